"""Writes files and folders whole or not at all: under a temporary name, flushed to disk, then renamed."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Folder inside an output for its lock, its record and its unfinished files.
WORK = ".unicode2"
# The files that the loaders of the libraries read first.
LAST = ("config.json", "adapter_config.json", "model_index.json")
FULL = (errno.ENOSPC, errno.EDQUOT)
# Messages of libraries that drop the error number, such as safetensors and datasets.
FULL_WORDS = ("No space left", "os error 28", "quota exceeded", "os error 122", "Not enough disk space")
BLOCKED = (errno.EACCES, errno.EPERM, errno.EROFS)
# Temporary names of `whole_file`.
TEMPORARY = re.compile(r"^\.(.+)\.\d+\.tmp$")
# If fewer bytes are free, the disk counts as full when a write fails.
ROOM = 2**16
# Exact names of errors that libraries raise when a write fails; narrower classes have other causes.
WRITE_ERRORS = ("RuntimeError", "SafetensorError", "ArrowException", "OSError")


class NotWrittenError(OSError):
    """Says in one sentence what could not be written, why, and what to do."""


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path to write to. Its content then replaces `path`. A failed write leaves nothing behind.

    Raises:
        `NotWrittenError`: when the disk is full or the file cannot be written.
    """
    path = Path(path)
    # Each process has its own temporary name.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with explained(path):
            yield temporary
            settle(temporary)
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_file(path: str | Path, content: bytes) -> None:
    """Writes a whole file or nothing, see `whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def remove_unfinished(folder: str | Path, names: tuple[str, ...] = ()) -> None:
    """Removes what killed writers left in a folder, of the files `names` or of all. No other process may write it."""
    for half in Path(folder).glob(".*.tmp"):
        known = TEMPORARY.match(half.name)
        if known and (not names or known[1] in names):
            remove(half)


@contextmanager
def whole_folder(folder: str | Path, last: tuple[str, ...] = LAST) -> Iterator[Path]:
    """Yields an empty folder inside `folder` to fill. Its entries then move to `folder`, those in `last` at the end.

    A loader reads the files in `last` first, so it finds a whole output or none. Other files in `folder` stay.
    `folder` itself may be a mount point, which cannot be renamed.

    Raises:
        `NotWrittenError`: when the disk is full or a file cannot be written.
    """
    folder = Path(folder)
    new = folder / WORK / "new"
    with explained(folder):
        try:
            # A killed run may have left it.
            remove(new)
            new.mkdir(parents=True)
            yield new
            move_entries(new, folder, last)
        finally:
            remove(new)


def move_entries(new: Path, folder: Path, last: tuple[str, ...] = LAST) -> None:
    """Flushes the entries of `new` to disk and moves them to `folder`, replacing entries of the same name."""
    for file in new.rglob("*"):
        if file.is_file():
            settle(file)
    for name in last:
        (folder / name).unlink(missing_ok=True)
    for entry in sorted(new.iterdir(), key=lambda entry: (entry.name in last, entry.name)):
        remove(folder / entry.name)
        entry.rename(folder / entry.name)


@contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Turns the errors of libraries on a full disk, or on a failed write under `path`, into a `NotWrittenError`."""
    try:
        yield
    except NotWrittenError:
        raise
    except Exception as error:
        reason = explain(error, Path(path))
        if reason is None:
            raise
        raise reason from error


def explain(error: Exception, path: Path) -> NotWrittenError | None:
    """The error that `explained` raises instead; `None` if the error is not about writing."""
    # Of a copy the second is what was written.
    names = (getattr(error, "filename2", None), getattr(error, "filename", None))
    number, file = getattr(error, "errno", None), Path(next((name for name in names if name is not None), path))
    # The final name in place of the temporary one.
    file = file.with_name(TEMPORARY.sub(r"\1", file.name))
    again = "make room and run the same command again"
    if is_full_disk(error, path):
        explanation = NotWrittenError(f"The disk is full: {file} could not be written; {again}.")
        explanation.errno = errno.ENOSPC
        return explanation
    if number == errno.EFBIG or "File too large" in str(error):
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        return NotWrittenError(f"{file} could not be written ({reason}); {again}.")
    if number in BLOCKED and file.absolute().is_relative_to(path.absolute()):
        return NotWrittenError(f"{file} could not be written ({error.strerror}); choose another place.")
    return None


def is_full_disk(error: BaseException, path: Path) -> bool:
    """Whether an error or its causes say that the disk is full, or a write failed and `path` has hardly any room."""
    wrote = type(error).__name__ in WRITE_ERRORS
    while error is not None:
        if getattr(error, "errno", None) in FULL or any(words in str(error) for words in FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    place = next((folder for folder in (path, *path.parents) if folder.is_dir()), Path())
    return wrote and shutil.disk_usage(place).free < ROOM


def make_folders(*folders: str | Path, option: str = "--output") -> None:
    """Makes missing folders. Raises `NotWrittenError` when that fails."""
    for folder in folders:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"{folder} cannot be made ({error.strerror}); choose another {option}."
            raise explain(error, Path(folder)) if error.errno in FULL else NotWrittenError(reason) from error


def settle(path: Path) -> None:
    """Flushes a file to disk with the usual permissions. Safetensors makes files that only the owner can read."""
    path.chmod(PLAIN)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Removes a file, a link or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def plain_mode() -> int:
    """The permissions that this process gives to a new file."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


PLAIN = plain_mode()
