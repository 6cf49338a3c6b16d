"""Files and folders that are whole or absent: they are written under a temporary name and renamed, flushed to the disk."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WORK = ".unicode2"  # folder inside an output: its lock, its record and what is not whole yet
FULL = (errno.ENOSPC, errno.EDQUOT)
ROOM = 2**16  # bytes; with less of them free, a library that failed to write had too few


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path to write to; what is there at the end takes the place of `path`. Nothing stays of a failed write.

    Raises:
        `OSError`: in one sentence, when the disk is full or the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # of a process alone
    try:
        with explained(path):
            yield temporary
            flush(temporary)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: str | Path, content: bytes) -> None:
    """Writes all of a file or nothing, see `whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def whole_folder(folder: str | Path, last: tuple[str, ...] = ("config.json",)) -> Iterator[Path]:
    """Yields an empty folder to fill, inside `folder`; its entries then move to `folder`, those named `last` after all others.

    A loader begins with what is named `last`, so it finds all of an output or nothing. What was in `folder` under other names stays.

    Raises:
        `OSError`: in one sentence, when the disk is full or a file cannot be written.
    """
    folder = Path(folder)
    new = folder / WORK / "new"
    with explained(folder):
        remove(new)  # of a run that was killed
        new.mkdir(parents=True)
        try:
            yield new
            for file in new.rglob("*"):
                if file.is_file():
                    flush(file)
            for name in last:
                (folder / name).unlink(missing_ok=True)
            for entry in sorted(new.iterdir(), key=lambda entry: (entry.name in last, entry.name)):
                remove(folder / entry.name)
                entry.rename(folder / entry.name)
        finally:
            remove(new)


@contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Turns what the libraries raise on a full disk, or when a file cannot be written, into an `OSError` of one sentence."""
    try:
        yield
    except Exception as error:
        if is_full_disk(error, Path(path)):
            raise OSError(
                errno.ENOSPC,
                f"The disk is full: {path} could not be written; make room and run the same command again.",
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OSError(
                f"{error.filename or path} could not be written ({error.strerror}); choose another place."
            ) from error
        raise


def is_full_disk(error: BaseException | None, path: Path) -> bool:
    """Whether an error, or what it came from, says that a disk is full; where it says nothing, how much room `path` has."""
    first = error
    while error is not None:
        if getattr(error, "errno", None) in FULL or "No space left" in str(error) or "os error 28" in str(error):
            return True
        error = error.__cause__ or error.__context__
    place = next((folder for folder in (path, *path.parents) if folder.is_dir()), Path())
    wrote = type(first).__name__ in ("RuntimeError", "SafetensorError", "ArrowException", "OSError")
    return wrote and shutil.disk_usage(place).free < ROOM


def flush(path: Path) -> None:
    """Waits until the disk has a file."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Removes a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
