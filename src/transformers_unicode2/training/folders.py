"""Finds the tables that a user means by the name of a file, a folder or a data set."""

import glob
import os
import re
from pathlib import Path

from ..images_unicode2 import one_line
from ..record import check_finished
from .arrow_table import ArrowTable
from .hub_rows import HubRows
from .tables import CaptionList, CsvTable, JsonTable, Tables, TarTable, TextFiles, is_image

KINDS = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz"), JsonTable),
    **dict.fromkeys((".csv", ".tsv"), CsvTable),
    **dict.fromkeys((".parquet", ".arrow"), ArrowTable),
    ".tar": TarTable,
}
# Tables that name the images beside them.
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "captions.tsv")
# Files of other programs' that are no data.
NO_DATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
# Of a data set, with a configuration or a split behind it.
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:|$)")
SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")


def open_table(data: str, split: str, streaming: bool) -> Tables | HubRows:
    """
    The rows that `data` names, see `open_source`.

    Raises:
        `ValueError`: when there are none, or it cannot be told which are meant.
    """
    if not data.strip():
        raise ValueError("--data is empty; give a file, a folder or the name of a data set.")
    place = Path(data)
    if place.is_dir():
        check_finished(place, split)
        return Tables(find_tables(place, split), place)
    files = [place] if place.is_file() else sorted(map(Path, glob.glob(data, recursive=True)))
    files = [file for file in files if file.is_file()]
    if not files and HUB_NAME.match(data) and find_suffix(place) not in KINDS:
        return HubRows(data, split, streaming)
    if not files:
        raise ValueError(f"There is no file or folder {data}, and a data set of the Hub is not named so.")
    return Tables(open_files(files, data), Path(os.path.commonpath([file.parent for file in files])))


def open_files(files: list[Path], data: str) -> list:
    """Tables of files, all of one kind."""
    kinds = {find_kind(file) for file in files}
    if None in kinds:
        unknown = next(file for file in files if find_kind(file) is None)
        raise ValueError(f"{one_line(str(unknown))} is no table; give one of {', '.join(KINDS)}.")
    if len(kinds) > 1:
        suffixes = sorted({find_suffix(file) for file in files})
        raise ValueError(
            f"{data} holds {' and '.join(suffixes)} files; name those of one kind, as {data}/*{suffixes[0]}."
        )
    return [kinds.copy().pop()(file) for file in files]


def find_suffix(file: Path) -> str:
    name = file.name.lower()
    return next((suffix for suffix in sorted(KINDS, key=len, reverse=True) if name.endswith(suffix)), file.suffix)


def find_kind(file: Path) -> type | None:
    """The class that reads a file, `None` for no table."""
    return CaptionList if is_caption_list(file) else KINDS.get(find_suffix(file))


def is_caption_list(file: Path) -> bool:
    """Whether a file is a `captions.tsv` without a header: its first line names an image."""
    if file.name.lower() != "captions.tsv":
        return False
    with open(file, encoding="utf-8-sig", errors="replace") as content:
        name = next(filter(str.strip, content), "").partition("\t")[0]
    return is_image(Path(name))


def find_tables(folder: Path, split: str) -> list:
    """The tables of one split in a folder: those with metadata of images, else those of one kind, else texts."""
    files = list_files(folder)
    tables = [file for file in files if find_suffix(file) in KINDS and file.name not in NO_DATA]
    tables = [file for file in tables if file.name.lower() in METADATA] or tables
    if tables:
        return open_files(choose_split(tables, folder, split, by_name=True), str(folder))
    # A picture `train_station.jpg` is of no split.
    images = choose_split([file for file in files if is_image(file)], folder, split, by_name=False)
    texts = TextFiles(folder, images)
    if not texts.texts:
        raise ValueError(
            f"{folder} has {len(images)} images and no texts: it needs a table ({', '.join(KINDS)}), one of "
            f"{', '.join(METADATA)}, or a .txt of the same name beside each image."
        )
    return [texts]


def list_files(folder: Path) -> list[Path]:
    """Files in a folder and those that its links lead to, sorted, without hidden ones. Each folder is visited once."""
    seen, files = set(), []
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(files)


def choose_split(files: list[Path], folder: Path, split: str, by_name: bool) -> list[Path]:
    """Files that are in a folder of the split's name; all if none names a split.

    With `by_name` also those whose own name begins with it. Raises `ValueError` when there are files of other splits
    alone, or some beside those of the split that are of none.
    """
    named = {}
    for file in files:
        parts = list(file.relative_to(folder).parts[:-1])
        parts += [file.name.split(".")[0].split("-")[0].split("_")[0]] if by_name else []
        own = next((part for part in parts if part == split or part.lower() in SPLITS), None)
        named.setdefault(own, []).append(file)
    if split in named and None in named:
        raise ValueError(
            f"{folder} has {len(named[split])} files of the split {split}, such as {one_line(named[split][0].name)}, "
            f"and {len(named[None])} of no split, such as {one_line(named[None][0].name)}; move those that you do not "
            "mean to another folder, or rename the others."
        )
    if split in named:
        return named[split]
    if set(named) - {None}:
        others = [name or "files of no split" for name in named]
        raise ValueError(f"{folder} has no files of the split {split}; there is {', '.join(others)}.")
    return files
