"""Records inside an output what it is made of. Commands compare the record before they resume, and lock the output."""

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .files import WORK, explained, make_folders, remove, remove_unfinished, write_file

# Suffixes of the files of a checkpoint that its results depend on.
CONTENT = (".json", ".safetensors", ".jinja", ".txt", ".model")
# Differences that an error names.
MOST = 5
# Size of a block in bytes, and the most blocks of a file that are read to tell whether it has changed.
BLOCK, NUM_BLOCKS = 2**16, 64
# `lost+found` is in the root of a disk.
NOT_CONTENT = (WORK, "lost+found")


@contextmanager
def held(folder: str | Path, option: str = "--output", work: str = WORK, doing: str = "writing to") -> Iterator[None]:
    """Locks a folder for this run, with a lock file in its subfolder `work`. A killed run releases the lock.

    Makes both folders if they are missing, and removes them at the end if they are empty.

    Raises:
        `ValueError`: when another run holds the lock. `NotWrittenError`: when the folder cannot be written to.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder)
    made, place = not folder.exists(), folder / work
    try:
        make_folders(folder, place, option=option)
        lock = FileLock(place / "lock")
        try:
            with explained(folder):
                lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"Another run is {doing} {folder}; wait for it or choose another {option}.") from None
        try:
            yield
        finally:
            # Removed before the release, so that no other run can lock a file that is about to disappear.
            remove(place / "lock")
            lock.release()
    finally:
        for empty in (place, folder) if made else (place,):
            if empty.is_dir() and not any(empty.iterdir()):
                empty.rmdir()


class Record:
    r"""
    The record of what a folder, or a part of it, is made of.

    Args:
        folder (`str` or `Path`): output of one command.
        made_of (`dict`): everything that the content depends on, as JSON: options, and SHA-256 of files.
        owns (`tuple[str]`): globs of the files that the command writes. Without a record, such files are foreign.
        part (`str`, *optional*, defaults to `"record"`): name of the part, for example a split.
        option (`str`, *optional*, defaults to `"--output"`): the option that names the folder.
        growing (`tuple[str]`, *optional*): dictionaries in `made_of` that may gain entries later.
        free (`tuple[str]`, *optional*): entries of `made_of` that may change; the output is then unfinished again.
        passing (`tuple[str]`, *optional*): globs of further files of the command that may disappear at any time.
        defaults (`dict`, *optional*): values of entries that records of earlier versions lack.
    """

    def __init__(
        self,
        folder: str | Path,
        made_of: dict,
        owns: tuple[str, ...] = ("*",),
        part: str = "record",
        option: str = "--output",
        growing: tuple[str, ...] = (),
        free: tuple[str, ...] = (),
        passing: tuple[str, ...] = (),
        defaults: dict | None = None,
    ):
        self.folder, self.owns, self.part, self.option = Path(folder), owns, part, option
        self.made_of, self.defaults = json.loads(json.dumps(made_of, default=str)), defaults or {}
        self.growing, self.free, self.passing = growing, free, passing
        self.file = self.folder / WORK / f"{part}.json"

    @contextmanager
    def making(self) -> Iterator[bool]:
        """Locks the folder while the output is made, and yields whether it is finished. Marks it finished at the end.

        Raises:
            `ValueError`: when another run holds the folder; see also `check`.
        """
        # A finished output needs neither a lock nor room to write.
        if self.check():
            yield True
            return
        with held(self.folder, self.option):
            finished = self.check()
            try:
                if not finished:
                    self.begin()
                yield finished
                if not finished:
                    self.write(finished=True)
            finally:
                if not self.find_files(self.owns + self.passing):
                    remove(self.file)

    def check(self) -> bool:
        """Whether the output is finished.

        Raises:
            `ValueError`: when it was begun with other settings, has files but no record, or was changed afterwards.
        """
        there, known = self.find_files(self.owns + self.passing), read_record(self.folder, self.part)
        # Without files, nothing of an earlier run can mix with this one.
        if not there:
            return False
        if known is None:
            raise ValueError(
                f"{self.folder} holds {there[0].relative_to(self.folder)}, and nothing tells what it was made of; "
                f"choose another {self.option}, or delete it."
            )
        before = {**self.defaults, **known["made_of"]}
        before = {name: value for name, value in before.items() if name in self.made_of}
        changes = compare({**before, **{name: self.made_of[name] for name in self.free}}, self.made_of, self.growing)
        if len(changes) > MOST:
            changes = [*changes[:MOST], f"and {len(changes) - MOST} more differ"]
        if changes:
            raise ValueError(
                f"{self.folder} was begun with something else ({'; '.join(changes)}); "
                f"choose another {self.option}, or delete it."
            )
        if not known["finished"] or self.made_of != before:
            return False
        changed = find_changed(self.folder, known["files"])
        for name in changed:
            if (self.folder / name).is_file():
                raise ValueError(
                    f"{self.folder / name} is not as it was written ({known['files'][name]} then, "
                    f"{summarize(self.folder / name)} now); delete it and run the command again."
                )
        return not changed

    def begin(self) -> None:
        """Removes the unfinished files of a killed run, and records what the output is made of."""
        owned = [path for pattern in self.owns + self.passing for path in self.folder.glob(pattern)]
        inside = [path for folder in owned for path in folder.rglob("*")]
        for folder in [path for path in (self.folder, *owned, *inside) if path.is_dir()]:
            remove_unfinished(folder)
        for folder in [path for path in (self.folder / WORK).glob("*") if path.is_dir()]:
            remove(folder)
        self.write(finished=False)

    def find_files(self, patterns: tuple[str, ...]) -> list[Path]:
        """Sorted files of the output that match the patterns, or lie in a folder that does."""
        found = {path for pattern in patterns for path in self.folder.glob(pattern) if path.name not in NOT_CONTENT}
        inside = {file for path in found if path.is_dir() for file in path.rglob("*")}
        files = {path for path in found | inside if not path.is_dir()}
        return sorted(file for file in files if WORK not in file.relative_to(self.folder).parts)

    def write(self, finished: bool) -> None:
        found = self.find_files(self.owns) if finished else []
        files = {str(file.relative_to(self.folder)): summarize(file) for file in found}
        make_folders(self.file.parent, option=self.option)
        content = {"made_of": self.made_of, "finished": finished, "files": files}
        write_file(self.file, (json.dumps(content, indent=2) + "\n").encode())


def read_record(folder: str | Path, part: str = "record") -> dict | None:
    """The record of an output, `{"made_of": dict, "finished": bool, "files": dict}`, or `None` if there is none.

    Raises `ValueError` when it is damaged.
    """
    file = Path(folder) / WORK / f"{part}.json"
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
        return {"made_of": dict(content["made_of"]), "finished": bool(content["finished"]), "files": content["files"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); delete {folder} and run the command again.") from error


def check_finished(folder: str | Path, part: str = "record") -> None:
    """Raises `ValueError` when a folder has a record of an unfinished command."""
    known = read_record(folder, part)
    if known is not None and not known["finished"]:
        command = known["made_of"].get("command", "its command")
        raise ValueError(f"{folder} is not finished; run `{command}` again there until it is.")


def find_changed(folder: Path, files: dict[str, str]) -> list[str]:
    """Names of the files of an output that are missing or differ from their recorded summary, see `summarize`."""
    return [name for name, note in files.items() if not (folder / name).is_file() or summarize(folder / name) != note]


def summarize(file: Path) -> str:
    """Size and CRC-32 of a file. For a large file, the checksum is of `NUM_BLOCKS` evenly spaced blocks, for speed."""
    size, checksum = file.stat().st_size, 0
    starts = range(0, size, BLOCK)
    if size > NUM_BLOCKS * BLOCK:
        starts = [(size - BLOCK) * i // (NUM_BLOCKS - 1) for i in range(NUM_BLOCKS)]
    with open(file, "rb") as content:
        for start in starts:
            content.seek(start)
            checksum = zlib.crc32(content.read(BLOCK), checksum)
    return f"{size} bytes with CRC-32 {checksum:08x}"


def compare(before: dict, now: dict, growing: tuple[str, ...] = (), prefix: str = "") -> list[str]:
    """One phrase for each entry that differs, also inside dictionaries. Those in `growing` may gain entries."""
    changes = []
    for name in [*now, *(name for name in before if name not in now)]:
        old, new = before.get(name, "nothing"), now.get(name, "nothing")
        if isinstance(old, dict) and isinstance(new, dict):
            added = set(new) - set(old) if name in growing else ()
            changes += compare(old, {key: new[key] for key in new if key not in added}, (), f"{prefix}{name} ")
        elif old != new:
            hashed = ", by the SHA-256 of its content" if shorten(old) != str(old) or shorten(new) != str(new) else ""
            changes.append(f"{prefix}{name} was {shorten(old)} and is {shorten(new)}{hashed}")
    return changes


def shorten(value) -> str:
    """A value as text; a SHA-256 is cut to its first 12 digits."""
    text = str(value)
    return text[:12] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def hash_file(file: str | Path) -> str:
    """SHA-256 of a file's content."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def hash_files(files: Iterable[str | Path], root: str | Path) -> str:
    """SHA-256 of the names, relative to `root`, and contents of files, in the order of the names."""
    digest = hashlib.sha256()
    for file in sorted(map(Path, files)):
        digest.update(str(file.relative_to(root)).encode(errors="surrogateescape") + b"\0")
        digest.update(bytes.fromhex(hash_file(file)))
    return digest.hexdigest()


def hash_source(name: str, deep: bool = False) -> str:
    """SHA-256 of the configurations, tokenizer and weights in a checkpoint folder, or the commit of a Hub checkpoint.

    Args:
        name: folder or Hub name.
        deep: whether to include subfolders, as a pipeline has them. Earlier training checkpoints do not count.

    Raises:
        `FileNotFoundError`: when there is no such folder or name. `ValueError`: when a file is damaged, or the folder
            is not finished.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from .loading_unicode2 import check_files

    folder = Path(name)
    if not folder.is_dir():
        try:
            return Path(snapshot_download(name, allow_patterns=["*.json"])).name
        except HFValidationError as error:
            raise FileNotFoundError(f"There is no folder {name}.") from error
        except LocalEntryNotFoundError as error:
            raise FileNotFoundError(
                f"There is no folder {name}, and the Hub cannot be reached for a repository of this name."
            ) from error
        except HfHubHTTPError as error:
            raise FileNotFoundError(f"There is no folder {name}, and the Hub gives no repository {name}.") from error
    check_finished(folder)
    files = folder.glob("**/*" if deep else "*")
    kept = [file for file in files if file.suffix in CONTENT and file.name != "trainer_state.json" and file.is_file()]
    hidden = (".", "checkpoint-")
    kept = [file for file in kept if not any(part.startswith(hidden) for part in file.relative_to(folder).parts)]
    for part in {file.parent for file in kept}:
        check_files(part)
    return hash_files(kept, folder)
