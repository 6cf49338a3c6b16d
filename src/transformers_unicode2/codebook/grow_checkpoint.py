"""A checkpoint for a codebook that was grown: a row of C2, and scores, for all that is new."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from ..configuration_unicode2 import save_code


def check_checkpoint(model: str, folder: str, codebook) -> None:
    """Raises `ValueError` unless a checkpoint holds the codebook of a folder, with thumbnails of the same size."""
    name = "model.quantizer.codebook.codes"
    for file in sorted(Path(model).glob("*.safetensors")):
        with open_tensors(file) as tensors:
            if name in tensors.keys():
                codes = tensors.get_tensor(name).float()
                if codes.shape == codebook.codes.shape and (codes == codebook.codes).all():
                    return check_thumbnails(model, folder, codebook)
    raise ValueError(f"{model} does not hold the codebook {folder}; nothing was written.")


def check_thumbnails(model: str, folder: str, codebook) -> None:
    """Raises `ValueError` when the thumbnails of the checkpoint are of another size than those of the codebook."""
    config = json.loads((Path(model) / "config.json").read_text())["codebook_config"]
    own, other = config.get("preview_size", 0), 0 if codebook.previews is None else codebook.previews.shape[1]
    if own != other:
        raise ValueError(
            f"The thumbnails of {model} are {own} pixels wide and those of {folder} {other}; nothing was written."
        )


def open_tensors(file: Path):
    """`safetensors.safe_open` for torch; raises `ValueError` on a damaged file."""
    from safetensors import safe_open

    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}.") from error


def grow_checkpoint(model: str, target: Path, before, after, parents: np.ndarray) -> None:
    """A checkpoint with the larger codebook: C2 gets a row for each new code, a copy of its parent's, so do the scores of new cells.

    Works file by file. Text ids and the visual ids that there are stay as they are.

    Args:
        model: folder of the checkpoint; it has to hold the codebook `before`.
        target: empty folder to write to.
        before, after: `UniCode2Codebook`.
        parents: int64 `(num_new,)`, the code that each new one was split from.
    """
    import torch
    from safetensors.torch import load_file, save_file

    source = Path(model)
    config = json.loads((source / "config.json").read_text())
    rows = torch.from_numpy(parents)
    first_cell = len(before.cell_centroids)
    cells = torch.from_numpy(np.searchsorted(before.cell_offsets.numpy(), parents, side="right") - 1).unique()
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
        for name in state:
            if name in changed:
                state[name] = changed[name].clone()
            elif name == "model.visual_embeddings.weight":
                state[name] = torch.cat([state[name], state[name][rows]])
            elif name.startswith("visual_head.linear.") and config.get("visual_head") == "two_level":
                state[name] = torch.cat([state[name], state[name][len(state[name]) - first_cell + cells]])
        save_file(state, target / file.name, metadata={"format": "pt"})
    config["codebook_config"] |= after.describe() | {"encoder_sha256": before.encoder_sha256}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_code(target)
    if (source / "model.safetensors.index.json").exists():
        index = json.loads((source / "model.safetensors.index.json").read_text())
        index["metadata"]["total_size"] = sum(file.stat().st_size for file in target.glob("*.safetensors"))
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
