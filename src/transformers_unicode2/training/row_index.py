"""The first pass of `unicode2 tokenize`: all rows as chats, with numbers in the place of their images.

An image that is named twice has one number, so it is encoded once. Its key is the SHA-256 of its content. Rows are kept
in blocks on disk, each of which becomes one shard.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..files import write_file
from .chats import encode_chat
from .image_files import FileHashes, check_image_files, collect_notes, note_files
from .shards import ENTRIES
from .sources import Row, RowError, Source


@dataclass(frozen=True)
class Job:
    """The chats that a task makes of a source.

    Args:
        folder (`str`): where its shards go, below the output.
        number (`int`): of the source, from 1.
        source (`Source`): its rows.
    """

    folder: str
    number: int
    source: Source


def index_rows(jobs: list[Job], work: Path, rows_per_block: int, processor=None) -> None:
    """Writes the blocks that are not there yet, see `RowIndex`.

    With a `UniCode2Processor`, rows that do not become ids of its model are refused.
    """
    from tqdm import tqdm

    known, block, hashes = {}, 0, FileHashes()
    for place, job in enumerate(jobs):
        rows, start = None, 0
        with tqdm(total=job.source.num_rows, unit="row", desc=f"reading {job.folder or job.source.format}") as bar:
            while start is not None:
                file = work / f"images-{block:05d}.json"
                if file.is_file():
                    content = json.loads(file.read_text())
                    for image in content["images"]:
                        known[image["key"]] = len(known)
                else:
                    rows = rows or Upcoming(job.source.rows(start))
                    content, chats = read_block(rows, known, rows_per_block, hashes, processor)
                    # The list of images is there last, so its chats are, too
                    write_file(work / f"rows-{block:05d}.json", json.dumps(chats).encode())
                    write_file(file, json.dumps({"job": place, **content}).encode())
                start, block = content["next"], block + 1
                bar.update(content["num_rows"])
    write_file(work / "indexed", b"")


class Upcoming:
    """An iterator over rows that tells which row is next."""

    def __init__(self, rows: Iterator):
        self.rows = rows
        self.next = next(rows, None)

    def take(self):
        row, self.next = self.next, next(self.rows, None)
        return row


def read_block(
    rows: Upcoming, known: dict[str, int], size: int, hashes: FileHashes, processor=None
) -> tuple[dict, list[dict]]:
    """
    The next rows of a source.

    Args:
        rows: of the source.
        known: numbers of images by their keys; new ones are added.
        size: rows at most.
        hashes: of image files.
        processor (`UniCode2Processor`, *optional*): whose chat template the chats must fit.

    Returns:
        What is known of the block: `num_rows`, the number of the `next` row after it, new `images`, notes of image
        `files`, `refused` rows, and the `extras` of messages. And its chats, `{"row", "messages", "images"}`.
    """
    content = {"num_rows": 0, "next": None, "images": [], "files": [], "refused": [], "extras": []}
    chats, extras = [], set()
    while rows.next is not None and content["num_rows"] < size:
        row = rows.take()
        content["num_rows"] += 1
        content["files"] += note_files(row, hashes.describe)
        if processor is not None and isinstance(row, Row):
            row = check_chat(row, processor)
        if isinstance(row, RowError):
            content["refused"].append({"row": row.number, "reason": row.reason, "missing": row.missing})
            continue
        numbers = []
        for position, image in enumerate(row.images):
            path = image["path"] if image["bytes"] is None else None
            key = hashes.describe(path)[2] if path else hashlib.sha256(image["bytes"]).hexdigest()
            if key not in known:
                known[key] = len(known)
                content["images"].append({"key": key, "path": path, "row": row.number, "position": position})
            numbers.append(known[key])
        chats.append({"row": row.number, "messages": row.messages, "images": numbers})
        extras |= {name for turn in row.messages for name in turn} - set(ENTRIES)
    content["extras"], content["next"] = sorted(extras), rows.next and rows.next.number
    return content, chats


def check_chat(row: Row, processor) -> Row | RowError:
    """The row, or its `RowError` when its chat does not become ids."""
    try:
        encode_chat(processor, row.messages, [[0] * processor.num_image_tokens] * len(row.images))
    except ValueError as error:
        return RowError(row.number, str(error).rstrip("."))
    return row


def check_blocks(jobs: list[Job], work: Path) -> None:
    """Raises `ValueError` when the rows of blocks that are there name other image files than when they were read."""
    blocks = RowIndex(jobs, work).blocks
    if blocks:
        check_image_files(jobs, collect_notes(blocks), (blocks[-1]["job"], blocks[-1]["next"]))


class RowIndex:
    r"""
    What the first pass wrote.

    Args:
        jobs (`list[Job]`): in their order.
        work (`Path`): folder of the blocks.

    Attributes:
        blocks (`list[dict]`): see `read_block`; each has the place of its `job`, too.
        images (`list[dict]`): all images by their numbers: `key`; `path`, or else the place of their `job`, their `row`
            in it and their `position` in the row.
        extras (`list[str]`): entries of messages beside role and content.
    """

    def __init__(self, jobs: list[Job], work: Path):
        self.jobs, self.work = jobs, work
        self.blocks = [json.loads(file.read_text()) for file in sorted(work.glob("images-*.json"))]
        self.images = [{**image, "job": block["job"]} for block in self.blocks for image in block.pop("images")]
        self.extras = sorted({name for block in self.blocks for name in block["extras"]})

    def forget(self) -> None:
        """Removes what may be another once files are repaired: all but the shards of codes without errors."""
        for pattern in ("indexed", "images-*.json", "rows-*.json"):
            # The last first: what a kill leaves is a beginning
            for file in sorted(self.work.glob(pattern), reverse=True):
                file.unlink()
        for file in self.work.glob("codes-*.json"):
            if json.loads(file.read_text())["errors"]:
                file.with_suffix(".npy").unlink(missing_ok=True)

    def read_chats(self, block: int) -> list[dict]:
        return json.loads((self.work / f"rows-{block:05d}.json").read_text())

    def list_shards(self) -> list[tuple[int, str]]:
        """Each block with the name of its shard, below the output and without the split."""
        counts, shards = {}, []
        for number, block in enumerate(self.blocks):
            folder = self.jobs[block["job"]].folder
            shards.append((number, folder, counts.setdefault(folder, 0)))
            counts[folder] += 1
        return [(number, f"{folder}/{{}}-{count:05d}.parquet".lstrip("/")) for number, folder, count in shards]

    def find_refused(self, errors: dict[int, str]) -> list[dict]:
        """The rows without a chat, and those with an image that cannot be read, as their numbers and reasons say.

        Args:
            errors: reasons by numbers of images.

        Returns:
            `name` and number of the `source`, `row`, `reason`, and the `missing` image file if there is one.
        """
        refused = []
        for number, block in enumerate(self.blocks):
            found = list(block["refused"])
            for chat in self.read_chats(number) if errors else ():
                reasons = [errors[image] for image in chat["images"] if image in errors]
                found += [{"row": chat["row"], "reason": reasons[0], "missing": None}] if reasons else []
            job = self.jobs[block["job"]]
            about = {"name": job.source.name, "source": job.number, "folder": job.folder}
            refused += [{**about, **row} for row in sorted(found, key=lambda row: row["row"])]
        return refused
