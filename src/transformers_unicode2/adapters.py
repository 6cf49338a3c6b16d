"""Adapters of PEFT on disk: which checkpoint each is for, and whole models made of the two."""

import json
import re
from pathlib import Path

from .checkpoints import check_model, check_name
from .files import write_file
from .loading_unicode2 import check_files
from .record import hash_source, shorten

# File in the folder of an adapter: the checkpoint that it was trained on, its digest, and what its configs learnt.
BASE_FILE = "base_checkpoint.json"


def is_adapter(name: str) -> bool:
    """Whether a folder or Hub name is of an adapter. Raises `ValueError` when it is of nothing."""
    from transformers.utils import find_adapter_config_file

    check_name(name)
    return find_adapter_config_file(name) is not None


def note_base(folder: str | Path, base: str, digest: str, config, generation_config) -> None:
    """Writes into the folder of an adapter what `merge` needs and PEFT does not keep.

    Args:
        folder: of the adapter.
        base: folder or Hub name of the checkpoint that it was trained on.
        digest: its SHA-256, or its commit, as `hash_source` gives it.
        config (`UniCode2Config`): of the trained model.
        generation_config (`GenerationConfig`): of the trained model.
    """
    image_generation = generation_config.to_dict().get("image_generation")
    note = {"model": base, "digest": digest, "caption_prompt": config.caption_prompt}
    note |= {"image_generation": image_generation}
    write_file(Path(folder) / BASE_FILE, (json.dumps(note, indent=2) + "\n").encode())


def find_base(adapter: str, base: str | None = None) -> tuple[str, str, dict]:
    """The checkpoint of an adapter, its digest, and what `note_base` wrote, empty if nothing did.

    Args:
        adapter: folder or Hub name.
        base: folder or Hub name of the checkpoint, if it is not where the adapter says.

    Raises:
        `ValueError`: when `adapter` is none, or the checkpoint is missing or another than the one it was trained on.
    """
    from transformers.utils import cached_file, find_adapter_config_file

    if not is_adapter(adapter):
        raise ValueError(f"{adapter} is no adapter; it has no adapter_config.json.")
    config = Path(find_adapter_config_file(adapter))
    check_files(config.parent)
    base = base or json.loads(config.read_text()).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{config} names no `base_model_name_or_path`; say with `--base` which checkpoint it is for.")
    if Path(adapter).is_dir() and not any(Path(adapter).glob("adapter_model.*")):
        raise ValueError(f"{adapter} lacks adapter_model.safetensors, the weights of the adapter; copy it again.")
    try:
        check_model(base)
    except (ValueError, OSError) as error:
        raise ValueError(f"{adapter} is an adapter of {base}: {error}") from error
    file = cached_file(adapter, BASE_FILE, _raise_exceptions_for_missing_entries=False)
    note = json.loads(Path(file).read_text()) if file else {}
    digest = hash_source(base)
    if note and digest != note["digest"]:
        raise ValueError(
            f"{adapter} was trained on another checkpoint ({shorten(note['digest'])}) than {base} is now "
            f"({shorten(digest)}); name that checkpoint."
        )
    return base, digest, note


def load_merged(adapter: str, base: str, note: dict, dtype: str = "auto") -> tuple:
    """The whole model that an adapter and its checkpoint make, without PEFT in it, and their processor.

    Args:
        adapter: folder or Hub name.
        base, note: as `find_base` gives them.
        dtype: of the weights; that of the checkpoint by default.

    Raises:
        `ValueError`: when the adapter is for another model, or cannot be part of the weights.
    """
    from peft import PeftModel

    from .modeling_unicode2 import UniCode2ForConditionalGeneration
    from .processing_unicode2 import UniCode2Processor

    model = UniCode2ForConditionalGeneration.from_pretrained(base, dtype=dtype)
    check_mergeable(adapter, model.config.tie_word_embeddings)
    try:
        adapted = PeftModel.from_pretrained(model, adapter)
    except KeyError as error:
        raise ValueError(f"{adapter} lacks {error.args[0]}; copy it again.") from error
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{adapter} does not fit {base}: {reason[:200]}") from error
    check_fit(adapted, adapter, base)
    try:
        model = adapted.merge_and_unload(safe_merge=True).eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{adapter} cannot be merged: {' '.join(str(error).split())[:200]}") from error
    if note:
        model.config.caption_prompt = note["caption_prompt"]
        if note["image_generation"]:
            model.generation_config.image_generation = note["image_generation"]
            # Else it would be made anew from the model's config when loaded
            model.generation_config._from_model_config = False
    has_processor = not Path(adapter).is_dir() or (Path(adapter) / "processor_config.json").is_file()
    return model, UniCode2Processor.from_pretrained(adapter if has_processor else base)


def check_mergeable(adapter: str, is_tied: bool) -> None:
    """Raises `ValueError` on an adapter that cannot be merged: prompts, or LoRA on one of two tied embeddings.

    Args:
        adapter: folder or Hub name.
        is_tied: whether the embedding of its checkpoint is the text head, too.
    """
    from peft import PeftConfig, PeftType

    try:
        config = PeftConfig.from_pretrained(adapter)
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"PEFT cannot read the adapter_config.json of {adapter} ({reason}); update PEFT.") from error
    if config.is_prompt_learning:
        raise ValueError(
            f"{adapter} learnt prompts ({config.peft_type.value}), which are no part of the weights; load it with PEFT."
        )
    settings = config.to_dict()
    if not is_tied or settings.get("ensure_weight_tying") or config.peft_type == PeftType.TRAINABLE_TOKENS:
        return
    named = settings.get("target_modules") or []
    named = [named] if isinstance(named, str) else named
    for name in ("embed_tokens", "lm_head"):
        paths = (name, f"model.language_model.{name}")
        if any(name == one.split(".")[-1] or any(re.fullmatch(one, path) for path in paths) for one in named):
            raise ValueError(
                f"{adapter} adapts `{name}`, which shares its weight with another module, so it cannot be merged; "
                "train it with `ensure_weight_tying`, or leave it out of `target_modules`."
            )


def check_fit(adapted, adapter: str, base: str) -> None:
    """Raises `ValueError` when an adapted model has weights that the files of the adapter lack, or the other way.

    Args:
        adapted (`PeftModel`): with the adapter.
        adapter, base: folders or Hub names.
    """
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    given = set(load_peft_weights(adapter, device="cpu"))
    surplus = sorted(adapted.load_adapter(adapter, "default").unexpected_keys)
    missing = sorted(set(get_peft_model_state_dict(adapted, save_embedding_layers=False)) - given)
    if surplus:
        raise ValueError(
            f"{adapter} has {len(surplus)} weights for which {base} has no place; the first is {surplus[0]}. It is an "
            "adapter of another model."
        )
    if missing:
        raise ValueError(
            f"{adapter} lacks {len(missing)} weights, which would be random; the first is {missing[0]}. Copy it again."
        )


__all__ = ["find_base", "is_adapter", "load_merged", "note_base"]
