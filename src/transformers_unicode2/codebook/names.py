"""Which files are images, and what is left out, in a sentence."""

import fnmatch
import glob
import os
from collections import Counter
from pathlib import Path, PurePosixPath

from ..images_unicode2 import one_line

IMAGE_SUFFIXES = {
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".dib"),
    *(
        ".avif",
        ".avifs",
        ".jp2",
        ".j2k",
        ".j2c",
        ".jpc",
        ".jpf",
        ".jpx",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".pfm",
        ".qoi",
    ),
    *(".ico", ".cur", ".icns", ".dds", ".psd", ".sgi", ".ras", ".pcx", ".xbm", ".xpm", ".tga"),
}


class LeftOut(Counter):
    """How many files of which kind are left out."""

    def keeps(self, name: str) -> bool:
        """Whether a path, from the folder of all on, is that of an image; counts it if not."""
        if is_hidden(name):
            self["hidden file"] += 1
        elif not self.is_image(name):
            self[one_line(PurePosixPath(name).suffix.lower()) or "without a suffix"] += 1
        return self.is_image(name)

    @staticmethod
    def is_image(name: str) -> bool:
        return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES and not is_hidden(name)

    def sentence(self) -> str:
        """`left out: 3 hidden files, 2 .txt`, or nothing."""
        plural = {"hidden file": "hidden files", "broken link": "broken links", "repeated link": "repeated links"}
        counts = [f"{count} {plural.get(kind, kind) if count > 1 else kind}" for kind, count in self.items()]
        return f"left out: {', '.join(counts)}" if counts else ""


def is_hidden(name: str) -> bool:
    """Whether a path, from the folder of all on, has a part that begins with a dot."""
    return any(part.startswith(".") and part not in (".", "..") for part in PurePosixPath(name).parts)


def walk(folder: Path) -> list[Path]:
    """All files in a folder and in those that links in it lead to, each file and folder once, sorted.

    Raises `OSError` when a folder cannot be read.
    """

    def fail(error: OSError):
        raise error

    folders, seen, files = [folder], set(), []
    for start in folders:  # grows by the links, so that what is there without any is found first
        for place, names, found in os.walk(start, onerror=fail):
            if os.path.realpath(place) in seen:
                names.clear()
                continue
            seen.add(os.path.realpath(place))
            files += [Path(place, name) for name in found]
            folders += [Path(place, name) for name in sorted(names) if os.path.islink(os.path.join(place, name))]
    return once(files)


def expand(pattern: str) -> list[Path]:
    """Files that a glob finds, those behind `**` once, as `walk` has them: `glob` goes around in links until a name is too long."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return [Path(name) for name in glob.glob(pattern)]
    start = parts.index("**")
    places = map(Path, glob.glob(str(Path(*parts[:start]))))
    files = [(place, file) for place in places if place.is_dir() for file in walk(place)]
    return [file for place, file in files if matches(file.relative_to(place).parts, parts[start:])]


def matches(names: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    """Whether the parts of a path are those of a glob; what is hidden is found by a pattern that begins with a dot alone."""
    if not patterns:
        return not names
    if patterns[0] == "**":
        seen = next((i for i, name in enumerate(names) if name.startswith(".")), len(names))
        return any(matches(names[i:], patterns[1:]) for i in range(seen + 1)) or (
            len(patterns) == 1 and seen == len(names)
        )
    if not names or names[0].startswith(".") > patterns[0].startswith("."):
        return False
    return fnmatch.fnmatchcase(names[0], patterns[0]) and matches(names[1:], patterns[1:])


def once(files: list[Path]) -> list[Path]:
    """Files without those that are another by a link, sorted; of several names the one with the fewest links stays."""
    by_target = {}
    for file in sorted(files, key=lambda file: (file.is_symlink(), file)):
        by_target.setdefault(os.path.realpath(file), file)
    return sorted(by_target.values())
