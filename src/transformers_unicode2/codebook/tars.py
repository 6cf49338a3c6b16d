"""The images of a tar, each with the place of its content: all that it holds, or a refusal."""

import os
import posixpath
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..images_unicode2 import one_line
from .names import LeftOut

BLOCK = tarfile.BLOCKSIZE
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"PK\x03\x04")
WITHOUT_CONTENT = (tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE)
MAX_LINKS = 40  # that are followed one after the other


def index_tar(file: Path, left_out: LeftOut) -> list[tuple[Path, str, int, int]]:
    """
    Tar, name, offset and size in bytes of every image of a tar, or of several tars that were joined to one file.

    Args:
        file (`Path`): an uncompressed tar.
        left_out (`LeftOut`): counts what is no image, and symbolic links to images that are there under their own names.

    Raises:
        `ValueError`: when it is compressed, damaged, cut short, or holds images in a form that is not read.
    """
    entries, places = [], {}
    with named(file):
        for member in read_members(file):
            name = posixpath.normpath(member.name)
            places[name] = find_place(member, places)
            if member.type not in WITHOUT_CONTENT:
                entries.append((name, places[name], member.type))
        items = [find_image(*entry, places, left_out) for entry in entries if left_out.keeps(entry[0])]
    return [(file, *item) for item in items if item]


def check_tar(file: Path) -> None:
    """Raises `ValueError` when a tar is compressed, damaged or cut short."""
    with named(file):
        for _ in read_members(file):
            pass


@contextmanager
def named(file: Path) -> Iterator[None]:
    """Turns what is raised on a damaged tar into a `ValueError` with its name."""
    try:
        yield
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(
            f"{one_line(str(file))} is no whole, uncompressed tar ({error}); repair or remove it."
        ) from error


def find_image(name: str, place, kind: bytes, places: dict, left_out: LeftOut) -> tuple[str, int, int] | None:
    """Name, offset and size of an image; `None` for a link that leads nowhere or to an image that is there under its own name.

    Raises `ValueError` when it is stored in a form that is not read.
    """
    target, place = follow(name, place, places)
    if place is None and kind != tarfile.SYMTYPE:
        raise ValueError(f"{one_line(name)} is stored as type {kind!r}, which is not read; pack it as a plain file")
    if place is None:
        left_out["broken link"] += 1
        return None
    if target != name and left_out.is_image(target):
        left_out["repeated link"] += 1
        return None
    return name, *place


def find_place(member: tarfile.TarInfo, places: dict) -> tuple[int, int] | str | None:
    """Offset and size of a member's content; of a symbolic link its target; `None` when it is in no form that is read.

    Raises `ValueError` on a hard link to what is not before it.
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
    """The member that a name stands for at last, and its place, `None` when there is none."""
    for _ in range(MAX_LINKS):
        if not isinstance(place, str):
            return name, place
        name, place = place, places.get(place)
    return name, None


def read_members(file: Path) -> Iterator[tarfile.TarInfo]:
    """All members. `tarfile` ends without a word at a damaged header and at the first end of several tars; this goes on or raises."""
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
    """Raises `ValueError` when zeros from one byte to another are no end of a tar: two blocks, or up to a whole record.

    A download that broke off in a file of its full length, or a hole in one, looks like more.
    """
    zeros = start - position
    is_end = start % tarfile.RECORDSIZE == 0 or start == length
    if zeros > tarfile.RECORDSIZE or position and zeros > 2 * BLOCK and not is_end:
        raise ValueError(f"there are {zeros} bytes of zeros from byte {position} on, where images may have been")


def skip_zeros(content, position: int) -> int:
    """The first block from a position on that is not all zeros, or the end of the file."""
    content.seek(position)
    while block := content.read(BLOCK):
        if block.strip(b"\0"):
            return content.tell() - len(block)
    return content.seek(0, os.SEEK_END)
