"""Data sets of the training stages: parquet with images and texts, and the pre-tokenized form of it."""

import glob
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import config
from PIL import Image, ImageOps

from ..files import explained
from ..image_tables import ImageTable, read_cell
from ..images_unicode2 import decode_image
from ..tokens import find_tables, hash_rows, hash_table, read_note
from .folders import open_table

# The command was here, and scripts still call it here
from .tokenize import main, make_parser  # noqa: F401

# Rows that are held at a time
BATCH = 64


def check_same_rows(images: str, tokens: list[Path], split: str = "train") -> None:
    """Raises `ValueError` unless the files with codes were made of the tables in the folder `images`.

    Files that do not say what they were made of are taken as they are.
    """
    made_of = [note["data"].values() for note in map(read_note, tokens) if note is not None]
    if made_of and any(hash_rows(open_table(images, split, False)) not in digests for digests in made_of):
        raise ValueError(
            f"{tokens[0].parent} was not made of what {images} holds now; tokenize it again, into another folder."
        )


def load_images(folder: str, split: str = "train"):
    """Opens `{split}-*.parquet` of a folder, whose tables may keep images in any way that `ImageTable` reads.

    Returns a `datasets.Dataset` with the images as compressed bytes, `{"bytes": ..., "path": None}`, and a column `row`
    that counts through all files. Raises `ValueError`, with file and row, when there is no image.
    """
    from datasets import Dataset
    from datasets import Image as ImageColumn

    tables = [ImageTable(file) for file in find_tables(folder, split, "--data")]
    if are_plain(tables):
        rows = load_files([table.file for table in tables]).cast_column("image", ImageColumn(decode=False))
    else:
        made_of = {"files": [str(table.file) for table in tables], "digest": [hash_table(t.file) for t in tables]}
        with explained(config.HF_DATASETS_CACHE):
            rows = Dataset.from_generator(read_contents, find_features(tables), gen_kwargs=made_of, split=split)
    return rows.add_column("row", np.arange(len(rows)))


def are_plain(tables: list[ImageTable]) -> bool:
    """Whether all tables keep the contents of images in one way, which `datasets` reads."""
    from pyarrow import types

    kinds = {str(table.schema.field("image").type): table.schema.field("image").type for table in tables}
    kind = next(iter(kinds.values()))
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if len(kinds) > 1 or not types.is_binary(kind):
        return False
    return not any(table.may_lack_contents() or table.has_empty_contents() for table in tables)


def find_features(tables: list[ImageTable]):
    """The columns of the first table that has rows, the images as compressed bytes."""
    from datasets import Features
    from datasets import Image as ImageColumn

    table = next((table for table in tables if len(table)), tables[0])
    return Features({**Features.from_arrow_schema(table.schema), "image": ImageColumn(decode=False)})


def read_contents(files: list[str], digest: list[str]) -> Iterator[dict]:
    """The rows of tables with the contents of their images. `digest`, of the files, tells `datasets` what it has
    already.
    """
    for file in map(Path, files):
        row = 0
        for batch in ImageTable(file).batches(BATCH):
            for values in batch.to_pylist():
                try:
                    content = read_cell(values["image"], file.parent, absolute=True)
                except ValueError as error:
                    raise ValueError(f"{file} row {row}: {error}.") from error
                yield {**values, "image": {"bytes": content, "path": None}}
                row += 1


def load_files(files: list[Path]):
    """Opens parquet files, whose names may have any characters, as one data set. Raises `ValueError` without a row."""
    from datasets import load_dataset
    from pyarrow.parquet import read_metadata

    # The reader of `datasets` fails on a file without rows
    filled = [glob.escape(str(file)) for file in files if read_metadata(file).num_rows]
    if not filled:
        raise ValueError(f"{files[0].parent} has {len(files)} files and not one row in them.")
    with explained(config.HF_DATASETS_CACHE):
        return load_dataset("parquet", data_files=filled, split="train")


def load_images_with_codes(folder: str, tokens: str, split: str = "train"):
    """`load_images` with the `codes` of each image, which `unicode2 tokenize` wrote to the folder `tokens`.

    A row that was refused there is left out. Raises `ValueError` when the codes are not those of one image a row.
    """
    from datasets import Dataset, concatenate_datasets

    images, chats = load_images(folder, split), load_files(find_tables(tokens, split, "`tokens`"))
    places, counts = np.array(chats["row"]), np.array([len(codes) for codes in chats["codes"]])
    if len(places) and (places.max() >= len(images) or len(np.unique(places)) < len(places) or (counts != 1).any()):
        raise ValueError(
            f"{tokens} has {len(chats)} chats of {counts.sum()} images, and {folder} {len(images)} rows; there must be "
            "one chat of one image for each row."
        )
    codes = Dataset.from_dict({"codes": [image for (image,) in chats["codes"]]})
    return concatenate_datasets([images.select(places), codes], axis=1)


def pixel_collator(rows: list[dict], size: int | None = None) -> dict[str, torch.Tensor]:
    """Batches images of one size, rows of `load_images`.

    With `size`, the shorter side of each image becomes that many pixels, and the middle of the longer one is kept.

    Returns `pixel_values`, float32 `(batch_size, 3, height, width)` in [-1, 1].
    Raises `ValueError` with its row when an image cannot be read, or when they are of several sizes.
    """
    images = [decode_row(row) for row in rows]
    if size is not None:
        images = [ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS) for image in images]
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise ValueError(
            f"Images of one size are needed; these are {sizes[0]} and {sizes[-1]} pixels wide and high. Set "
            "`image_size`."
        )
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return {"pixel_values": pixels.permute(0, 3, 1, 2).float() / 127.5 - 1}


def decode_row(row: dict):
    """The RGB image of a row of `load_images`. Raises `ValueError` with the number of the row."""
    try:
        return decode_image(row["image"]["bytes"])
    except ValueError as error:
        raise ValueError(f"Row {row['row']} of the data: {error}") from error
