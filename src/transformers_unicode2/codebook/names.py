"""Finds image files, and says in a sentence what is left out."""

import fnmatch
import glob
import os
from collections import Counter
from pathlib import Path, PurePosixPath

from ..images_unicode2 import one_line

COMMON = ".png .apng .jpg .jpeg .jpe .jif .jfif .webp .gif .tif .tiff .bmp .dib .avif .avifs .ppm .pgm .pbm .pnm .pfm"
RARE = ".jp2 .j2k .j2c .jpc .jpf .jpx .qoi .ico .cur .icns .dds .psd .sgi .ras .pcx .xbm .xpm .tga"
IMAGE_SUFFIXES = {*COMMON.split(), *RARE.split()}
READ_SUFFIXES = IMAGE_SUFFIXES | {".parquet", ".arrow", ".tar"}


class LeftOut(Counter):
    """Number of left-out files of each kind."""

    def keeps(self, name: str) -> bool:
        """Whether a path, relative to the folder of all files, is an image; counts it if not."""
        if is_hidden(name):
            self["hidden file"] += 1
        elif not self.is_image(name):
            self[one_line(PurePosixPath(name).suffix.lower()) or "without a suffix"] += 1
        return self.is_image(name)

    @staticmethod
    def is_image(name: str) -> bool:
        return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES and not is_hidden(name)

    def sentence(self) -> str:
        """For example `left out: 3 hidden files, 2 .txt`; empty if nothing is left out."""
        plural = {"hidden file": "hidden files", "broken link": "broken links", "repeated link": "repeated links"}
        counts = [f"{count} {plural.get(kind, kind) if count > 1 else kind}" for kind, count in self.items()]
        return f"left out: {', '.join(counts)}" if counts else ""


def is_hidden(name: str) -> bool:
    """Whether a path, relative to the folder of all files, has a part that begins with a dot."""
    return any(part.startswith(".") and part not in (".", "..") for part in PurePosixPath(name).parts)


def walk(folder: Path) -> list[Path]:
    """All files in a folder and in the folders that its links lead to, sorted. Each folder is visited once.

    If a folder has several names, a visible one wins, then one without links. Raises `OSError` when a folder cannot be
    read.
    """

    def fail(error: OSError):
        raise error

    def rank(place: Path) -> tuple:
        return is_hidden(str(place.relative_to(folder))), place.is_symlink(), place

    waiting, seen, files = [folder], set(), []
    while waiting:
        start = min(waiting, key=rank)
        waiting.remove(start)
        for place, names, found in os.walk(start, onerror=fail):
            if os.path.realpath(place) in seen:
                names.clear()
                continue
            seen.add(os.path.realpath(place))
            files += [Path(place, name) for name in found]
            later = [name for name in names if os.path.islink(os.path.join(place, name)) or name.startswith(".")]
            waiting += [Path(place, name) for name in later]
            names[:] = [name for name in names if name not in set(later)]
    return sorted(files)


def expand(pattern: str) -> list[Path]:
    """Files that match a glob. `walk` visits the folders behind `**`, since `glob` would follow links in circles."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return [Path(name) for name in glob.glob(pattern)]
    start = parts.index("**")
    places = map(Path, glob.glob(str(Path(*parts[:start]))))
    files = [(place, file) for place in places if place.is_dir() for file in walk(place)]
    return [file for place, file in files if matches(file.relative_to(place).parts, parts[start:])]


def matches(names: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    """Whether the parts of a path match those of a glob. Hidden names match only patterns that begin with a dot."""
    if not patterns:
        return not names
    if patterns[0] == "**":
        seen = next((i for i, name in enumerate(names) if name.startswith(".")), len(names))
        if len(patterns) == 1 and seen == len(names):
            return True
        return any(matches(names[i:], patterns[1:]) for i in range(seen + 1))
    if not names or names[0].startswith(".") > patterns[0].startswith("."):
        return False
    return fnmatch.fnmatchcase(names[0], patterns[0]) and matches(names[1:], patterns[1:])


def once(files: list[tuple[Path, str]]) -> list[tuple[Path, str]]:
    """Files and their names for `LeftOut`, sorted, without links to other files of the list.

    If a file has several names, one that is read wins, then one without links.
    """

    def rank(pair: tuple[Path, str]) -> tuple:
        file, name = pair
        is_read = file.suffix.lower() in READ_SUFFIXES and not is_hidden(name)
        return not is_read, file.is_symlink(), file

    by_target = {}
    for file, name in sorted(files, key=rank):
        by_target.setdefault(os.path.realpath(file), (file, name))
    return sorted(by_target.values())
