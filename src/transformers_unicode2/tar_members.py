"""Members of tars, each with the place of its content. A tar that cannot be read in full is refused."""

import os
import posixpath
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .images_unicode2 import one_line

BLOCK = tarfile.BLOCKSIZE
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"PK\x03\x04")
# Links that are followed one after the other.
MAX_LINKS = 40


@contextmanager
def named(file: Path) -> Iterator[None]:
    """Turns the errors of a damaged tar into a `ValueError` with its name."""
    try:
        yield
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(
            f"{one_line(str(file))} is no whole, uncompressed tar ({error}); repair or remove it."
        ) from error


def find_place(member: tarfile.TarInfo, places: dict) -> tuple[int, int] | str | None:
    """Offset and size of a member's content, the target of a symbolic link, or `None` for an unsupported form.

    Raises `ValueError` on a hard link whose target does not come before it.
    """
    if member.issym():
        return posixpath.normpath(posixpath.join(posixpath.dirname(member.name), member.linkname))
    if member.islnk():
        target = posixpath.normpath(member.linkname)
        if target not in places:
            raise ValueError(f"{one_line(member.name)} is a link to {one_line(target)}, which is not before it")
        return places[target]
    plain = member.isfile() and not member.issparse()
    return (member.offset_data, member.size) if plain else None


def follow(name: str, place, places: dict) -> tuple[str, tuple[int, int] | None]:
    """The member at the end of a chain of links, and its place, or `None` if there is none."""
    for _ in range(MAX_LINKS):
        if not isinstance(place, str):
            return name, place
        name, place = place, places.get(place)
    return name, None


def read_members(file: Path) -> Iterator[tarfile.TarInfo]:
    """Yields all members of all joined tars; raises `ValueError` on damage.

    `tarfile` would silently stop at a damaged header, and at the end of the first of several tars.
    """
    length, position = file.stat().st_size, 0
    with open(file, "rb") as content:
        if content.read(6).startswith(COMPRESSED):
            raise ValueError("it is compressed; images are read from any position, so unpack it to a plain .tar")
        if not length:
            raise ValueError("it is empty")
        while (start := skip_zeros(content, position)) < length:
            check_padding(position, start, length)
            content.seek(start)
            with tarfile.TarFile(fileobj=content) as tar:
                for member in tar:
                    stored = 0 if member.issparse() or not member.isfile() else member.size
                    if member.offset_data + stored > length:
                        raise ValueError(
                            f"{one_line(member.name)} goes on to byte {member.offset_data + stored} of {length}"
                        )
                    yield member
                if tar.offset == start or 0 < position == start:
                    raise ValueError(f"the header at byte {start} is damaged")
                position = tar.offset
        if position >= length:
            raise ValueError(f"it was cut at byte {length}, where no end is marked")
        check_padding(position, length, length)


def check_padding(position: int, start: int, length: int) -> None:
    """Raises `ValueError` when the zeros from `position` to `start` cannot be the end of a tar.

    An end has two blocks of zeros, and more up to the end of a record: a whole record and one block at most. More of
    them may be a hole, or a download that stopped in a file of full length.
    """
    zeros = start - position
    is_end = start % tarfile.RECORDSIZE == 0 or start == length
    if zeros > tarfile.RECORDSIZE + BLOCK or position and zeros > 2 * BLOCK and not is_end:
        raise ValueError(f"there are {zeros} bytes of zeros from byte {position} on, where images may have been")


def skip_zeros(content, position: int) -> int:
    """Position of the first block, from `position` on, that is not all zeros; else the end of the file."""
    content.seek(position)
    while block := content.read(BLOCK):
        if block.strip(b"\0"):
            return content.tell() - len(block)
    return content.seek(0, os.SEEK_END)
