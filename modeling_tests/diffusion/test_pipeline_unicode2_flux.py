import datasets
import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline

from transformers_unicode2 import UniCode2ConditionMapper, UniCode2FluxPipeline


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    pipe = UniCode2FluxPipeline.from_pretrained(str(tiny_checkpoint))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, seed=0, **kwargs):
    kwargs = {"num_inference_steps": 2, "output_type": "pt", "generator": torch.Generator().manual_seed(seed), **kwargs}
    return pipe(**kwargs)


def test_same_generator_gives_the_same_bits_and_leaves_the_global_one_alone(pipe):
    state = torch.random.get_rng_state()
    first, second, other = (
        draw(pipe, prompt="a red circle"),
        draw(pipe, prompt="a red circle"),
        draw(pipe, 1, prompt="a red circle"),
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first.images, second.images)
    assert not torch.equal(first.visual_token_ids, other.visual_token_ids)


def test_painting_written_tokens_equals_drawing_the_prompt(pipe):
    drawn = pipe.generate_visual_tokens("a blue star", torch.Generator().manual_seed(3))
    image = pipe(
        visual_token_ids=drawn,
        num_inference_steps=2,
        true_cfg_scale=1.0,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images
    conditioning = dict(zip(("prompt_embeds", "pooled_prompt_embeds"), pipe.encode_visual_tokens(drawn)))
    plain = FluxPipeline.__call__(
        pipe,
        **conditioning,
        height=64,
        width=64,
        num_inference_steps=2,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert torch.equal(image, plain)


def test_batches_and_several_images_per_prompt(pipe):
    output = draw(pipe, prompt=["a red circle", "two stars"], num_images_per_prompt=2)
    assert output.images.shape == (4, 3, 64, 64)
    assert output.visual_token_ids.shape == (4, 64)


def test_score_is_the_log_likelihood_of_the_prompt_as_a_caption(tiny_checkpoint):
    from transformers_unicode2.training.chats import build_examples

    pipe = UniCode2FluxPipeline.from_pretrained(str(tiny_checkpoint))
    model = pipe.vision_language_encoder.float()
    offset = model.config.visual_token_offset
    prompts = ["a red circle", "three small green hearts and a blue ring on a white ground", "a heart"]
    tokens = pipe.generate_visual_tokens(prompts, torch.Generator().manual_seed(0), num_candidates=1)
    question = {
        "role": "user",
        "content": [{"type": "image", "text": None}, {"type": "text", "text": "describe the image."}],
    }
    answers = [{"role": "assistant", "content": [{"type": "text", "text": text}]} for text in prompts]
    rows = datasets.Dataset.from_list(
        [
            {"messages": [question, answer], "codes": [codes]}
            for answer, codes in zip(answers, (tokens - offset).tolist())
        ]
    )
    scores = pipe.score_visual_tokens(prompts, tokens)
    alone = torch.cat([pipe.score_visual_tokens(text, row[None]) for text, row in zip(prompts, tokens)])
    wrong = pipe.score_visual_tokens(prompts[::-1], tokens)
    expected = []
    for row in build_examples(rows, pipe.processor, offset):
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            loss = model(torch.tensor([row["input_ids"]]), labels=labels).text_loss
        expected.append(-loss * (labels != -100).sum())
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(scores, alone, rtol=1e-3, atol=1e-2)
    assert scores[0] > wrong[2] and scores[2] > wrong[0]


def test_scores_in_parts_equal_those_at_once(pipe, monkeypatch):
    prompts = ["a red circle", "two green hearts on a grey ground", "<|vision_start|>a heart"]
    tokens = pipe.generate_visual_tokens(prompts, torch.Generator().manual_seed(0), num_candidates=1)
    at_once = pipe.score_visual_tokens(prompts, tokens)
    assert at_once.isfinite().all()
    monkeypatch.setattr("transformers_unicode2.diffusion.prior_unicode2.MAX_SCORES", 1)
    torch.testing.assert_close(pipe.score_visual_tokens(prompts, tokens), at_once, rtol=2e-2, atol=0.1)  # bfloat16


def test_the_candidate_that_reads_best_is_kept(pipe):
    prompts = ["a red circle", "two green hearts"]
    kept = pipe.generate_visual_tokens(prompts, torch.Generator().manual_seed(5), num_candidates=3)
    repeated = [text for text in prompts for _ in range(3)]
    written = pipe.generate_visual_tokens(repeated, torch.Generator().manual_seed(5), num_candidates=1)
    scores = pipe.score_visual_tokens(repeated, written).reshape(2, 3)
    assert torch.equal(kept, written.reshape(2, 3, -1)[torch.arange(2), scores.argmax(1)])
    assert scores.std(1).min() > 0
    with pytest.raises(ValueError, match="`num_candidates` is 0; it must be a whole number of at least 1"):
        pipe("a red circle", num_candidates=0)
    with pytest.raises(ValueError, match="`num_return_sequences` does not go with 2 candidates a prompt"):
        pipe("a red circle", num_candidates=2, prior_generation_kwargs={"num_return_sequences": 2})
    with pytest.raises(ValueError, match="1 prompts do not fit 6 images"):
        pipe.score_visual_tokens("a red circle", written)
    with pytest.raises(ValueError, match="has places for 2 images, and 1 are given"):
        pipe.score_visual_tokens("<|image_pad|>", written[:1])


def test_candidates_guidance_and_steps_are_kept_with_the_pipeline(pipe, tmp_path):
    names = {name: getattr(pipe, name) for name in ("scheduler", "vae", "transformer", "vision_language_encoder")}
    names |= {"processor": pipe.processor, "condition_mapper": pipe.condition_mapper}
    numbers = {"image_size": 64, "num_candidates": 4, "true_cfg_scale": 1.5, "num_inference_steps": 3}
    UniCode2FluxPipeline(**names, **numbers).save_pretrained(tmp_path)
    again = UniCode2FluxPipeline.from_pretrained(str(tmp_path))
    assert {name: again.config[name] for name in numbers} == numbers
    tokens, seeded = pipe.generate_visual_tokens("a ring", num_candidates=1), torch.Generator().manual_seed
    options = {"visual_token_ids": tokens, "output_type": "latent"}
    own, named = (again(**options, **more, generator=seeded(0)).images for more in ({}, {"num_inference_steps": 3}))
    assert torch.equal(own, named)


def test_guidance_leads_away_from_a_prompt_of_zeros(pipe):
    tokens = pipe.generate_visual_tokens("a blue ring", torch.Generator().manual_seed(3))
    embeds, pooled = pipe.encode_visual_tokens(tokens)
    options = {
        "prompt_embeds": embeds,
        "pooled_prompt_embeds": pooled,
        "height": 64,
        "width": 64,
        "num_inference_steps": 2,
    }

    def plainly(scale, negative):
        negatives = {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": 0 * pooled}
        generator = torch.Generator().manual_seed(0)
        return FluxPipeline.__call__(
            pipe, **options, **negatives, true_cfg_scale=scale, output_type="pt", generator=generator
        ).images

    without = draw(pipe, visual_token_ids=tokens, true_cfg_scale=1.0).images
    guided = draw(pipe, visual_token_ids=tokens, true_cfg_scale=2.0).images
    assert torch.equal(without, plainly(1.0, 0 * embeds)) and not torch.equal(guided, without)
    assert torch.equal(guided, plainly(2.0, 0 * embeds))
    own = {"negative_prompt_embeds": embeds.flip(1), "negative_pooled_prompt_embeds": 0 * pooled}
    from_own = draw(pipe, visual_token_ids=tokens, true_cfg_scale=2.0, **own).images
    assert torch.equal(from_own, plainly(2.0, embeds.flip(1))) and not torch.equal(from_own, guided)
    parts = {name: getattr(pipe, name) for name in ("scheduler", "vae", "transformer", "vision_language_encoder")}
    parts |= {"processor": pipe.processor, "condition_mapper": pipe.condition_mapper}
    other = UniCode2FluxPipeline(**parts, image_size=64, true_cfg_scale=2.0)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(draw(other, visual_token_ids=tokens).images, guided)


def test_image_is_redrawn_from_its_own_codes(pipe, photo):
    output = draw(pipe, image=[photo, photo.rotate(90)])
    pixels = pipe.processor.image_processor([photo, photo.rotate(90)], return_tensors="pt")["pixel_values"]
    assert torch.equal(output.visual_token_ids, pipe.vision_language_encoder.get_image_tokens(pixels))


def test_saved_pipeline_paints_the_same_through_either_class(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    expected = draw(pipe, prompt="a red circle")
    for cls in (UniCode2FluxPipeline, DiffusionPipeline):
        loaded = cls.from_pretrained(str(tmp_path))
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is UniCode2FluxPipeline is diffusers.UniCode2FluxPipeline
        again = draw(loaded, prompt="a red circle")
        assert torch.equal(again.visual_token_ids, expected.visual_token_ids)
        # Another place in memory may change the last bit of a product
        torch.testing.assert_close(again.images, expected.images, atol=1e-5, rtol=0)


def test_bad_input_is_refused_with_the_numbers(pipe, photo):
    with pytest.raises(ValueError, match="exactly one of .* got prompt and image"):
        pipe("a circle", image=photo)
    with pytest.raises(ValueError, match="got none"):
        pipe()
    with pytest.raises(ValueError, match="Prompt 2 of 2 is empty"):
        pipe(["a circle", ""])
    with pytest.raises(ValueError, match="runs from 5 to 5; visual token ids are 768 to 8959"):
        pipe(visual_token_ids=torch.full((1, 64), 5))
    with pytest.raises(ValueError, match="takes 64 visual tokens an image and got 60"):
        pipe.condition_mapper(torch.zeros(1, 60, pipe.condition_mapper.config.visual_dim))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompt": 5}, "`prompt` holds int"),
        ({"prompt": ["a star", None]}, "`prompt` holds NoneType"),
        ({"image": []}, "`image` is an empty list"),
        ({"prompt": "a star", "num_images_per_prompt": 0}, "`num_images_per_prompt` is 0"),
        ({"prompt": "a star", "num_inference_steps": 0}, "`num_inference_steps` is 0"),
        ({"prompt": "a star", "height": -64}, "`height` is -64"),
        ({"prompt": "a star", "true_cfg_scale": "2"}, "`true_cfg_scale` is '2'; it must be a number of at least 1"),
        ({"prompt": "a star", "true_cfg_scale": float("nan")}, "`true_cfg_scale` is nan"),
        ({"prompt": "a star", "true_cfg_scale": 0.5}, "`true_cfg_scale` is 0.5"),
        (
            {"prompt": "a star", "negative_pooled_prompt_embeds": torch.zeros(1, 192)},
            "`negative_prompt_embeds` and `negative_pooled_prompt_embeds`, or neither",
        ),
        (
            {"prompt": "a star", "negative_prompt": "a ring", "true_cfg_scale": 2.0},
            "`negative_prompt` needs FLUX's own",
        ),
        ({"visual_token_ids": [1, 2]}, "`visual_token_ids` is list"),
        ({"visual_token_ids": torch.zeros(1, 64)}, "`visual_token_ids` is torch.float32"),
        ({"visual_token_ids": torch.zeros(64, dtype=torch.long)}, r"has shape \(64,\); it must be \(batch_size, 64\)"),
        ({"visual_token_ids": torch.zeros(1, 63, dtype=torch.long)}, r"has shape \(1, 63\)"),
        ({"visual_token_ids": torch.zeros(0, 64, dtype=torch.long)}, r"has shape \(0, 64\)"),
    ],
)
def test_odd_arguments_are_refused_before_any_work(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(pipe, **arguments)


def test_mapper_sees_the_order_of_tokens_and_calibrates_its_output():
    torch.manual_seed(0)
    mapper = UniCode2ConditionMapper(
        visual_dim=16,
        hidden_dim=32,
        output_dim=24,
        pooled_dim=8,
        num_visual_tokens=16,
        num_layers=1,
        num_attention_heads=2,
        output_scale=0.3,
        pooled_scale=2.0,
    )
    embeds = 5 * torch.randn(2, 16, 16)
    output = mapper(embeds)
    assert output.prompt_embeds.shape == (2, 16, 24) and output.pooled_prompt_embeds.shape == (2, 8)
    order = torch.randperm(16)
    permuted = mapper(embeds[:, order]).prompt_embeds
    assert (permuted - output.prompt_embeds[:, order]).abs().max() > 1e-3
    rms = output.prompt_embeds.square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, 0.3), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="is 15, which is not a square number"):
        UniCode2ConditionMapper(visual_dim=16, num_visual_tokens=15)
