"""What comes before generation: options are followed or refused, wherever a caller writes them; plans."""

import copy

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from transformers_unicode2 import UniCode2ForConditionalGeneration

PROMPT = torch.tensor([[20, 21, 22]])


def count_rows(model, call):
    """What `call` returns, and how many rows each forward of the visual head saw."""
    rows = []
    handle = model.visual_head.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    output = call()
    handle.remove()
    return output, set(rows)


def test_generation_mode_of_a_config_is_that_of_the_call(model, tmp_path):
    expected = model.generate(PROMPT, generation_mode="image", do_sample=False)
    given = GenerationConfig(generation_mode="image", do_sample=False)
    assert torch.equal(model.generate(PROMPT, given), expected)
    assert model.generate(PROMPT, given, generation_mode="text", max_new_tokens=4).shape[1] <= 7
    model.generation_config = GenerationConfig(generation_mode="image", eos_token_id=1, pad_token_id=0)
    assert torch.equal(model.generate(PROMPT, do_sample=False), expected)
    model.save_pretrained(tmp_path)
    again = UniCode2ForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.generate(PROMPT, do_sample=False), expected)
    with pytest.raises(ValueError, match="`generation_mode` is 'video'"):
        model.generate(PROMPT, GenerationConfig(generation_mode="video"))
    with pytest.raises(ValueError, match="`generate_batch` writes text only; `generation_mode` is 'image'"):
        model.generate_batch([[20, 21]], GenerationConfig(generation_mode="image"))


def test_image_settings_are_found_wherever_they_are_written(model):
    def draw(**options):
        return count_rows(model, lambda: model.generate(PROMPT, generation_mode="image", **options))

    expected, rows = draw(guidance_scale=3.0, do_sample=False)
    assert rows == {2}
    image = {"do_sample": False, "guidance_scale": 3.0}
    for options in (
        {"generation_config": GenerationConfig(guidance_scale=3.0, do_sample=False)},
        {"generation_config": GenerationConfig(image_generation=image)},
        {"image_generation": image},
    ):
        output, rows = draw(**options)
        assert torch.equal(output, expected) and rows == {2}, options
    model.generation_config.guidance_scale = 3.0
    output, rows = draw(do_sample=False)
    assert torch.equal(output, expected) and rows == {2}
    assert draw(do_sample=False, guidance_scale=1.0)[1] == {1}


def test_guidance_of_a_checkpoint_leaves_its_text_alone(model):
    calls = []
    expected = model.generate(PROMPT, max_new_tokens=6, do_sample=False)
    model.generation_config.guidance_scale = 3.0
    model.generation_config.max_plan_tokens = 4
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    assert torch.equal(model.generate(PROMPT, max_new_tokens=6, do_sample=False), expected)
    handle.remove()
    assert len(calls) == expected.shape[1] - 3
    own = copy.deepcopy(model.generation_config)  # as people do, to change a number in it
    own.max_new_tokens, own.do_sample = 6, False
    assert torch.equal(model.generate(PROMPT, own), expected)
    with pytest.raises(ValueError, match="`guidance_scale` is 2.0 in text mode"):
        model.generate(PROMPT, GenerationConfig(guidance_scale=2.0))
    with pytest.raises(ValueError, match="`max_plan_tokens` is 5 in interleaved mode"):
        model.generate(PROMPT, GenerationConfig(max_plan_tokens=5), generation_mode="interleaved")


def test_forced_end_of_a_text_or_of_what_has_images_in_it(model, config):
    model.generation_config.eos_token_id = None
    row = model.generate(PROMPT, GenerationConfig(forced_eos_token_id=7, max_new_tokens=5, do_sample=False))[0]
    assert row[-1] == 7 and len(row) == 8
    with torch.no_grad():  # the begin-of-image id is by far the likeliest text
        model.lm_head.weight[config.boi_token_id] = 50 * model.model.language_model.norm.weight
    for room in (1, 2, 17, 18, 19, 20, 37, 38):
        options = {
            "forced_eos_token_id": 7,
            "generation_mode": "interleaved",
            "max_new_tokens": room,
            "do_sample": True,
        }
        row = model.generate(PROMPT, **options)[0].tolist()
        assert row[-1] == 7 and len(row) == 3 + room
        assert sum(id_ >= config.visual_token_offset for id_ in row) == 16 * row.count(config.boi_token_id)
        assert row.count(config.boi_token_id) == row.count(config.eoi_token_id)


@pytest.mark.parametrize(
    "name, value",
    [
        ("forced_eos_token_id", 7),
        ("forced_bos_token_id", 7),
        ("stop_strings", ["end"]),
        ("exponential_decay_length_penalty", (2, 1.1)),
        ("token_healing", True),
        ("watermarking_config", {"bias": 2.5}),
    ],
)
def test_what_is_about_text_is_refused_for_an_image_and_not_followed_from_a_checkpoint(model, config, name, value):
    expected = model.generate(PROMPT, generation_mode="image", do_sample=False)
    with pytest.raises(ValueError, match=f"`{name}` is about text, and image mode writes 16 visual ids"):
        model.generate(PROMPT, generation_mode="image", **{name: value})
    with pytest.raises(ValueError, match=f"`{name}` is about text"):
        model.generate(PROMPT, GenerationConfig(**{name: value}), generation_mode="image")
    setattr(model.generation_config, name, getattr(GenerationConfig(**{name: value}), name))
    own = copy.deepcopy(model.generation_config)
    if name != "watermarking_config":  # of which no two are equal
        assert torch.equal(model.generate(PROMPT, own, generation_mode="image", do_sample=False), expected)
    assert torch.equal(model.generate(PROMPT, generation_mode="image", do_sample=False), expected)


def test_numbers_of_numpy_are_numbers(model):
    twin = copy.deepcopy(model)
    text = {
        "max_new_tokens": np.int64(5),
        "do_sample": np.bool_(True),
        "temperature": np.float32(0.5),
        "top_k": np.int32(9),
    }
    text |= {"repetition_penalty": np.float16(1.5), "top_p": np.float32(0.75), "eos_token_id": [np.int64(3)]}
    image = {"guidance_scale": np.float32(2.0), "max_plan_tokens": np.int64(3), "num_return_sequences": np.int8(2)}
    image |= {"generation_mode": "image", "temperature": np.float64(0.5), "do_sample": True, "top_k": np.uint8(5)}
    for options in (text, image):
        plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in options.items()} | {"eos_token_id": [3]}
        torch.manual_seed(0)
        expected = twin.generate(PROMPT, **plain)
        torch.manual_seed(0)
        assert torch.equal(model.generate(PROMPT, **options | {"eos_token_id": [np.int64(3)]}), expected)
        torch.manual_seed(0)
        mode = options.pop("generation_mode", "text")
        config = GenerationConfig(eos_token_id=3)
        for name, value in options.items():
            setattr(config, name, value)
        assert torch.equal(model.generate(PROMPT, config, generation_mode=mode), expected)
    model.generation_config.image_generation = {"guidance_scale": np.float32(2), "do_sample": np.bool_(False)}
    expected = twin.generate(PROMPT, generation_mode="image", guidance_scale=2.0, do_sample=False)
    assert torch.equal(model.generate(PROMPT, generation_mode="image"), expected)
    with pytest.raises(ValueError, match="`guidance_scale` is -1.0"):
        model.generate(PROMPT, generation_mode="image", guidance_scale=np.float32(-1))


def rows_of_images(row, config):
    """Whether visual ids follow a begun image only, `num_image_tokens` of them, and how many there are."""
    left, whole = 0, True
    for id_ in row:
        is_visual = id_ >= config.visual_token_offset
        whole &= is_visual == bool(left)
        left = left - 1 if left else config.num_image_tokens if id_ == config.boi_token_id else 0
    return whole


@pytest.mark.parametrize("typed", [[11], [11, 11], [11, 12], [12], [12, 11]], ids=str)
@pytest.mark.parametrize("num_beams", [1, 2])
def test_frames_that_a_user_typed_begin_no_image(model, config, typed, num_beams):
    prompts = torch.tensor([[20, *typed, 21], [22, 23, *typed[1:], 24]])
    torch.manual_seed(0)
    options = {"generation_mode": "interleaved", "max_new_tokens": 30, "eos_token_id": -1, "num_beams": num_beams}
    rows = model.generate(prompts, do_sample=True, **options)[:, prompts.shape[1] :].tolist()
    assert all(rows_of_images(row, config) for row in rows)
    begun = torch.tensor([[20, *typed, 21, config.boi_token_id, 770, 771]])
    row = model.generate(begun, **options)[0, begun.shape[1] :].tolist()
    assert all(id_ >= config.visual_token_offset for id_ in row[:14]) and row[14] == config.eoi_token_id


def begin_images_often(model, config, strength=2.5):
    """Lets text be followed by an image after a few ids."""
    with torch.no_grad():
        head = model.lm_head.weight
        head[config.boi_token_id] = head.mean(0) + strength * head.std() * torch.randn(
            head.shape[1], generator=torch.Generator().manual_seed(1)
        )


def test_plan_and_image_equal_what_interleaved_mode_writes(model, config):
    begin_images_often(model, config)
    model.generation_config.eos_token_id = None
    lengths = set()
    for prompt in torch.arange(20, 44).reshape(8, 1, 3):
        row = model.generate(prompt, generation_mode="interleaved", max_new_tokens=60, do_sample=False)[0, 3:].tolist()
        assert config.boi_token_id in row[:-17]
        begin = row.index(config.boi_token_id)
        lengths.add(begin)
        image = model.generate(prompt, generation_mode="image", max_plan_tokens=60, do_sample=False)
        assert image[0].tolist() == row[begin + 1 : begin + 17]
        cut = model.generate(prompt, generation_mode="image", max_plan_tokens=begin, do_sample=False)
        assert torch.equal(cut, image)
    assert len(lengths) > 2, lengths


def plan_lengths(model, rows, **options):
    """What the model sees when it begins the image, for each prompt alone."""
    lengths = []

    def count(module, args, kwargs):
        if kwargs["output_modality"] == "image" and kwargs["input_ids"].shape[1] > 1:
            lengths.append(kwargs["input_ids"].shape[1])

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    images = [model.generate(torch.tensor([row]), **options)[0] for row in rows]
    handle.remove()
    return torch.stack(images), [length - len(row) - 1 for length, row in zip(lengths, rows)]


@pytest.mark.parametrize("arguments", [{"guidance_scale": 1.0}, {"guidance_scale": 2.0}, {"num_return_sequences": 2}])
def test_plans_of_a_batch_equal_those_of_single_prompts(model, config, arguments):
    begin_images_often(model, config)
    options = {"generation_mode": "image", "max_plan_tokens": 20, "do_sample": False}
    rows = [[20, 21, 22], [23, 24], [26, 27, 28], [25]]
    alone, lengths = plan_lengths(model, rows, **options, guidance_scale=arguments.get("guidance_scale"))
    assert len(set(lengths)) > 2 and max(lengths) <= 20, lengths
    batch = torch.tensor([[0] * (3 - len(row)) + row for row in rows])
    if "num_return_sequences" in arguments:
        arguments, alone = {**arguments, "num_beams": 1, "do_sample": True, "top_k": 1}, alone.repeat_interleave(2, 0)
    options |= arguments
    together = model.generate(batch, attention_mask=(batch != 0).long(), **options)
    assert torch.equal(together, alone)
    model.generation_config.pad_token_id = 0
    assert torch.equal(model.generate(batch, **options), alone)  # the mask follows from the padding, as without a plan


def test_plan_ends_as_the_model_ends_text_whatever_config_is_given(model, config):
    from transformers import GenerationConfig

    prompt = torch.tensor([[23, 24]])
    options = {"generation_mode": "image", "max_plan_tokens": 8, "do_sample": False}
    model.generation_config.eos_token_id = None
    written = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, 2:].tolist()
    end = next(id_ for i, id_ in enumerate(written) if i and id_ not in written[:i])
    cut = written[: written.index(end)]
    model.generation_config.eos_token_id = end
    expected = model.generate(
        torch.tensor([[23, 24, *cut, config.boi_token_id]]), generation_mode="image", do_sample=False
    )
    assert torch.equal(model.generate(prompt, **options), expected)
    given = GenerationConfig(do_sample=False, min_new_tokens=4, max_length=50, max_plan_tokens=8)
    assert torch.equal(model.generate(prompt, given, generation_mode="image"), expected)


def test_no_plan_behind_a_begun_image_nor_without_asking(model, config):
    begin_images_often(model, config)
    model.generation_config.image_generation = {"do_sample": False, "max_plan_tokens": 9}
    begun = torch.tensor([[20, 21, config.boi_token_id]])
    expected = model.generate(begun, generation_mode="image")
    assert torch.equal(expected, model.generate(begun[:, :2], generation_mode="image", max_plan_tokens=0))
    modalities = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: modalities.append(kwargs["output_modality"]), with_kwargs=True
    )
    model.generate(begun, generation_mode="image")
    assert set(modalities) == {"image"}
    model.generate(begun[:, :2], generation_mode="image")
    handle.remove()
    assert set(modalities) == {"plan", "image"}


@pytest.mark.parametrize("num_beams", [1, 2])
def test_plan_of_a_prompt_with_an_image(model, prompt, pixel_values, config, num_beams):
    begin_images_often(model, config)
    options = {"generation_mode": "image", "max_plan_tokens": 12, "guidance_scale": 2.0, "do_sample": False}
    model.generation_config.num_beams = num_beams
    from_pixels = model.generate(**prompt, pixel_values=pixel_values, **options)
    features = model.get_image_features(pixel_values, return_dict=True)
    from_features = model.generate(**prompt, mm_encoder_outputs={"image": features}, **options)
    assert torch.equal(from_pixels, from_features)
    ids = prompt["input_ids"].masked_scatter(
        prompt["input_ids"] == config.image_token_id, model.get_image_tokens(pixel_values).flatten()
    )
    assert torch.equal(model.generate(**{**prompt, "input_ids": ids}, **options), from_pixels)
