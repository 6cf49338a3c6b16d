"""What an output was made of: noted inside it, and compared before a command goes on there."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .files import WORK, explained, write_file


@contextmanager
def held(folder: str | Path, option: str = "--output") -> Iterator[None]:
    """Holds a folder, which is made if it is not there, for this run alone; a run that is killed lets go of it.

    Raises:
        `ValueError`: when another run holds it.
    """
    from filelock import FileLock, Timeout

    with explained(folder):
        (Path(folder) / WORK).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(folder) / WORK / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"Another run is writing to {folder}; wait for it or choose another {option}.") from None
    try:
        yield
    finally:
        lock.release()


class Record:
    r"""
    What a folder, or a part of it, is made of.

    Args:
        folder (`str` or `Path`): output of one command.
        made_of (`dict`): everything that the content depends on, as JSON has it: options, and SHA-256 of files.
        owns (`tuple[str]`): globs of what the command writes; where such files are and no record, something else made them.
        part (`str`, *optional*, defaults to `"record"`): name of the part, as a split.
        option (`str`, *optional*, defaults to `"--output"`): the option that names the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        made_of: dict,
        owns: tuple[str, ...],
        part: str = "record",
        option: str = "--output",
    ):
        self.folder, self.owns, self.option = Path(folder), owns, option
        self.made_of = json.loads(json.dumps(made_of))
        self.file = self.folder / WORK / f"{part}.json"

    def begin(self) -> bool:
        """Notes what the output is made of, or compares it with what was noted; returns whether the output is finished.

        Raises:
            `ValueError`: when it was begun with something else, or holds files that no record tells of.
        """
        known = read_record(self.folder, self.file.stem)
        if known is None:
            foreign = [path.name for pattern in self.owns for path in sorted(self.folder.glob(pattern))]
            if foreign:
                raise ValueError(
                    f"{self.folder} holds {foreign[0]}, and nothing tells what it was made of; "
                    f"choose another {self.option}, or delete it."
                )
            self.write(finished=False)
            return False
        changes = compare(known["made_of"], self.made_of)
        if changes:
            raise ValueError(
                f"{self.folder} was begun with something else ({'; '.join(changes)}); "
                f"choose another {self.option}, or delete it."
            )
        return known["finished"]

    def finish(self) -> None:
        """Notes that the output is whole."""
        self.write(finished=True)

    def write(self, finished: bool) -> None:
        with explained(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
        content = {"made_of": self.made_of, "finished": finished}
        write_file(self.file, (json.dumps(content, indent=2) + "\n").encode())


def read_record(folder: str | Path, part: str = "record") -> dict | None:
    """`{"made_of": dict, "finished": bool}` of an output, `None` where there is none. Raises `ValueError` when it is damaged."""
    file = Path(folder) / WORK / f"{part}.json"
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
        return {"made_of": dict(content["made_of"]), "finished": bool(content["finished"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); delete {folder} and run the command again.") from error


def compare(before: dict, now: dict) -> list[str]:
    """One phrase for each entry that is not as it was."""
    names = [*now, *(name for name in before if name not in now)]
    return [
        f"{name} was {shorten(before.get(name))} and is {shorten(now.get(name))}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def shorten(value) -> str:
    """A value as it is shown: of a SHA-256 its first 12 digits."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] if len(text) == 64 and all(digit in "0123456789abcdef" for digit in text) else text


def hash_files(files: Iterable[str | Path], root: str | Path) -> str:
    """SHA-256 of the names, from `root` on, and contents of files, in the order of the names."""
    digest = hashlib.sha256()
    for file in sorted(map(Path, files)):
        digest.update(str(file.relative_to(root)).encode(errors="surrogateescape") + b"\0")
        with open(file, "rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
