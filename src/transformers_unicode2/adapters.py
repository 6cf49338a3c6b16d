"""Adapters of PEFT on disk: which checkpoint each is for, and whole models made of the two."""

import json
from pathlib import Path

from .checkpoints import check_model, check_name
from .files import write_file
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
    base = base or json.loads(Path(find_adapter_config_file(adapter)).read_text())["base_model_name_or_path"]
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
    """
    from peft import PeftModel

    from .modeling_unicode2 import UniCode2ForConditionalGeneration
    from .processing_unicode2 import UniCode2Processor

    model = UniCode2ForConditionalGeneration.from_pretrained(base, dtype=dtype)
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True).eval()
    if note:
        model.config.caption_prompt = note["caption_prompt"]
        if note["image_generation"]:
            model.generation_config.image_generation = note["image_generation"]
            # Else it would be made anew from the model's config when loaded
            model.generation_config._from_model_config = False
    has_processor = not Path(adapter).is_dir() or (Path(adapter) / "processor_config.json").is_file()
    return model, UniCode2Processor.from_pretrained(adapter if has_processor else base)


__all__ = ["find_base", "is_adapter", "load_merged", "note_base"]
