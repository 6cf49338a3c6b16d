"""Rows of parquet and arrow files."""

import os
from collections.abc import Iterator
from pathlib import Path

from ..image_tables import named, open_arrow
from ..images_unicode2 import one_line
from .tables import BATCH, FileTable


class ArrowTable(FileTable):
    """Rows of a parquet or arrow file, as Python objects. Raises `ValueError` when the file is damaged."""

    kind = "parquet or arrow file"
    typed = True

    def __init__(self, file: Path):
        super().__init__(file)
        self.rows, self.groups = None, []
        with named(file):
            if file.suffix.lower() == ".arrow":
                self.rows = open_arrow(file)
                names = self.rows.column_names
            else:
                table = self.open()
                names, metadata = table.schema_arrow.names, table.metadata
                self.groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        if len(set(names)) < len(names):
            raise ValueError(
                f"{one_line(str(file))} has the columns {', '.join(names)}, which must be of different names."
            )

    def open(self):
        import pyarrow as pa
        from pyarrow import parquet

        return parquet.ParquetFile(pa.OSFile(os.fsencode(self.file)))

    def __len__(self) -> int:
        return sum(self.groups) if self.rows is None else len(self.rows)

    def read(self, start: int = 0) -> Iterator[dict | ValueError]:
        with named(self.file):
            if self.rows is not None:
                for first in range(start, len(self.rows), BATCH):
                    yield from list_rows(self.rows[first : first + BATCH])
                return
            for group, size in enumerate(self.groups):
                # Whole groups before the first row are not read.
                skipped, start = min(start, size), max(start - size, 0)
                if skipped < size:
                    for batch in self.open().iter_batches(BATCH, row_groups=[group]):
                        yield from list_rows(batch[skipped:])
                        skipped = max(skipped - len(batch), 0)


def list_rows(batch) -> list[dict | ValueError]:
    """Rows of an Arrow table or batch as Python objects.

    A time that Python cannot hold is left out. In the place of a row with another such cell is the `ValueError`.
    """
    from pyarrow import types

    try:
        return batch.to_pylist()
    except (OverflowError, ValueError):
        if len(batch) > 1:
            return [row for number in range(len(batch)) for row in list_rows(batch.slice(number, 1))]
    row = {}
    for name in batch.schema.names:
        try:
            row[name] = batch.column(name).to_pylist()[0]
        except (OverflowError, ValueError) as error:
            if not types.is_temporal(batch.schema.field(name).type):
                return [ValueError(f"its column {one_line(name)} cannot be read ({error})")]
    return [row]
