"""Which image files a tokenized output is made of, so that others in their places are noticed.

Of each image that a row names by a path, the size and the time of change of its file are kept with the SHA-256 of its
content. Later only those files are read whose size or time differ. Paths are not kept, so data may move.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..files import WORK, whole_file
from ..images_unicode2 import one_line
from ..record import hash_file, read_record
from .sources import Row, RowError, Source

# One image of a row; a file that is not there has the size -1
NOTE = np.dtype([("job", "i4"), ("row", "i8"), ("size", "i8"), ("changed", "i8"), ("sha256", "V32")])


class FileHashes:
    """SHA-256 of files, each of which is read once."""

    def __init__(self):
        self.known = {}

    def describe(self, path: str) -> tuple[int, int, str]:
        """Size in bytes, time of change in nanoseconds and SHA-256 of a file."""
        if path not in self.known:
            about = os.stat(path)
            self.known[path] = (about.st_size, about.st_mtime_ns, hash_file(path))
        return self.known[path]


def note_files(row: Row | RowError, describe: Callable[[str], tuple]) -> list[tuple]:
    """What is kept of a row: number, and size, time of change and SHA-256 of each file, see `NOTE`."""
    if isinstance(row, RowError):
        return [] if row.missing is None else [(row.number, -1, 0, "")]
    return [(row.number, *describe(image["path"])) for image in row.images if image["bytes"] is None]


def collect_notes(blocks: list[dict]) -> np.ndarray:
    """The notes of all blocks of a `RowIndex`, `(num_files,)` of `NOTE`."""
    notes = [
        (block["job"], row, size, changed, bytes.fromhex(digest).ljust(32, b"\0"))
        for block in blocks
        for row, size, changed, digest in block["files"]
    ]
    return np.array(notes, NOTE)


def write_notes(file: Path, notes: np.ndarray) -> None:
    with whole_file(file) as temporary, open(temporary, "wb") as content:
        np.save(content, notes)


def check_image_files(jobs: list, notes: np.ndarray, last: tuple[int, int | None], option: str = "--output") -> None:
    """
    Raises `ValueError` when rows name other image files than they did.

    Args:
        jobs: of the run. Those without notes have no image files.
        notes: as of `collect_notes`.
        last: place of the last job that was read, and its first row that was not, `None` if all were.
    """
    hashes = FileHashes()
    for place in np.unique(notes["job"]).tolist():
        job, expected = jobs[place], group_by_row(notes[notes["job"] == place])
        for row in job.source.rows():
            if (place, row.number) == last:
                break
            change = find_change(row, expected.get(row.number, notes[:0]), hashes)
            if change:
                raise ValueError(
                    f"{change} in row {row.number} of {one_line(job.source.name)}, which {option} was made of; choose "
                    f"another {option}, or delete it."
                )


def check_later(sources: list[Source], folder: Path, split: str, option: str) -> None:
    """Raises `ValueError` when rows that gave codes name other image files than they did.

    Args:
        sources: of the data, in the order of `unicode2 tokenize`.
        folder: its output, or that of one of its tasks. One without notes is taken as it is.
        split: of the output.
        option: where `sources` were given, for messages.
    """
    for output in (folder, folder.absolute().parent):
        file, record = notes_file(output, split), read_record(output, split)
        if file.is_file() and record and "chats" in record["made_of"]:
            break
    else:
        return
    notes, hashes = np.load(file), FileHashes()
    # The jobs were noted in their order, each by its task and the number of its source
    numbers = [int(name.split()[-1]) for name in record["made_of"]["chats"]]
    of_source = np.array(numbers)[notes["job"]]
    for number, source in enumerate(sources, 1):
        own = notes[(of_source == number) & (notes["size"] >= 0)]
        # Several tasks read the same files
        expected = group_by_row(own[own["job"] == own["job"].min()]) if len(own) else {}
        for row in source.rows() if expected else ():
            change = find_change(row, expected[row.number], hashes) if row.number in expected else None
            if change:
                raise ValueError(
                    f"{change} in row {row.number} of {one_line(source.name)} ({option}), which {folder} was made of; "
                    "tokenize it again."
                )


def notes_file(output: str | Path, split: str) -> Path:
    """What the image files of a tokenized output were, beside its record."""
    return Path(output, WORK, f"images-{split}.npy")


def group_by_row(notes: np.ndarray) -> dict[int, np.ndarray]:
    """Notes of one job by the numbers of their rows."""
    starts = np.searchsorted(notes["row"], np.unique(notes["row"]))
    return {int(group["row"][0]): group for group in np.split(notes, starts[1:])}


def find_change(row: Row | RowError, notes: np.ndarray, hashes: FileHashes) -> str | None:
    """How the image files of a row differ from their notes, `None` if they do not."""
    if isinstance(row, RowError):
        same = not len(notes) if row.missing is None else len(notes) == 1 and notes["size"][0] == -1
        return None if same else f"Now {row.reason},"
    paths = [image["path"] for image in row.images if image["bytes"] is None]
    if len(paths) != len(notes) or len(notes) and notes["size"][0] == -1:
        return f"There are {len(paths)} image files, and there were {max(0, (notes['size'] >= 0).sum())},"
    for path, note in zip(paths, notes):
        about = os.stat(path)
        is_same = (about.st_size, about.st_mtime_ns) == (note["size"], note["changed"])
        if not is_same and bytes.fromhex(hashes.describe(path)[2]) != bytes(note["sha256"]):
            return f"The image file {one_line(path)} is another than it was"
    return None
