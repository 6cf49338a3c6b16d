"""The codebook folder: `codebook.safetensors` and `codebook.json` (its configuration and where it comes from)."""

import json
from pathlib import Path

import torch

from ..configuration_unicode2 import UniCode2CodebookConfig
from ..quantization_unicode2 import UniCode2Codebook


def save_codebook(codebook: UniCode2Codebook, folder: str | Path, provenance: dict) -> None:
    """Writes a codebook. Each file is written under a temporary name and renamed, the JSON last."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: buffer.contiguous() for name, buffer in codebook.named_buffers()}
    config = {
        "codebook_size": len(codebook.codes),
        "codebook_dim": codebook.codes.shape[1],
        "num_cells": len(codebook.cell_centroids),
        "preview_size": 0 if codebook.previews is None else codebook.previews.shape[1],
    }
    save_file(tensors, folder / "codebook.safetensors.tmp")
    (folder / "codebook.safetensors.tmp").rename(folder / "codebook.safetensors")
    (folder / "codebook.json.tmp").write_text(json.dumps({"config": config, "provenance": provenance}, indent=2) + "\n")
    (folder / "codebook.json.tmp").rename(folder / "codebook.json")


def load_codebook(folder: str | Path) -> UniCode2Codebook:
    """Reads what `unicode2 codebook build` wrote.

    Raises `FileNotFoundError` when a file is missing and `ValueError` when the cells do not hold the codes exactly.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in ("codebook.json", "codebook.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a codebook: it has no {name}.")
    config = json.loads((folder / "codebook.json").read_text())["config"]
    codebook = UniCode2Codebook(UniCode2CodebookConfig(**config))
    codebook.load_state_dict(load_file(folder / "codebook.safetensors"))
    offsets = codebook.cell_offsets
    if offsets[0] != 0 or offsets[-1] != len(codebook.codes) or (offsets.diff() < 0).any():
        raise ValueError(
            f"The cells of {folder} go from {offsets[0].item()} to {offsets[-1].item()}, not through codes 0 to {len(codebook.codes)}."
        )
    return codebook


def load_provenance(folder: str | Path) -> dict:
    """Where a codebook comes from, as `unicode2 codebook build` noted it."""
    return json.loads((Path(folder) / "codebook.json").read_text())["provenance"]


def codebook_from_arrays(codes, cell_centroids, cell_offsets, previews=None) -> UniCode2Codebook:
    """A codebook from float32 `(K, d)` and `(K1, d)`, int64 `(K1 + 1,)` and, if any, uint8 `(K, side, side, 3)` arrays."""
    side = 0 if previews is None else previews.shape[1]
    config = UniCode2CodebookConfig(
        codebook_size=len(codes), codebook_dim=codes.shape[1], num_cells=len(cell_centroids), preview_size=side
    )
    codebook = UniCode2Codebook(config)
    arrays = {"codes": codes, "cell_centroids": cell_centroids, "cell_offsets": cell_offsets, "previews": previews}
    codebook.load_state_dict({name: torch.as_tensor(array) for name, array in arrays.items() if array is not None})
    return codebook
