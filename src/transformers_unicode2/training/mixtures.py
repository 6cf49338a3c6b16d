"""Mixtures of tokenized data sets, in the form of TRL's `DatasetMixtureConfig`.

    datasets:
      - {path: tokens/read, fraction: 0.8}
      - {path: tokens/draw, fraction: 0.2}

A path is a folder that `unicode2 tokenize` wrote, or a data set of such files on the Hub. `fraction` is TRL's: a share
of the mixture, normalised over its parts. The mixture is as large as it can be without a row taken twice. TRL takes the
first rows of each part; here they are drawn at random by the seed, since files are often sorted.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from pyarrow import types

from ..record import hash_file
from ..tokens import check_codes, find_tables, is_list, read_schema

# Of TRL's fields those that a folder of tokenized files has a meaning for
FIELDS = ("path", "data_dir", "split", "fraction")
# Of tokenized files those that all stages read
COLUMNS = ("messages", "codes")


@dataclass(frozen=True)
class MixturePart:
    """One data set of a mixture: its parquet files in their order, and its share, `None` for all of its rows."""

    path: str
    split: str
    fraction: float | None
    files: tuple[Path, ...]

    def open(self, columns: tuple[str, ...] = COLUMNS):
        """These columns of all rows, a `datasets.Dataset`. Raises `ValueError` when one is missing."""
        from .data import load_files

        rows = load_files(list(self.files))
        missing = [name for name in columns if name not in rows.column_names]
        if missing:
            raise ValueError(f"{self.path} has no column {missing[0]}; tokenize its data with `unicode2 tokenize`.")
        return rows.select_columns(list(columns))


def find_parts(datasets: list[dict], option: str) -> list[MixturePart]:
    """The parts of a mixture with their files.

    Args:
        datasets: `path`, and optionally `fraction`, `split` and `data_dir`, of each part.
        option: where they were given, for messages.

    Raises:
        `ValueError`: when a part is not as it must be, or its files are missing or no tokenized chats.
    """
    from trl.scripts.utils import DatasetConfig

    parts = []
    for number, fields in enumerate(datasets, 1):
        if not isinstance(fields, dict) or "path" not in fields or not fields.keys() <= set(FIELDS):
            raise ValueError(
                f"Part {number} of {option} is {fields}; it needs a `path`, and may have a `fraction`, a `split` and a "
                "`data_dir`."
            )
        config = DatasetConfig(**fields)
        inner = config.data_dir or ""
        folder = str(Path(find_folder(str(config.path), option), inner))
        files = find_tables(folder, config.split, option)
        check_columns(files)
        parts.append(MixturePart(str(Path(config.path, inner)), config.split, config.fraction, tuple(files)))
    check_fractions([part.fraction for part in parts], option)
    return parts


def find_folder(path: str, option: str) -> str:
    """The folder of a part, downloaded where `path` is a name on the Hub. Raises `ValueError` when there is neither."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if Path(path).is_dir():
        return path
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path):
        try:
            return snapshot_download(path, repo_type="dataset", allow_patterns="*.parquet")
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ValueError(f"{option}: there is no folder {path}, and the Hub gives no data set {path}.") from error
    raise ValueError(f"{option}: there is no folder {path}; give one that `unicode2 tokenize` wrote.")


def check_columns(files: list[Path]) -> None:
    """Raises `ValueError` unless the files have the columns of tokenized chats."""
    for file in files:
        schema = read_schema(file)
        names = schema.names
        if {"messages", "codes"} <= set(names):
            check_message_type(file, schema.field("messages").type)
            continue
        if "codes" in names:
            reason = "an earlier version tokenized it"
        elif "messages" in names and {"images", "image"} & set(names):
            reason = "its images are no codes yet"
        else:
            reason = "these are no tokenized chats"
        raise ValueError(
            f"{file} has the columns {', '.join(names)}, and a stage reads messages and codes: {reason}; give the data "
            "to `unicode2 tokenize`, and the stage what that writes."
        )


def check_message_type(file: Path, kind) -> None:
    """Raises `ValueError` unless an Arrow type is that of messages whose contents are lists of parts."""
    entries = list_entries(kind)
    parts = list_entries(entries["content"]) if "content" in entries else {}
    if "role" not in entries or not {"type", "text"} <= parts.keys():
        raise ValueError(
            f"{file} has messages of the type {kind}; they must be a list of role and content, and a content a list of "
            "parts with type and text, as `unicode2 tokenize` writes them."
        )


def list_entries(kind) -> dict:
    """Types of the entries in a list of structs, by their names; none of another Arrow type."""
    is_struct = is_list(kind) and types.is_struct(kind.value_type)
    return {field.name: field.type for field in kind.value_type} if is_struct else {}


def check_fractions(fractions: list[float | None], option: str) -> None:
    """Raises `ValueError` unless all parts have a fraction or none, and the fractions have a sum above 0."""
    given = [fraction for fraction in fractions if fraction is not None]
    if given and len(given) < len(fractions):
        raise ValueError(
            f"{len(given)} of {len(fractions)} parts of {option} have a `fraction`; give one to all or to none."
        )
    wrong = [value for value in given if not isinstance(value, int | float) or not value >= 0]
    if wrong or given and not 0 < sum(given) < float("inf"):
        raise ValueError(f"The fractions of {option} are {given}; none may be negative, and one must be above 0.")


def check_mixture(parts: list[MixturePart], model: str, config) -> None:
    """`check_codes` of each part. Raises `ValueError` on codes that `model` does not make.

    Args:
        parts: as of `find_parts`.
        model: folder or Hub name of a checkpoint.
        config: its `UniCode2Config`.
    """
    for part in parts:
        check_codes(list(part.files), model, config.codebook_config.codebook_size, config.num_image_tokens)


def hash_parts(parts: list[MixturePart]) -> dict[str, dict]:
    """What the rows of a mixture depend on, by the numbers of its parts. Their places do not matter."""
    return {
        str(number): {
            "split": part.split,
            "fraction": part.fraction,
            **{file.name: hash_file(file) for file in part.files},
        }
        for number, part in enumerate(parts, 1)
    }


def open_mixture(parts: list[MixturePart], seed: int, columns: tuple[str, ...] = COLUMNS):
    """
    The rows of a mixture, part after part, each in its own order.

    Args:
        parts: as of `find_parts`.
        seed: of the rows that a part with a fraction gives.
        columns: to read, `messages` and `codes` among them.

    Returns:
        `datasets.Dataset` with these columns.
    """
    from datasets import concatenate_datasets

    opened = [part.open(columns) for part in parts]
    sizes = count_rows([len(rows) for rows in opened], [part.fraction for part in parts])
    chosen = []
    for number, (rows, size) in enumerate(zip(opened, sizes)):
        if size < len(rows):
            order = np.random.default_rng([seed, number]).permutation(len(rows))
            rows = rows.select(np.sort(order[:size]))
        chosen.append(rows)
    features = merge_features([rows.features for rows in chosen])
    return concatenate_datasets([rows.cast(features) if rows.features != features else rows for rows in chosen])


def count_rows(sizes: list[int], fractions: list[float | None]) -> list[int]:
    """Rows that each part gives: all, or its share of the largest mixture in which no row is taken twice."""
    if not fractions or fractions[0] is None:
        return sizes
    shares = [fraction / sum(fractions) for fraction in fractions]
    total = min(size / share for size, share in zip(sizes, shares) if share > 0)
    counts = [round(share * total) for share in shares]
    for number, (count, size, share) in enumerate(zip(counts, sizes, shares), 1):
        if share > 0 and not count:
            raise ValueError(
                f"Part {number} has {share:.3g} of a mixture of {total:.0f} rows, and gives none of its {size}; raise "
                "its `fraction` or leave it out."
            )
    return counts


def merge_features(features: list):
    """Columns that hold the rows of all parts, whose codes may have several integer types, and whose messages may have
    several entries.
    """
    from datasets import Features, List, Value

    entries = {}
    for columns in features:
        entries |= {name: kind for name, kind in columns["messages"].feature.items() if name not in entries}
    kinds = {columns["codes"].feature.feature.dtype for columns in features}
    code = max(kinds, key=lambda kind: np.dtype(kind).itemsize)
    return Features({**features[0], "messages": List(entries), "codes": List(List(Value(code)))})


def check_targets(examples, visual_token_offset: int, train_modules: list[str]) -> None:
    """Raises `ValueError` when the visual head is to learn without the language model, and no image is learnt.

    Args:
        examples: data set with `labels`, as of `build_examples`.
        visual_token_offset: first visual token id.
        train_modules: modules that learn.
    """
    if "visual_head" not in train_modules or any(name.startswith("language_model") for name in train_modules):
        return
    batches = examples.select_columns("labels").with_format("arrow").iter(4096)
    if not any((pc.max(pc.list_flatten(batch["labels"])).as_py() or 0) >= visual_token_offset for batch in batches):
        raise ValueError(
            f"`train_modules` are {', '.join(train_modules)}, and none of the {len(examples)} examples has an image to "
            "learn, so the visual head would learn nothing; add chats with an image in an answer, or leave it out."
        )
