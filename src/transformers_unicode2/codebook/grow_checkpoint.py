"""Grows a checkpoint with its codebook: new codes get rows of C2, new cells get scores."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from ..configuration_unicode2 import save_code


def check_checkpoint(model: str, folder: str, codebook) -> None:
    """Raises `ValueError` unless the checkpoint `model` holds the codebook of `folder` and equal thumbnail sizes."""
    name = "model.quantizer.codebook.codes"
    for file in sorted(Path(model).glob("*.safetensors")):
        with open_tensors(file) as tensors:
            if name in tensors.keys():
                codes = tensors.get_tensor(name).float()
                if codes.shape == codebook.codes.shape and (codes == codebook.codes).all():
                    return check_thumbnails(model, folder, codebook)
    raise ValueError(f"{model} does not hold the codebook {folder}; nothing was written.")


def check_thumbnails(model: str, folder: str, codebook) -> None:
    """Raises `ValueError` when the thumbnails of the checkpoint and of the codebook differ in size."""
    config = json.loads((Path(model) / "config.json").read_text())["codebook_config"]
    own, other = config.get("preview_size", 0), 0 if codebook.previews is None else codebook.previews.shape[1]
    if own != other:
        raise ValueError(
            f"The thumbnails of {model} are {own} pixels wide and those of {folder} {other}; nothing was written."
        )


def open_tensors(file: Path):
    """`safetensors.safe_open` for torch. Raises `ValueError` on a damaged file."""
    from safetensors import safe_open

    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}.") from error


def grow_checkpoint(model: str, target: Path, before, after, parents: np.ndarray) -> None:
    """Writes the checkpoint with the larger codebook, file by file. Existing text and visual ids do not change.

    Args:
        model: folder of the checkpoint; it must hold the codebook `before`.
        target: empty folder to write to.
        before, after: `UniCode2Codebook`.
        parents: int64 `(num_new,)`, the code that each new one was split from.
    """
    from safetensors.torch import load_file, save_file

    source = Path(model)
    config = json.loads((source / "config.json").read_text())
    changed = {f"model.quantizer.codebook.{name}": buffer for name, buffer in after.state_dict().items()}
    changed["visual_head.cell_offsets"] = after.cell_offsets
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copyfile(file, target / file.name)
    for file in sorted(source.glob("*.safetensors")):
        with open_tensors(file) as tensors:
            names = set(tensors.keys())
        if not names & {*changed, "model.visual_embeddings.weight", "visual_head.linear.weight"}:
            shutil.copyfile(file, target / file.name)
            continue
        state = load_file(file)
        grow_state(state, changed, before, parents, config.get("visual_head") == "two_level")
        save_file(state, target / file.name, metadata={"format": "pt"})
    config["codebook_config"] |= after.describe() | {"encoder_sha256": before.encoder_sha256}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_code(target)
    index_file = target / "model.safetensors.index.json"
    if index_file.exists():
        index = json.loads(index_file.read_text())
        index["metadata"]["total_size"] = sum(file.stat().st_size for file in target.glob("*.safetensors"))
        index_file.write_text(json.dumps(index, indent=2) + "\n")


def grow_state(state: dict, changed: dict, before, parents: np.ndarray, two_level: bool) -> None:
    """Replaces the tensors `changed` of a state dict, and appends rows for new codes and new cells to the others.

    A new code gets a copy of its parent's row of C2. A new cell gets a copy of the scores of its parents' cell.
    """
    import torch

    num_cells, rows = len(before.cell_centroids), torch.from_numpy(parents)
    cells = torch.from_numpy(np.searchsorted(before.cell_offsets.numpy(), parents, side="right") - 1).unique()
    for name, tensor in state.items():
        if name in changed:
            state[name] = changed[name].clone()
        elif name == "model.visual_embeddings.weight":
            state[name] = torch.cat([tensor, tensor[rows]])
        elif name.startswith("visual_head.linear.") and two_level:
            # The scores of the cells are the last rows.
            state[name] = torch.cat([tensor, tensor[len(tensor) - num_cells + cells]])
