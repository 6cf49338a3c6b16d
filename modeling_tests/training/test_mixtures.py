"""Mixtures of tokenized data: their shares, their rows, and what is refused as a part of one."""

from collections import Counter

import pyarrow as pa
import pytest
from datasets import Dataset, load_dataset
from pyarrow import parquet
from trl import DatasetMixtureConfig, get_dataset

from transformers_unicode2.tokens import check_range
from transformers_unicode2.training.mixtures import check_targets, count_rows, find_parts, hash_parts, open_mixture
from transformers_unicode2.training.shards import write_shard


def write(folder, size: int, codebook_size: int = 96, extras: tuple = (), **entries) -> str:
    """A folder of `size` chats that say its name and the number of the row."""
    folder.mkdir()
    for number, rows in enumerate((range(size // 2), range(size // 2, size))):
        chats = [
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"{folder.name} {row}"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "yes"}], **entries},
                ],
                "codes": [[row % 96] * 4],
                "source": 1,
                "row": row,
            }
            for row in rows
        ]
        write_shard(folder / f"train-{number:05d}.parquet", chats, codebook_size, list(extras), {})
    return str(folder)


def mix(datasets: list[dict], seed: int = 0) -> list[str]:
    """What the first turns of a mixture say."""
    rows = open_mixture(find_parts(datasets, "`datasets`"), seed)
    return [turns[0]["content"][1]["text"] for turns in rows["messages"]]


def test_fractions_mean_what_they_mean_to_trl(tmp_path):
    """The same number of rows of each part as TRL takes, drawn by the seed where TRL takes the first ones."""
    sizes = {"a": 40, "b": 30, "c": 10}
    paths = {name: write(tmp_path / name, size) for name, size in sizes.items()}
    for fractions in ((0.5, 0.3, 0.2), (8, 1, 1), (0, 1, 1), (None, None, None)):
        parts = [{"path": path, "fraction": fraction} for path, fraction in zip(paths.values(), fractions)]
        said = mix(parts)
        stock = get_dataset(DatasetMixtureConfig(datasets=[dict(part) for part in parts]))["train"]
        expected = Counter(turns[0]["content"][1]["text"].split()[0] for turns in stock["messages"])
        assert Counter(text.split()[0] for text in said) == expected
        assert len(set(said)) == len(said) and sum(expected.values()) > 0
    first, second, other = mix(parts[:1]), mix([{**parts[0], "fraction": 1}]), parts[0] | {"fraction": 1}
    assert first == second == [f"a {row}" for row in range(40)]
    drawn = [mix([other, {**parts[2], "fraction": 1}], seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    of_a = [int(text.split()[1]) for text in drawn[0] if text.startswith("a")]
    assert len(of_a) == 10 and of_a == sorted(of_a) != list(range(10))


def test_parts_with_other_integers_and_other_entries_mix(tmp_path):
    call = [{"function": {"name": "f", "arguments": {"x": [1, "two"]}}}]
    paths = [
        write(tmp_path / "small", 4),
        write(tmp_path / "large", 4, codebook_size=500_000),
        write(tmp_path / "tools", 4, extras=("tool_calls",), tool_calls=call),
    ]
    rows = open_mixture(find_parts([{"path": path} for path in paths], "`datasets`"), 0)
    assert rows.features["codes"].feature.feature.dtype == "uint32" and len(rows) == 12
    assert [turns[1]["tool_calls"] for turns in rows["messages"]] == [None] * 8 + [call] * 4
    assert rows["codes"][:4] == rows["codes"][4:8] == [[[row] * 4] for row in range(4)]
    kinds = [load_dataset(path, split="train").features["codes"].feature.feature.dtype for path in paths]
    assert kinds == ["uint8", "uint32", "uint8"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("tokens", "Part 1 of `datasets` is tokens; it needs a `path`"),
        ({"fraction": 1}, "Part 1 of `datasets` is {'fraction': 1}; it needs a `path`"),
        ({"path": "x", "share": 1}, "it needs a `path`, and may have a `fraction`"),
        ({"path": "nowhere"}, "there is no folder nowhere; give one that `unicode2 tokenize` wrote"),
        ({"path": "no/where"}, "there is no folder no/where, and the Hub gives no data set no/where"),
        ({"path": None, "split": "test"}, "has no test-.*parquet"),
        (
            {"path": None, "fraction": 0},
            r"fractions of `datasets` are \[0\]; none may be negative, and one must be",
        ),
        ({"path": None, "fraction": -1}, r"The fractions of `datasets` are \[-1\]"),
        ({"path": None, "fraction": "half"}, r"The fractions of `datasets` are \['half'\]"),
    ],
)
def test_a_part_that_is_not_as_it_must_be_is_refused(tmp_path, fields, message):
    if "path" in fields and fields["path"] is None:
        fields["path"] = write(tmp_path / "t", 4)
    with pytest.raises(ValueError, match=message):
        find_parts([fields], "`datasets`")


def test_a_fraction_of_some_parts_alone_is_refused(tmp_path):
    parts = [{"path": write(tmp_path / "a", 4), "fraction": 0.5}, {"path": write(tmp_path / "b", 4)}]
    with pytest.raises(ValueError, match="1 of 2 parts of `datasets` have a `fraction`; give one to all or to none"):
        find_parts(parts, "`datasets`")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "user", "content": "x"}], "images": [b"x"]}, "its images are no codes yet"),
        ({"codes": [1, 2], "caption": "x"}, "an earlier version tokenized it"),
        ({"text": "x"}, "these are no tokenized chats"),
    ],
)
def test_what_is_not_tokenized_is_sent_to_tokenize(tmp_path, row, reason):
    Dataset.from_list([row]).to_parquet(str(tmp_path / "train-0.parquet"))
    with pytest.raises(ValueError, match=f"a stage reads messages and codes: {reason}; give the data to `unicode2 tok"):
        find_parts([{"path": str(tmp_path)}], "`datasets`")


def test_a_task_folder_of_an_unfinished_output_is_refused(tmp_path):
    from transformers_unicode2.record import Record

    write(tmp_path / "read", 4)
    record = Record(tmp_path, {"command": "tokenize"}, ("*/train-*.parquet",), "train")
    record.write(finished=False)
    with pytest.raises(ValueError, match="is not finished; run `tokenize` again there"):
        find_parts([{"path": str(tmp_path / "read")}], "`datasets`")
    record.write(finished=True)
    assert len(find_parts([{"path": str(tmp_path / "read")}], "`datasets`")[0].files) == 2


def test_a_mixture_is_known_by_its_contents(tmp_path):
    parts = [{"path": write(tmp_path / "a", 4), "fraction": 1}]
    before = hash_parts(find_parts(parts, "`datasets`"))
    (tmp_path / "a").rename(tmp_path / "moved")
    parts[0]["path"] = str(tmp_path / "moved")
    assert hash_parts(find_parts(parts, "`datasets`")) == before
    assert hash_parts(find_parts([{**parts[0], "fraction": 2}], "`datasets`")) != before
    write(tmp_path / "more", 6)
    (tmp_path / "more/train-00001.parquet").rename(tmp_path / "moved/train-00001.parquet")
    assert hash_parts(find_parts(parts, "`datasets`")) != before


def test_largest_mixture_without_a_row_taken_twice():
    assert count_rows([100, 10], [0.5, 0.5]) == [10, 10]
    assert count_rows([100, 10], [10, 1]) == [100, 10]
    assert count_rows([90_000] * 5, [1.0, 0.8, 0.25, 0.15, 0.1]) == [90_000, 72_000, 22_500, 13_500, 9_000]
    assert count_rows([7, 3], [None, None]) == [7, 3]


def test_a_visual_head_without_images_to_learn_is_refused():
    texts = Dataset.from_list([{"labels": [-100, 5, 6]}, {"labels": [-100, -100, 7]}])
    images = Dataset.from_list([{"labels": [-100, 5, 6]}, {"labels": [-100, 800, 7]}])
    with pytest.raises(ValueError, match="none of the 2 examples has an image to learn, so the visual head"):
        check_targets(texts, 768, ["visual_head", "projector"])
    check_targets(images, 768, ["visual_head"])
    check_targets(texts, 768, ["visual_head", "language_model"])
    check_targets(texts, 768, ["projector"])


TURN = pa.struct({"role": pa.string(), "content": pa.list_(pa.struct({"type": pa.string(), "text": pa.string()}))})
CODES = {
    "lists": pa.list_(pa.list_(pa.uint8())),
    "large lists": pa.large_list(pa.large_list(pa.int64())),
    "lists of one size": pa.list_(pa.list_(pa.int32(), 4)),
}


@pytest.mark.parametrize("kind", CODES)
def test_codes_in_lists_of_any_kind_are_read(tmp_path, kind):
    """Also of a row without images whose codes are missing, and in a file without rows."""
    chats = [[{"role": "user", "content": [{"type": "text", "text": name}]}] for name in "abc"]
    rows = pa.table({"messages": chats, "codes": [[[1, 2, 3, 4], [5, 6, 7, 95]], None, []]})
    rows = rows.cast(pa.schema({"messages": pa.list_(TURN), "codes": CODES[kind]}))
    parquet.write_table(rows, tmp_path / "train-0.parquet")
    parquet.write_table(rows[:0], tmp_path / "train-1.parquet")
    for number in range(2):
        check_range(tmp_path / f"train-{number}.parquet", 96, 4)
    with pytest.raises(ValueError, match="has codes from 1 to 95, 0 are missing; those of this model go from 0 to 94"):
        check_range(tmp_path / "train-0.parquet", 95, 4)
    with pytest.raises(ValueError, match="Row 0 of .* has an image of 4 codes; an image has 5"):
        check_range(tmp_path / "train-0.parquet", 96, 5)
    mixed = open_mixture(find_parts([{"path": str(tmp_path)}, {"path": write(tmp_path / "a", 4)}], "`datasets`"), 0)
    assert mixed["codes"][:3] == [[[1, 2, 3, 4], [5, 6, 7, 95]], None, []] and len(mixed) == 7


def test_a_part_without_rows_is_refused(tmp_path):
    schema = pa.schema({"messages": pa.list_(TURN), "codes": CODES["lists"]})
    parquet.write_table(schema.empty_table(), tmp_path / "train-0.parquet")
    with pytest.raises(ValueError, match="has 1 files and not one row in them"):
        open_mixture(find_parts([{"path": str(tmp_path)}], "`datasets`"), 0)


@pytest.mark.parametrize("messages", ['[{"role": "user", "content": "x"}]', [{"role": "user", "content": "x"}], None])
def test_messages_of_another_type_are_refused(tmp_path, messages):
    parquet.write_table(pa.table({"messages": [messages], "codes": [[[1]]]}), tmp_path / "train-0.parquet")
    with pytest.raises(ValueError, match="has messages of the type .*; they must be a list of role and content"):
        find_parts([{"path": str(tmp_path)}], "`datasets`")
