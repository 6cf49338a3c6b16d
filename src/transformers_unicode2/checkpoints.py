"""Checkpoints on disk: whether they are whole, which files hold their weights, and what loading one reports."""

import json
import re
from pathlib import Path

from huggingface_hub import snapshot_download

from .loading_unicode2 import check_files


def check_checkpoint(name: str, *files: str) -> None:
    """Raises `FileNotFoundError` when the folder `name` lacks `config.json` or one of `files`, `ValueError` when a file
    is damaged, or when it is an adapter.

    A name that is not a folder may be one on the Hub.
    """
    check_no_adapter(name)
    missing = [file for file in ("config.json", *files) if not (Path(name) / file).is_file()]
    if missing == ["config.json"] and (Path(name) / "codebook.json").is_file():
        raise FileNotFoundError(f"{name} is a codebook; `unicode2 init` makes a checkpoint of it.")
    if Path(name).is_dir() and missing:
        raise FileNotFoundError(f"{name} is no whole checkpoint: it has no {missing[0]}; copy or assemble it again.")
    check_files(Path(name))
    index = Path(name, "model_index.json")
    for part in json.loads(index.read_text()) if index.is_file() else ():
        check_files(Path(name, part))


def check_no_adapter(name: str) -> None:
    """Raises `ValueError` when the folder `name` is an adapter, where a whole checkpoint is needed."""
    if (Path(name) / "adapter_config.json").is_file():
        raise ValueError(
            f"{name} is an adapter, and a whole checkpoint is needed; `unicode2 merge {name} --output DIR` makes one."
        )


def find_safetensors(source: str) -> list[Path]:
    """The safetensors files of a folder, or of a Hub repository, downloaded. Raises `ValueError` if it has none."""
    folder = Path(source)
    if not folder.is_dir():
        patterns = ["*.safetensors", "*.safetensors.index.json"]
        folder = Path(snapshot_download(source, allow_patterns=patterns, ignore_patterns=["*/*"]))
    index = folder / "model.safetensors.index.json"
    # Transformers takes the single file first; an index beside it is an old one.
    has_index = index.is_file() and not (folder / "model.safetensors").is_file()
    names = set(json.loads(index.read_text())["weight_map"].values()) if has_index else {"model.safetensors"}
    files = sorted(folder / name for name in names)
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ValueError(f"{source} lacks {', '.join(absent)}; the weights of a model must be in safetensors.")
    return files


def load_model(name: str, base: str | None = None, dtype: str = "auto") -> tuple:
    """Loads a model with its processor, for use: a checkpoint, or an adapter merged into the one that it names.

    The model keeps the dtype of its checkpoint unless another one is named. It goes to the accelerator if there is one.

    Args:
        name (`str`): folder or Hub name.
        base (`str`, *optional*): of the checkpoint of an adapter, if it is not where the adapter says.
        dtype (`str` or `torch.dtype`, defaults to `"auto"`): of the weights; codebook and encoder keep their own.

    Returns:
        The `UniCode2ForConditionalGeneration` and its `UniCode2Processor`.

    Raises:
        `ValueError`: when `name` is neither, or an adapter of another checkpoint.
        `FileNotFoundError`: when a folder lacks a file.
    """
    import torch

    from .adapters import find_base, is_adapter, load_merged
    from .modeling_unicode2 import UniCode2ForConditionalGeneration
    from .processing_unicode2 import UniCode2Processor

    if is_adapter(name):
        base, _, note = find_base(name, base)
        model, processor = load_merged(name, base, note, dtype)
    else:
        if base is not None:
            raise ValueError(f"{name} is a whole checkpoint; leave --base, the checkpoint of an adapter, out.")
        check_model(name)
        model = UniCode2ForConditionalGeneration.from_pretrained(name, dtype=dtype)
        processor = UniCode2Processor.from_pretrained(name)
    device = torch.accelerator.current_accelerator(check_available=True)
    return model.to(device or "cpu").eval(), processor


def check_model(name: str) -> None:
    """Raises `ValueError` when a folder or Hub name is of no UniCode² model, `FileNotFoundError` when a file lacks."""
    from .configuration_unicode2 import UniCode2Config

    check_name(name)
    check_checkpoint(name)
    try:
        found = UniCode2Config.get_config_dict(name)[0].get("model_type")
    except OSError as error:
        raise ValueError(f"There is no folder {name}, and the Hub gives no checkpoint of this name.") from error
    if found != UniCode2Config.model_type:
        kind = f"a {found} model" if found else "of another kind"
        raise ValueError(f"{name} is no UniCode² checkpoint, but {kind}; `unicode2 init` makes one of its parts.")


def check_name(name: str) -> None:
    """Raises `ValueError` on what is neither a folder nor written as `owner/name`, as a repository on the Hub is."""
    if not Path(name).is_dir() and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ValueError(f"There is no folder {name}; give the folder of a checkpoint, or its name on the Hub.")


__all__ = ["check_checkpoint", "check_model", "find_safetensors", "load_model"]
