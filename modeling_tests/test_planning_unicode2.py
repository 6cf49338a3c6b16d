"""What comes before generation.

Options are followed or refused, wherever a caller writes them. A chat continues from the cache of its first turns as
from the whole chat.
"""

import copy

import numpy as np
import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

from transformers_unicode2 import UniCode2ForConditionalGeneration

PROMPT = torch.tensor([[20, 21, 22]])
GREEDY = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": -1}


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


@pytest.fixture
def block(config):
    return [config.boi_token_id] + [config.image_token_id] * config.num_image_tokens + [config.eoi_token_id]


@pytest.fixture
def pixels():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def ask(model, chats, **kwargs):
    """What is written behind chats of one length."""
    ids = torch.tensor(chats)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, **kwargs)[:, ids.shape[1] :].tolist()


def make_cache(model, kind):
    config = model.config.text_config
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=200)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("num_images", [0, 1, 2])
@pytest.mark.parametrize("given", ["new", "all"])
def test_second_turn_goes_on_from_the_cache(model, block, pixels, kind, num_images, given):
    cache, first = make_cache(model, kind), [20, *block, 21, *block, 22]
    answer = ask(model, [first], pixel_values=pixels[:2], past_key_values=cache)[0]
    second = [*first, *answer, 23, *(block * num_images), 24]
    expected = ask(model, [second], pixel_values=pixels[: 2 + num_images])
    images = pixels[2 : 2 + num_images] if given == "new" else pixels[: 2 + num_images]
    read = []
    handle = model.get_quantizer().vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(len(kwargs.get("pixel_values", args[0] if args else ()))),
        with_kwargs=True,
    )
    images = {"pixel_values": images} if len(images) else {}
    assert ask(model, [second], past_key_values=cache, **images) == expected
    handle.remove()
    assert sum(read) == num_images  # what is in the cache is not read again


def test_third_turn_and_features_in_place_of_pixels(model, block, pixels):
    cache, chat, seen = make_cache(model, "dynamic"), [], 0
    for turn, number in enumerate((1, 0, 2)):
        chat = [*chat, 20 + turn, *(block * number), 30]
        seen += number
        features = model.get_image_features(pixels[:seen], return_dict=True)
        expected = ask(model, [chat], pixel_values=pixels[:seen])
        assert ask(model, [chat], past_key_values=cache, mm_encoder_outputs={"image": features}) == expected
        chat += expected[0]


def test_rows_of_a_batch_keep_their_own_images(model, block, pixels):
    cache = make_cache(model, "dynamic")
    # two images against one: what is missing is text
    first = [[20, *block, *block, 21], [22, *block, *([23] * len(block)), 24]]
    answers = ask(model, first, pixel_values=pixels[:3], past_key_values=cache)
    second = [row + answer for row, answer in zip(first, answers)]
    second = [[*second[0], *([25] * len(block)), 26], [*second[1], *block, 27]]
    expected = ask(model, second, pixel_values=pixels[:4])
    assert ask(model, second, pixel_values=pixels[:4], past_key_values=cache) == expected
    assert ask(model, second, pixel_values=pixels[[0, 1, 2, 3]]) == expected


def test_new_tokens_alone_with_a_mask_over_all(model, block, pixels):
    cache, first = make_cache(model, "dynamic"), [20, *block, 21]
    answer = ask(model, [first], pixel_values=pixels[:1], past_key_values=cache)[0]
    new = [answer[-1], 22, *block, 23]  # the last token written is not in the cache
    whole = [*first, *answer[:-1], *new]
    expected = ask(model, [whole], pixel_values=pixels[:2])
    ids = torch.tensor([new])
    mask = torch.ones(1, len(whole), dtype=torch.long)
    output = model.generate(ids, attention_mask=mask, pixel_values=pixels[1:2], past_key_values=cache, **GREEDY)
    assert output[:, len(new) :].tolist() == expected


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_chat_goes_on_behind_an_image_that_was_written(model, block, pixels, config, kind):
    cache, first = make_cache(model, kind), [20, *block, 21]
    options = {"generation_mode": "image", "do_sample": False, "past_key_values": cache}
    image = model.generate(torch.tensor([first]), pixel_values=pixels[:1], **options)[0].tolist()
    second = [*first, config.boi_token_id, *image, config.eoi_token_id, 22]
    expected = ask(model, [second], pixel_values=pixels[:1])
    assert ask(model, [second], past_key_values=cache) == expected
    third = [*second, *expected[0]]
    options["past_key_values"] = None
    again = model.generate(torch.tensor([third]), pixel_values=pixels[:1], **options)
    options["past_key_values"] = cache
    assert torch.equal(model.generate(torch.tensor([third]), pixel_values=pixels[:1], **options), again)


def test_interleaved_mode_goes_on_from_a_cache(model, block, pixels):
    cache, first = make_cache(model, "dynamic"), [20, *block, 21]
    answer = ask(model, [first], pixel_values=pixels[:1], past_key_values=cache, generation_mode="interleaved")[0]
    second = [*first, *answer, 22]
    expected = ask(model, [second], pixel_values=pixels[:1], generation_mode="interleaved")
    assert ask(model, [second], past_key_values=cache, generation_mode="interleaved") == expected


def test_what_does_not_fit_the_cache_is_refused(model, block, pixels):
    cache, first = make_cache(model, "dynamic"), [20, *block, 21]
    answer = ask(model, [first], pixel_values=pixels[:1], past_key_values=cache)[0]
    with pytest.raises(ValueError, match="The cache holds 24 tokens and the prompt 20; give the whole chat"):
        ask(model, [first], past_key_values=cache)
    second = [*first, *answer, 22, *block, 23]
    with pytest.raises(ValueError, match="holds 16 image placeholders and no images"):
        ask(model, [second], past_key_values=cache)
    with pytest.raises(ValueError, match="has 2 images, 1 of them behind what the cache holds, and 3 are given"):
        ask(model, [second], past_key_values=cache, pixel_values=pixels[:3])
    cache.crop(-14)  # the first 10 tokens
    with pytest.raises(ValueError, match="ends inside an image, after 10 tokens"):
        ask(model, [second], past_key_values=cache, pixel_values=pixels[:2])
    cache.crop(-9)
    assert ask(model, [second], past_key_values=cache, pixel_values=pixels[:2]) == ask(
        model, [second], pixel_values=pixels[:2]
    )
