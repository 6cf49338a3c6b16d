"""The images of a row: the columns that have them, and where they are stored."""

import io
from contextlib import suppress
from math import isnan
from pathlib import Path

from PIL import Image

from ..image_tables import find_file, read_cell
from ..images_unicode2 import FORMATS, URLS, one_line
from .columns import IMAGE_COLUMNS, IMAGE_SUFFIXES
from .hub_rows import find_stored
from .messages import list_values, parse_cell
from .tables import is_image

# Columns of chats with their images, and with names of them.
CHAT_IMAGES = ("images", "image")
CHAT_NAMES = ("file_names", "file_name")
# Columns that may have an image, and more often have something else.
ANY_FILE = ("file", "path")


class MissingFileError(ValueError):
    """A row names an image file that is not there."""

    def __init__(self, file: str, folder: Path | None):
        place = "the data set" if folder is None else "the working directory" if folder == Path() else folder
        super().__init__(f"there is no image file {one_line(file):.200} in {place}")
        self.file = file


def list_images(row: dict, columns: tuple[str, ...]) -> list:
    """The values of the images in the first of these columns that has some."""
    for name in columns:
        value = row.get(name)
        # A file may be named as a list is written, without being one.
        with suppress(ValueError):
            value = parse_cell(value)
        # pandas has NaN where there is nothing.
        if isinstance(value, float) and isnan(value):
            value = None
        if isinstance(value, dict) and not any(value.values()):
            value = None
        if list_values(value):
            return list_values(value)
    return []


def list_chat_images(row: dict) -> list:
    """The images of a chat in the columns that are for them. Raises `ValueError` when two of these disagree."""
    first, second = (list_images(row, (name,)) for name in CHAT_IMAGES)
    if first and second and first != second:
        raise ValueError(
            f"it has {len(first)} images in its column images and {len(second)} others in its column image"
        )
    return first or second or list_images(row, CHAT_NAMES)


def list_other_images(row: dict) -> list:
    """The images of a chat in a column of another name. Raises `ValueError` when it cannot be told which."""
    found = {}
    for name in row:
        kind = name.lower().rsplit(".", 1)[-1]
        known = kind in (*IMAGE_COLUMNS, *IMAGE_SUFFIXES) and kind not in ANY_FILE
        if kind == "id" or kind.endswith(("_id", "__key__", "__url__")):
            continue
        values = list_images(row, (name,))
        if values and (known and isinstance(values[0], (str, bytes, dict)) or any(map(may_be_image, values))):
            found[name] = values
            if not known and kind not in ANY_FILE:
                raise ValueError(
                    f"it has an image in its column {one_line(name)}, which is not read without --image-column"
                )
    if len(set(map(repr, found.values()))) > 1:
        raise ValueError(f"it has images in its columns {' and '.join(found)}; name one by --image-column")
    return next(iter(found.values()), [])


def may_be_image(value: object) -> bool:
    """Whether a value holds or names an image, by its first bytes or its suffix."""
    if isinstance(value, bytes):
        with suppress(Exception), Image.open(io.BytesIO(value), formats=FORMATS):
            return True
        return False
    if isinstance(value, dict):
        return any(may_be_image(value.get(name)) for name in ("bytes", "path", "url"))
    if not isinstance(value, str) or "\n" in value:
        return False
    return value.startswith("data:image/") or is_image(Path(value.partition("?")[0]))


def find_image(value: bytes | str | dict | None, folder: Path | None) -> dict:
    """Where an image is: the path of its file, or its content.

    Args:
        value: of a cell, see `image_tables.read_cell`; a dictionary may have a `url` as well.
        folder: that a path is relative to, and stays inside unless it is absolute. Without one, see `find_stored`.

    Raises:
        `MissingFileError`: when there is no such file. `ValueError`: when there is no image.
    """
    if isinstance(value, dict):
        held = value.get("bytes") or value.get("path") or value.get("url")
        if value and not held:
            raise ValueError(f"an image is {value!r:.60}, where bytes, path or url must be")
        value = held
    if isinstance(value, str) and value:
        path = find_file(value, folder, absolute=True)
        found = find_stored(value) if folder is None else path and {"path": path, "bytes": None}
        if found:
            return found
    try:
        return {"path": None, "bytes": read_cell(value, folder, absolute=True)}
    except ValueError as error:
        if isinstance(value, str) and value and not value.lower().startswith((*URLS, "data:")):
            raise MissingFileError(value, folder) from error
        raise
