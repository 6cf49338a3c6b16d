"""Images in tables: parquet and arrow files with a column of file contents, paths, or both."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from .images_unicode2 import URLS, decode_image, fetch, one_line

# The end of an arrow stream, which readers of Arrow do not check.
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
# Longer text, in characters, is not a path.
MAX_PATH = 4096
# Rows held at a time.
BATCH = 32


class ImageTable:
    r"""
    The column `image` of a parquet or arrow file, undecoded.

    Args:
        file (`Path`): the table. Arrow files may have the file format or the stream format, which `datasets` writes.

    Raises:
        `ValueError`: when the file is damaged or truncated, or has no column of images.
    """

    def __init__(self, file: Path):
        self.file, self.rows = file, None
        with named(file):
            if file.suffix.lower() == ".arrow":
                self.rows = open_arrow(file)
                schema, self.groups = self.rows.schema, [len(self.rows)]
            else:
                table = self.open_parquet()
                schema, self.metadata = table.schema_arrow, table.metadata
                self.leaves = [table.schema.column(i).path for i in range(table.metadata.num_columns)]
                self.groups = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
        check_column(schema, file)
        self.schema = schema

    def __len__(self) -> int:
        return sum(self.groups)

    def open_parquet(self):
        import pyarrow as pa
        from pyarrow import parquet

        return parquet.ParquetFile(pa.OSFile(os.fsencode(self.file)))

    def read(self, start: int, stop: int) -> Iterator:
        """Yields the values of the rows from `start` to `stop`, see `read_cell`. Opens one parquet row group at a time.

        Raises `ValueError` when the file is damaged.
        """
        with named(self.file):
            yield from self.read_rows(start, stop)

    def read_rows(self, start: int, stop: int) -> Iterator:
        if self.rows is not None:
            for first in range(start, stop, BATCH):
                yield from self.rows["image"][first : min(first + BATCH, stop)].to_pylist()
            return
        first = 0
        for group, size in enumerate(self.groups):
            low, high = max(start - first, 0), min(stop - first, size)
            first += size
            if low < high:
                for batch in self.open_parquet().iter_batches(BATCH, row_groups=[group], columns=["image"]):
                    yield from batch["image"][max(low, 0) : max(high, 0)].to_pylist()
                    low, high = low - len(batch), high - len(batch)
                    if high <= 0:
                        break

    def batches(self, size: int) -> Iterator:
        """Yields all rows and columns of a parquet file in record batches of at most `size` rows.

        Raises `ValueError` when the file is damaged.
        """
        with named(self.file):
            yield from self.open_parquet().iter_batches(size)

    def may_lack_contents(self) -> bool:
        """Whether some rows may lack file contents, by the column's type and its number of missing values."""
        from pyarrow import compute, types

        kind = unwrap(self.schema.field("image").type)
        is_struct, leaf = types.is_struct(kind), "image"
        if is_struct and kind.get_field_index("bytes") >= 0:
            kind, leaf = kind.field("bytes").type, "image.bytes"
        if not is_binary(kind):
            return True
        if self.rows is not None:
            column = self.rows["image"]
            return (compute.struct_field(column, "bytes") if is_struct else column).null_count > 0
        groups = map(self.metadata.row_group, range(self.metadata.num_row_groups))
        columns = [group.column(self.leaves.index(leaf)) for group in groups]
        return any(not column.is_stats_set or column.statistics.null_count != 0 for column in columns)

    def has_empty_contents(self) -> bool:
        """Whether a content of a parquet file is empty; reads all of them."""
        from pyarrow import compute, types

        for batch in self.open_parquet().iter_batches(BATCH, columns=["image"]):
            column = batch["image"]
            column = compute.struct_field(column, "bytes") if types.is_struct(column.type) else column
            if compute.min(compute.binary_length(column)).as_py() == 0:
                return True
        return False

    def files(self) -> Iterator[str]:
        """Yields the existing files inside the table's folder that rows name, even if the rows hold contents too."""
        from pyarrow import compute, types

        kind = unwrap(self.schema.field("image").type)
        is_struct = types.is_struct(kind)
        if is_struct and kind.get_field_index("path") < 0 or is_binary(kind):
            return
        leaf = "image.path" if is_struct else "image"
        batches = self.open_parquet().iter_batches(columns=[leaf]) if self.rows is None else self.rows.to_batches()
        for batch in batches:
            names = compute.struct_field(batch["image"], "path") if is_struct else batch["image"]
            for name in filter(None, names.to_pylist()):
                file = find_inside(name, self.file.parent)
                if file is not None:
                    yield file

    def read_image(self, row: int, value) -> Image.Image:
        """Decodes the value of a row to RGB, see `read_cell`. Its path may be absolute.

        Raises `ValueError` that names file and row.
        """
        try:
            return decode_image(read_cell(value, self.file.parent, absolute=True))
        except ValueError as error:
            raise ValueError(f"{one_line(str(self.file))} row {row}: {str(error).rstrip('.')}.") from error


@contextmanager
def named(file: Path) -> Iterator[None]:
    """Turns the errors of Arrow on a damaged table into a `ValueError` with its name."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        kind = file.suffix.lower()[1:]
        raise ValueError(f"{one_line(str(file))} is no whole {kind} file ({first_words(error)}).") from error


def open_arrow(file: Path):
    """Maps all rows into memory. Raises `pyarrow.ArrowInvalid` or `OSError` on a damaged file."""
    import pyarrow as pa

    with open(file, "rb") as content:
        is_file = content.read(6) == b"ARROW1"
        content.seek(-min(len(END_OF_STREAM), file.stat().st_size), os.SEEK_END)
        if not is_file and content.read() != END_OF_STREAM:
            raise pa.ArrowInvalid("it does not end as an arrow file does")
    source = pa.memory_map(os.fsencode(file))
    return (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source).read_all()


def check_column(schema, file: Path) -> None:
    """Raises `ValueError` unless a schema has one column `image` of a type that can hold images."""
    names = [one_line(name) for name in schema.names]
    if schema.names.count("image") != 1:
        raise ValueError(
            f"{one_line(str(file))} has the columns {', '.join(names)}, none or several of them named image."
        )
    kind = schema.field("image").type
    if not may_be_images(kind):
        raise ValueError(
            f"{one_line(str(file))} has a column image of {kind}; it must hold file contents (binary), paths (string) "
            "or both (struct of bytes and path)."
        )


def may_be_images(kind) -> bool:
    """Whether a column of this Arrow type may hold contents, paths, both or nothing."""
    from pyarrow import types

    kind = unwrap(kind)
    if types.is_struct(kind):
        fields = [unwrap(kind.field(name).type) for name in ("bytes", "path") if kind.get_field_index(name) >= 0]
        return bool(fields) and all(may_be_images(field) and not types.is_struct(field) for field in fields)
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return is_binary(kind) or is_text or types.is_null(kind)


def is_binary(kind) -> bool:
    from pyarrow import types

    tests = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    return any(test(kind) for test in tests)


def unwrap(kind):
    """The value type of an Arrow dictionary or extension type; other types stay as they are."""
    from pyarrow import BaseExtensionType, types

    kind = kind.storage_type if isinstance(kind, BaseExtensionType) else kind
    return kind.value_type if types.is_dictionary(kind) else kind


def read_cell(value, folder: Path | None, absolute: bool = False) -> bytes:
    """
    Reads the content of an image file from a value in a table.

    Args:
        value: the content; its path, base64 or data URI; or `{"bytes": ..., "path": ...}` as in `datasets`.
        folder (`Path`, *optional*): the table's folder. Paths are relative to it and must stay inside, links included.
        absolute (`bool`, *optional*, defaults to `False`): whether the folder is the user's own, where an absolute path
            and a link may lead anywhere.

    Raises:
        `ValueError`: when there is no image, or it cannot be read.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, (bytes, str, type(None))):
        raise ValueError(f"{type(value).__name__} is no image")
    if not value:
        raise ValueError("there is no image")
    if isinstance(value, bytes):
        return value
    path = find_file(value, folder, absolute)
    if path is None:
        if value.lower().startswith(URLS):
            raise ValueError(f"{one_line(value)} is a URL; download it first")
        return fetch(value)[0]
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"{one_line(path)} cannot be read: {error.strerror}") from error


def find_file(value: str, folder: Path | None, absolute: bool = False) -> str | None:
    """The file that a path in a table names, or `None`. Raises `ValueError` when it is outside the table's folder.

    Where `absolute` paths may lead anywhere, links may, too, in a path without `..`.
    """
    if folder is None or "\0" in value or len(value) > MAX_PATH:
        return None
    path, root = os.path.realpath(os.path.join(folder, value)), os.path.realpath(folder)
    if not os.path.isfile(path):
        return None
    is_inside = any(os.path.commonpath([path, place]) == place for place in [root, *find_blobs(root)])
    if not is_inside and not (absolute and (os.path.isabs(value) or ".." not in Path(value).parts)):
        raise ValueError(f"{one_line(value)} is outside the table's folder, and only images inside are opened")
    return path


def find_blobs(folder: str) -> list[str]:
    """The cache folders with the contents of a Hub snapshot, whose files are links; empty outside a snapshot."""
    places = [parent.parent / "blobs" for parent in Path(folder).parents if parent.name == "snapshots"]
    return [str(place) for place in places if place.is_dir()]


def find_inside(value: str, folder: Path, absolute: bool = False) -> str | None:
    """Like `find_file`, but `None` for a file outside. Reading its row raises the error."""
    try:
        return find_file(value, folder, absolute)
    except ValueError:
        return None


def first_words(error: Exception) -> str:
    """The first line of an error's message, without a full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
