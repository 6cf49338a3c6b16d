"""Rows of files, read on from any of them."""

import csv
import gzip
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import load_dataset
from numbered import picture
from pyarrow import parquet

from transformers_unicode2.training import tables
from transformers_unicode2.training.arrow_table import ArrowTable
from transformers_unicode2.training.tables import CaptionList, CsvTable, JsonTable, Tables, TarTable

ROWS = [
    {"id": 1, "text": 'é [{"]} 漢\n', "more": {"a": [1, {"b": "]"}]}},
    {"id": "2"},
    {},
    {"id": None, "new": "\u2028"},
]


def check_rows(table, rows: list) -> None:
    """A table has these rows, from any of them on."""
    assert len(table) == len(rows)
    for start in range(len(rows) + 1):
        assert list(table.read(start)) == rows[start:]


@pytest.mark.parametrize("chunk", [7, 30, 2**20])
@pytest.mark.parametrize(
    "write",
    [
        lambda rows: json.dumps(rows, ensure_ascii=False),
        lambda rows: "\ufeff \r\n" + json.dumps(rows, indent=2).replace("\n", "\r\n") + "\r\n ",
        lambda rows: "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        lambda rows: "\ufeff" + "\r\n\r\n".join(map(json.dumps, rows)) + "\r\n \n",
    ],
    ids=["array", "array, BOM and CRLF", "lines", "lines, BOM, CRLF and blank ones"],
)
def test_json_rows_keep_their_types_whatever_other_rows_have(tmp_path, monkeypatch, write, chunk):
    monkeypatch.setattr(tables, "CHUNK", chunk)
    (tmp_path / "a.json").write_bytes(write(ROWS).encode())
    check_rows(JsonTable(tmp_path / "a.json"), ROWS)
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write(write(ROWS).encode())
    check_rows(JsonTable(tmp_path / "b.jsonl.gz"), ROWS)


def test_an_array_is_not_held_in_memory(tmp_path):
    """Of 40 MB, less than a tenth."""
    import tracemalloc

    row = json.dumps({"conversations": "x" * 4000})
    (tmp_path / "a.json").write_text(f"[{','.join([row] * 10_000)}]")
    tracemalloc.start()
    table = JsonTable(tmp_path / "a.json")
    count = sum(1 for _ in table.read(5000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(table) == 10_000 and count == 5000 and peak < 8 * 2**20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1}, {"a"', "damaged or cut short in item 1 of its array"),
        (b'[{"a": 1}, {"a": x}, {"a": 2}]', "damaged or cut short in item 1 of its array: Expecting value at byte 17"),
        (b'[{"a": 1}', "cut short in item 1"),
        (b'[{"a": 1}, 7]', "Item 1 of the array in .*a.json is no object"),
        (b'[{"a": 1}] [{"a": 1}]', "goes on behind the end of its array, after 1 items"),
    ],
)
def test_damaged_arrays_are_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        len(JsonTable(tmp_path / "a.json"))


def test_a_damaged_line_is_one_bad_row(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"a": \n[1]\n{"a": "\xff"}\n{"a": 2}\n')
    table = JsonTable(tmp_path / "a.jsonl")
    rows = list(table.read())
    assert len(table) == 5 and rows[0] == {"a": 1} and rows[4] == {"a": 2}
    assert [str(row)[:10] for row in rows[1:4]] == ["it is no J", "it is list", "it is no J"]


def test_a_cut_gzip_is_refused(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 99)[:-9])
    with pytest.raises(ValueError, match="a.jsonl.gz cannot be read"):
        len(JsonTable(tmp_path / "a.jsonl.gz"))


@pytest.mark.parametrize(("suffix", "dialect"), [("csv", "excel"), ("tsv", "excel-tab")])
def test_cells_are_texts_as_they_are_written(tmp_path, suffix, dialect):
    """`datasets` makes nothing of NA, and 7 of 007."""
    rows = [
        {"file_name": "a.png", "caption": "NA"},
        {"file_name": "b,c.png", "caption": "007"},
        {"file_name": "é.png", "caption": 'she said "no",\tand\nleft'},
        {"file_name": "", "caption": "x" * 200_000},
    ]
    with open(tmp_path / f"a.{suffix}", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "caption"], dialect=dialect)
        writer.writeheader()
        writer.writerows(rows)
    check_rows(CsvTable(tmp_path / f"a.{suffix}"), rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,a\n1,2\n", "the columns a, a are not of different names"),
        (b"a,b\n\xff,2\n", "cannot be read as a table"),
        (b'a,b\n1,one\n2,"two\n3,three\n', "cannot be read as a table: unexpected end of data behind line 2"),
        (b'a,b\n1,"one" he said\n', "expected after .* behind line 1"),
    ],
)
def test_damaged_csv_files_are_refused(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(CsvTable(tmp_path / "a.csv").read())


def test_a_list_of_captions_keeps_quotes(tmp_path):
    (tmp_path / "captions.tsv").write_bytes('\ufeffa.png\t"quoted\r\n\r\né b.png\ta\tb\nc.png\n'.encode())
    rows = list(CaptionList(tmp_path / "captions.tsv").read())
    assert rows[:2] == [{"file_name": "a.png", "caption": '"quoted'}, {"file_name": "é b.png", "caption": "a\tb"}]
    assert "has no tabulator" in str(rows[2])
    (tmp_path / "captions.tsv").write_bytes(b"a.png\t\xff\n")
    with pytest.raises(ValueError, match="captions.tsv is no text in UTF-8"):
        list(CaptionList(tmp_path / "captions.tsv").read())


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_rows_of_parquet_and_arrow(tmp_path, suffix):
    rows = [{"image": {"bytes": picture(n), "path": None}, "asked": [str(n)] * n, "n": n} for n in range(70)]
    table = pa.Table.from_pylist(rows)
    if suffix == "parquet":
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=33)
    else:
        with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
            writer.write_table(table)
    check_rows(ArrowTable(tmp_path / f"a.{suffix}"), rows)


def test_cells_that_python_cannot_hold_cost_no_other_rows(tmp_path):
    """A time beyond the year 9999 is left out, and a row with other damage is refused by itself."""
    names = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    far = pa.array([0, 10**18, 0], pa.timestamp("us"))
    parquet.write_table(pa.table({"far": far, "n": [0, 1, 2]}), tmp_path / "a.parquet")
    assert [row["n"] for row in ArrowTable(tmp_path / "a.parquet").read()] == [0, 1, 2]
    parquet.write_table(pa.table({"far": far, "n": [0, 1, 2], "name": names}), tmp_path / "b.parquet")
    rows = list(ArrowTable(tmp_path / "b.parquet").read())
    assert [row["name"] for row in (rows[0], rows[2])] == ["a", "c"]
    assert "its column name cannot be read ('utf-8' codec" in str(rows[1])


def test_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["caption", "caption"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="has the columns caption, caption, which must be of different names"):
        ArrowTable(tmp_path / "a.parquet")


def write_tar(file: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_samples_of_a_tar_are_those_of_datasets(tmp_path):
    members = {}
    for n in range(3):
        members |= {f"d/{n}.png": picture(n), f"d/{n}.txt": f"caption é {n}".encode()}
        members[f"d/{n}.json"] = json.dumps({"n": n}).encode()
    write_tar(tmp_path / "a.tar", members)
    rows = [{"txt": f"caption é {n}", "n": n, "images": [picture(n)]} for n in range(3)]
    check_rows(TarTable(tmp_path / "a.tar"), rows)
    theirs = load_dataset(
        "webdataset", data_files=str(tmp_path / "a.tar"), split="train", streaming=True, cache_dir=tmp_path
    )
    theirs = [{"txt": row["txt"], **row["json"], "images": [row["png"]["bytes"]]} for row in theirs.decode(False)]
    assert theirs == rows


def test_samples_that_differ_from_the_first(tmp_path):
    """Upper case, several images, no image, a hidden file, a number beside a picture, broken JSON, a name again."""
    members = {
        "0.JPG": b"0",
        "0.json": b'{"messages": [], "image": "0.JPG"}',
        "1.a.png": b"1a",
        "1.b.png": b"1b",
        "1.npy": b"no",
        "._1.png": b"hidden",
        "2.txt": b"alone",
        "3.png": b"3",
        "3.json": b"{",
        "x/3.png": b"x3",
        "x/3.txt": b"\xff",
        "4.png": b"4",
        "4.PNG": b"5",
    }
    write_tar(tmp_path / "a.tar", members)
    rows = list(TarTable(tmp_path / "a.tar").read())
    assert rows[:3] == [
        {"messages": [], "images": [b"0"]},
        {"images": [b"1a", b"1b"]},
        {"txt": "alone", "images": []},
    ]
    assert ["its .json: it is no JSON" in str(rows[3]), "its .txt: 'utf-8'" in str(rows[4])] == [True, True]
    assert rows[5:] == [{"images": [b"4"]}, {"images": [b"5"]}]


def test_a_damaged_tar_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.png": picture(0), "1.png": picture(1)})
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[:1200])
    with pytest.raises(ValueError, match="a.tar is no whole, uncompressed tar"):
        len(TarTable(tmp_path / "a.tar"))


def test_several_tables_are_one_sequence(tmp_path):
    for number, count in enumerate((3, 0, 2)):
        lines = [json.dumps({"n": [number, row]}) for row in range(count)]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines))
    joined = Tables([JsonTable(tmp_path / f"{number}.jsonl") for number in range(3)], tmp_path)
    every = [[0, 0], [0, 1], [0, 2], [2, 0], [2, 1]]
    assert joined.num_rows == 5
    for start in range(6):
        assert [row["n"] for _, row in joined.read(start)] == every[start:]


def test_json_of_many_levels_is_refused_like_damaged_json(tmp_path):
    deep = "[" * 100_000
    (tmp_path / "a.jsonl").write_text(f'{{"a": 1}}\n{{"a": {deep}\n')
    rows = list(JsonTable(tmp_path / "a.jsonl").read())
    assert rows[0] == {"a": 1} and str(rows[1]) == "it is JSON of too many levels"
    (tmp_path / "a.json").write_text(f'[{{"a": {deep}')
    with pytest.raises(ValueError, match="Item 0 of the array in .*a.json has too many levels"):
        len(JsonTable(tmp_path / "a.json"))


def test_one_object_over_several_lines_is_no_table(tmp_path):
    """As COCO has it."""
    (tmp_path / "a.json").write_text(json.dumps({"images": [], "annotations": []}, indent=1))
    with pytest.raises(ValueError, match="a.json is one JSON object over several lines, and rows are wanted"):
        len(JsonTable(tmp_path / "a.json"))
