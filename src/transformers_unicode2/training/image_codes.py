"""The second pass of `unicode2 tokenize`: each image once through the quantizer, in shards of codes on disk.

Pictures are decoded and resized in worker processes, ahead of the encoder. Shards and batches are cut by the numbers of
the images alone, since rounding in an encoder may depend on what else is in its batch. So the codes do not depend on
the numbers of processes and workers.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..files import whole_file, write_file
from ..images_unicode2 import one_line
from ..pixels_unicode2 import crop_square
from ..record import hash_file
from .row_index import RowIndex
from .sources import read_image

# Images of a shard of codes. A run that is killed loses one shard of each process at most.
IMAGES_PER_SHARD = 128


class ImageReader:
    """Fetches images by ascending numbers, undecoded. Rows are read on, so tables without a way to a row are read once.

    Args:
        index (`RowIndex`): says where an image is.
    """

    def __init__(self, index: RowIndex):
        self.index, self.job, self.rows, self.row = index, None, iter(()), None

    def fetch(self, number: int) -> dict:
        """The record of an image, for `read_image`. Raises `ValueError` when it is not what it was when indexed."""
        image = self.index.images[number]
        if image["path"] is not None:
            return {"path": image["path"], "bytes": None, "key": image["key"]}
        source = self.index.jobs[image["job"]].source
        if self.job != image["job"] or self.row is None or self.row.number > image["row"]:
            self.job, self.rows = image["job"], source.rows(image["row"])
            self.row = next(self.rows, None)
        while self.row is not None and self.row.number < image["row"]:
            self.row = next(self.rows, None)
        images = [] if self.row is None or isinstance(self.row, ValueError) else self.row.images
        found = images[image["position"]] if image["position"] < len(images) else {"bytes": None}
        if hashlib.sha256(found["bytes"] or b"").hexdigest() != image["key"]:
            raise ValueError(
                f"Row {image['row']} of {source.name} changed while it was read; run the command again with another "
                "--output."
            )
        return found


class Preprocessing:
    """Images to pixels: a data set whose indices are numbers of images with their records, read in worker processes."""

    def __init__(self, image_processor, center_crop: bool = False):
        self.image_processor, self.center_crop = image_processor, center_crop

    def __getitem__(self, item: tuple[int, dict]) -> tuple[int, torch.Tensor | None, str | None]:
        number, image = item
        try:
            picture = read_image(image)
            picture = crop_square(picture) if self.center_crop else picture
            pixels = self.image_processor(picture, return_tensors="pt")["pixel_values"][0]
            if image["path"] is not None and hash_file(image["path"]) != image["key"]:
                raise ValueError(f"{one_line(image['path'])} changed while the data were read")
            return number, pixels, None
        except ValueError as error:
            return number, None, str(error).rstrip(".")


def collate(items: list[tuple]) -> tuple[list[int], torch.Tensor | None, dict[int, str]]:
    """Numbers and pixels of the images that can be read, and the reasons by the numbers of the others."""
    numbers, pixels = [number for number, pixels, _ in items if pixels is not None], [item[1] for item in items]
    pixels = [image for image in pixels if image is not None]
    return numbers, torch.stack(pixels) if pixels else None, {item[0]: item[2] for item in items if item[1] is None}


def read_batches(
    index: RowIndex,
    spans: list[tuple[int, int]],
    image_processor,
    batch_size: int,
    num_workers: int,
    center_crop: bool = False,
):
    """Yields, for each batch of each span of images, what `collate` returns."""
    reader = ImageReader(index)

    def batches() -> Iterator[list[tuple[int, dict]]]:
        for start, stop in spans:
            for first in range(start, stop, batch_size):
                yield [(number, reader.fetch(number)) for number in range(first, min(first + batch_size, stop))]

    count = sum(-(-(stop - start) // batch_size) for start, stop in spans)
    # One batch is sooner read than a worker starts.
    num_workers = min(num_workers, count) if count > 1 else 0
    options = {"num_workers": num_workers, "pin_memory": torch.cuda.is_available(), "collate_fn": collate}
    yield from DataLoader(Preprocessing(image_processor, center_crop), batch_sampler=batches(), **options)


def encode_images(
    index: RowIndex,
    quantizer,
    image_processor,
    batch_size: int,
    num_workers: int,
    state,
    center_crop: bool = False,
) -> None:
    """
    Writes the shards of codes that are not there yet, of this process's share of all images.

    Args:
        index: of all images.
        quantizer: `UniCode2Quantizer`, on its device.
        image_processor: its image processor.
        batch_size: images that the encoder reads at a time.
        num_workers: processes that decode and resize, of each process.
        state: `PartialState`.
        center_crop: whether the middle square of each image is encoded.
    """
    from tqdm import tqdm

    num_images, limits = len(index.images), [*range(0, len(index.images), IMAGES_PER_SHARD), len(index.images)]
    spans = list(pairwise(limits)) if num_images else []
    # One run of shards for each process, so that it reads its part of the tables once
    first, last = (len(spans) * (state.process_index + step) // state.num_processes for step in (0, 1))
    keys = {shard: hash_keys(index, *spans[shard]) for shard in range(first, last)}
    missing = [shard for shard, digest in keys.items() if not is_made_of(codes_file(index.work, shard), digest)]
    if state.is_main_process and len(missing) < len(keys):
        print(f"{index.work.parent} resumes: {len(keys) - len(missing)} of {len(keys)} shards of codes are there")
    todo = [spans[shard] for shard in missing]
    batches = read_batches(index, todo, image_processor, batch_size, num_workers, center_crop)
    with tqdm(total=num_images, unit="image", desc="encoding", disable=not state.is_main_process) as bar:
        for shard, (start, stop) in zip(missing, todo):
            settle_bar(bar, index.work)
            codes, errors = encode_span(batches, start, stop, quantizer, batch_size, bar)
            write_codes(codes_file(index.work, shard), codes, {"images": keys[shard], "errors": errors})
        settle_bar(bar, index.work)
        while state.is_main_process and bar.n < num_images:
            time.sleep(1)
            settle_bar(bar, index.work)


def settle_bar(bar, work: Path) -> None:
    """Sets a bar to the images of all finished shards, those of other processes included."""
    bar.n = min(bar.total, IMAGES_PER_SHARD * len(list(work.glob("codes-*.npy"))))
    bar.refresh()


def codes_file(work: Path, shard: int) -> Path:
    return work / f"codes-{shard:06d}.npy"


def hash_keys(index: RowIndex, start: int, stop: int) -> str:
    """SHA-256 of the keys of the images from `start` to `stop`."""
    keys = [image["key"] for image in index.images[start:stop]]
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()


def is_made_of(file: Path, digest: str) -> bool:
    """Whether a shard of codes is there, of images whose keys have this digest. One of other images is removed."""
    if file.is_file() and json.loads(file.with_suffix(".json").read_text())["images"] != digest:
        file.unlink()
    return file.is_file()


def encode_span(
    batches: Iterator, start: int, stop: int, quantizer, batch_size: int, bar
) -> tuple[np.ndarray, dict[int, str]]:
    """The codes of the images from `start` to `stop`, `(num_images, num_image_tokens)`, and why some have none."""
    settings = quantizer.config
    kind = np.min_scalar_type(settings.codebook_config.codebook_size - 1)
    codes, errors = np.zeros((stop - start, settings.num_image_tokens), kind), {}
    for _ in range(start, stop, batch_size):
        numbers, pixels, wrong = next(batches)
        errors |= wrong
        if pixels is not None:
            pixels = pixels.to(quantizer.device, non_blocking=True)
            codes[np.array(numbers) - start] = quantizer.encode_images(pixels).cpu().numpy()
        bar.update(len(numbers) + len(wrong))
    return codes, errors


def write_codes(file: Path, codes: np.ndarray, about: dict) -> None:
    """Writes a shard of codes, and beside it what it is about: a digest of the `images`, and the `errors`."""
    write_file(file.with_suffix(".json"), json.dumps(about).encode())
    with whole_file(file) as temporary, open(temporary, "wb") as content:
        np.save(content, codes)


class ImageCodes:
    """The codes of all images by their numbers, and the reasons of those that cannot be read.

    Args:
        work (`Path`): folder of the shards.
    """

    def __init__(self, work: Path):
        self.shards = [np.load(file, mmap_mode="r") for file in sorted(work.glob("codes-*.npy"))]
        self.errors = {
            int(number): reason
            for file in sorted(work.glob("codes-*.json"))
            for number, reason in json.loads(file.read_text())["errors"].items()
        }

    def __getitem__(self, number: int) -> np.ndarray:
        """Codes of an image, `(num_image_tokens,)`."""
        return self.shards[number // IMAGES_PER_SHARD][number % IMAGES_PER_SHARD]
