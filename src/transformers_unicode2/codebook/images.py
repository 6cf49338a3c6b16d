"""Where the images of a codebook come from: one sequence of images, whatever they lie in."""

import glob
import hashlib
import io
import os
import tarfile
import warnings
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageOps

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")  # of a data set; the others are WebDataset's
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


class ImageSource:
    r"""
    Images in a fixed order, read one after the other from any position.

    Args:
        path (`str`): a folder, a file or a glob (`**` goes through folders) of image files; of parquet or arrow files of `datasets`, with
            an `image` column; or of WebDataset tars. With `streaming`, a data set that `datasets.load_dataset` knows by this name.
        limit (`int`, *optional*): use the first so many images only. Required by `streaming`.
        streaming (`bool`, *optional*, defaults to `False`): read a data set from its start on, without a copy on disk.

    Raises:
        `FileNotFoundError`: no images. `ValueError`: kinds that are mixed, a tar that is compressed or damaged, a stream without `limit`, a `limit` below 1.
    """

    def __init__(self, path: str, limit: int | None = None, streaming: bool = False):
        self.path, self.streaming = path, streaming
        if limit is not None and limit < 1:
            raise ValueError(f"--num-images is {limit}; it must be at least 1.")
        if streaming:
            if limit is None:
                raise ValueError(f"The length of the stream {path} is unknown; say --num-images.")
            self.files, self.kind, self.items = [], "stream", range(limit)
            self.stream = Stream(path)
        else:
            self.files, self.kind = find_files(path)
            self.items = INDEXERS[self.kind](self.files)
        self.length = len(self.items) if limit is None else min(limit, len(self.items))
        if self.length == 0:
            raise FileNotFoundError(f"No images in {path}: its {len(self.files)} {self.kind} files hold none.")

    def __len__(self) -> int:
        return self.length

    def listing(self) -> list[str]:
        """Path, size in bytes and time of change in nanoseconds of every file, and the number of images.

        Of a stream its name, and its files with what tells their versions: a commit of the Hub, an ETag or a time of change.
        """
        if self.streaming:
            from datasets import load_dataset_builder

            files = load_dataset_builder(self.path).config.data_files
            files = files[choose_split(self.path, files)]
            versions = ["\t".join(map(str, version)) for version in files.origin_metadata]
            return [self.path, *map(str, files), *versions, str(len(self))]
        stats = [(file, file.stat()) for file in self.files]
        return [f"{file.resolve()}\t{stat.st_size}\t{stat.st_mtime_ns}" for file, stat in stats] + [str(len(self))]

    def fingerprint(self) -> str:
        """SHA-256 of the listing, with paths from the folder of all files on, so that the folder may be named in any way."""
        lines = self.listing()
        if not self.streaming:
            root = os.path.commonpath([file.resolve().parent for file in self.files]) + os.sep
            lines = [line.removeprefix(root) for line in lines]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def read(self, start: int, stop: int) -> Iterator[tuple[str, bytes | OSError]]:
        """Name and file content of the images from `start` to `stop`; instead of the content why it cannot be read."""
        if self.streaming:
            yield from self.stream.read(start, stop)
        else:
            yield from READERS[self.kind](self.items, start, min(stop, len(self)))


def find_files(path: str) -> tuple[list[Path], str]:
    """The files behind a folder, a file or a glob, sorted, and their kind: images, parquet, arrow or tar."""
    place = Path(path)
    files = place.rglob("*") if place.is_dir() else [Path(name) for name in glob.glob(path, recursive=True)]
    if not place.exists() and not files:
        raise FileNotFoundError(f"There is no folder or file {path}.")
    found = {"parquet": [], "arrow": [], "tar": [], "image": []}
    for file in sorted(file for file in files if file.is_file()):
        suffix = file.suffix.lower()
        kind = "image" if suffix in IMAGE_SUFFIXES else suffix[1:]
        if ".tar." in file.name or suffix == ".tgz":
            raise ValueError(f"{file} is compressed; images are read from any position, so unpack it to a plain .tar.")
        if kind in found:
            found[kind].append(file)
    kinds = [kind for kind, files in found.items() if files]
    if not kinds:
        raise FileNotFoundError(
            f"No images in {path}: it holds neither parquet, arrow or tar files nor {', '.join(sorted(IMAGE_SUFFIXES))} files."
        )
    if len(kinds) > 1:
        counts = " and ".join(f"{len(found[kind])} {kind}" for kind in kinds)
        raise ValueError(f"{path} holds {counts} files; name those of one kind, for example {path}/*.{kinds[0]}.")
    return found[kinds[0]], kinds[0]


def index_tars(files: list[Path]) -> list[tuple[Path, str, int, int]]:
    """Tar, name, offset and size in bytes of every image."""
    items = []
    for file in files:
        try:
            with tarfile.open(file, "r:") as tar:
                items += [
                    (file, member.name, member.offset_data, member.size)
                    for member in tar
                    if member.isfile() and Path(member.name).suffix.lower() in IMAGE_SUFFIXES
                ]
        except tarfile.TarError as error:
            raise ValueError(f"{file} is no whole, uncompressed tar ({error}); repair or remove it.") from error
    return items


def index_tables(files: list[Path]):
    """The `image` column of parquet or arrow files, undecoded, mapped into memory or read by row groups."""
    from datasets import Dataset, concatenate_datasets
    from datasets import Image as ImageFeature

    if files[0].suffix == ".parquet":
        return ParquetColumn(files)
    rows = concatenate_datasets([Dataset.from_file(str(file)) for file in files])
    check_column(rows.column_names, files[0])
    rows = rows.select_columns("image")
    is_image = isinstance(rows.features["image"], ImageFeature)
    return rows.cast_column("image", ImageFeature(decode=False)) if is_image else rows


class ParquetColumn:
    """The `image` column of parquet files: its length from their footers, its rows by row group, one group in memory at a time."""

    def __init__(self, files: list[Path]):
        from pyarrow import parquet

        self.groups = []  # (file, row group, number of rows)
        for file in files:
            table = parquet.ParquetFile(file)
            check_column(table.schema_arrow.names, file)
            sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
            self.groups += [(file, group, size) for group, size in enumerate(sizes)]

    def __len__(self) -> int:
        return sum(size for *_, size in self.groups)

    def read(self, start: int, stop: int) -> Iterator[tuple[str, bytes]]:
        from pyarrow import parquet

        first = 0
        for file, group, size in self.groups:
            if start < first + size and first < stop:
                table = parquet.ParquetFile(file)
                low, high = max(start - first, 0), min(stop - first, size)
                row = low
                for batch in table.iter_batches(batch_size=256, row_groups=[group], columns=["image"]):
                    if low < len(batch):
                        for image in batch["image"][low:high].to_pylist():
                            yield f"{file.name} row {first + row}", read_content(image)
                            row += 1
                    low, high = max(low - len(batch), 0), high - len(batch)
                    if high <= 0:
                        break
            first += size


def check_column(names: list[str], file: Path) -> None:
    if "image" not in names:
        raise ValueError(f"{file} has the columns {', '.join(names)}, none of them named image.")


def read_files(items: list[Path], start: int, stop: int) -> Iterator[tuple[str, bytes | OSError]]:
    for file in items[start:stop]:
        yield str(file), read_file(file)


def read_file(file: Path) -> bytes | OSError:
    try:
        return file.read_bytes()
    except OSError as error:
        return error


def read_tars(items: list, start: int, stop: int) -> Iterator[tuple[str, bytes]]:
    for file, members in groupby(items[start:stop], key=lambda item: item[0]):
        with open(file, "rb") as tar:
            for _, name, offset, size in members:
                tar.seek(offset)
                yield f"{file.name}/{name}", tar.read(size)


def read_tables(items, start: int, stop: int) -> Iterator[tuple[str, bytes]]:
    if isinstance(items, ParquetColumn):
        yield from items.read(start, stop)
    else:
        for index in range(start, stop):
            yield f"row {index}", read_content(items[index]["image"])


def read_content(value) -> bytes | OSError:
    """An image file's content out of a table: bytes, a path, or both as `datasets` keeps them; nothing when there is none."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return read_file(Path(value)) if Path(value).is_file() else b""
    return value or b""


class Stream:
    """A data set of `datasets.load_dataset` in its order; to read on from where the last reading ended costs nothing more."""

    def __init__(self, name: str):
        self.name, self.rows, self.position = name, None, 0

    def read(self, start: int, stop: int) -> Iterator[tuple[str, bytes | OSError]]:
        if self.rows is None or start < self.position:
            self.rows, self.position = iter(open_stream(self.name).skip(start)), start
        while self.position < stop:
            row = next(self.rows, None)
            if row is None:
                return
            self.position += 1
            if self.position > start:
                column = next((name for name in IMAGE_COLUMNS if name in row), None)
                if column is None:
                    raise ValueError(
                        f"{self.name} has the columns {', '.join(row)}, none of them {', '.join(IMAGE_COLUMNS)}."
                    )
                yield f"row {self.position - 1}", read_content(row[column])


def open_stream(name: str):
    """The images of a data set, undecoded, to be iterated over."""
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    splits = load_dataset(name, streaming=True)
    rows = splits[choose_split(name, splits)]
    for column, feature in (rows.features or {}).items():  # a table without a schema of its own is not decoded
        if column in IMAGE_COLUMNS and isinstance(feature, ImageFeature):
            rows = rows.cast_column(column, ImageFeature(decode=False))
    return rows


def choose_split(name: str, splits: dict) -> str:
    """`train`, or the only split that there is; raises `ValueError` otherwise."""
    if "train" in splits or len(splits) == 1:
        return "train" if "train" in splits else next(iter(splits))
    raise ValueError(f"{name} has the splits {', '.join(map(str, splits))}, none of them named train.")


INDEXERS = {"image": list, "tar": index_tars, "parquet": index_tables, "arrow": index_tables}
READERS = {"image": read_files, "tar": read_tars, "parquet": read_tables, "arrow": read_tables}


def decode_image(content: bytes | OSError) -> Image.Image:
    """An image file's content as RGB, turned as its EXIF data say. Raises `ValueError` when it cannot be read, or could not."""
    if isinstance(content, OSError):
        raise ValueError(f"the file cannot be read: {content.strerror}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", "Palette images")
        try:
            return ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
        except Exception as error:  # what a decoder raises on damaged files is not documented
            raise ValueError(f"{len(content)} bytes that are no image: {error}") from error
