"""Parquet files of images and texts, and of tokenized chats, as data sets."""

import glob
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import config
from PIL import Image

from ..files import explained
from ..image_tables import ImageTable, read_cell
from ..images_unicode2 import decode_image
from ..tokens import find_tables, hash_table

# The command was here, and scripts still call it here
from .tokenize import main, make_parser  # noqa: F401

# Rows that are held at a time
BATCH = 64


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


def pixel_collator(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Batches images of one size, rows of `load_images`.

    Returns `pixel_values`, see `stack_pixels`.
    Raises `ValueError` with its row when an image cannot be read, or when they are of several sizes.
    """
    images = [decode_row(row) for row in rows]
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise ValueError(f"Images of one size are needed; these are {sizes[0]} and {sizes[-1]} pixels wide and high.")
    return {"pixel_values": stack_pixels(images)}


def stack_pixels(images: list[Image.Image]) -> torch.Tensor:
    """RGB images of one size to float32 `(batch_size, 3, height, width)` in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def decode_row(row: dict):
    """The RGB image of a row of `load_images`. Raises `ValueError` with the number of the row."""
    try:
        return decode_image(row["image"]["bytes"])
    except ValueError as error:
        raise ValueError(f"Row {row['row']} of the data: {error}") from error
