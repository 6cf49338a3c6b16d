"""Files and folders that are whole or absent: they are written under a temporary name and renamed, flushed to the disk."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

WORK = ".unicode2"  # folder inside an output: its lock, its record and what is not whole yet
LAST = ("config.json", "adapter_config.json", "model_index.json")  # what the loaders of the libraries begin with
FULL = (errno.ENOSPC, errno.EDQUOT)
# as the libraries put it that keep no error number: safetensors, datasets
FULL_WORDS = ("No space left", "os error 28", "quota exceeded", "os error 122", "Not enough disk space")
BLOCKED = (errno.EACCES, errno.EPERM, errno.EROFS)
TEMPORARY = re.compile(r"^\.(.+)\.\d+\.tmp$")  # names that `whole_file` gives
ROOM = 2**16  # bytes; with less of them free, a library that failed to write had too few


class NotWrittenError(OSError):
    """What could not be written, why, and what to do, in one sentence."""


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path to write to; what is there at the end takes the place of `path`. Nothing stays of a failed write.

    Raises:
        `NotWrittenError`: when the disk is full or the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # of a process alone
    try:
        with explained(path):
            yield temporary
            settle(temporary)
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_file(path: str | Path, content: bytes) -> None:
    """Writes all of a file or nothing, see `whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def whole_folder(folder: str | Path, last: tuple[str, ...] = LAST) -> Iterator[Path]:
    """Yields an empty folder to fill, inside `folder`; its entries then move to `folder`, those named `last` after all others.

    A loader begins with what is named `last`, so it finds all of an output or nothing. What was in `folder` under other names stays.
    `folder` itself may be a mount point, which cannot be renamed.

    Raises:
        `NotWrittenError`: when the disk is full or a file cannot be written.
    """
    folder = Path(folder)
    new = folder / WORK / "new"
    with explained(folder):
        try:
            remove(new)  # of a run that was killed
            new.mkdir(parents=True)
            yield new
            move_entries(new, folder, last)
        finally:
            remove(new)


def move_entries(new: Path, folder: Path, last: tuple[str, ...] = LAST) -> None:
    """Moves what lies in `new`, once the disk has it, to `folder`, in the place of what has these names there."""
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
    """Turns what the libraries raise on a full disk, or when something under `path` cannot be written, into a `NotWrittenError`."""
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
    """What `explained` raises in the place of an error; nothing for one that is not about writing."""
    number, file = getattr(error, "errno", None), Path(getattr(error, "filename", None) or path)
    file = file.with_name(TEMPORARY.sub(r"\1", file.name))  # what it would have become
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
    """Whether an error, or what it came from, says that a disk is full; where it says nothing, how much room `path` has."""
    wrote = type(error).__name__ in (
        "RuntimeError",
        "SafetensorError",
        "ArrowException",
        "OSError",
    )  # of no narrower class
    while error is not None:
        if getattr(error, "errno", None) in FULL or any(words in str(error) for words in FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    place = next((folder for folder in (path, *path.parents) if folder.is_dir()), Path())
    return wrote and shutil.disk_usage(place).free < ROOM


def make_folders(*folders: str | Path, option: str = "--output") -> None:
    """Makes folders that are not there. Raises `NotWrittenError` when that cannot be done."""
    for folder in folders:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"{folder} cannot be made ({error.strerror}); choose another {option}."
            raise explain(error, Path(folder)) if error.errno in FULL else NotWrittenError(reason) from error


def settle(path: Path) -> None:
    """Waits until the disk has a file, and lets it be read by whom other files may be read; safetensors keeps its own from all others."""
    path.chmod(PLAIN)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Removes a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def plain_mode() -> int:
    """Permissions that this process gives to a new file."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


PLAIN = plain_mode()
