"""What a call of `generate` asks for, gathered from its arguments, its generation config and that of the checkpoint."""

import numbers

import numpy as np
from transformers import GenerationConfig

GENERATION_MODES = ("text", "image", "interleaved")
# Options whose code takes ids of the prompt, or of another model, for places in the scores.
TWO_VOCABULARIES = (
    "prompt_lookup_num_tokens",
    "assistant_model",
    "assistant_early_exit",
    "use_mtp",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
)
# Options that are about text; an image has a fixed number of visual ids and nothing else.
TEXT_ONLY = (
    "forced_bos_token_id",
    "forced_eos_token_id",
    "stop_strings",
    "exponential_decay_length_penalty",
    "token_healing",
    "watermarking_config",
)


def plain(value):
    """NumPy's scalars as the Python numbers that they stand for, also within lists and dictionaries: `generate` looks at types."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    if type(value) is dict:
        return {plain(key): plain(item) for key, item in value.items()}
    return value


def make_plain(config: GenerationConfig) -> None:
    """Turns the NumPy scalars in a generation config into Python's, in place."""
    for name, value in vars(config).items():
        setattr(config, name, plain(value))


def first_given(*values):
    """The first that is not `None`; `None` without any."""
    return next((value for value in values if value is not None), None)


def find_option(name: str, *configs: GenerationConfig | None):
    """The value in the first generation config that has one; options of ours are extra entries, which not every config has."""
    return first_given(*(getattr(config, name, None) for config in configs))


def find_asked(name: str, config: GenerationConfig | None, defaults: GenerationConfig):
    """The value in the generation config of a call, unless it came there from the checkpoint's, `defaults`; then `None`."""
    value = find_option(name, config)
    return None if value == find_option(name, defaults) else value


def check_mode(mode: str) -> None:
    """Raises `ValueError` on an unknown mode."""
    if mode not in GENERATION_MODES:
        raise ValueError(f"`generation_mode` is {mode!r}; it must be one of {', '.join(GENERATION_MODES)}.")


def check_guidance(mode: str, guidance_scale: float | None) -> None:
    """Raises `ValueError` on guidance that is no number from 0 on, or outside image mode."""
    if guidance_scale is None:
        return
    if not (isinstance(guidance_scale, numbers.Real) and 0 <= guidance_scale < float("inf")):
        raise ValueError(f"`guidance_scale` is {guidance_scale!r}; it must be a number from 0 on.")
    if mode != "image" and guidance_scale != 1:
        raise ValueError(f"`guidance_scale` is {guidance_scale} in {mode} mode; guidance works in image mode only.")


def check_plan(mode: str, max_plan_tokens: int | None) -> None:
    """Raises `ValueError` on a length of a plan that is no whole number from 0 on, or outside image mode."""
    if max_plan_tokens is None:
        return
    if not (isinstance(max_plan_tokens, numbers.Integral) and max_plan_tokens >= 0):
        raise ValueError(f"`max_plan_tokens` is {max_plan_tokens!r}; it must be a whole number from 0 on.")
    if mode != "image" and max_plan_tokens:
        raise ValueError(f"`max_plan_tokens` is {max_plan_tokens} in {mode} mode; it works in image mode only.")


def check_options(model_config, mode: str, asked: dict, config: GenerationConfig | None, defaults: GenerationConfig):
    """Raises `ValueError` on an option that cannot work with two vocabularies, and on one about text for an image.

    Args:
        model_config (`UniCode2Config`): says how many ids there are.
        mode: the generation mode.
        asked: options of the call, by name.
        config: the generation config of the call, if it has one.
        defaults: that of the checkpoint, whose options about text do not speak of images.
    """
    for name in TWO_VOCABULARIES:
        if first_given(asked.get(name), find_option(name, config, defaults)) not in (None, False):
            raise ValueError(
                f"`{name}` works on one vocabulary; this one is split into {model_config.visual_token_offset} text ids "
                f"and {model_config.codebook_config.codebook_size} visual ids."
            )
    for name in TEXT_ONLY if mode == "image" else ():
        if first_given(asked.get(name), find_asked(name, config, defaults)) not in (None, False):
            raise ValueError(
                f"`{name}` is about text, and image mode writes {model_config.num_image_tokens} visual ids; leave it out."
            )


__all__ = ["GENERATION_MODES", "TEXT_ONLY"]
