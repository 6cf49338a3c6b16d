"""Tells by the columns of a table what its rows are, and which column has the image and which the caption."""

from itertools import islice

from .hub_rows import HubRows
from .tables import Tables
from .templates import Task

IMAGE_COLUMNS = (
    *("image", "images", "file_name", "img", "picture", "photo", "image_path", "img_path", "image_file"),
    *("file_names", "file", "path"),
)
# Columns of a WebDataset, of which a row has one.
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
CAPTION_COLUMNS = ("caption", "text", "txt", "captions", "description", "prompt", "title")
# Columns of an answer. Beside one, a `text` or `prompt` is rather what was asked.
REPLY_COLUMNS = ("answer", "answers", "chosen", "completion", "output", "reply", "response", "solution", "target")
# Formats of rows, and the columns that tell one.
FORMATS = {
    "llava": ("conversations",),
    "messages": ("messages",),
    "journeydb": ("img_path", "prompt"),
    "questions": ("questions", "answers"),
    "captions": (),
}
# Rows that a format is recognised by.
NUM_FIRST = 32


def find_columns(table: Tables | HubRows, data: str) -> dict:
    """The columns of the first rows, each with a value where one has one.

    Raises `ValueError` when there are no rows, or none that can be read.
    """
    columns, errors = {}, []
    for _, row in islice(table.read(), NUM_FIRST):
        if isinstance(row, ValueError):
            errors.append(row)
            continue
        for name, value in row.items():
            if columns.get(name) in (None, "", []):
                columns[name] = value
    if not columns:
        reason = f"row 0: {errors[0]}" if errors else "it is empty"
        raise ValueError(f"{data} has no row that can be read; {reason}.")
    return columns


def find_image_columns(columns: dict) -> tuple[str, ...]:
    """Columns that are named as those with images are, or else hold their contents."""
    for name in ("image", "images", "file_name"):
        if name in columns:
            return (name,)
    names = [name for name in columns if name.lower().rsplit(".", 1)[-1] in (*IMAGE_COLUMNS, *IMAGE_SUFFIXES)]
    held = [name for name, value in columns.items() if isinstance(value, bytes) or is_image_struct(value)]
    return tuple(names or held)


def is_image_struct(value: object) -> bool:
    return isinstance(value, dict) and {"bytes", "path"} >= value.keys() > set()


def find_caption_column(columns: dict) -> str | None:
    """The column that is named as captions are; `None` when there is none, or several, or one beside an answer."""
    names = [name for name in columns if name.lower() in CAPTION_COLUMNS]
    has_reply = any(name.lower() in REPLY_COLUMNS for name in columns)
    return "caption" if "caption" in names else names[0] if len(names) == 1 and not has_reply else None


def recognize(columns: dict, image_columns: tuple[str, ...], task: Task | None, data: str) -> str:
    """The format of rows with these columns. Raises `ValueError` when it could be several, or none."""
    found = [name for name, needed in FORMATS.items() if needed and set(needed) <= columns.keys()]
    chats = [name for name in found if name in ("llava", "messages")]
    if len(chats) > 1:
        raise ValueError(f"{data} has the columns conversations and messages; say --format llava or messages.")
    if chats or "journeydb" in found:
        return [*chats, "journeydb"][0]
    if not image_columns and (task is None or "image" in task.find_names()):
        raise ValueError(
            f"{data} has the columns {', '.join(columns)}, none of them known to hold chats or images; name it by "
            "--image-column."
        )
    return "questions" if "questions" in found and task is None else "captions"


def check_format(format: str, columns: dict, data: str) -> None:
    """Raises `ValueError` unless there is such a format and its columns are there."""
    if format not in FORMATS:
        raise ValueError(f"--format is {format}; it must be one of {', '.join(FORMATS)}.")
    missing = [name for name in FORMATS[format] if name not in columns]
    if missing:
        raise ValueError(
            f"--format {format} needs the column {missing[0]}, and {data} has the columns {', '.join(columns)}."
        )


def check_columns(task: Task, columns: dict, image_columns: tuple, has_caption: bool, data: str) -> None:
    """Raises `ValueError` when a task asks for columns that are not there, or it cannot be told which one is meant."""
    names = task.find_names()
    if "caption" in names and not has_caption:
        raise ValueError(
            f"It cannot be told which column of {data} is the caption: it has {', '.join(columns)}; name it by "
            "--caption-column, or give templates of chats by --task FILE.yaml."
        )
    known = {*columns, "image", "caption", "caption_prompt"}
    missing = sorted(names - known)
    if missing:
        raise ValueError(f"The task asks for {{{missing[0]}}}; {data} has the columns {', '.join(columns)}.")
    if "image" in names and (not image_columns or len(image_columns) > 1 and not are_suffixes(image_columns)):
        raise ValueError(
            f"It cannot be told which column of {data} is the image: it has {', '.join(columns)}; name it by "
            "--image-column."
        )


def are_suffixes(names: tuple[str, ...]) -> bool:
    """Whether columns are named by kinds of image files, of which a row has one."""
    return all(name.lower() in IMAGE_SUFFIXES for name in names)
