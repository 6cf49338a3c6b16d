"""The images of a tar, each with the place of its content: all that it holds, or a refusal."""

import os
import posixpath
import tarfile
from collections.abc import Iterator
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
    entries, places, items = [], {}, []
    try:
        for member in read_members(file):
            name = posixpath.normpath(member.name)
            places[name] = find_place(member, places)
            if member.type not in WITHOUT_CONTENT:
                entries.append((name, places[name], member.type))
        for name, place, kind in entries:
            if left_out.keeps(name):
                target, place = follow(name, place, places)
                if place is None and kind != tarfile.SYMTYPE:
                    raise ValueError(
                        f"{one_line(name)} is stored as type {kind!r}, which is not read; pack it as a plain file"
                    )
                if place is None:
                    left_out["broken link"] += 1
                elif target != name and left_out.is_image(target):
                    left_out["repeated link"] += 1
                else:
                    items.append((file, name, *place))
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(
            f"{one_line(str(file))} is no whole, uncompressed tar ({error}); repair or remove it."
        ) from error
    return items


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


def skip_zeros(content, position: int) -> int:
    """The first block from a position on that is not all zeros, or the end of the file."""
    content.seek(position)
    while block := content.read(BLOCK):
        if block.strip(b"\0"):
            return content.tell() - len(block)
    return content.seek(0, os.SEEK_END)
