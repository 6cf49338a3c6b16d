"""Every recipe parses; every stage runs two steps on small shapes, learns, and resumes to the same bytes after a kill."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset

from transformers_unicode2 import UniCode2Config, UniCode2ForConditionalGeneration
from transformers_unicode2.images_unicode2 import decode_image

RECIPES = Path(__file__).parents[1] / "training_recipes"
STAGES = sorted(path for name in ("stage1", "stage1.5", "stage2") for path in RECIPES.glob(f"*/{name}.yaml"))


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory, tiny_checkpoint):
    """A checkpoint with few weights and a small pre-tokenized data set."""
    from transformers import AutoProcessor

    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    config = UniCode2Config.from_pretrained(tiny_checkpoint).to_dict()
    config["text_config"] |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "layer_types": None}
    config["text_config"] |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    UniCode2ForConditionalGeneration(UniCode2Config(**config)).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "codes": torch.randint(0, 8, (64,), generator=generator).tolist(),
            "caption": "a red circle",
            "dense_caption": "a small red circle at c4, on a white ground",
            "questions": ["what color is the circle?", "how many objects are there?"],
            "answers": ["red", "one"],
        }
        for _ in range(48)
    ]
    (folder / "tokens").mkdir()
    Dataset.from_list(rows).to_parquet(str(folder / "tokens" / "train-00000.parquet"))
    return folder


def run_stage(recipe, folder, output, *extra):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(RECIPES / "accelerate/cpu.yaml"),
    ]
    command += ["-m", "transformers_unicode2.training.sft", "--config", str(recipe), "--use_cpu", "true"]
    command += ["--model", str(folder / "model"), "--data", str(folder / "tokens"), "--output_dir", str(output)]
    command += ["--per_device_train_batch_size", "4", "--warmup_steps", "1", "--save_steps", "2", *extra]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return run


def test_codes_of_two_codebooks_do_not_mix(tiny_checkpoint, tmp_path, photo):
    """The same model goes on in a folder of codes; a model with another codebook is refused and changes nothing."""
    from transformers_unicode2.training import data

    (tmp_path / "data").mkdir()
    Dataset.from_dict({"image": [photo] * 2}).to_parquet(str(tmp_path / "data/train-00000.parquet"))
    arguments = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "tokens"), "--model"]
    for _ in range(2):
        data.main(data.make_parser().parse_args([*arguments, str(tiny_checkpoint)]))
    before = {path.name: path.read_bytes() for path in (tmp_path / "tokens").rglob("*") if path.is_file()}
    assert sorted(before) == ["train-00000.parquet", "train.json"]
    model = UniCode2ForConditionalGeneration.from_pretrained(tiny_checkpoint)
    model.get_quantizer().codebook.codes[0] += 1
    model.save_pretrained(tmp_path / "other")
    (tmp_path / "other/processor_config.json").write_bytes(
        (Path(tiny_checkpoint) / "processor_config.json").read_bytes()
    )
    with pytest.raises(ValueError, match="was begun with something else .quantizer was .* and is "):
        data.main(data.make_parser().parse_args([*arguments, str(tmp_path / "other")]))
    after = {path.name: path.read_bytes() for path in (tmp_path / "tokens").rglob("*") if path.is_file()}
    assert before == after


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: str(path.relative_to(RECIPES)))
def test_recipe_parses(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


@pytest.mark.parametrize("recipe", STAGES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_stage_runs_two_steps(recipe, tiny_run, tmp_path):
    run_stage(recipe, tiny_run, tmp_path / "out", "--max_steps", "2", "--dtype", "float32")
    before = UniCode2ForConditionalGeneration.from_pretrained(tiny_run / "model").state_dict()
    after = UniCode2ForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    frozen = [name for name in before if ".quantizer." in name]
    assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)
    for module in ("projector", "language_model"):
        assert any(not torch.equal(before[name], after[name]) for name in before if module in name), module


def test_killed_stage_resumes_to_the_same_bytes(tiny_run, tmp_path):
    import shutil

    recipe = RECIPES / "unicode2-tiny/stage2.yaml"
    run_stage(recipe, tiny_run, tmp_path / "whole", "--max_steps", "4")
    shutil.copytree(
        tmp_path / "whole/checkpoint-2", tmp_path / "killed/checkpoint-2"
    )  # as a kill after step 2 leaves it
    run_stage(recipe, tiny_run, tmp_path / "killed", "--max_steps", "4")
    name = "model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_stage_learns_what_its_data_say(tiny_run, tmp_path):
    from transformers import AutoProcessor

    recipe = RECIPES / "unicode2-tiny/stage2.yaml"
    run = run_stage(
        recipe, tiny_run, tmp_path / "out", "--max_steps", "60", "--learning_rate", "0.01", "--logging_steps", "10"
    )
    losses = [
        eval(line.split("\r")[-1])["text_loss"]
        for line in (run.stdout + run.stderr).splitlines()
        if "'text_loss'" in line
    ]
    assert float(losses[-1]) < 0.5 * float(losses[0]), losses
    model = UniCode2ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.generation_config.image_generation["max_plan_tokens"] == 64
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    prompt = processor.apply_chat_template([{"role": "user", "content": "a red circle"}], add_generation_prompt=True)
    inputs = processor(text=prompt, return_tensors="pt")
    output = model.generate(**inputs, generation_mode="interleaved", max_new_tokens=140, do_sample=False)
    plan, image = processor.split_images(output[0, inputs["input_ids"].shape[1] :])[:2]
    assert plan["text"] == "a small red circle at c4, on a white ground"
    assert image["type"] == "image"


def test_planned_image_is_an_answer_of_text_and_image(tiny_run):
    from datasets import load_dataset
    from transformers import AutoProcessor

    from transformers_unicode2.training.data import build_examples

    rows = load_dataset("parquet", data_files=str(tiny_run / "tokens/train-00000.parquet"), split="train")
    processor = AutoProcessor.from_pretrained(tiny_run / "model")
    example = build_examples(rows, {"planned_text_to_image": 1.0}, processor, 768)[0]
    learnt = [id_ for id_ in example["labels"] if id_ != -100]
    plan, image = processor.split_images(torch.tensor(learnt))
    assert plan["text"] == "a small red circle at c4, on a white ground"
    assert (image["visual_token_ids"] - 768).tolist() == rows[0]["codes"]
    asked = [id_ for id_, label in zip(example["input_ids"], example["labels"]) if label == -100]
    assert "a red circle" in processor.tokenizer.decode(asked) and "white" not in processor.tokenizer.decode(asked)


def test_text_tokens_weigh_as_the_recipe_says(tiny_run, tmp_path):
    from trl import SFTConfig

    from transformers_unicode2.training.sft import StageArguments, main

    logs = []
    for weight in (1.0, 3.0):
        output = tmp_path / str(weight)
        tasks = {"questions": 1.0, "text_to_image": 1.0}
        stage = StageArguments(str(tiny_run / "model"), str(tiny_run / "tokens"), tasks, text_weight=weight)
        options = {"max_steps": 1, "logging_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none"}
        options |= {
            "remove_unused_columns": False,
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "max_length": None,
        }
        main(stage, SFTConfig(str(output), per_device_train_batch_size=16, save_steps=1, **options))
        logs.append(json.loads((output / "checkpoint-1" / "trainer_state.json").read_text())["log_history"][0])
    even, heavy = logs
    assert even["text_loss"] == heavy["text_loss"]
    share = (even["loss"] - even["visual_loss"]) / (
        even["text_loss"] - even["visual_loss"]
    )  # of the targets that are text
    assert 0 < share < 0.5
    assert heavy["loss"] == pytest.approx(even["loss"] + 2 * share * even["text_loss"], rel=1e-3)


def test_paper_settings_are_those_of_table_6():
    stages = {path.stem: yaml.safe_load(path.read_text()) for path in (RECIPES / "unicode2-7b").glob("stage*.yaml")}
    assert {name: recipe["learning_rate"] for name, recipe in stages.items()} == {
        "stage1": 1e-3,
        "stage1.5": 1e-5,
        "stage2": 1e-5,
    }
    for recipe in stages.values():
        assert (recipe["adam_beta1"], recipe["adam_beta2"], recipe["weight_decay"]) == (0.9, 0.95, 0.0)
        assert recipe["lr_scheduler_type"] == "cosine" and recipe["warmup_steps"] == 0.03 and recipe["bf16"]
    zero3 = yaml.safe_load((RECIPES / "accelerate/zero3.yaml").read_text())
    assert zero3["num_processes"] * stages["stage1"]["per_device_train_batch_size"] == 512
    assert zero3["deepspeed_config"]["zero_stage"] == 3


def test_unknown_task_and_module_are_refused(tiny_run):
    from transformers_unicode2.training.data import build_examples
    from transformers_unicode2.training.sft import freeze_all_but

    with pytest.raises(ValueError, match="Unknown tasks painting; the tasks are caption"):
        build_examples(None, {"painting": 1.0}, None, 0)
    model = UniCode2ForConditionalGeneration.from_pretrained(tiny_run / "model")
    with pytest.raises(ValueError, match="lies in `encoder2`"):
        freeze_all_but(model, ["encoder2"])


def test_contrastive_loss_is_lowest_for_matching_pairs():
    from transformers_unicode2.training.mapper import contrastive_loss

    torch.manual_seed(0)
    text = torch.randn(8, 16)
    assert contrastive_loss(text, text, 0.07) < 0.05 < contrastive_loss(text.roll(1, 0), text, 0.07)
    twins = torch.cat([text[:4], text[:4]])
    assert contrastive_loss(twins, twins, 0.07) < 0.05  # equal captions are no negatives


def test_mapper_starts_from_image_prompts_and_is_drawn_to_them():
    from transformers_unicode2 import UniCode2ConditionMapper
    from transformers_unicode2.training.mapper import start_from

    sizes = {"visual_dim": 8, "hidden_dim": 12, "output_dim": 8, "pooled_dim": 4, "num_visual_tokens": 4}
    sizes["num_attention_heads"] = 2
    adapter = UniCode2ConditionMapper(**sizes, output_scale=0.6)
    mapper = UniCode2ConditionMapper(**sizes, pooled_scale=0.01)
    features = torch.randn(2, 4, 8)
    start_from(mapper, adapter)
    assert torch.equal(mapper(features).prompt_embeds, adapter(features).prompt_embeds)
    assert mapper(features).pooled_prompt_embeds.abs().max() < 0.1
    deeper = UniCode2ConditionMapper(**sizes, num_layers=1)
    start_from(deeper, adapter)
    assert torch.equal(deeper(features).prompt_embeds, adapter(features).prompt_embeds)
    start_from(deeper, adapter, whole=True)
    assert torch.equal(deeper(features).pooled_prompt_embeds, adapter(features).pooled_prompt_embeds)
    for other, message in (
        ({"hidden_dim": 16}, "`hidden_dim` was 12 and is 16"),
        ({"num_layers": 0}, "`num_layers` was 1 and is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            start_from(
                UniCode2ConditionMapper(**{**sizes, "num_layers": 1, **other}),
                deeper,
                whole=True,
            )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"start": "x", "image_prompts": "y"}, "give `start` or `image_prompts`, not both"),
        ({"encoder": "x", "decoder": "y"}, "`encoder` makes the patch features for `image_prompts`"),
        ({"start": "x"}, r"from `start` \(x\) by regression only; got `contrastive_weight` 1, `flow"),
        ({"contrastive_weight": 0.0, "flow_matching_weight": 0.0}, r"learns from `start` \(None\)"),
        (
            {"start": "x", "contrastive_weight": 0.0, "flow_matching_weight": 0.0},
            "nothing to learn: .*`regression_weight` 0",
        ),
        ({"decoder": "x", "regression_weight": -1.0}, "`regression_weight` -1; none may be negative"),
        ({"decoder": "y", "features_share": 0.5}, "`features_share` is 0.5; .* 0 without `start`"),
        ({"decoder": "y", "start": "x", "features_share": 1.0}, r"`features_share` is 1; it must be in \[0, 1\)"),
        ({"decoder": "y", "code_noise": 1.5}, r"`code_noise` is 1.5; it must be in \[0, 1\]"),
    ],
)
def test_mapper_refuses_losses_without_what_they_need(options, message):
    from transformers_unicode2.training.mapper import MapperArguments, check_arguments

    with pytest.raises(ValueError, match=message):
        check_arguments(MapperArguments("data", "tokens", "model", **options))


def test_near_codes_take_the_places_of_a_share_of_codes():
    """Up to the share asked for, another one in each image, always by one of the nearest rows and never by the code itself."""
    from transformers_unicode2.training.mapper import NearCodes

    torch.manual_seed(0)
    line = torch.arange(3000.0)[:, None] * torch.tensor([[1.0, 0.0]])  # the nearest rows are the next numbers
    near_codes = NearCodes(line, num_nearest=4)
    codes = torch.randint(10, 2990, (400, 64))
    moved = (near_codes(codes, 0.6) - codes).abs()
    assert moved.max() == 2 and torch.equal(near_codes(codes, 0.0), codes)
    shares = (moved > 0).float().mean(1)
    assert shares.mean().item() == pytest.approx(0.3, abs=0.03) and shares.min() < 0.03 and 0.5 < shares.max() < 0.85
    assert ((near_codes(codes, 1.0) - codes).abs() == 1).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert NearCodes(line[:3]).nearest.shape == (3, 2)


def test_features_take_the_places_of_codes():
    """The distance of a mapper to itself on the same features is 0, and that of images that come as codes is not."""
    from transformers_unicode2 import UniCode2ConditionMapper
    from transformers_unicode2.training.mapper import MapperArguments, MapperWithLosses

    torch.manual_seed(0)
    mapper = UniCode2ConditionMapper(visual_dim=8, hidden_dim=12, output_dim=8, pooled_dim=4, num_visual_tokens=4)
    options = {"start": "x", "contrastive_weight": 0.0, "flow_matching_weight": 0.0, "regression_weight": 2.0}
    model = MapperWithLosses(mapper, None, torch.randn(16, 8), MapperArguments("", "", "", **options))
    codes, features = torch.randint(16, (4, 4)), torch.randn(4, 4, 8)
    targets = {name: value.detach() for name, value in mapper(features).items()}
    whole, half, none = (model(codes, features=features[:n], **targets) for n in (4, 2, 0))
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        assert whole[name] == 0 < half[name] < none[name]
    assert none["loss"].item() == pytest.approx(2 * (none["prompt_embeds"] + none["pooled_prompt_embeds"]).item())


def test_mapper_learns_alone_to_make_of_codes_what_it_makes_of_features(tiny_checkpoint, tmp_path):
    """On images that it does not learn from; without a decoder; a run killed within an epoch goes on to the same bytes."""
    import shutil

    from transformers import AutoImageProcessor, TrainingArguments

    from transformers_unicode2 import UniCode2ConditionMapper
    from transformers_unicode2.evaluation import dataset
    from transformers_unicode2.training import data
    from transformers_unicode2.training.mapper import MapperArguments, main

    for split in ("train", "test"):
        arguments = ["--output", str(tmp_path / "data"), "--num-scenes", "48", "--split", split]
        dataset.main(dataset.make_parser().parse_args(arguments))
    arguments = [
        "--data",
        str(tmp_path / "data"),
        "--model",
        str(tiny_checkpoint),
        "--output",
        str(tmp_path / "tokens"),
    ]
    data.main(data.make_parser().parse_args(arguments))
    tiny = UniCode2ConditionMapper.from_pretrained(tiny_checkpoint, subfolder="condition_mapper").config
    torch.manual_seed(0)
    names = ("visual_dim", "output_dim", "pooled_dim", "num_visual_tokens")
    start = UniCode2ConditionMapper(
        **{name: tiny[name] for name in names}, hidden_dim=64, num_layers=1, num_attention_heads=3
    )
    start.save_pretrained(tmp_path / "start")
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    model = UniCode2ForConditionalGeneration.from_pretrained(tiny_checkpoint)
    model.model.visual_embeddings.weight.data *= (
        0.5  # a C2 that has gone far from C1, which the mapper must make up for
    )
    model.save_pretrained(tmp_path / "model")
    options = {"num_layers": 2}

    def learn(output):
        args = MapperArguments(
            *(str(tmp_path / "data"), str(tmp_path / "tokens"), str(tmp_path / "model")),
            **{"start": str(tmp_path / "start"), "mapper": options, "features_share": 0.125, "muon": True},
            code_noise=0.2,
            **{"contrastive_weight": 0.0, "flow_matching_weight": 0.0, "regression_weight": 1.0},
        )
        options_ = {"max_steps": 24, "save_steps": 10, "learning_rate": 3e-3, "warmup_steps": 4, "adam_beta2": 0.98}
        options_ |= {"use_cpu": True, "bf16": True, "report_to": "none", "remove_unused_columns": False}
        main(args, TrainingArguments(str(output), per_device_train_batch_size=16, **options_))
        return (output / "diffusion_pytorch_model.safetensors").read_bytes()

    whole = learn(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole/checkpoint-10", tmp_path / "killed/checkpoint-10")
    kept = (tmp_path / "killed/checkpoint-10/trainer_state.json").stat().st_mtime_ns
    assert learn(tmp_path / "killed") == whole
    assert (tmp_path / "killed/checkpoint-10/trainer_state.json").stat().st_mtime_ns == kept  # it was not made anew
    quantizer, offset = model.get_quantizer(), model.config.visual_token_offset
    images = [decode_image(row["image"]["bytes"]) for row in data.load_images(str(tmp_path / "data"), "test")]
    pixels = AutoImageProcessor.from_pretrained(tiny_checkpoint)(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = quantizer.vision_model(pixels).last_hidden_state
        embeds = model.model.visual_embeddings.weight[model.get_image_tokens(pixels) - offset].float()
        wanted = start(features)
        learnt = UniCode2ConditionMapper.from_pretrained(tmp_path / "whole")
        for name in ("prompt_embeds", "pooled_prompt_embeds"):
            before, after, kept = (
                float((mapper(inputs)[name] - wanted[name]).square().mean() / wanted[name].var())
                for mapper, inputs in ((start, embeds), (learnt, embeds), (learnt, features))
            )
            assert after < 0.9 * before and kept < 0.7 * before, name


def test_flux_goes_on_alone_from_coarse_image_prompts(tiny_checkpoint, tmp_path, monkeypatch):
    """A FLUX that has forgotten part of its output layer paints images anew that it does not learn from; killed within an epoch, it goes on to the same bytes."""
    import shutil

    from diffusers import FluxPipeline, FluxTransformer2DModel
    from transformers import TrainingArguments

    from transformers_unicode2 import UniCode2ConditionMapper
    from transformers_unicode2.evaluation import dataset
    from transformers_unicode2.training import data
    from transformers_unicode2.training import mapper as losses_of
    from transformers_unicode2.training.mapper import encode_latents, flow_matching_loss

    monkeypatch.syspath_prepend(RECIPES / "unicode2-tiny")
    from tune_flux import TuneFluxArguments, main

    shifts = []
    spy = lambda *args, shift: shifts.append(shift) or flow_matching_loss(*args, shift=shift)  # noqa: E731
    monkeypatch.setattr(losses_of, "flow_matching_loss", spy)

    for split in ("train", "test"):
        arguments = ["--output", str(tmp_path / "data"), "--num-scenes", "48", "--split", split]
        dataset.main(dataset.make_parser().parse_args(arguments))
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, model)
    flux = FluxTransformer2DModel.from_pretrained(model, subfolder="transformer")
    flux.proj_out.weight.data *= 0.5
    flux.save_pretrained(model / "transformer")

    def learn(output):
        options = {"max_steps": 12, "save_steps": 4, "learning_rate": 1e-3, "warmup_steps": 2, "adam_beta2": 0.98}
        options |= {"use_cpu": True, "bf16": True, "report_to": "none", "remove_unused_columns": False}
        main(
            TuneFluxArguments(str(tmp_path / "data"), str(model), table_size=256, shift=3.0),
            TrainingArguments(str(output), per_device_train_batch_size=8, **options),
        )
        return (output / "transformer/diffusion_pytorch_model.safetensors").read_bytes()

    whole = learn(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole/checkpoint-4", tmp_path / "killed/checkpoint-4")
    kept = (tmp_path / "killed/checkpoint-4/trainer_state.json").stat().st_mtime_ns
    assert learn(tmp_path / "killed") == whole
    assert (tmp_path / "killed/checkpoint-4/trainer_state.json").stat().st_mtime_ns == kept  # it was not made anew
    without_texts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    learnt = FluxPipeline.from_pretrained(tmp_path / "whole", **without_texts)
    was = FluxPipeline.from_pretrained(model, **without_texts).scheduler.config
    assert dict(learnt.scheduler.config) == dict(was) | {"shift": 3.0}
    assert set(shifts) == {3.0}
    source = UniCode2ForConditionalGeneration.from_pretrained(tiny_checkpoint)
    pixels = data.pixel_collator(list(data.load_images(str(tmp_path / "data"), "test")))["pixel_values"]
    with torch.no_grad():
        codes = source.get_image_tokens(pixels) - source.config.visual_token_offset
        embeds = source.model.visual_embeddings.weight[codes].float()
        condition = UniCode2ConditionMapper.from_pretrained(model, subfolder="condition_mapper").float()(embeds)
        latents, losses = encode_latents(learnt.vae, pixels), []
        for transformer in (flux, learnt.transformer):
            torch.manual_seed(0)
            losses.append(flow_matching_loss(transformer.float(), latents, *condition.values(), shift=3.0).item())
    assert losses[1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"coarse_share": 1.5}, r"`coarse_share` is 1.5; it must be in \[0, 1\]"),
        ({"drop_share": -0.1}, r"`drop_share` is -0.1; it must be in \[0, 1\]"),
        ({"table_size": 15}, "`table_size` is 15; it must be 16 at least"),
        ({"shift": 0.0}, "`shift` is 0; it must be above 0"),
    ],
)
def test_flux_alone_says_which_number_is_wrong(wrong, message, monkeypatch):
    monkeypatch.syspath_prepend(RECIPES / "unicode2-tiny")
    from tune_flux import TuneFluxArguments, main

    with pytest.raises(ValueError, match=message):
        main(TuneFluxArguments("nowhere", "nowhere", **wrong), None)


def test_flux_from_nothing_says_which_shift_is_wrong(monkeypatch):
    monkeypatch.syspath_prepend(RECIPES / "unicode2-tiny")
    from train_flux import FluxArguments, main

    with pytest.raises(ValueError, match="`shift` is -1; it must be above 0"):
        main(FluxArguments("nowhere", "nowhere", "nowhere", "nowhere", shift=-1.0), None)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_coarse_features_are_rows_of_the_table(share, tmp_path, monkeypatch):
    """The first images are rounded, each patch to the nearest of half a table; the others keep every bit."""
    from transformers_unicode2.evaluation import dataset
    from transformers_unicode2.training.data import load_images

    monkeypatch.syspath_prepend(RECIPES / "unicode2-tiny")
    from train_flux import CoarseFeatures

    dataset.main(dataset.make_parser().parse_args(["--output", str(tmp_path), "--num-scenes", "8"]))

    def encode(pixel_values):  # (1, 3, 64, 64) to the means of 64 patches
        return torch.nn.functional.avg_pool2d(pixel_values, 8).flatten(2).transpose(1, 2)

    coarsen = CoarseFeatures(encode, load_images(str(tmp_path)), 64)
    assert coarsen.table.shape == (64, 3)
    features = torch.rand(4, 64, 3) * 2 - 1
    coarse = coarsen(features, share)
    num_coarse = round(4 * share)
    assert torch.equal(coarse[num_coarse:], features[num_coarse:])
    assert (coarse[:num_coarse, :, None] == coarsen.table).all(-1).any(-1).all()
    distances = torch.cdist(features[:num_coarse], coarsen.table)
    kept = (coarsen.table == coarse[:num_coarse, :, None]).all(-1)
    rank = (distances < distances.where(kept, torch.inf).amin(-1, keepdim=True)).sum(-1)
    assert (rank <= 32).all()  # at most the other half of the table is nearer


def test_prompts_are_dropped_of_whole_images(monkeypatch):
    monkeypatch.syspath_prepend(RECIPES / "unicode2-tiny")
    from train_flux import drop_prompts

    torch.manual_seed(0)
    prompts = torch.ones(400, 3, 5, dtype=torch.bfloat16), torch.ones(400, 2)
    for share in (0.0, 0.25, 1.0):
        kept, pooled = drop_prompts(share, *prompts)
        dropped = (pooled == 0).all(1)
        assert torch.equal(dropped, (kept == 0).all(2).all(1)) and torch.equal(~dropped, (kept == 1).all(2).all(1))
        assert kept.dtype == torch.bfloat16 and pooled.dtype == torch.float32
        assert dropped.float().mean().item() == pytest.approx(share, abs=0.08 * (0 < share < 1))
    with pytest.raises(ValueError, match=r"`drop_share` is nan; it must be in \[0, 1\]"):
        drop_prompts(float("nan"), *prompts)


def test_shift_moves_times_towards_noise():
    """`x_t` of an image of zeros is `t noise`, and a transformer that gives it back is off by `(1 - t) noise`, by less where t is more."""
    from types import SimpleNamespace

    from transformers_unicode2.training.mapper import flow_matching_loss

    def echo(hidden_states, timestep, **_):
        times.append(timestep)
        return SimpleNamespace(sample=hidden_states)

    losses, times = [], []
    for shift in (1.0, 3.0):
        torch.manual_seed(0)
        inputs = torch.zeros(64, 4, 4, 4), torch.zeros(64, 2, 8), torch.zeros(64, 8)
        losses.append(flow_matching_loss(echo, *inputs, shift=shift).item())
    torch.testing.assert_close(times[1], 3 * times[0] / (1 + 2 * times[0]))
    assert losses[1] < losses[0]


@pytest.mark.slow
def test_every_stage_of_the_tiny_recipe_runs_in_order(tmp_path):
    """Two steps of each command of run.sh, on 96 drawn scenes, up to an assembled repository that draws."""
    import os

    text = (RECIPES / "unicode2-tiny/run.sh").read_text()
    for name in ("siglip", "stage1", "stage1.5", "stage2", "vae", "flux", "mapper-flux", "mapper-codes", "flux-coarse"):
        recipe = yaml.safe_load((RECIPES / f"unicode2-tiny/{name}.yaml").read_text())
        recipe |= {"max_steps": 2, "per_device_train_batch_size": 4, "warmup_steps": 1, "save_steps": 2}
        recipe |= {"features_share": 0.25} if "features_share" in recipe else {}
        recipe |= {"table_size": 256} if "table_size" in recipe else {}
        target = tmp_path / f"training_recipes/unicode2-tiny/{name}.yaml"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(yaml.safe_dump(recipe))
    for path in [
        *RECIPES.glob("unicode2-tiny/*.py"),
        RECIPES / "unicode2-tiny/llm.yaml",
        RECIPES / "accelerate/cpu.yaml",
    ]:
        target = tmp_path / "training_recipes" / path.relative_to(RECIPES)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    replacements = {
        "--num-scenes 50000 --num-emoji 40000": "--num-scenes 96",
        "--num-scenes 60000 --num-emoji 60000": "--num-scenes 96",
        "--num-scenes 20000 --num-emoji 120000": "--num-scenes 96",
        "--max_steps 3900 --warmup_steps 50": "--max_steps 2 --warmup_steps 1",
        ' --emoji-dir "$emoji"': "",
        "--codebook-size 8192 --num-cells 64": "--codebook-size 128 --num-cells 4",
        "--num-images 20000": "--num-images 96",
        "unicode2 evaluate scenes": "unicode2 evaluate scenes --num-scenes 6 --steps 2 --utilization-images 100",
        'echo "--max_steps $1"': 'echo "--max_steps 2"',
    }
    for old, new in replacements.items():
        assert old in text, old
        text = text.replace(old, new)
    (tmp_path / "run.sh").write_text(text)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def run(*arguments, model="unicode2-tiny"):
        command = ["bash", "run.sh", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "redrawing | new scenes" in done.stdout
        folder = tmp_path / "outputs/unicode2-tiny" / model
        index = json.loads((folder / "model_index.json").read_text())
        assert (index["num_candidates"], index["true_cfg_scale"]) == (4, 2.0)
        defaults = json.loads((folder / "generation_config.json").read_text())["image_generation"]
        assert defaults["max_plan_tokens"] == 64 and defaults["guidance_scale"] == 2.0

    run()
    run()  # all stages are done
    (tmp_path / "outputs/unicode2-tiny").rename(tmp_path / "first")
    run("", "first/unicode2-tiny")  # its parts go on learning
    run("", "first/unicode2-tiny", "language", model="unicode2-tiny-language")  # its language model alone
    run("", "first/unicode2-tiny", "mapper", model="unicode2-tiny-mapper")
    weights = "diffusion_pytorch_model.safetensors"
    parts = ["model.safetensors", f"vae/{weights}", f"condition_mapper/{weights}", f"transformer/{weights}"]
    run("", "outputs/unicode2-tiny/unicode2-tiny-mapper", "decoder", model="unicode2-tiny-decoder")
    start, end = (tmp_path / f"outputs/unicode2-tiny/unicode2-tiny-{part}" for part in ("mapper", "decoder"))
    same = {part: (start / part).read_bytes() == (end / part).read_bytes() for part in parts}
    assert same == dict.fromkeys(parts, True) | {parts[-1]: False}
    assert json.loads((end / "scheduler/scheduler_config.json").read_text())["shift"] == 3.0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["", "", "language"], "needs START"),
        (["", "", "mapper"], "mapper needs START"),
        (["", "", "decoder"], "decoder needs START"),
        (["", "/"], "START / has no config.json"),
        (["", "", "all?"], "is all?;"),
    ],
)
def test_recipe_refuses_arguments_before_any_work(arguments, message, tmp_path):
    command = ["bash", str(RECIPES / "unicode2-tiny/run.sh"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and not list(tmp_path.iterdir())
