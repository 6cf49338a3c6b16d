"""Tables with images: contents, paths, or nothing."""

import io
import os
from base64 import b64encode
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numbered import fill, numbers, picture
from pyarrow import parquet

from transformers_unicode2.codebook.images import ImageSource
from transformers_unicode2.image_tables import read_cell
from transformers_unicode2.images_unicode2 import decode_image


def test_a_table_in_a_snapshot_of_the_hub_names_images_that_are_links(tmp_path):
    snapshot = tmp_path / "datasets--org--name" / "snapshots" / "0123"
    fill(snapshot.parent.parent / "blobs", "h0", "h1")
    snapshot.mkdir(parents=True)
    for number in (0, 1):
        (snapshot / f"{number}.png").symlink_to(f"../../blobs/h{number}")
    parquet.write_table(pa.table({"image": ["0.png", "1.png"]}), snapshot / "t.parquet")
    assert numbers(ImageSource(str(snapshot / "t.parquet"))) == [0, 1]
    (snapshot / "0.png").unlink()
    (snapshot / "0.png").symlink_to(tmp_path / "secret.png")
    fill(tmp_path, "secret.png")
    (name, content), _ = ImageSource(str(snapshot / "t.parquet")).read(0, 2)
    assert isinstance(content, ValueError) and "outside the table's folder" in str(content)


CELLS = {
    "binary": pa.binary(),
    "large binary": pa.large_binary(),
    "binary view": pa.binary_view(),
    "struct": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    "struct of bytes": pa.struct([("bytes", pa.large_binary())]),
    "struct of paths": pa.struct([("path", pa.large_string())]),
    "string": pa.string(),
    "large string": pa.large_string(),
    "string view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
}


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("kind", CELLS)
def test_tables_of_every_type(tmp_path, kind, suffix):
    """Contents and paths, then rows that are empty, broken or name a missing file; each row is named and counted."""
    fill(tmp_path / "images", "0.png", "1.png", "2.png")
    is_path = "bytes" not in kind and any(word in kind for word in ("string", "paths", "dictionary"))
    values = [f"images/{n}.png" if is_path else picture(n) for n in range(3)]
    values += [None, "images/none.png" if is_path else b"broken"]
    if kind.startswith("struct"):
        values = [None if value is None else {"path" if is_path else "bytes": value} for value in values]
    column = pa.array(values, pa.string() if kind == "dictionary" else CELLS[kind])
    table = pa.table({"text": ["x"] * 5, "image": column.dictionary_encode() if kind == "dictionary" else column})
    write_table(table, tmp_path / f"t.{suffix}")
    source = ImageSource(str(tmp_path / f"t.{suffix}"))
    rows = list(source.read(0, 5))
    assert [source.decode(content).getpixel((0, 0))[0] for _, content in rows[:3]] == [0, 1, 2]
    assert [name for name, _ in rows] == [f"t.{suffix} row {n}" for n in range(5)]
    for (_, content), message in zip(
        rows[3:], ("there is no image", "no image file images/none" if is_path else "6 bytes")
    ):
        with pytest.raises(ValueError, match=message):
            source.decode(content)
    assert [name for name, _ in source.read(2, 4)] == [f"t.{suffix} row {n}" for n in (2, 3)]


def write_table(table: pa.Table, file: Path) -> None:
    if file.suffix == ".parquet":
        parquet.write_table(table, file, row_group_size=2)
        return
    with pa.ipc.new_stream(str(file), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array([2**40]), "int64"),
        (pa.array([1.5]), "double"),
        (pa.array([True]), "bool"),
        (pa.array([0], pa.timestamp("s")), "timestamp"),
        (pa.array([[1, 2]]), "list<"),
        (pa.array([{"a": 1}]), "struct<a: int64>"),
        (pa.array([[{"bytes": b"x"}]]), "list<"),
        (pa.array([{"bytes": 1}]), "struct<bytes: int64>"),
        (pa.array([1, 1]).dictionary_encode(), "(dictionary<values=)?int64"),
    ],
)
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_columns_that_are_no_images_are_refused_by_their_type(tmp_path, column, kind, suffix):
    write_table(pa.table({"image": column}), tmp_path / f"t.{suffix}")
    with pytest.raises(ValueError, match=f"t.{suffix} has a column image of {kind}.*it must hold file contents"):
        ImageSource(str(tmp_path / f"t.{suffix}"))


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_tables_that_are_damaged_or_empty_are_refused(tmp_path, suffix):
    file = tmp_path / f"t.{suffix}"
    write_table(pa.table({"picture": [picture(0)], "text": ["x"]}), file)
    with pytest.raises(ValueError, match="has the columns picture, text, none or several of them named image"):
        ImageSource(str(file))
    write_table(pa.table({"image": pa.array([], pa.binary())}), file)
    with pytest.raises(FileNotFoundError, match="hold none"):
        ImageSource(str(file))
    write_table(pa.table({"image": [picture(n) for n in range(20)]}), file)
    content = file.read_bytes()
    for cut in (0, 3, 100, len(content) // 2, len(content) - 8, len(content) - 1):
        file.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=f"t.{suffix} is no whole {suffix} file"):
            ImageSource(str(file))


def test_a_parquet_file_that_is_damaged_inside_is_named(tmp_path, tiny_checkpoint):
    file = tmp_path / "train-0.parquet"
    parquet.write_table(pa.table({"image": [picture(n) for n in range(20)], "text": ["x"] * 20}), file)
    content = bytearray(file.read_bytes())
    content[4:200] = b"\xff" * 196
    file.write_bytes(content)
    with pytest.raises(ValueError, match="train-0.parquet is no whole parquet file"):
        list(ImageSource(str(file)).read(0, 20))
    with pytest.raises(ValueError, match="train-0.parquet is no whole parquet file"):
        tokenize(file, tiny_checkpoint, tmp_path / "out")


def test_an_arrow_stream_that_ends_between_two_batches_is_refused(tmp_path):
    table, file = pa.table({"image": [picture(n) for n in range(9)]}), io.BytesIO()
    writer = pa.ipc.new_stream(file, table.schema)
    for batch in table.to_batches(max_chunksize=3)[:2]:
        writer.write_batch(batch)
    (tmp_path / "t.arrow").write_bytes(file.getvalue())
    with pytest.raises(ValueError, match="does not end as an arrow file does"):
        ImageSource(str(tmp_path / "t.arrow"))


def test_an_arrow_file_of_the_other_form_and_tables_of_several_types_are_one_source(tmp_path):
    table = pa.table({"image": [picture(0), picture(1)]})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    write_table(pa.table({"image": [{"bytes": picture(2), "path": None}], "more": [1]}), tmp_path / "b.arrow")
    source = ImageSource(str(tmp_path))
    assert numbers(source) == [0, 1, 2]
    assert [name for name, _ in source.read(1, 3)] == ["a.arrow row 1", "b.arrow row 0"]


def test_tables_in_folders_of_any_name(tmp_path):
    folder = tmp_path / os.fsdecode(b"a[1]\xff*")
    folder.mkdir()
    table = pa.table({"image": [picture(0)]})
    with open(folder / os.fsdecode(b"\xfe.parquet"), "wb") as file:
        parquet.write_table(table, file)
    assert numbers(ImageSource(str(folder))) == [0]
    (folder / os.fsdecode(b"\xfe.parquet")).unlink()
    with open(folder / "t.arrow", "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    assert numbers(ImageSource(str(folder))) == [0]


def test_paths_in_a_table_lead_nowhere_but_into_its_folder(tmp_path):
    fill(tmp_path / "t" / "in", "0.png")
    fill(tmp_path, "secret.png", start=1)
    (tmp_path / "t" / "out.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "t" / "up").symlink_to(tmp_path)
    inside = ["in/0.png", "./in/../in/0.png", str(tmp_path / "t" / "in" / "0.png")]
    outside = ["../secret.png", str(tmp_path / "secret.png"), "out.png", "up/secret.png", "in/../../secret.png"]
    for kind in (pa.string(), CELLS["struct"]):
        cells = [*inside, *outside] if kind == pa.string() else [{"path": path} for path in (*inside, *outside)]
        parquet.write_table(pa.table({"image": pa.array(cells, kind)}), tmp_path / "t" / "t.parquet")
        found = [content for _, content in ImageSource(str(tmp_path / "t" / "*.parquet")).read(0, 8)]
        assert found[:3] == [picture(0)] * 3
        assert all("outside the table's folder" in str(error) for error in found[3:])
    with pytest.raises(ValueError, match="is a URL; download it first"):
        read_cell("http://127.0.0.1:1/x.png", tmp_path)
    assert read_cell(f"data:image/png;base64,{b64encode(picture(0)).decode()}", tmp_path) == picture(0)
    assert read_cell(b64encode(picture(0)).decode() + "\n", None) == picture(0)
    for text in ("a" * 5000, "a\0b", "", "in", "nonsense"):
        with pytest.raises(ValueError):
            read_cell(text, tmp_path / "t")


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("kind", ["string", "struct", "struct of paths"])
def test_a_change_of_a_file_that_a_table_names_is_noticed(tmp_path, kind, suffix):
    fill(tmp_path, "0.png")
    cells = ["0.png", "gone.png"] if kind == "string" else [{"path": "0.png"}, {"path": None}]
    write_table(pa.table({"image": pa.array(cells, CELLS[kind])}), tmp_path / f"t.{suffix}")
    source = ImageSource(str(tmp_path / f"t.{suffix}"))
    before = source.fingerprint()
    assert len(source.listing()) == 3 and source.fingerprint() == before
    (tmp_path / "0.png").write_bytes(picture(1) + b" ")
    assert source.fingerprint() != before


def tokenize(folder: Path, model: Path, output: Path) -> list[list[int]]:
    from transformers_unicode2.training import tokenize as command

    words = ["--data", str(folder), "--model", str(model), "--output", str(output)]
    command.main(command.make_parser().parse_args(words))
    return parquet.read_table(output / "train-00000.parquet").to_pydict()["codes"]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([picture(0), None], "data row 1: it has 0 images"),
        ([picture(0), b"\xff\xd8 broken"], r"data row 1: The file \(9 bytes\) cannot be read as an image"),
        (["0.png", "../0.png"], "data row 1: ../0.png is outside the table's folder"),
        (["0.png", "nowhere.png"], "data row 1: there is no image file nowhere.png"),
        ([1, 2], "2 of 2 rows cannot be used"),
    ],
)
def test_tokenize_names_the_row_that_cannot_be_read(tmp_path, tiny_checkpoint, cells, message):
    fill(tmp_path / "data", "0.png")
    fill(tmp_path, "0.png")
    parquet.write_table(pa.table({"image": cells, "caption": ["x", "y"]}), tmp_path / "data" / "train-0.parquet")
    with pytest.raises(ValueError, match=message):
        tokenize(tmp_path / "data", tiny_checkpoint, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.parquet"))


def open_pairs_with_pictures(folder, tokens):
    """The pairs of tokenized chats, and the images of their rows."""
    from transformers_unicode2.training.mixtures import find_parts
    from transformers_unicode2.training.pairs import decode_pictures, open_pairs, open_pictures, read_pictures

    pairs = open_pairs(find_parts([{"path": str(tokens)}], "`datasets`"), 0, "`datasets`")
    places = list(zip(pairs["source"], pairs["row"]))
    return pairs, decode_pictures(list(read_pictures(open_pictures([str(folder)], "train"), places)))


def test_tokenize_and_the_images_of_a_stage_read_tables_of_every_type(tmp_path, tiny_checkpoint):
    fill(tmp_path / "d[0]", "0.png", "1.png")
    codes, pixels = [], []
    for number, kind in enumerate(("binary", "struct", "string", "struct of paths", "large string")):
        values = (
            [picture(0), picture(1)] if kind in ("binary", "struct") else ["0.png", str(tmp_path / "d[0]" / "1.png")]
        )
        if kind.startswith("struct"):
            values = [{"path" if isinstance(value, str) else "bytes": value} for value in values]
        table = pa.table({"image": pa.array(values, CELLS[kind]), "caption": ["x", "y"]})
        parquet.write_table(table, tmp_path / "d[0]" / "train-0.parquet")
        codes.append(tokenize(tmp_path / "d[0]", tiny_checkpoint, tmp_path / str(number)))
        _, images = open_pairs_with_pictures(tmp_path / "d[0]", tmp_path / str(number))
        pixels.append([np.asarray(image) for image in images])
    assert all(code == codes[0] for code in codes) and codes[0][0] != codes[0][1]
    assert all(np.array_equal(values, pixels[0]) for values in pixels)


def test_shards_of_several_types_are_one_data_set(tmp_path, tiny_checkpoint):
    """Also with a shard without rows, an empty content beside a path, and types that `datasets` does not read."""
    from transformers_unicode2.training import tokenize as command

    fill(tmp_path / "d", "0.png", "1.png")
    both = CELLS["struct"]
    shards = [
        ([{"bytes": picture(0), "path": None}, {"bytes": b"", "path": "1.png"}], both),
        ([], both),
        (["0.png", "1.png"], pa.string()),
        ([picture(0), picture(1)], pa.binary_view()),
    ]
    for number, (values, kind) in enumerate(shards):
        table = pa.table({"image": pa.array(values, kind), "caption": ["x"] * len(values)})
        parquet.write_table(table, tmp_path / "d" / f"train-{number}.parquet")
    words = ["--data", str(tmp_path / "d"), "--model", str(tiny_checkpoint), "--output", str(tmp_path / "t")]
    command.main(command.make_parser().parse_args(words))
    rows, images = open_pairs_with_pictures(tmp_path / "d", tmp_path / "t")
    expected = [decode_image(picture(number)).tobytes() for number in (0, 1)]
    assert [image.tobytes() for image in images] == expected * 3
    assert [row["codes"] for row in rows] == [rows[0]["codes"], rows[1]["codes"]] * 3
    assert rows["row"][:] == list(range(6))


def test_an_image_that_a_stage_cannot_read_has_a_row(tmp_path):
    from transformers_unicode2.training import data

    table = pa.table({"image": [picture(0), b"\xff\xd8 broken"]})
    parquet.write_table(table, tmp_path / "train-0.parquet")
    rows = data.load_images(str(tmp_path))
    with pytest.raises(ValueError, match=r"Row 1 of the data: The file \(9 bytes\) cannot be read as an image"):
        data.pixel_collator([rows[0], rows[1]])


def test_a_stream_takes_the_column_that_holds_something(tmp_path):
    columns = {"jpg": [picture(0), None, None], "png": [None, picture(1), None], "caption": ["x"] * 3}
    write_table(pa.table(columns), tmp_path / "0.parquet")
    source = ImageSource(str(tmp_path), limit=3, streaming=True)
    *found, nothing = (content for _, content in source.read(0, 3))
    assert found == [picture(0), picture(1)] and "there is no image" in str(nothing)
