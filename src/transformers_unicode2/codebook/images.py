"""The images of a codebook as one sequence, whatever files they are stored in."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

from PIL import Image

from ..image_tables import ImageTable, read_cell
from ..images_unicode2 import MAX_PIXELS, decode_image, one_line
from .names import IMAGE_SUFFIXES, LeftOut, expand, is_hidden, once, walk
from .tars import check_tar, index_tar

# Most resident memory per pixel while an image is decoded and resized. A JPEG 2000 with transparency takes 29.3 bytes.
PIXEL_BYTES = 30
COMPRESSED_TAR = re.compile(r"\.(tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst|lz4|z|lzma))$")


class ImageSource:
    r"""
    Images in a fixed order, read one after the other from any position.

    Args:
        path (`str`): a folder, a file or a glob (`**` crosses folders) of image files; of parquet or arrow files with
            an `image` column; or of WebDataset tars. Other and hidden files are counted in `left_out`. With
            `streaming`, the name of a data set for `datasets.load_dataset`.
        limit (`int`, *optional*): use only the first N images. Required by `streaming`.
        streaming (`bool`, *optional*, defaults to `False`): read a data set in order, without a copy on disk.
        max_pixels (`int`, *optional*, defaults to `MAX_PIXELS`): larger images count as unreadable; see `PIXEL_BYTES`.

    Raises:
        `FileNotFoundError`: no images. `ValueError`: mixed kinds of files; a damaged, truncated or compressed tar or
            table; a column without images; a stream without `limit`; a `limit` below 1.
    """

    def __init__(self, path: str, limit: int | None = None, streaming: bool = False, max_pixels: int = MAX_PIXELS):
        self.path, self.streaming, self.max_pixels = path, streaming, max_pixels
        if limit is not None and limit < 1:
            raise ValueError(f"--num-images is {limit}; it must be at least 1.")
        if streaming:
            if limit is None:
                raise ValueError(f"The length of the stream {path} is unknown; give --num-images.")
            self.files, self.kind, self.items, self.left_out = [], "stream", range(limit), LeftOut()
            self.stream = Stream(path)
            self.check_stream()
        else:
            self.files, self.kind, self.left_out = find_files(path)
            self.items = self.index()
        self.length = len(self.items) if limit is None else min(limit, len(self.items))
        if self.length == 0:
            left_out = f" ({self.left_out.sentence()})" if self.left_out else ""
            raise FileNotFoundError(
                f"No images in {one_line(path)}: its {len(self.files)} {self.kind} files hold none.{left_out}"
            )

    def check_stream(self) -> None:
        """Raises `ValueError` on a damaged local tar. `datasets` would silently stop there."""
        for file in map(Path, self.stream.list_files()):
            if file.suffix.lower() == ".tar" and file.is_file():
                check_tar(file)

    def index(self) -> "list | Rows":
        """The place of each image."""
        if self.kind == "image":
            return self.files
        if self.kind == "tar":
            return [item for file in self.files for item in index_tar(file, self.left_out)]
        return Rows([ImageTable(file) for file in self.files])

    def __len__(self) -> int:
        return self.length

    def listing(self, root: str = "") -> list[str]:
        """One line per file, including those that tables name: path relative to `root`, size in bytes, mtime in ns.

        The last line is the number of images. A stream lists its name, its files and their versions: a Hub commit, an
        ETag or a modification time.
        """
        if self.streaming:
            files = self.stream.list_files()
            versions = ["\t".join(map(str, version)) for version in files.origin_metadata]
            return [self.path, *map(str, files), *versions, str(len(self))]
        tables = self.items.tables if isinstance(self.items, Rows) else []
        named = [Path(file) for table in tables if table.may_lack_contents() for file in table.files()]
        stats = [(one_line(str(file.resolve()).removeprefix(root)), file.stat()) for file in [*self.files, *named]]
        return [f"{name}\t{stat.st_size}\t{stat.st_mtime_ns}" for name, stat in stats] + [str(len(self))]

    def fingerprint(self) -> str:
        """SHA-256 of the listing. Paths are relative to the common folder, whose own name does not matter."""
        root = "" if self.streaming else os.path.commonpath([file.resolve().parent for file in self.files]) + os.sep
        return hashlib.sha256("\n".join(self.listing(root)).encode()).hexdigest()

    def read(self, start: int, stop: int) -> Iterator[tuple[str, bytes | ValueError]]:
        """Yields name and file content of the images from `start` to `stop`, or the error in place of the content."""
        if self.streaming:
            yield from self.stream.read(start, stop)
        elif self.kind == "image":
            yield from read_files(self.items[start : min(stop, len(self))])
        elif self.kind == "tar":
            yield from read_tars(self.items[start : min(stop, len(self))])
        else:
            yield from self.items.read(start, min(stop, len(self)))

    def decode(self, content: bytes | ValueError) -> Image.Image:
        """Decodes what `read` yielded to RGB. Raises `ValueError` when the image could not be read or decoded."""
        if isinstance(content, ValueError):
            raise content
        return decode_image(content, self.max_pixels)


def fitting_pixels(memory: int) -> int:
    """The most pixels an image may have within a memory budget in bytes; a third of it is for the current image."""
    return min(MAX_PIXELS, memory // 3 // PIXEL_BYTES)


def find_files(path: str) -> tuple[list[Path], str, LeftOut]:
    """Sorted files of a folder, a file or a glob, their kind (image, parquet, arrow or tar), and what is left out."""
    found, left_out = {"parquet": [], "arrow": [], "tar": [], "image": []}, LeftOut()
    compressed = []
    for file, name in list_files(path):
        suffix = file.suffix.lower()
        if not file.is_file():
            left_out["broken link" if file.is_symlink() else "special file"] += 1
        elif suffix[1:] in found and not is_hidden(name):
            found[suffix[1:]].append(file)
        elif left_out.keeps(name):
            found["image"].append(file)
        elif COMPRESSED_TAR.search(file.name.lower()) and not is_hidden(name):
            compressed.append(file)
    kinds = [kind for kind, files in found.items() if files]
    # Next to tars, a compressed file is part of the data. Next to images it is something else.
    if compressed and kinds in ([], ["tar"]):
        raise ValueError(
            f"{one_line(str(compressed[0]))} is compressed; images are read from any position, "
            "so unpack it to a plain .tar."
        )
    if not kinds:
        suffixes, others = ", ".join(sorted(IMAGE_SUFFIXES)), f" ({left_out.sentence()})" if left_out else ""
        raise FileNotFoundError(
            f"No images in {one_line(path)}: it holds neither parquet, arrow or tar files nor {suffixes} files{others}."
        )
    if len(kinds) > 1:
        counts = " and ".join(f"{len(found[kind])} {kind}" for kind in kinds)
        raise ValueError(
            f"{one_line(path)} holds {counts} files; name those of one kind, for example {one_line(path)}/*.{kinds[0]}."
        )
    return found[kinds[0]], kinds[0], left_out


def list_files(path: str) -> list[tuple[Path, str]]:
    """All files of a folder, a file or a glob, each with the name that decides whether it is hidden.

    A file that was asked for is never hidden.
    """
    place = Path(path)
    if place.is_dir():
        return once([(file, str(file.relative_to(place))) for file in walk(place)])
    files = [place] if place.exists() else expand(path)
    if not files:
        raise FileNotFoundError(f"There is no folder or file {one_line(path)}.")
    return once([(file, file.name.lstrip(".")) for file in files if not file.is_dir()])


class Rows:
    """The rows of several tables as one sequence."""

    def __init__(self, tables: list[ImageTable]):
        self.tables = tables

    def __len__(self) -> int:
        return sum(map(len, self.tables))

    def read(self, start: int, stop: int) -> Iterator[tuple[str, bytes | ValueError]]:
        first = 0
        for table in self.tables:
            low, high = max(start - first, 0), min(stop - first, len(table))
            first += len(table)
            if low < high:
                for row, value in enumerate(table.read(low, high), low):
                    yield f"{table.file.name} row {row}", attempt(read_cell, value, table.file.parent)


def read_files(files: list[Path]) -> Iterator[tuple[str, bytes | ValueError]]:
    for file in files:
        yield str(file), attempt(read_file, file)


def read_file(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"the file cannot be read: {error.strerror}") from error


def attempt(read: Callable, *arguments) -> bytes | ValueError:
    """Returns what a function reads, or the `ValueError` that it raises."""
    try:
        return read(*arguments)
    except ValueError as error:
        return error


def read_tars(items: list[tuple[Path, str, int, int]]) -> Iterator[tuple[str, bytes]]:
    for file, members in groupby(items, key=lambda item: item[0]):
        with open(file, "rb") as tar:
            for _, name, offset, size in members:
                tar.seek(offset)
                yield f"{file.name}/{name}", tar.read(size)


class Stream:
    """A data set of `datasets.load_dataset` in its order. Reading on from the last position costs nothing extra."""

    def __init__(self, name: str):
        self.name, self.rows, self.position = name, None, 0

    def list_files(self):
        """Paths or URLs of the files of the split, in the form of `datasets`, with their versions."""
        from datasets import load_dataset_builder

        files = load_dataset_builder(self.name).config.data_files
        return files[choose_split(self.name, files)]

    def read(self, start: int, stop: int) -> Iterator[tuple[str, bytes | ValueError]]:
        if self.rows is None or start < self.position:
            self.rows, self.position = iter(open_stream(self.name).skip(start)), start
        while self.position < stop:
            row = next(self.rows, None)
            if row is None:
                return
            self.position += 1
            if self.position > start:
                folder = Path(self.name) if Path(self.name).is_dir() else None
                yield f"row {self.position - 1}", attempt(read_cell, self.find_image(row), folder)

    def find_image(self, row: dict):
        """The value of the one image column of a row that is not empty; `None` if all are.

        Raises `ValueError` when there is no image column, or when several hold something.
        """
        columns = ["image"] if "image" in row else [name for name in row if f".{name.split('.')[-1]}" in IMAGE_SUFFIXES]
        if not columns:
            raise ValueError(f"{self.name} has the columns {', '.join(row)}, none of them image, jpg, png or the like.")
        held = [name for name in columns if row[name] is not None]
        if len(held) > 1:
            raise ValueError(
                f"{self.name} has several images in row {self.position - 1}, {' and '.join(held)}; "
                "without --streaming each is read."
            )
        return row[held[0]] if held else None


def open_stream(name: str):
    """The rows of a data set, with undecoded images, as an iterable."""
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    splits = load_dataset(name, streaming=True)
    rows = splits[choose_split(name, splits)]
    # Without a schema, nothing is decoded anyway.
    for column, feature in (rows.features or {}).items():
        if isinstance(feature, ImageFeature):
            rows = rows.cast_column(column, ImageFeature(decode=False))
    return rows


def choose_split(name: str, splits: dict) -> str:
    """`train`, or the only split. Raises `ValueError` otherwise."""
    if "train" in splits or len(splits) == 1:
        return "train" if "train" in splits else next(iter(splits))
    raise ValueError(f"{name} has the splits {', '.join(map(str, splits))}, none of them named train.")
