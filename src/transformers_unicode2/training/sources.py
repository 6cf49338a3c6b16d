"""What people have, as chats: the one place that knows formats of data.

A row becomes `messages`, whose contents are lists of parts of type text and image, and `images` in the order of the
image parts. An image in a user's turn is read, one in the assistant's is drawn. No image is decoded here.

| format | columns of a row |
| --- | --- |
| `llava` | `conversations`, with `<image>` where an image is; `image`, one or a list |
| `messages` | `messages`, as TRL reads them, with image parts or `<image>`; `images` or `image` |
| `journeydb` | `img_path`, `prompt`, `Task2`, whose `Caption` is used, or else the prompt |
| `questions` | an image, `questions` and `answers`, lists |
| `captions` | an image and a text about it, which `--task` makes a chat of |

A column `system` beside a chat is its first turn.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..images_unicode2 import decode_image, load_image, one_line
from .columns import check_columns, check_format, find_caption_column, find_columns, find_image_columns, recognize
from .folders import open_table
from .hub_rows import HubRows
from .messages import add_system, check_messages, list_values, parse_cell, read_messages
from .row_images import (
    CHAT_IMAGES,
    CHAT_NAMES,
    MissingFileError,
    find_image,
    list_chat_images,
    list_images,
    list_other_images,
)
from .tables import Tables
from .templates import CAPTION_PROMPT, USUAL, Task, build_chat

# Characters of a text that are shown.
SHOWN = 300
# Columns of chats that are not read: without them, a chat would be about nothing, or about something else.
NOT_READ = ("video", "videos", "audio", "audios", "tools")


class RowError(ValueError):
    """A row that makes no chat. `missing` is the name of an image file that is not there, if that is why."""

    def __init__(self, number: int, reason: str, missing: str | None = None):
        super().__init__(f"row {number}: {reason}")
        self.number, self.reason, self.missing = number, reason, missing


@dataclass(frozen=True)
class Row:
    """A chat, and `{"path": str | None, "bytes": bytes | None}` for each of its images; see `read_image`."""

    number: int
    messages: list[dict]
    images: list[dict]


@dataclass(frozen=True)
class Source:
    r"""
    Rows of one kind as chats; see `open_source`, which makes one.

    Args:
        name (`str`): as the user gave it.
        format (`str`): one of `columns.FORMATS`.
        table (`Tables` or `HubRows`): the rows as they are stored.
        image_root (`Path`, *optional*): folder of the images; by default that of the file which names them.
        task (`Task`, *optional*): what is made of a row that is no chat yet.
        image_columns (`tuple[str]`): columns with images. A chat has those of the first that is filled, see
            `row_images`; a row that is no chat yet has one image in one of them.
        caption_column (`str`, *optional*): what `{caption}` stands for.
        caption_prompt (`str`): what `{caption_prompt}` stands for.
    """

    name: str
    format: str
    table: Tables | HubRows
    image_root: Path | None = None
    task: Task | None = None
    image_columns: tuple[str, ...] = ()
    caption_column: str | None = None
    caption_prompt: str = CAPTION_PROMPT

    @property
    def num_rows(self) -> int | None:
        """Number of rows; `None` for a stream."""
        return self.table.num_rows

    def __len__(self) -> int:
        """Number of rows. Raises `TypeError` for a stream."""
        if self.num_rows is None:
            raise TypeError(f"The length of the stream {self.name} is unknown.")
        return self.num_rows

    def digest(self) -> str:
        """SHA-256 of all that the rows depend on, but for the contents of image files that they name."""
        made_of = {
            "files": self.table.versions,
            "format": self.format,
            "task": self.task and self.task.to_dict(),
            "columns": [*self.image_columns, self.caption_column],
            "caption_prompt": self.task and self.caption_prompt,
        }
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()

    def rows(self, start: int = 0) -> Iterator["Row | RowError"]:
        """Yields the chats of the rows from `start` on; in the place of a row that makes none, its `RowError`."""
        for number, (folder, row) in enumerate(self.table.read(start), start):
            try:
                if isinstance(row, ValueError):
                    raise row
                yield self.convert(number, row, folder)
            except MissingFileError as error:
                yield RowError(number, str(error), error.file)
            except ValueError as error:
                yield RowError(number, str(error))

    def convert(self, number: int, row: dict, folder: Path | None) -> Row:
        """The chat of a row. Raises `ValueError` when it makes none."""
        if self.format in ("llava", "messages"):
            filled = [name for name in NOT_READ if list_values(parse_cell(row.get(name)))]
            if filled:
                raise ValueError(f"it has something in its column {filled[0]}, which is not read")
            turns = row.get("conversations" if self.format == "llava" else "messages")
            turns = add_system(turns, row.get("system"))
            messages, images = self.read_chat(row, turns)
        else:
            messages = build_chat(self.name_columns(row, number), number, self.task, self.caption_prompt)
            count = sum(part["type"] == "image" for message in messages for part in message["content"])
            images = [self.find_only_image(row)] * count if count else []
        check_messages(messages, len(images))
        return Row(number, messages, [find_image(image, self.image_root or folder) for image in images])

    def read_chat(self, row: dict, turns: list[dict] | str) -> tuple[list[dict], list]:
        """Messages and images of a chat. Raises `ValueError` when it has images which are not read."""
        typed = self.table.typed
        if self.image_columns != (*CHAT_IMAGES, *CHAT_NAMES):
            return read_messages(turns, list_images(row, self.image_columns), typed)
        messages, images = read_messages(turns, list_chat_images(row), typed)
        others = [] if images else list_other_images(row)
        return read_messages(turns, others, typed) if others else (messages, images)

    def name_columns(self, row: dict, number: int) -> dict:
        """The row with its caption in the column `caption`. Of several captions, rows take another one in turn.

        Questions and answers may be lists as JSON, as CSV files have them.
        """
        if self.format == "questions":
            return {**row, **{name: parse_cell(row.get(name)) for name in ("questions", "answers")}}
        if self.format == "journeydb" and self.caption_column is None:
            about = parse_cell(row.get("Task2"))
            caption = about.get("Caption") if isinstance(about, dict) else None
            return {**row, "caption": caption if str(caption or "").strip() else row.get("prompt")}
        if self.caption_column is None:
            return row
        caption = row.get(self.caption_column)
        # A caption may be written as a list is, without being one
        with suppress(ValueError):
            listed = parse_cell(caption)
            caption = listed if isinstance(listed, list) and all(isinstance(text, str) for text in listed) else caption
        if isinstance(caption, list) and caption:
            caption = caption[number % len(caption)]
        return {**row, "caption": caption}

    def find_only_image(self, row: dict) -> bytes | str | dict:
        """The value of the image of a row. Raises `ValueError` unless there is one."""
        images = {name: list_images(row, (name,)) for name in self.image_columns}
        found = [image for values in images.values() for image in values]
        if len(found) != 1:
            held = ", ".join(f"{len(values)} in {name}" for name, values in images.items() if values) or "none"
            raise ValueError(f"it has {len(found)} images ({held}), where a text is about one")
        return found[0]


def read_image(image: dict) -> Image.Image:
    """The RGB image of a record of `Row.images`. Raises `ValueError` when it cannot be read."""
    return load_image(Path(image["path"])) if image["bytes"] is None else decode_image(image["bytes"])


def open_source(
    data: str,
    *,
    format: str | None = None,
    image_root: str | None = None,
    task: Task | None = None,
    split: str = "train",
    streaming: bool = False,
    image_column: str | None = None,
    caption_column: str | None = None,
    caption_prompt: str = CAPTION_PROMPT,
) -> Source:
    """
    Opens what a user names as data.

    Args:
        data: a file, a folder or a glob; or the name of a data set, `NAME`, `NAME:SPLIT` or `NAME:CONFIG:SPLIT`.
        format: one of `columns.FORMATS`, by default recognised by the columns.
        image_root: folder that the paths of images are relative to.
        task: what to make of rows that are no chats; by default the questions that rows have, or `read`.
        split: of a folder or data set with several.
        streaming: whether a data set of the Hub is read without a copy on disk. Local files always are.
        image_column: column with the image, by default recognised by its name.
        caption_column: column with the caption, by default recognised by its name.
        caption_prompt: the question that captions answer.

    Raises:
        `ValueError`: when there is no such data, or it cannot be told what its rows are.
    """
    if image_root is not None and not Path(image_root).is_dir():
        raise ValueError(f"--image-root {image_root} is no folder.")
    table = open_table(data, split, streaming)
    columns = find_columns(table, data)
    for option, column in (("image", image_column), ("caption", caption_column)):
        if column is not None and column not in columns:
            raise ValueError(f"--{option}-column is {column}, and {data} has the columns {', '.join(columns)}.")
    given = (image_column,) if image_column else ()
    image_columns = given or find_image_columns(columns)
    format = format or recognize(columns, image_columns, task, data)
    check_format(format, columns, data)
    root = Path(image_root) if image_root else None
    if format in ("llava", "messages"):
        return Source(data, format, table, root, image_columns=given or (*CHAT_IMAGES, *CHAT_NAMES))
    if format == "journeydb":
        image_columns = given or ("img_path",)
    elif format == "captions":
        caption_column = caption_column or find_caption_column(columns)
    task = task or Task(**USUAL["questions" if format == "questions" else "read"])
    check_columns(task, columns, image_columns, caption_column or format == "journeydb", data)
    return Source(data, format, table, root, task, image_columns, caption_column, caption_prompt)


def describe(source: Source) -> str:
    """What was recognised, with the first chat, in lines for the user."""
    count = "a stream of rows" if source.num_rows is None else f"{source.num_rows:,} rows"
    columns = f"; images from {' or '.join(source.image_columns)}" if source.task and source.image_columns else ""
    columns += f", captions from {source.caption_column}" if source.caption_column else ""
    lines = [f"{source.format}: {count} of {source.name}, {source.table.kind}{columns}"]
    first = next((row for row in source.rows() if isinstance(row, Row)), None)
    if first is None:
        return "\n".join([*lines, "  none of its rows makes a chat"])
    images = iter(first.images)
    for message in first.messages:
        parts = message["content"]
        texts = [one_line(p["text"]) if p["type"] == "text" else name_image(next(images)) for p in parts]
        texts += [f"[{len(message['tool_calls'])} tool calls]"] if "tool_calls" in message else []
        texts = [text if len(text) <= SHOWN else f"{text[:SHOWN]}..." for text in texts]
        lines.append(f"  {message['role']}: {' '.join(texts)}")
    return "\n".join(lines)


def name_image(image: dict) -> str:
    place = f"{len(image['bytes']):,} bytes" if image["path"] is None else one_line(Path(image["path"]).name)
    return f"[image: {place}]"
