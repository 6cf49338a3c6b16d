"""Data sets of the training stages: parquet with images and texts, and the pre-tokenized form of it."""

import glob
from pathlib import Path

import numpy as np
import torch

from ..files import explained
from ..image_tables import ImageTable, read_cell
from ..images_unicode2 import decode_image
from .tokens import find_tables


def load_images(folder: str, split: str = "train"):
    """Opens `{split}-*.parquet` of a folder with the images as compressed bytes, also those that a table keeps by path.

    Raises `ValueError`, with file or row, when there is no image.
    """
    from datasets import Features, Image

    tables = [ImageTable(file) for file in find_tables(folder, split, "--data")]
    rows = load_rows(folder, split)
    if not any(table.may_lack_contents() for table in tables):
        return rows.cast_column("image", Image(decode=False))
    if isinstance(rows.features["image"], Image):
        rows = rows.cast_column("image", Image(decode=False))

    def fetch(row: dict, index: int) -> dict:
        try:
            return {"image": {"bytes": read_cell(row["image"], Path(folder), absolute=True), "path": None}}
        except ValueError as error:
            raise ValueError(f"{folder} row {index} of all {split}-*.parquet: {error}.") from error

    features = Features({**rows.features, "image": Image(decode=False)})
    return rows.map(fetch, with_indices=True, features=features, load_from_cache_file=False, desc="reading images")


def load_rows(folder: str, split: str):
    """Opens `{split}-*.parquet` of a folder, whose name may have any characters."""
    from datasets import config, load_dataset

    with explained(config.HF_DATASETS_CACHE):
        return load_dataset("parquet", data_files=f"{glob.escape(str(folder))}/{split}-*.parquet", split="train")


def load_images_with_codes(folder: str, tokens: str, split: str = "train"):
    """`load_images` with the `codes` of the same rows, which `unicode2 tokenize` wrote to the folder `tokens`."""
    from datasets import concatenate_datasets

    images, codes = load_images(folder, split), load_rows(tokens, split).select_columns("codes")
    if len(images) != len(codes):
        raise ValueError(f"{folder} has {len(images)} rows and {tokens} {len(codes)}; they must be the same rows.")
    return concatenate_datasets([images, codes], axis=1)


def pixel_collator(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Batches images of one size, rows of `load_images`.

    Returns `pixel_values`, float32 `(batch_size, 3, height, width)` in [-1, 1].
    Raises `ValueError` when an image cannot be read, or they are of several sizes.
    """
    images = [decode_image(row["image"]["bytes"]) for row in rows]
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise ValueError(f"Images of one size are needed; these are {sizes[0]} and {sizes[-1]} pixels wide and high.")
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return {"pixel_values": pixels.permute(0, 3, 1, 2).float() / 127.5 - 1}
