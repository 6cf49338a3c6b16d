"""Going on from a key-value cache: what of a chat, and which of its images, the model has read already."""

import copy

import torch
from transformers.cache_utils import Cache


def count_cached(input_ids: torch.LongTensor, kwargs: dict, num_more: int) -> int:
    """How many ids at the start of the prompts are in the cache already; 0 where the prompts hold new ids only.

    As in stock `generate`, prompts are whole chats, or new ids alone with an attention mask over all.

    Args:
        input_ids: prompts, `(batch_size, num_tokens)`.
        kwargs: arguments of `generate`, where the cache and the attention mask are.
        num_more: ids that are put behind the prompts before the model reads them.

    Raises:
        `ValueError`: when the prompts hold nothing that is not in the cache.
    """
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    cache = kwargs.get("cache") if cache is None else cache
    if not isinstance(cache, Cache) or (mask is not None and mask.shape[1] > input_ids.shape[1]):
        return 0
    num_cached = int(cache.get_seq_length())
    if num_cached >= input_ids.shape[1] + num_more:
        raise ValueError(
            f"The cache holds {num_cached} tokens and the prompt {input_ids.shape[1]}; give the whole chat, or its new tokens "
            "with an `attention_mask` over all."
        )
    return num_cached


def drop_cached_images(
    input_ids: torch.LongTensor, num_cached: int, image_token_id: int, num_image_tokens: int, kwargs: dict
) -> None:
    """Takes the images that the cache holds out of the arguments of `generate`, which may name all of a chat or the new ones only.

    Args:
        input_ids: prompts, `(batch_size, num_tokens)`, of which the first `num_cached` tokens are in the cache.
        image_token_id: placeholder of a patch, of which an image has `num_image_tokens`.
        kwargs: arguments of `generate`; its `pixel_values` and `mm_encoder_outputs` are changed.

    Raises:
        `ValueError`: when there are placeholders and no images for them, or the cache ends inside an image.
    """
    is_place = input_ids == image_token_id
    places, cached = is_place.sum(-1), is_place[:, :num_cached].sum(-1)  # (batch_size,)
    num_new = (places - cached).sum().item()
    given = [name for name in ("pixel_values", "mm_encoder_outputs") if kwargs.get(name) is not None]
    if not given and num_new:
        raise ValueError(f"The prompt holds {num_new} image placeholders and no images; give `pixel_values`.")
    if not given or not cached.any():
        return
    if (cached % num_image_tokens).any():
        raise ValueError(f"The cache ends inside an image, after {num_cached} tokens; crop it in front of the image.")
    numbers = torch.arange((places.sum() // num_image_tokens).item())  # of all images, row by row
    starts = (places.cumsum(0) - places) // num_image_tokens
    rows = torch.searchsorted(starts.cpu(), numbers, right=True) - 1
    keep = numbers[numbers - starts.cpu()[rows] >= (cached // num_image_tokens).cpu()[rows]].tolist()
    for name in given:
        chosen = select_images(kwargs.pop(name), keep, len(numbers))
        kwargs.update({} if chosen is None else {name: chosen})


def select_images(images, keep: list[int], num_images: int):
    """Those images of a chat that are not in the cache; images that are as many already stay.

    Args:
        images: pixels `(num_images, 3, height, width)`, or a dictionary of what `get_image_features` returned.
        keep: places of the new images among the `num_images` of the chat.

    Returns `None` when there are none. Raises `ValueError` on another number of images.
    """
    features = None if isinstance(images, torch.Tensor) else images["image"]
    num_given = len(images) if features is None else len(features.pooler_output)
    if num_given not in (len(keep), num_images):
        raise ValueError(
            f"The chat has {num_images} images, {len(keep)} of them behind what the cache holds, and {num_given} are given."
        )
    if not keep:
        return None
    if num_given == len(keep):
        return images
    if features is None:
        return images[keep]
    chosen = copy.copy(features)
    chosen.pooler_output = tuple(features.pooler_output[i] for i in keep)
    chosen.image_tokens = features.image_tokens[keep]
    return {**images, "image": chosen}


__all__ = ["count_cached", "drop_cached_images"]
