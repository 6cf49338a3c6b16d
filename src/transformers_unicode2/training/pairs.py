"""Pairs of an image and its caption: codes and captions of tokenized chats, and pictures of their sources."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from ..pixels_unicode2 import crop_square
from ..tokens import CROP, hash_rows, read_note
from .messages import find_pair
from .mixtures import COLUMNS, MixturePart, open_mixture
from .sources import Row, Source, open_source, read_image
from .templates import Task

# Of a row that is no chat, its picture alone matters here
PICTURE = Task(user="{image}", assistant="{caption_prompt}")


def open_pairs(parts: list[MixturePart], seed: int, option: str):
    """
    The pairs of a mixture, in the order of their sources and rows.

    Args:
        parts: as of `find_parts`.
        seed: of the rows that a part with a fraction gives.
        option: where they were given, for messages.

    Returns:
        `datasets.Dataset` with the columns `codes`, a list of integers, `caption`, `source`, from 1, and `row`.

    Raises:
        `ValueError`: when no chat has one image and a text about it.
    """

    def convert(batch: dict[str, list]) -> dict[str, list]:
        found = [find_pair(*row) for row in zip(batch["messages"], batch["codes"])]
        kept = [number for number, pair in enumerate(found) if pair]
        return {
            "codes": [found[number][0] for number in kept],
            "caption": [found[number][1] for number in kept],
            **{name: [batch[name][number] for number in kept] for name in ("source", "row")},
        }

    rows = open_mixture(parts, seed, (*COLUMNS, "source", "row"))
    pairs = rows.map(convert, batched=True, remove_columns=rows.column_names, desc="building pairs")
    if not len(pairs):
        raise ValueError(f"No chat of {option} has one image and a text about it; {len(rows)} were read.")
    if len(pairs) < len(rows):
        print(f"{option}: {len(rows) - len(pairs):,} of {len(rows):,} chats are left out: not one image and its text")
    return pairs.select(np.lexsort((pairs["row"][:], pairs["source"][:])))


def open_pictures(
    data: list[str], split: str, image_root: str | None = None, image_column: str | None = None
) -> list[Source]:
    """The sources of pictures, see `open_source`."""
    options = {"image_root": image_root, "image_column": image_column}
    return [open_source(name, task=PICTURE, split=split, **options) for name in data]


def find_crop(parts: list[MixturePart], image_processor, option: str) -> bool:
    """Whether codes are those of the middle of each picture, and not of all of it, squeezed into a square.

    Raises `ValueError` when some are of one kind and some of the other.
    """
    crops = {bool((read_note(file) or {}).get(CROP)) for part in parts for file in part.files}
    if len(crops) > 1 and not image_processor.do_center_crop:
        raise ValueError(
            f"{option} has codes of whole pictures and codes of their middles (`unicode2 tokenize --center-crop`); "
            "tokenize all of them in one way."
        )
    return bool(image_processor.do_center_crop) or crops == {True}


def hash_pictures(sources: list[Source]) -> dict[str, str]:
    """SHA-256 of the files of each source, by its number, from 1."""
    return {str(number): hash_rows(source.table) for number, source in enumerate(sources, 1)}


def check_pictures(digests: dict[str, str], parts: list[MixturePart], option: str) -> None:
    """Raises `ValueError` unless the codes of all parts were made of these pictures, see `hash_pictures`.

    Files that do not say what they were made of are taken as they are.
    """
    for part in parts:
        for note in map(read_note, part.files):
            made_of = digests if note is None else note["data"]
            if len(made_of) != len(digests):
                raise ValueError(
                    f"{part.path} was made of {len(made_of)} sources, and {option} names {len(digests)}; name those "
                    "that `unicode2 tokenize` was given as --data, in the same order."
                )
            changed = [number for number, digest in made_of.items() if digests.get(number) != digest]
            if changed:
                raise ValueError(
                    f"{part.path} was not made of what source {changed[0]} of {option} holds now; name what `unicode2 "
                    "tokenize` was given as --data, in the same order, or tokenize it again."
                )


def read_pictures(sources: list[Source], places: list[tuple[int, int]]) -> Iterator[dict]:
    """
    Yields `{"path": str | None, "bytes": bytes | None}` of the picture of each row.

    Args:
        sources: as of `open_pictures`.
        places: source, from 1, and row, in ascending order.

    Raises:
        `ValueError`: when a row has not one picture.
    """
    rows, row, current = iter(()), None, 0
    for number, wanted in places:
        if not 0 < number <= len(sources):
            raise ValueError(f"The codes name source {number}, and {len(sources)} sources of pictures are given.")
        if number != current:
            current, rows = number, sources[number - 1].rows(wanted)
            row = next(rows, None)
        while row is not None and row.number < wanted:
            row = next(rows, None)
        if not isinstance(row, Row) or row.number != wanted or len(row.images) != 1:
            reason = row if isinstance(row, ValueError) else f"row {wanted} has not one picture"
            raise ValueError(f"{sources[number - 1].name}: {reason}.")
        yield row.images[0]


def decode_pictures(records: list[dict], size: int | None = None, crop: bool = True) -> list[Image.Image]:
    """
    The RGB images of records of `read_pictures`, decoded by several threads.

    Args:
        records: of the pictures.
        size: side in pixels that images are resized to. By default they stay as they are.
        crop: whether the middle square of each is kept. Else all of it is squeezed into the square, as its codes are.

    Raises:
        `ValueError`: when an image cannot be read, or without `size` they are of several sizes.
    """

    def load(record: dict) -> Image.Image:
        image = crop_square(read_image(record)) if crop else read_image(record)
        return image if size is None else image.resize((size, size), Image.Resampling.LANCZOS)

    with ThreadPoolExecutor() as threads:
        images = list(threads.map(load, records))
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise ValueError(
            f"Images of one size are needed; these are {sizes[0]} and {sizes[-1]} pixels wide and high. Set "
            "`image_size`."
        )
    return images


def read_content(record: dict) -> bytes:
    """The compressed content of a picture."""
    return Path(record["path"]).read_bytes() if record["bytes"] is None else record["bytes"]
