"""Rows of data sets that `datasets` loads by name, with undecoded images."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..files import NotWrittenError, explained
from ..image_tables import find_inside
from .tables import BATCH, TEXTS, is_image

NAME = re.compile(r"(?P<name>[^:]+)(:(?P<config>[^:\[\]]+))??(:(?P<split>[^:\[\]]+(\[.*\])?))?")
# What an image is in that is read as a stream.
REMOTE = ("hf://", "zip://", "tar://", "gzip://")


class HubRows:
    r"""
    A data set of the Hub.

    Args:
        data (`str`): `NAME`, `NAME:SPLIT` or `NAME:CONFIG:SPLIT`.
        split (`str`): where `data` names none.
        streaming (`bool`): whether to read without a copy on disk; the number of rows is unknown then.

    Raises:
        `ValueError`: when there is no such data set, configuration or split, or the Hub cannot be reached.
    """

    kind = "a data set of the Hub"
    typed = True

    def __init__(self, data: str, split: str, streaming: bool):
        from datasets import Features, config, load_dataset_builder

        found = NAME.fullmatch(data)
        if found is None:
            raise ValueError(f"{data} is no file or folder; a data set is named NAME, NAME:SPLIT or NAME:CONFIG:SPLIT.")
        name, part, self.split = found["name"], found["config"], found["split"] or split
        try:
            with explained(config.HF_DATASETS_CACHE):
                self.builder = load_dataset_builder(name, part)
                rows = self.open(streaming)
        except NotWrittenError:
            raise
        except Exception as error:
            # Of any kind: of the network, of the Hub, of the reader of the files.
            reason = " ".join(str(error.__cause__ or error).split()).rstrip(".")
            raise ValueError(f"{data} is no file or folder, nor a data set that can be loaded: {reason}.") from error
        self.num_rows = None if streaming else len(rows)
        self.rows = rows.decode(False) if streaming else rows.with_format("arrow")
        # Some streams tell them only as they are read.
        kinds = rows.features or {}
        self.features = Features({column: undecoded(kind) for column, kind in kinds.items()})

    def open(self, streaming: bool):
        """The split as a `datasets.IterableDataset` or `Dataset`, of which a copy is kept on disk."""
        if streaming:
            return self.builder.as_streaming_dataset(self.split)
        self.builder.download_and_prepare()
        return self.builder.as_dataset(self.split)

    def read(self, start: int = 0) -> Iterator[tuple[Path | None, dict | ValueError]]:
        """Yields the rows from `start` on; their files are in no folder of the user's, see `find_stored`."""
        for row in self.rows.skip(start) if self.num_rows is None else self.read_stored(start):
            row = self.features.decode_example(row) if self.features else row
            yield None, flatten_sample(row) if "__key__" in row else row

    def read_stored(self, start: int) -> Iterator[dict]:
        """Rows as they are on disk. `cast`, which would leave images undecoded, too, copies all of them."""
        for first in range(start, self.num_rows, BATCH):
            yield from self.rows[first : first + BATCH].to_pylist()

    @property
    def versions(self) -> list[str]:
        """What tells the rows from those of another data set: its hash, which is a commit on the Hub, and the split."""
        return [self.builder.cache_dir.rsplit("___")[-1], str(self.builder.hash), self.split]


def undecoded(feature):
    """A feature whose images, sounds and films are read as they are stored."""
    from datasets import Audio, Image, LargeList, List, Video

    if isinstance(feature, (Image, Audio, Video)):
        return type(feature)(decode=False)
    if isinstance(feature, (List, LargeList)):
        return type(feature)(undecoded(feature.feature))
    if isinstance(feature, dict):
        return {name: undecoded(kind) for name, kind in feature.items()}
    return feature


def flatten_sample(row: dict) -> dict | ValueError:
    """A sample of a WebDataset as `tables.TarTable` has it: images in one column, beside the entries of its JSON."""
    if not isinstance(row.get("json"), dict | None):
        return ValueError(f"its .json is {type(row['json']).__name__}, where an object must be")
    kinds = {name: name.rsplit(".", 1)[-1].lower() for name in row}
    images = [value for name, value in row.items() if is_image(Path(f"x.{kinds[name]}")) and value is not None]
    about = {name: value for name, value in (row.get("json") or {}).items() if name != "image" or not images}
    return {**about, **{name: row[name] for name in row if kinds[name] in TEXTS}, "images": images}


def find_stored(name: str) -> dict | None:
    """Where an image is that a loaded data set names: in a cache of the Hub, or behind an address of a stream.

    Returns `{"path": ..., "bytes": ...}`, one of them `None`; or `None` when it is neither.
    Raises `ValueError` when the address cannot be read.
    """
    import fsspec
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    if name.startswith(REMOTE):
        try:
            with fsspec.open(name, "rb") as file:
                return {"path": None, "bytes": file.read()}
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error}") from error
    caches = (HF_HUB_CACHE, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH) if os.path.isabs(name) else ()
    paths = [find_inside(name, Path(cache)) for cache in caches]
    return next(({"path": path, "bytes": None} for path in paths if path), None)
