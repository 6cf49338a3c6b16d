"""What every loader checks: nothing that defines the codes of an image is missing, damaged, rounded or exchanged."""

import hashlib
import re
from collections.abc import Iterable

import torch
from torch import nn

AGAIN = "Copy or build it again."
# What each digest in a codebook's configuration is of: names of weights, as they end.
DIGESTS = {
    "codes_sha256": r"codebook\.codes",
    "cells_sha256": r"codebook\.cell_(?:centroids|offsets)",
    "vision_sha256": r"vision_model\..+",
}


def find_digests(tensors: dict[str, torch.Tensor], wanted: Iterable[str] = tuple(DIGESTS)) -> dict[str, str]:
    """The digests of codes, cells and encoder, as far as they are among the weights of a quantizer or a model."""
    digests = {}
    for digest in wanted:
        matches = {name: re.search(rf"(?:^|\.)({DIGESTS[digest]})$", name) for name in tensors}
        found = {match[1]: tensors[name] for name, match in matches.items() if match}
        if found and not any(tensor.is_meta for tensor in found.values()):
            digests[digest] = hash_tensors(found)
    return digests


def hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names, shapes and values, as little-endian float32 or int64, whatever dtype holds them.

    500K codes of width 1152 take 1.2 s, a third of what it takes to read them from a disk at 0.7 GB/s.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        kind, dtype = ("<f4", torch.float32) if tensor.is_floating_point() else ("<i8", torch.int64)
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        for part in tensor.detach().reshape(-1).split(2**22):
            digest.update(part.to("cpu", dtype).numpy().astype(kind, copy=False))
    return digest.hexdigest()


def check_digests(tensors: dict[str, torch.Tensor], config, source: str) -> None:
    """Raises `ValueError` when the weights of a quantizer have other digests than its codebook's configuration."""
    wanted = {name: getattr(config, name) for name in DIGESTS if getattr(config, name)}
    for digest, found in find_digests(tensors, wanted).items():
        if found != wanted[digest]:
            part = {"codes_sha256": "codes", "cells_sha256": "cells", "vision_sha256": "weights of the encoder"}[digest]
            raise ValueError(
                f"The {part} in {source} are not those that its configuration names (SHA-256 {found[:12]}, there "
                f"{wanted[digest][:12]}): they are damaged, rounded or others. If that is on purpose, set `{digest}` "
                "to null there."
            )


def check_codebook(codebook: nn.Module, source: str) -> None:
    """Raises `ValueError` on cells that do not hold the codes exactly, and on codes or centroids that are not finite.

    What is on the meta device cannot be looked at.
    """
    if codebook.codes.is_meta:
        return
    check_cells(codebook.cell_offsets, len(codebook.codes), source)
    check_finite("codes", codebook.codes, source)
    check_finite("cell centroids", codebook.cell_centroids, source)


def check_cells(offsets: torch.LongTensor, size: int, source: str) -> None:
    """Raises `ValueError` unless offsets `(num_cells + 1,)` lead through codes 0 to `size` without going back."""
    if offsets.dtype != torch.long:
        raise ValueError(f"The cell offsets of {source} are {offsets.dtype}, not whole numbers of 64 bits. {AGAIN}")
    first, last = offsets[0].item(), offsets[-1].item()
    if first != 0 or last != size:
        raise ValueError(f"The cells of {source} go from {first} to {last}, not through codes 0 to {size}. {AGAIN}")
    back = (offsets.diff() < 0).nonzero()[:, 0].tolist()
    if back:
        raise ValueError(
            f"{len(back)} of {len(offsets) - 1} cells of {source} end before they begin, the first is {back[0]}. "
            f"{AGAIN}"
        )


def check_finite(name: str, rows: torch.Tensor, source: str) -> None:
    """Raises `ValueError` when some of the rows `(num_rows, dim)` are not finite."""
    # A finite sum has finite terms, and takes one pass.
    if rows.sum().isfinite():
        return
    bad = (~rows.isfinite().all(-1)).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(rows)} {name} of {source} are not finite; the first is number {bad[0]}. {AGAIN}"
        )


def check_loaded(model, info: dict, source: str | None, want_info: bool) -> None:
    """Raises `ValueError` when a model that was loaded gives images other codes than its checkpoint, or is random.

    Args:
        model (`PreTrainedModel`): has `get_quantizer()` and a configuration with a `codebook_config`.
        info (`dict`): what loading reports.
        source (`str`, *optional*): folder or Hub name of the weights; `None` for a state dict.
        want_info (`bool`): whether the caller reads the report, so that weights may be missing.
    """
    source = "the state dict" if source is None else str(source)
    quantizer, config = model.get_quantizer(), model.config.codebook_config
    # What the names of its weights hold.
    part = "" if model is quantizer else "quantizer."
    if not want_info:
        check_keys(info, source, part)
    if getattr(model, "is_quantized", False):
        check_full_precision(quantizer, model.quantization_method.value)
    absent = {*info["missing_keys"], *(key for key, _, _ in info["mismatched_keys"])}
    if not any("codebook." in key for key in absent):
        check_codebook(quantizer.codebook, source)
        check_head(model, quantizer.codebook, absent, source)
    if not any(part in key for key in absent):
        check_digests(quantizer.state_dict(), config, source)


def check_keys(info: dict, source: str, part: str) -> None:
    """Raises `ValueError` on weights that loading did not find, and on those of the quantizer that have no place.

    The names of the quantizer's weights hold `part`. A weight of another size has no place either.
    """
    missing, surplus = sorted(info["missing_keys"]), sorted(key for key in info["unexpected_keys"] if part in key)
    others = sorted(row for row in info["mismatched_keys"] if part in row[0])
    codebook = [key for key in missing if "codebook." in key]
    if any(key.endswith("codebook.codes") for key in codebook):
        raise ValueError(
            f"The checkpoint has no codebook: {', '.join(codebook)} not found in {source}. Build one with "
            "`unicode2 codebook build`."
        )
    if missing:
        raise ValueError(
            f"In {source} {len(missing)} weights are missing, which would be random; the first is {missing[0]}. "
            f"{AGAIN} `output_loading_info=True` loads it all the same."
        )
    if surplus:
        raise ValueError(
            f"In {source} are {len(surplus)} weights of the frozen quantizer that its configuration has no place for; "
            f"the first is {surplus[0]}. Give it the configuration that it was saved with."
        )
    if others:
        name, stored, expected = others[0]
        raise ValueError(
            f"{len(others)} weights of the frozen quantizer in {source} have another size, which no option may ignore; "
            f"the first is {name}, {tuple(stored)} there and {tuple(expected)} in the configuration."
        )


def check_head(model: nn.Module, codebook: nn.Module, absent: set[str], source: str) -> None:
    """Raises `ValueError` when a two-level visual head has other cells than the codebook."""
    cells = dict(model.named_buffers()).get("visual_head.cell_offsets")
    if cells is None or "visual_head.cell_offsets" in absent or cells.is_meta or codebook.cell_offsets.is_meta:
        return
    wrong = (cells.cpu() != codebook.cell_offsets.cpu()).sum().item()
    if wrong:
        raise ValueError(
            f"{wrong} of {len(cells)} cell offsets of the visual head of {source} are not the codebook's. {AGAIN}"
        )


def check_full_precision(quantizer: nn.Module, method: str) -> None:
    """Raises `ValueError` when a weight of the frozen encoder has been quantized."""
    weights = dict(quantizer.named_parameters())
    changed = [name for name, w in weights.items() if type(w) is not nn.Parameter or not w.is_floating_point()]
    if changed:
        raise ValueError(
            f"{len(changed)} of {len(weights)} weights of the frozen encoder would be quantized by {method}, which "
            f"changes the codes; the first is {changed[0]}. Name `vision_model` among the modules that it leaves "
            "alone, or quantize another way."
        )
