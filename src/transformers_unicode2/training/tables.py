"""Rows of files that people have: JSON, CSV, parquet and arrow, tars, folders of images. Nothing is decoded here.

Each table has a length, and reads on from any row. A row is a dictionary, or the `ValueError` that its line is.
JSON and CSV are read by the standard library. The readers of `datasets` fix the types of columns by the first rows.
They turn a caption `NA` into nothing, and fail on a later row with other fields.
"""

import csv
import gzip
import json
import mimetypes
import posixpath
import re
import sys
import zlib
from array import array
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from json import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from ..images_unicode2 import FORMATS, one_line
from ..record import hash_file
from ..tar_members import find_place, follow, read_members
from ..tar_members import named as named_tar

# Characters of a JSON array that are read at a time.
CHUNK = 2**20
# Rows of a parquet file that are held at a time.
BATCH = 32
BETWEEN = re.compile(r"\s*,?\s*")
BOM = b"\xef\xbb\xbf"
# Suffixes of the texts of a WebDataset.
TEXTS = ("txt", "text", "caption")


class FileTable:
    """Rows of one file, which is a `kind`.

    In a `typed` one all rows have the same entries, so that `None` stands for those that a row does not have.
    """

    kind: str
    typed = False

    def __init__(self, file: Path):
        self.file = file

    def list_files(self) -> list[Path]:
        """Files that the rows are in."""
        return [self.file]

    def __len__(self) -> int:
        return sum(1 for _ in self.read())

    def read(self, start: int = 0) -> Iterator[dict | ValueError]:
        """Yields the rows from `start` on; in the place of one that is damaged, the `ValueError` that says so."""
        raise NotImplementedError


class JsonTable(FileTable):
    """Objects of a JSON array or of JSON lines, plain or compressed by gzip. Only their places are held in memory.

    Raises `ValueError` on a damaged array, or on one of anything but objects.
    """

    kind = "JSON file"

    def open(self):
        return gzip.open(self.file) if self.file.suffix.lower() == ".gz" else open(self.file, "rb")

    @cached_property
    def places(self) -> tuple[array, array]:
        """First and last offsets of the rows, in bytes."""
        starts, ends = array("Q"), array("Q")
        try:
            with self.open() as content:
                head = content.read(CHUNK).removeprefix(BOM).lstrip()[:1]
                content.seek(0)
                if content.readline(16).removeprefix(BOM).strip() == b"{":
                    raise ValueError(
                        f"{one_line(str(self.file))} is one JSON object over several lines, and rows are wanted: an "
                        "array of objects, or one object a line."
                    )
                content.seek(0)
                for start, end in find_items(content, self.file) if head == b"[" else find_lines(content):
                    starts.append(start)
                    ends.append(end)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{one_line(str(self.file))} cannot be read: {error}.") from error
        return starts, ends

    def __len__(self) -> int:
        return len(self.places[0])

    def read(self, start: int = 0) -> Iterator[dict | ValueError]:
        with self.open() as content:
            for first, end in islice(zip(*self.places), start, None):
                content.seek(first)
                yield parse_object(content.read(end - first))


def find_lines(content) -> Iterator[tuple[int, int]]:
    """Places of the lines that are not blank."""
    position = 0
    for line in content:
        if line.removeprefix(BOM).strip():
            yield position, position + len(line)
        position += len(line)


def find_items(content, file: Path) -> Iterator[tuple[int, int]]:
    """Places of the objects of an array. As Latin-1, one character is one byte, and JSON's own signs are the same."""
    scan = JSONDecoder().raw_decode
    text, first, count = content.read(CHUNK).decode("latin-1"), 0, 0
    position = text.index("[") + 1
    while True:
        position = BETWEEN.match(text, position).end()
        if text[position : position + 1] == "]":
            if (text[position + 1 :] + content.read().decode("latin-1")).strip():
                raise ValueError(f"{one_line(str(file))} goes on behind the end of its array, after {count} items.")
            return
        try:
            if text[position : position + 1] not in ("{", ""):
                raise ValueError(f"Item {count} of the array in {one_line(str(file))} is no object; a row must be one.")
            _, end = scan(text, position)
        except RecursionError:
            raise ValueError(f"Item {count} of the array in {one_line(str(file))} has too many levels.") from None
        except JSONDecodeError as error:
            more = content.read(max(CHUNK, len(text) - position))
            if not more:
                raise ValueError(
                    f"{one_line(str(file))} is damaged or cut short in item {count} of its array: {error.msg} at byte "
                    f"{first + error.pos}."
                ) from error
            first, text, position = first + position, text[position:] + more.decode("latin-1"), 0
            continue
        yield first + position, first + end
        position, count = end, count + 1


def parse_object(content: bytes) -> dict | ValueError:
    try:
        row = json.loads(content)
    except RecursionError:
        return ValueError("it is JSON of too many levels")
    except ValueError as error:
        return ValueError(f"it is no JSON ({str(error).splitlines()[0]})")
    return row if isinstance(row, dict) else ValueError(f"it is {type(row).__name__} in JSON, where an object must be")


class CsvTable(FileTable):
    """Rows of a CSV or TSV file with a header, all of them texts. Raises `ValueError` on a damaged file."""

    kind = "CSV file"

    def read(self, start: int = 0) -> Iterator[dict | ValueError]:
        # A cell may hold a base64 image.
        csv.field_size_limit(sys.maxsize)
        dialect = "excel-tab" if self.file.suffix.lower() == ".tsv" else "excel"
        try:
            with open(self.file, encoding="utf-8-sig", newline="") as content:
                # Not strict, an open quote would swallow the rows behind it
                reader = csv.DictReader(content, dialect=dialect, strict=True)
                names = reader.fieldnames or []
                if len(set(names)) < len(names):
                    raise ValueError(f"the columns {', '.join(names)} are not of different names")
                for row in islice(reader, start, None):
                    yield ValueError(f"it has more cells than the {len(names)} columns") if None in row else row
        except (csv.Error, ValueError) as error:
            place = f" behind line {reader.line_num}" if isinstance(error, csv.Error) else ""
            raise ValueError(f"{one_line(str(self.file))} cannot be read as a table: {error}{place}.") from error


class CaptionList(FileTable):
    """Lines of a file name, a tabulator and a caption, without a header, as `captions.tsv` has them."""

    kind = "captions.tsv file"

    def read(self, start: int = 0) -> Iterator[dict | ValueError]:
        try:
            with open(self.file, encoding="utf-8-sig") as content:
                for line in islice(filter(str.strip, content), start, None):
                    name, separator, caption = line.rstrip("\n").partition("\t")
                    row = {"file_name": name, "caption": caption}
                    yield row if separator else ValueError(f"its line {one_line(name)!r:.80} has no tabulator")
        except UnicodeDecodeError as error:
            raise ValueError(f"{one_line(str(self.file))} is no text in UTF-8: {error}.") from error


class TextFiles(FileTable):
    """Images of a folder, each with a text file of the same name beside it."""

    kind = "folder of images and texts"

    def __init__(self, folder: Path, images: list[Path]):
        super().__init__(folder)
        self.images = images
        self.texts = [image.with_suffix(".txt") for image in images if image.with_suffix(".txt").is_file()]

    def list_files(self) -> list[Path]:
        return self.texts

    def __len__(self) -> int:
        return len(self.images)

    def read(self, start: int = 0) -> Iterator[dict | ValueError]:
        for image in self.images[start:]:
            try:
                text = image.with_suffix(".txt").read_text(encoding="utf-8-sig").strip()
                yield {"file_name": str(image.relative_to(self.file)), "caption": text}
            except (OSError, UnicodeDecodeError) as error:
                yield ValueError(f"the text of {one_line(image.name)} cannot be read ({error})")


class TarTable(FileTable):
    """Samples of a WebDataset tar: members one after the other whose names are the same up to their first dot.

    A row has the images of a sample in the column `images`, its texts by their suffixes, and the entries of its JSON.
    Raises `ValueError` on a tar that cannot be read in full.
    """

    kind = "WebDataset tar"

    def __len__(self) -> int:
        return sum(1 for _ in self.find_samples())

    def read(self, start: int = 0) -> Iterator[dict | ValueError]:
        with open(self.file, "rb") as tar:
            for sample in islice(self.find_samples(), start, None):
                yield read_sample(tar, sample)

    def find_samples(self) -> Iterator[dict[str, tuple[int, int] | None]]:
        """Yields the places of the members of each sample, by the suffixes of their names."""
        places, sample, key = {}, {}, None
        with named_tar(self.file):
            for member in read_members(self.file):
                name = posixpath.normpath(member.name)
                places[name] = find_place(member, places)
                folder, _, base = name.rpartition("/")
                stem, _, suffix = base.partition(".")
                is_hidden = any(part.startswith(".") for part in name.split("/"))
                if is_hidden or not suffix or not (member.isfile() or member.issym() or member.islnk()):
                    continue
                if sample and (key != (folder, stem) or suffix.lower() in sample):
                    yield sample
                    sample = {}
                key = folder, stem
                sample[suffix.lower()] = follow(name, places[name], places)[1]
        if sample:
            yield sample


def read_sample(tar: BinaryIO, sample: dict[str, tuple[int, int] | None]) -> dict | ValueError:
    """The row of a sample, see `TarTable`."""
    row, images = {}, []
    for suffix, place in sample.items():
        kind = suffix.rsplit(".", 1)[-1]
        if kind not in ("json", *TEXTS) and not is_image(Path(f"x.{kind}")):
            continue
        if place is None:
            return ValueError(f"its .{suffix} is a link to nothing, or stored in a form that is not read")
        tar.seek(place[0])
        content = tar.read(place[1])
        if kind not in ("json", *TEXTS):
            images.append(content)
            continue
        entry = parse_object(content) if kind == "json" else parse_text(content, suffix)
        if isinstance(entry, ValueError):
            return ValueError(f"its .{suffix}: {entry}")
        row |= entry
    if images:
        row.pop("image", None)
    return {**row, "images": images}


def parse_text(content: bytes, name: str) -> dict | ValueError:
    try:
        return {name: content.decode("utf-8-sig").strip()}
    except UnicodeDecodeError as error:
        return ValueError(str(error))


class Tables:
    """The rows of several tables as one sequence.

    Args:
        tables (`list`): of one kind.
        folder (`Path`): above them all. Its own name does not matter.
    """

    def __init__(self, tables: list, folder: Path):
        self.tables, self.folder = tables, folder

    @cached_property
    def lengths(self) -> list[int]:
        return list(map(len, self.tables))

    @property
    def num_rows(self) -> int:
        return sum(self.lengths)

    @property
    def typed(self) -> bool:
        return self.tables[0].typed

    @property
    def kind(self) -> str:
        """What the rows are read from, for example `2 CSV files`."""
        count = len(self.tables)
        return f"{count} {self.tables[0].kind}s" if count > 1 else f"a {self.tables[0].kind}"

    def read(self, start: int = 0) -> Iterator[tuple[Path, dict | ValueError]]:
        """Yields the rows from `start` on, each with the folder that its files are in."""
        for number, table in enumerate(self.tables):
            # Lengths are counted when they are needed, since that reads a file.
            if start and start >= self.lengths[number]:
                start -= self.lengths[number]
                continue
            for row in table.read(start):
                yield table.file if table.file.is_dir() else table.file.parent, row
            start = 0

    @cached_property
    def versions(self) -> list[str]:
        """Names and SHA-256 of the files that texts are in, which are read once for it."""
        files = [file for table in self.tables for file in table.list_files()]
        return [f"{one_line(str(file.relative_to(self.folder)))} {hash_file(file)}" for file in files]


def is_image(file: Path) -> bool:
    """Whether a file is named as an image of one of `FORMATS` is."""
    return Image.registered_extensions().get(file.suffix.lower()) in FORMATS


def is_other_image(file: Path) -> bool:
    """Whether a file is named as an image of a format that is not read, such as HEIC."""
    return (mimetypes.guess_type(file.name)[0] or "").startswith("image/") and not is_image(file)
