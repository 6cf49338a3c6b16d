"""Models that judge pictures. None of their weights may be random, since a score would then mean nothing."""

import torch

# Share of the tokens of a text tower that its tokenizer knows, at least
LEAST_KNOWN = 0.9


def load_judge(kind: type, name: str, option: str, **options) -> torch.nn.Module:
    """
    Loads a model with all of its weights.

    Args:
        kind: class of Transformers, with `from_pretrained`.
        name: folder or Hub name.
        option: that named it.
        **options: of `from_pretrained`.

    Raises:
        `ValueError`: when its files lack weights, with their number.
    """
    model, info = kind.from_pretrained(name, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{option} {name} lacks {len(missing)} weights of a {type(model).__name__}, such as {missing[0]}; give a "
            "whole one, since these would be random."
        )
    return model.eval()


def check_clip(name: str, option: str = "--clip") -> None:
    """Raises `ValueError` when a CLIP has no text tower, or not its tokenizer."""
    from transformers import AutoConfig, AutoProcessor

    config = AutoConfig.from_pretrained(name)
    if config.model_type != "clip":
        raise ValueError(
            f"{option} {name} is a {config.model_type}, which has no text tower of CLIP; give a CLIP with both towers."
        )
    # Transformers makes an empty tokenizer where there are no files of one
    known, size = len(getattr(AutoProcessor.from_pretrained(name), "tokenizer", ())), config.text_config.vocab_size
    if known < LEAST_KNOWN * size:
        raise ValueError(
            f"The tokenizer of {option} {name} knows {known} tokens, and its text tower {size}; give a CLIP with both "
            "towers and its tokenizer."
        )
