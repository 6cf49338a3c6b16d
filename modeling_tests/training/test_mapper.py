import shutil

import pytest
import torch

from transformers_unicode2 import UniCode2ConditionMapper, UniCode2ForConditionalGeneration
from transformers_unicode2.images_unicode2 import decode_image
from transformers_unicode2.training.mapper import MapperArguments, check_arguments, main, make_mapper, start_from
from transformers_unicode2.training.mapper_losses import (
    MapperWithLosses,
    NearCodes,
    compare_texts,
    contrastive_loss,
    find_own,
)

PARTS = {"model": "m", "datasets": [{"path": "tokens"}], "images": ["data"]}


def test_contrastive_loss_is_lowest_for_matching_pairs():
    torch.manual_seed(0)
    text = torch.randn(8, 16)
    assert contrastive_loss(text, text, 0.07) < 0.05 < contrastive_loss(text.roll(1, 0), text, 0.07)
    twins = torch.cat([text[:4], text[:4]])
    # Equal captions are no negatives
    assert contrastive_loss(twins, twins, 0.07) < 0.05
    assert find_own(text.roll(1, 0), text).sum() == 0 and find_own(twins, twins).all()
    # Those of another batch are
    more = contrastive_loss(text[:4], text, 0.07, torch.arange(4))
    assert contrastive_loss(text[:4], text[:4], 0.07) < more and contrastive_loss(
        text[4:], text, 0.07, torch.arange(4, 8)
    ) == pytest.approx(contrastive_loss(text, text, 0.07).item() * 2 - more.item(), rel=1e-4)


def test_equal_captions_are_told_in_mixed_precision():
    """Products in bfloat16 would give near captions the same cosine, and two equal ones less than 1."""
    generator = torch.Generator().manual_seed(0)
    text = torch.ones(64, 256) + 0.04 * torch.randn(64, 256, generator=generator)
    text[63] = text[0]
    with torch.autocast("cpu", torch.bfloat16):
        cosines, twins, _ = compare_texts(text, text)
        right = find_own(text, text)
    assert cosines.dtype == torch.float32 and twins.nonzero().tolist() == [[0, 63], [63, 0]] and right.all()


def test_mapper_starts_from_image_prompts():
    sizes = {"visual_dim": 8, "hidden_dim": 12, "output_dim": 8, "pooled_dim": 4, "num_visual_tokens": 4}
    sizes["num_attention_heads"] = 2
    adapter = UniCode2ConditionMapper(**sizes, output_scale=0.6)
    features = torch.randn(2, 4, 8)
    for num_layers in (0, 1):
        mapper = UniCode2ConditionMapper(**sizes, pooled_scale=0.01, num_layers=num_layers)
        start_from(mapper, adapter)
        assert torch.equal(mapper(features).prompt_embeds, adapter(features).prompt_embeds)
        assert mapper(features).pooled_prompt_embeds.abs().max() < 0.1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"encoder": "x", "decoder": "y"}, "`encoder` makes the patch features for `image_prompts`"),
        ({"image_prompts": "x"}, "Without a `decoder` there is regression only; got `contrastive_weight` 1, `flow"),
        ({"contrastive_weight": 0.0, "flow_matching_weight": 0.0}, "nothing to learn: .*`regression_weight` 0"),
        (
            {"contrastive_weight": 0.0, "flow_matching_weight": 0.0, "regression_weight": 1.0},
            "regression needs `image_prompts`",
        ),
        ({"decoder": "x", "regression_weight": -1.0}, "`regression_weight` -1; each must be at least 0"),
        ({"decoder": "y", "code_noise": 1.5}, r"`code_noise` is 1.5; it must be in \[0, 1\]"),
    ],
)
def test_mapper_refuses_losses_without_what_they_need(options, message):
    with pytest.raises(ValueError, match=message):
        check_arguments(MapperArguments(**{**PARTS, **options}))


def test_near_codes_take_the_places_of_a_share_of_codes():
    """Up to the share asked for, another one in each image; always by one of the nearest, never by the code itself."""
    torch.manual_seed(0)
    # The nearest rows are the next numbers
    line = torch.arange(3000.0)[:, None] * torch.tensor([[1.0, 0.0]])
    near_codes = NearCodes(line, torch.arange(0, 3001, 100), num_nearest=4)
    codes = torch.randint(10, 2990, (400, 64))
    moved = (near_codes(codes, 0.6) - codes).abs()
    assert moved.max() == 2 and torch.equal(near_codes(codes, 0.0), codes)
    shares = (moved > 0).float().mean(1)
    assert shares.mean().item() == pytest.approx(0.3, abs=0.03) and shares.min() < 0.03 and 0.5 < shares.max() < 0.85
    assert ((near_codes(codes, 1.0) - codes).abs() == 1).float().mean().item() == pytest.approx(0.25, abs=0.03)
    few = NearCodes(line[:3], torch.tensor([0, 3]))
    assert set(few(torch.zeros(1, 200, dtype=torch.long), 1.0).flatten().tolist()) <= {0, 1, 2}
    assert few.counts.tolist() == [2, 2, 2] and NearCodes(line[:1], torch.tensor([0, 1])).nearest.tolist() == [[0] * 16]


def test_regression_is_the_relative_distance_to_the_image_prompts():
    torch.manual_seed(0)
    mapper = UniCode2ConditionMapper(visual_dim=8, hidden_dim=12, output_dim=8, pooled_dim=4, num_visual_tokens=4)
    options = {"contrastive_weight": 0.0, "flow_matching_weight": 0.0, "regression_weight": 2.0}
    embeddings, codes = torch.randn(16, 8), torch.randint(16, (4, 4))
    model = MapperWithLosses(mapper, None, embeddings, MapperArguments(**PARTS, image_prompts="x", **options))
    own = mapper(embeddings[codes]).prompt_embeds.detach()
    assert model(codes, prompt_embeds=own)["loss"] == 0
    assert model(codes, prompt_embeds=own + own.std())["loss"].item() == pytest.approx(2, rel=1e-4)


def test_a_mapper_that_continues_begins_as_it_was(tiny_checkpoint, tmp_path):
    """Also with another layer, which begins as the identity; other sizes are refused."""
    sizes = {"visual_dim": 24, "output_dim": 16, "pooled_dim": 8, "num_visual_tokens": 4, "num_attention_heads": 2}
    before = UniCode2ConditionMapper(**sizes, hidden_dim=16, num_layers=1, output_scale=3.0)
    before.save_pretrained(tmp_path)
    embeds, places = torch.randn(2, 4, 24), {**PARTS, "start": str(tmp_path)}
    for fields in ({}, {"num_layers": 2}):
        after = make_mapper(MapperArguments(**places, mapper=fields), {}, None).eval()
        for one, other in zip(before.eval()(embeds).values(), after(embeds).values()):
            torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match=r"`start` has .* which these fields of `mapper` leave out"):
        make_mapper(MapperArguments(**places, mapper={"hidden_dim": 32}), {}, None)


def test_what_a_redux_does_not_pool_can_learn(tmp_path):
    """Zeros have no direction: the gradient of a cosine would be beyond all bounds."""
    sizes = {"visual_dim": 8, "hidden_dim": 12, "output_dim": 8, "pooled_dim": 4, "num_visual_tokens": 4}
    redux = UniCode2ConditionMapper(**sizes, output_norm=False)
    for parameter in redux.pool.parameters():
        torch.nn.init.zeros_(parameter)
    redux.save_pretrained(tmp_path)
    args = MapperArguments(**PARTS, start=str(tmp_path), flow_matching_weight=0.0, mapper={"output_norm": False})
    mapper = make_mapper(args, {}, None)
    pooled = mapper(torch.randn(4, 4, 8)).pooled_prompt_embeds
    contrastive_loss(pooled, torch.randn(4, 4), 0.07).backward()
    assert 0 < mapper.pool.weight.grad.norm() < 1e3
    assert torch.equal(mapper.down.weight, redux.down.weight)


def test_mapper_learns_image_prompts_without_a_decoder(tiny_checkpoint, tmp_path):
    """On images that it does not learn from; a run killed within an epoch resumes to the same bytes."""
    from transformers import AutoImageProcessor, TrainingArguments

    from transformers_unicode2.scenes import write
    from transformers_unicode2.training import data, tokenize

    for split in ("train", "test"):
        words = ["--output", str(tmp_path / "data"), "--num-scenes", "48", "--split", split]
        write.main(write.make_parser().parse_args(words))
    words = ["--data", str(tmp_path / "data"), "--model", str(tiny_checkpoint), "--output", str(tmp_path / "tokens")]
    tokenize.main(tokenize.make_parser().parse_args(words))
    tiny = UniCode2ConditionMapper.from_pretrained(tiny_checkpoint, subfolder="condition_mapper").config
    torch.manual_seed(0)
    sizes = {name: tiny[name] for name in ("visual_dim", "output_dim", "pooled_dim", "num_visual_tokens")}
    sizes |= {"hidden_dim": 64, "num_attention_heads": 3}
    teacher = UniCode2ConditionMapper(**sizes)
    teacher.save_pretrained(tmp_path / "teacher")
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    model = UniCode2ForConditionalGeneration.from_pretrained(tiny_checkpoint)
    # A C2 that has gone far from C1, which the mapper must make up for
    model.model.visual_embeddings.weight.data *= 0.5
    model.save_pretrained(tmp_path / "model")

    def learn(output):
        losses = {"contrastive_weight": 0.0, "flow_matching_weight": 0.0, "regression_weight": 1.0, "code_noise": 0.2}
        folders = {"model": str(tmp_path / "model"), "datasets": [{"path": str(tmp_path / "tokens")}]}
        folders |= {"images": [str(tmp_path / "data")], "cache_dir": str(tmp_path / "cache")}
        teaching = {"image_prompts": str(tmp_path / "teacher"), "mapper": {**sizes, "num_layers": 1}, "muon": True}
        steps = {"max_steps": 16, "save_steps": 5, "learning_rate": 3e-3, "warmup_steps": 2, "adam_beta2": 0.98}
        steps |= {"use_cpu": True, "bf16": True, "report_to": "none", "per_device_train_batch_size": 8}
        main(MapperArguments(**folders, **teaching, **losses), TrainingArguments(str(output), **steps))
        return (output / "diffusion_pytorch_model.safetensors").read_bytes()

    whole = learn(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole/checkpoint-5", tmp_path / "killed/checkpoint-5")
    kept = (tmp_path / "killed/checkpoint-5/trainer_state.json").stat().st_mtime_ns
    assert learn(tmp_path / "killed") == whole
    # It was not made anew
    assert (tmp_path / "killed/checkpoint-5/trainer_state.json").stat().st_mtime_ns == kept
    quantizer, offset = model.get_quantizer(), model.config.visual_token_offset
    images = [decode_image(row["image"]["bytes"]) for row in data.load_images(str(tmp_path / "data"), "test")]
    pixels = AutoImageProcessor.from_pretrained(tiny_checkpoint)(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = teacher(quantizer.vision_model(pixels).last_hidden_state).prompt_embeds
        embeds = model.model.visual_embeddings.weight[model.get_image_tokens(pixels) - offset].float()
        learnt = UniCode2ConditionMapper.from_pretrained(tmp_path / "whole")
        before, after = ((mapper(embeds).prompt_embeds - wanted).square().mean() for mapper in (teacher, learnt))
    assert after < 0.9 * before
