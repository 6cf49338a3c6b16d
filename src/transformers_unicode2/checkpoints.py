"""Checkpoints on disk: whether they are whole, which files hold their weights, and what loading one reports."""

import json
import re
from pathlib import Path

from huggingface_hub import snapshot_download

from .loading_unicode2 import check_files


def check_checkpoint(name: str, *files: str) -> None:
    """Raises `FileNotFoundError` when the folder `name` lacks `config.json` or one of `files`, `ValueError` when a file
    is damaged.

    A name that is not a folder may be one on the Hub.
    """
    missing = [file for file in ("config.json", *files) if not (Path(name) / file).is_file()]
    if Path(name).is_dir() and missing:
        raise FileNotFoundError(f"{name} is no whole checkpoint: it has no {missing[0]}; copy or assemble it again.")
    check_files(Path(name))
    index = Path(name, "model_index.json")
    for part in json.loads(index.read_text()) if index.is_file() else ():
        check_files(Path(name, part))


def find_safetensors(source: str) -> list[Path]:
    """The safetensors files of a folder, or of a Hub repository, downloaded. Raises `ValueError` if it has none."""
    folder = Path(source)
    if not folder.is_dir():
        patterns = ["*.safetensors", "*.safetensors.index.json"]
        folder = Path(snapshot_download(source, allow_patterns=patterns, ignore_patterns=["*/*"]))
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    files = sorted(folder / name for name in names)
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ValueError(f"{source} lacks {', '.join(absent)}; the weights of a model must be in safetensors.")
    return files


def check_encoder_keys(info: dict, source: str) -> None:
    """Raises `ValueError` when loading an encoder left weights at random, or ignored layers that the file holds.

    Args:
        info (`dict`): what `from_pretrained(output_loading_info=True)` reports.
        source (`str`): where the encoder comes from, for the message.
    """
    layers = r"(vision_model\.)?(encoder|embeddings)\."
    missing = sorted(info["missing_keys"])
    surplus = sorted(key for key in info["unexpected_keys"] if re.match(layers, key))
    if missing:
        raise ValueError(
            f"The encoder {source} lacks {len(missing)} weights, which would be random; the first is {missing[0]}."
        )
    if surplus:
        raise ValueError(
            f"The encoder {source} holds {len(surplus)} weights that its configuration has no place for; the first is "
            f"{surplus[0]}."
        )


__all__ = ["check_checkpoint", "check_encoder_keys", "find_safetensors"]
