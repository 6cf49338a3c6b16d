"""What made the codes of a data set: noted in every parquet file with codes, and compared before anything learns."""

import hashlib
import json
import logging
from pathlib import Path

from .image_tables import ImageTable, find_inside
from .record import check_finished, hash_file, shorten

logger = logging.getLogger(__name__)

# Key in the metadata of a parquet file, so that it goes wherever the file goes
NOTE = b"unicode2"
# Of an image processor: what decides about the pixels
PIXELS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std", "do_pad", "pad_size"),
)


def hash_quantizer(model: str) -> str:
    """SHA-256 of what makes codes of pixels: encoder and codes of a checkpoint, in float32, read tensor by tensor.

    What the encoder computes by its configuration counts too, see `hash_settings`.

    Args:
        model: folder or Hub name of a UniCode² checkpoint, or of a quantizer alone.

    Raises:
        `ValueError`: when there is no quantizer in its files.
    """
    from safetensors import safe_open

    from .checkpoints import find_safetensors
    from .configuration_unicode2 import UniCode2QuantizerConfig
    from .loading_unicode2 import hash_settings

    places = {}
    for file in find_safetensors(model):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                part = name.removeprefix("model.quantizer.")
                if part.startswith("vision_model.") or part == "codebook.codes":
                    places[part] = file, name
    if "codebook.codes" not in places:
        raise ValueError(f"{model} has no codebook; give a UniCode² checkpoint.")
    config = UniCode2QuantizerConfig.from_pretrained(model)
    settings = hash_settings(config.vision_config, config.codebook_config.encoder_dtype)
    digest = hashlib.sha256(bytes.fromhex(settings))
    for part, (file, name) in sorted(places.items()):
        with safe_open(file, framework="pt") as tensors:
            tensor = tensors.get_tensor(name).float()
        digest.update(f"{part}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def hash_image_processor(model: str) -> str:
    """SHA-256 of what the image processor of a checkpoint does to pixels."""
    from transformers import AutoImageProcessor

    settings = AutoImageProcessor.from_pretrained(model).to_dict()
    kept = {name: settings.get(name) for name in PIXELS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def hash_table(file: Path) -> str:
    """SHA-256 of a parquet file, and of the image files that its rows name in the place of their content."""
    table = ImageTable(file)
    if not table.may_lack_contents():
        return hash_file(file)
    digest = hashlib.sha256(bytes.fromhex(hash_file(file)))
    for value in table.read(0, len(table)):
        name = (None if value.get("bytes") else value.get("path")) if isinstance(value, dict) else value
        found = find_inside(name, file.parent, absolute=True) if isinstance(name, str) else None
        digest.update(bytes.fromhex(hash_file(Path(found))) if found else b"")
    return digest.hexdigest()


def read_schema(file: Path):
    """The Arrow schema of a parquet file. Raises `ValueError` when it is damaged."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return parquet.read_schema(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}); delete it and run `unicode2 tokenize` again.") from error


# Of a note: whether codes are those of the middle square of each picture
CROP = "center crop"


def read_note(file: Path) -> dict | None:
    """What made the codes of a parquet file, `None` when it does not say. Raises `ValueError` when it is damaged."""
    metadata = read_schema(file).metadata or {}
    return json.loads(metadata[NOTE]) if NOTE in metadata else None


def find_tables(folder: str, split: str, option: str) -> list[Path]:
    """`{split}-*.parquet` of a folder, in the order of their names.

    Raises `ValueError` when there are none, or the folder is not finished.
    """
    # Several tasks have a folder each in one output
    for place in (Path(folder), Path(folder).absolute().parent):
        check_finished(place, split)
    files = sorted(Path(folder).glob(f"{split}-*.parquet"))
    if not files:
        raise ValueError(f"{option} {folder} has no {split}-*.parquet.")
    return files


def check_codes(files: list[Path], model: str, codebook_size: int, num_image_tokens: int) -> None:
    """Raises `ValueError` on codes that `model` does not make: by their quantizer, image processor, number or range.

    Codes that do not say what made them, as those of other programs, are taken with a warning.

    Args:
        files: parquet files with a column `codes`.
        model: folder or Hub name of a checkpoint.
        codebook_size: its number of codes, K.
        num_image_tokens: codes of an image, T.
    """
    notes = {file: read_note(file) for file in files}
    silent = [file for file, note in notes.items() if note is None]
    if silent:
        logger.warning(
            f"{len(silent)} of {len(files)} files in {files[0].parent} do not say what made their codes; they are "
            f"taken for those that the quantizer of {model} makes."
        )
    if len(silent) < len(files):
        own = {"quantizer": hash_quantizer(model), "image processor": hash_image_processor(model)}
        for file, note in notes.items():
            for name, value in own.items():
                if note is not None and note[name] != value:
                    raise ValueError(
                        f"{file} has codes of another {name} (SHA-256 {shorten(note[name])}) than that of {model} "
                        f"({shorten(value)}); tokenize its data with {model}."
                    )
    for file in files:
        check_range(file, codebook_size, num_image_tokens)


def check_range(file: Path, codebook_size: int, num_image_tokens: int) -> None:
    """Raises `ValueError` unless each image of a parquet file has `num_image_tokens` codes below `codebook_size`."""
    import pyarrow.compute as pc
    from pyarrow import parquet, types

    table, first = parquet.ParquetFile(file), 0
    kind = table.schema_arrow.field("codes").type if "codes" in table.schema_arrow.names else None
    nested = kind is not None and is_list(kind) and is_list(kind.value_type)
    if not nested or not types.is_integer(kind.value_type.value_type):
        raise ValueError(
            f"{file} needs a column codes, a list of integers for each image; it has {table.schema_arrow.names}, "
            f"codes: {kind}."
        )
    for batch in table.iter_batches(batch_size=4096, columns=["codes"]):
        rows, images = pc.list_parent_indices(batch["codes"]), batch["codes"].flatten()
        lengths, codes = pc.fill_null(pc.list_value_length(images), 0), images.flatten()
        wrong = pc.index(pc.not_equal(lengths, num_image_tokens), True).as_py()
        if wrong >= 0:
            raise ValueError(
                f"Row {first + rows[wrong].as_py()} of {file} has an image of {lengths[wrong]} codes; an image has "
                f"{num_image_tokens}."
            )
        limits = pc.min_max(codes).as_py()
        if len(codes) and (codes.null_count or limits["min"] < 0 or limits["max"] >= codebook_size):
            raise ValueError(
                f"{file} has codes from {limits['min']} to {limits['max']}, {codes.null_count} are missing; "
                f"those of this model go from 0 to {codebook_size - 1}."
            )
        first += batch.num_rows


def is_list(kind) -> bool:
    """Whether an Arrow type is one of lists, of any kind."""
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def hash_rows(table) -> str:
    """SHA-256 of the names and contents of the files that the rows of a `Tables` are in."""
    return hashlib.sha256("\n".join(table.versions).encode()).hexdigest()
