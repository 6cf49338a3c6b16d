"""The codebook folder: `codebook.safetensors`, `codebook.json` (configuration, provenance) and a card, `README.md`."""

import json
from pathlib import Path

import torch

from ..configuration_unicode2 import UniCode2CodebookConfig, check_codebook_config, check_num_cells
from ..files import make_folders, whole_file, write_file
from ..loading_unicode2 import check_codebook, check_digests
from ..quantization_unicode2 import UniCode2Codebook
from .features import Encoder

# The dtypes that each buffer may be stored in. The codes are rounded to bfloat16.
STORED_AS = {torch.float32: ("F32", "BF16", "F16"), torch.int64: ("I64",), torch.uint8: ("U8",)}

# Entries of a build's record that the card leaves out: local paths, and entries that are no options.
NOT_IN_CARD = ("images", "encoder", "images_sha256", "encoder_sha256", "products")

CARD = """---
tags: [unicode2, codebook]
---

# A codebook of {codebook_size:,} codes

Codes of width {codebook_dim} in {num_cells:,} cells, for UniCode², built from the patch features of {num_images:,}
images by

    {commands}

**The encoder in {dtype} defines the ids**: another encoder or dtype gives other ids where two codes are about equally
near. A checkpoint keeps the encoder in {encoder_dtype} and this codebook in float32.{added}

{statistics}
"""


def save_codebook(codebook: UniCode2Codebook, folder: str | Path, provenance: dict) -> None:
    """Writes a codebook. Both files get temporary names and are then renamed, the JSON last.

    Raises `NotWrittenError` when there is no room; the files that were there stay.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    make_folders(folder)
    tensors = {name: buffer.contiguous() for name, buffer in codebook.named_buffers()}
    config = codebook.describe()
    config["encoder_sha256"] = config["encoder_sha256"] or provenance.get("command", {}).get("encoder_sha256")
    content = json.dumps({"config": config, "provenance": provenance}, indent=2) + "\n"
    write_file(folder / "README.md", make_card(config, provenance).encode())
    with whole_file(folder / "codebook.json") as description, whole_file(folder / "codebook.safetensors") as weights:
        description.write_text(content)
        save_file(tensors, weights)


def make_card(config: dict, provenance: dict) -> str:
    """The text of a codebook's card."""
    command = provenance.get("command", {})
    options = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for name, value in command.items()
        if name not in NOT_IN_CARD and value is not None and value is not False
    ]
    grown = provenance.get("grown", [])
    added = sum(report["added"] for report in grown)
    places = ["--images IMAGES", "--encoder ENCODER", "--output OUTPUT"]
    commands = ["build " + " ".join(places + options), *(f"grow --add {report['added']}" for report in grown)]
    return CARD.format(
        **config,
        added=f" {added:,} of the codes were added by `unicode2 codebook grow`." if added else "",
        num_images=provenance.get("num_images", 0),
        commands="\n    ".join(f"unicode2 codebook {command}" for command in commands),
        dtype=command.get("dtype", "float32"),
        statistics="\n".join(list_statistics(provenance)),
    )


def list_statistics(provenance: dict) -> list[str]:
    """Lines of the table of a card: of a grown codebook, what its last growth changed on images not used for it."""
    if provenance.get("grown"):
        last = provenance["grown"][-1]
        head = ["| of images that it was not grown on | before the last growth | now |", "| --- | ---: | ---: |"]
        return head + [
            f"| {name} | {value:.5g} | {last['after'][name]:.5g} |" for name, value in last["before"].items()
        ]
    scope = provenance.get("statistics_of", "nearest code")
    head = [f"| of the features that it was built from ({scope}) | |", "| --- | ---: |"]
    return head + [f"| {name} | {value:.5g} |" for name, value in provenance.get("statistics", {}).items()]


def load_codebook(folder: str | Path) -> UniCode2Codebook:
    """Reads a codebook that `unicode2 codebook build` wrote.

    Raises `FileNotFoundError` when a file is missing. Raises `ValueError` when one is damaged or they do not fit
    together; see also `check_codebook`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in ("codebook.json", "codebook.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a codebook: it has no {name}.")
    config = read_config(folder)
    weights = folder / "codebook.safetensors"
    try:
        check_tensors(weights, config)
        codebook = UniCode2Codebook(config)
        codebook.load_state_dict(load_file(weights))
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged: {str(error).strip().splitlines()[0]}") from error
    check_codebook(codebook, str(folder))
    check_digests({f"codebook.{name}": buffer for name, buffer in codebook.named_buffers()}, config, str(folder))
    return codebook


def read_config(folder: Path) -> UniCode2CodebookConfig:
    """The configuration of a codebook. Raises `ValueError` when `codebook.json` lacks a field or has an unknown one."""
    config, file = read_description(folder, "config"), folder / "codebook.json"
    odd = [f"lacks {name}" for name in ("codebook_size", "codebook_dim", "num_cells") if name not in config]
    unknown = [name for name in config if name not in UniCode2CodebookConfig.__annotations__]
    odd += [f"has {name!r}, which is not known here" for name in unknown]
    if odd:
        raise ValueError(f"{file} is damaged or of a later version: its config {odd[0]}.")
    command = load_command(folder)
    config = {"encoder_sha256": command.get("encoder_sha256"), **config}
    try:
        check_codebook_config(config)
        check_num_cells(config["num_cells"], config["codebook_size"])
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    return UniCode2CodebookConfig(**config)


def check_tensors(file: Path, config: UniCode2CodebookConfig) -> None:
    """Raises `ValueError` unless a file holds the buffers of a codebook with their shapes and dtypes. Reads no data."""
    from safetensors import safe_open

    with torch.device("meta"):
        expected = dict(UniCode2Codebook(config).named_buffers())
    with safe_open(file, framework="pt") as tensors:
        stored = {name: tensors.get_slice(name) for name in tensors.keys()}
    odd = sorted(expected.keys() ^ stored.keys())
    if odd:
        raise ValueError(
            f"{file} {'lacks' if odd[0] in expected else 'also holds'} {odd[0]}, which contradicts codebook.json."
        )
    for name, buffer in expected.items():
        shape, dtype = tuple(stored[name].get_shape()), stored[name].get_dtype()
        wanted = tuple(buffer.shape)
        if shape != wanted or dtype not in STORED_AS[buffer.dtype]:
            raise ValueError(
                f"{name} of {file} is {dtype} {shape}; codebook.json makes it {STORED_AS[buffer.dtype][0]} {wanted}."
            )


def read_description(folder: str | Path, part: str) -> dict:
    """The part `"config"` or `"provenance"` of `codebook.json`. Raises `ValueError` when the file lacks it."""
    file = Path(folder) / "codebook.json"
    try:
        description = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: it has no {part}.") from error
    if not (isinstance(description, dict) and isinstance(description.get(part), dict)):
        raise ValueError(f"{file} is damaged: it has no {part}.")
    return description[part]


def load_provenance(folder: str | Path) -> dict:
    """The provenance of a codebook, as `unicode2 codebook build` recorded it."""
    return read_description(folder, "provenance")


def load_command(folder: str | Path) -> dict:
    """The options that a codebook was built with, empty if unknown. Raises `ValueError` when they are damaged."""
    command = load_provenance(folder).get("command", {})
    if not isinstance(command, dict):
        raise ValueError(f"{Path(folder) / 'codebook.json'} is damaged: its command is {command!r}.")
    for name in ("encoder", "encoder_sha256", "dtype"):
        if not isinstance(command.get(name, ""), (str, type(None))):
            raise ValueError(f"{Path(folder) / 'codebook.json'} is damaged: {name} is {command[name]!r}.")
    return command


def load_encoder(folder: str | Path, codebook: UniCode2Codebook, path: str | None = None) -> Encoder:
    """Loads the encoder that a codebook was built with, in the same dtype, on a GPU if there is one.

    `path` defaults to the recorded place. Raises `ValueError` when another encoder is there, or when no place is known.
    """
    command = load_command(folder)
    path = path or command.get("encoder")
    if path is None:
        raise ValueError(f"{Path(folder) / 'codebook.json'} does not name the encoder of the codebook; give --encoder.")
    encoder = Encoder(path, command.get("dtype", "float32"), "cuda" if torch.cuda.is_available() else "cpu")
    if encoder.dim != codebook.codes.shape[1]:
        raise ValueError(
            f"The encoder {path} has features of width {encoder.dim}, "
            f"the codebook codes of width {codebook.codes.shape[1]}."
        )
    known = command.get("encoder_sha256")
    if known and known != encoder.fingerprint():
        raise ValueError(
            f"The encoder {path} is not the one that {folder} was built with "
            f"(SHA-256 {encoder.fingerprint()[:12]} now, {known[:12]} then)."
        )
    return encoder


def codebook_from_arrays(
    codes, cell_centroids, cell_offsets, previews=None, encoder_dtype: str = "float32"
) -> UniCode2Codebook:
    """A codebook that shares the memory of the given arrays or tensors.

    Args:
        codes: float32 `(codebook_size, codebook_dim)`.
        cell_centroids: float32 `(num_cells, codebook_dim)`.
        cell_offsets: int64 `(num_cells + 1,)`.
        previews: uint8 `(codebook_size, side, side, 3)`, or `None`.
        encoder_dtype: see `UniCode2CodebookConfig`.
    """
    side = 0 if previews is None else previews.shape[1]
    config = UniCode2CodebookConfig(
        codebook_size=len(codes),
        codebook_dim=codes.shape[1],
        num_cells=len(cell_centroids),
        preview_size=side,
        encoder_dtype=encoder_dtype,
    )
    codebook = UniCode2Codebook(config)
    arrays = {"codes": codes, "cell_centroids": cell_centroids, "cell_offsets": cell_offsets, "previews": previews}
    arrays = {name: torch.as_tensor(array) for name, array in arrays.items() if array is not None}
    codebook.load_state_dict(arrays, assign=True)
    return codebook
