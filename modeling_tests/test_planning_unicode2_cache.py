"""A chat continues from the cache of its first turns as from the whole chat."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

GREEDY = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": -1}


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
    # Two images against one: what is missing is text
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
