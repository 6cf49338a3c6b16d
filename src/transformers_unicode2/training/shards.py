"""The files that `unicode2 tokenize` writes: chats with the codes of their images."""

import json
from pathlib import Path

import numpy as np

from ..files import whole_file
from ..tokens import NOTE

ROWS_PER_GROUP = 1000
# Entries of a message that every chat has
ENTRIES = ("role", "content")


def make_features(codebook_size: int, extras: list[str]):
    """
    The columns of a shard, `datasets.Features`.

    Args:
        codebook_size: number of codes, K; ids have the smallest unsigned integer type that holds them.
        extras: further entries of messages, such as `tool_calls`, kept as JSON.
    """
    from datasets import Features, Json, List, Value

    text = Value("string")
    message = {"role": text, "content": List({"type": text, "text": text}), **{name: Json() for name in extras}}
    code = np.min_scalar_type(codebook_size - 1).name
    columns = {"messages": List(message), "codes": List(List(Value(code)))}
    return Features({**columns, "source": Value("int32"), "row": Value("int64")})


def write_shard(file: Path, rows: list[dict], codebook_size: int, extras: list[str], note: dict) -> None:
    """
    Writes tokenized chats to a parquet file, whole or not at all.

    Args:
        file: parquet file to write.
        rows: `messages`; `codes`, one list or array of integers an image; number of the `source` among those that were
            given, from 1; number of the `row` in it.
        codebook_size, extras: see `make_features`.
        note: what made the codes, kept in the file's metadata.
    """
    import pyarrow as pa
    from datasets import Dataset, Features
    from pyarrow.parquet import write_table

    features = make_features(codebook_size, extras)
    schema = features.arrow_schema
    schema = schema.with_metadata({**schema.metadata, NOTE: json.dumps(note, sort_keys=True)})
    messages = [{"messages": [complete(turn, extras) for turn in row["messages"]]} for row in rows]
    chats = Dataset.from_list(messages, features=Features({"messages": features["messages"]}))
    columns = [chats.data.table["messages"], list_codes([row["codes"] for row in rows], codebook_size)]
    columns += [pa.array([row[name] for row in rows], schema.field(name).type) for name in ("source", "row")]
    with whole_file(file) as temporary:
        write_table(pa.Table.from_arrays(columns, schema=schema), temporary, row_group_size=ROWS_PER_GROUP)


def complete(turn: dict, extras: list[str]) -> dict:
    """A message with all of its entries, and with the text of each part."""
    parts = [{"type": part["type"], "text": part.get("text")} for part in turn["content"]]
    return {"role": turn["role"], "content": parts, **{name: turn.get(name) for name in extras}}


def list_codes(rows: list[list], codebook_size: int):
    """Codes of the images of rows as an Arrow array of lists of lists."""
    import pyarrow as pa

    images = [np.asarray(image) for codes in rows for image in codes]
    values = np.concatenate([np.zeros(0, int), *images]).astype(np.min_scalar_type(codebook_size - 1))
    ends, counts = np.cumsum([0, *map(len, images)]), np.cumsum([0, *map(len, rows)])
    inner = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values))
    return pa.ListArray.from_arrays(pa.array(counts, pa.int32()), inner)
