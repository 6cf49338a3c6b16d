"""All images of a tar, each with the place of its content. A tar that cannot be read in full is refused."""

import posixpath
import tarfile
from pathlib import Path

from ..images_unicode2 import one_line
from ..tar_members import find_place, follow, named, read_members
from .names import LeftOut

WITHOUT_CONTENT = (tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE)


def index_tar(file: Path, left_out: LeftOut) -> list[tuple[Path, str, int, int]]:
    """
    Tar, name, offset and size in bytes of every image in a tar, or in several tars joined to one file.

    Args:
        file (`Path`): an uncompressed tar.
        left_out (`LeftOut`): counts members that are no images, and symbolic links to images of the tar.

    Raises:
        `ValueError`: when the tar is compressed, damaged or truncated, or stores an image in an unsupported form.
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
    """Raises `ValueError` when a tar is compressed, damaged or truncated."""
    with named(file):
        for _ in read_members(file):
            pass


def find_image(name: str, place, kind: bytes, places: dict, left_out: LeftOut) -> tuple[str, int, int] | None:
    """Name, offset and size of an image; `None` for a broken link, or for a link to an image of the tar.

    Raises `ValueError` when the image is stored in an unsupported form.
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
