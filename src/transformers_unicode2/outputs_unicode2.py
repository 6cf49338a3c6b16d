"""What the models return, and what Transformers names otherwise from release to release."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast

# What Transformers calls the key-value cache of its models: `cache` from 5.24 on.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


@dataclass
class UniCode2ModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    Args:
        image_hidden_states (`torch.FloatTensor` of shape `(num_images, num_image_tokens, hidden_size)`, *optional*):
            Embeddings of the images given as pixels.
        image_tokens (`torch.LongTensor` of shape `(num_images, num_image_tokens)`, *optional*):
            Their visual token ids.
    """

    image_hidden_states: torch.FloatTensor | None = None
    image_tokens: torch.LongTensor | None = None


@dataclass
class UniCode2CausalLMOutputWithPast(CausalLMOutputWithPast):
    r"""
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned with `labels`):
            Mean negative log-likelihood over all target tokens, text and visual.
        logits (`torch.FloatTensor`, *optional*, returned without `labels`):
            Scores over the unified vocabulary, `(batch_size, num_tokens, visual_token_offset + codebook_size)`; with
            `output_modality="text"` only its text part, `(batch_size, num_tokens, visual_token_offset)`.
        text_loss (`torch.FloatTensor` of shape `()`, *optional*, returned with `labels`):
            The loss over the text targets, Eq. 7; 0 without any.
        visual_loss (`torch.FloatTensor` of shape `()`, *optional*, returned with `labels`):
            The loss over the visual targets, Eq. 8; 0 without any.
        image_hidden_states (`torch.FloatTensor` of shape `(num_images, num_image_tokens, hidden_size)`, *optional*):
            Embeddings of the images given as pixels.
    """

    text_loss: torch.FloatTensor | None = None
    visual_loss: torch.FloatTensor | None = None
    image_hidden_states: torch.FloatTensor | None = None


@dataclass
class UniCode2ImageFeatures(BaseModelOutputWithPooling):
    r"""
    What the encoder returned, with `pooler_output` replaced by a tuple of one `(num_image_tokens, hidden_size)` embedding an
    image.

    Args:
        image_tokens (`torch.LongTensor` of shape `(num_images, num_image_tokens)`):
            The images' visual token ids.
    """

    image_tokens: torch.LongTensor | None = None


def name_cache(past_key_values: Cache | None, cache: Cache | None) -> dict[str, Cache]:
    """The key-value cache as the language model takes it. Raises `ValueError` when it is given under both names.

    The old name goes on as it is, so that Transformers warns of it where it is going to be removed. A cache of continuous batching,
    which is no `Cache`, has always been called `cache`.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError(
            "Give at most one of `past_key_values` and `cache`, which is its name from Transformers 5.24 on."
        )
    if cache is not None:
        return {CACHE_NAME if isinstance(cache, Cache) else "cache": cache}
    return {} if past_key_values is None else {"past_key_values": past_key_values}


def keep_positions(hidden_states: torch.Tensor, kept: int | torch.Tensor) -> torch.Tensor:
    """Hidden states `(batch_size, num_tokens, hidden_size)` of the last `kept` positions, all if it is 0, or of these positions: one row
    of them for all samples, one a sample, or a mask, whose result is flattened. Transformers has this from 5.21 on."""
    if isinstance(kept, int):
        return hidden_states[:, -kept:]
    if kept.ndim == 1:
        return hidden_states[:, kept]
    return hidden_states[kept] if kept.dtype == torch.bool else hidden_states.take_along_dim(kept[..., None], dim=1)
