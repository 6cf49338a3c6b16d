"""Sources of images: everything in a folder, tar or table is read, named, counted or refused, never lost silently."""

import io
import os
import subprocess
import sys
import tarfile
from base64 import b64encode
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from transformers_unicode2.codebook.images import ImageSource, fitting_pixels
from transformers_unicode2.image_tables import read_cell
from transformers_unicode2.images_unicode2 import MAX_PIXELS


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 200 * (number % 2))).save(file, "PNG")
    return file.getvalue()


def numbers(source: ImageSource) -> list[int]:
    """The numbers of the pictures that a source has, in its order."""
    return [source.decode(content).getpixel((0, 0))[0] for _, content in source.read(0, len(source))]


def fill(folder: Path, *names: str, start: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names, start):
        (folder / name).write_bytes(picture(number))


def test_folders_behind_links_are_read_once_and_loops_end(tmp_path):
    fill(tmp_path / "real" / "deep", "0.png", "1.png")
    fill(tmp_path / "set", "own.png", start=2)
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "set" / "again").symlink_to(tmp_path / "real" / "deep")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "real" / "back").symlink_to(tmp_path)
    (tmp_path / "set" / "copy.png").symlink_to(tmp_path / "set" / "own.png")
    source = ImageSource(str(tmp_path / "set"))
    assert sorted(numbers(source)) == [0, 1, 2]
    assert sorted(numbers(ImageSource(f"{tmp_path}/set/**/*.png"))) == [0, 1, 2]
    # Named by the file, not by the link.
    assert [name for name, _ in source.read(0, 3)][-1] == str(tmp_path / "set" / "own.png")


def test_a_folder_without_links_keeps_its_order(tmp_path):
    names = ["b.png", "a/z.jpg", "a.b/c.png", "B.PNG", "é.webp", "10.png", "9.png"]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture(number))
    found = ImageSource(str(tmp_path))
    assert found.files == sorted(file for file in tmp_path.rglob("*") if file.is_file())


@pytest.mark.parametrize("asked", ["{}", "{}/**/*.png", "{}/*.png"])
def test_visible_links_to_hidden_files_are_images(tmp_path, asked):
    """As git-annex, DataLad and the cache of the Hub keep them."""
    fill(tmp_path / ".git" / "annex", "a.png", "b.png")
    (tmp_path / "b").touch()
    fill(tmp_path, "2.png", start=2)
    Image.open(io.BytesIO(picture(3))).save(tmp_path / "blob.dat", format="PNG")
    for name, target in {"0.png": ".git/annex/a.png", "1.png": ".git/annex/b.png", "3.png": "blob.dat"}.items():
        (tmp_path / name).symlink_to(target)
    source = ImageSource(asked.format(tmp_path))
    assert numbers(source) == [0, 1, 2, 3]


def test_a_folder_with_a_hidden_and_a_visible_name_is_visible(tmp_path):
    fill(tmp_path / "elsewhere", "0.png")
    fill(tmp_path / "s", "1.png", start=1)
    for name in (".a", "images"):
        (tmp_path / "s" / name).symlink_to(tmp_path / "elsewhere")
    assert sorted(numbers(ImageSource(str(tmp_path / "s")))) == [0, 1]


def test_what_is_compressed_is_counted_beside_images_and_refused_beside_tars(tmp_path):
    fill(tmp_path / "images", "0.png", "x.tar.png")
    (tmp_path / "images" / "backup.tar.gz").touch()
    source = ImageSource(str(tmp_path / "images"))
    assert numbers(source) == [0, 1] and source.left_out.sentence() == "left out: 1 .gz"
    (tmp_path / "tars").mkdir()
    make_tar(tmp_path / "tars" / "0.tar")
    (tmp_path / "tars" / "1.tar.gz").touch()
    with pytest.raises(ValueError, match="1.tar.gz is compressed"):
        ImageSource(str(tmp_path / "tars"))


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


def test_what_is_left_out_is_counted(tmp_path):
    fill(tmp_path, "0.png", "1.JFIF", "2.jpe", "3.avif", ".4.png", "._0.png")
    fill(tmp_path / ".cache", "5.png")
    for name in ("a.txt", "b.txt", "c.JSON", "README"):
        (tmp_path / name).touch()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    source = ImageSource(str(tmp_path))
    assert numbers(source) == [0, 1, 2, 3]
    sentence = source.left_out.sentence()
    assert sentence.startswith("left out: ")
    for part in ("3 hidden files", "2 .txt", "1 .json", "1 without a suffix", "1 broken link", "1 special file"):
        assert part in sentence
    # A file that was asked for is not hidden.
    assert numbers(ImageSource(str(tmp_path / ".4.png"))) == [4]
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "rows.jsonl").touch()
    with pytest.raises(
        FileNotFoundError, match=r"No images in .*neither parquet, arrow or tar files nor .*\(left out: 1 .jsonl\)"
    ):
        ImageSource(str(tmp_path / "t"))


def test_names_may_be_of_any_bytes(tmp_path):
    names = [
        b"a[1].png",
        b"b*?.png",
        b"c\nd.png",
        "e\u2028f.png".encode(),
        b"g\xff.png",
        b"h\tx.png",
        b"'i\".png",
        b"j\\n.png",
    ]
    folder = tmp_path / "set[0]\n"
    folder.mkdir()
    for number, name in enumerate(names):
        Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).write_bytes(picture(number))
    source = ImageSource(str(folder))
    assert sorted(numbers(source)) == list(range(len(names)))
    assert len(source.listing()) == len("\n".join(source.listing()).splitlines()) == len(names) + 1
    assert source.fingerprint() == ImageSource(str(folder)).fingerprint()
    for number, name in enumerate(names):
        assert numbers(ImageSource(os.path.join(str(folder), os.fsdecode(name)))) == [number]


def test_unreadable_images_with_odd_names_count_once(tmp_path, tiny_model, tiny_checkpoint):
    from transformers import AutoImageProcessor

    from transformers_unicode2.codebook.features import Encoder, encode_all, read_batches

    fill(tmp_path / "i", "0.png", "1.png")
    bad = ["x\ny\n.png", "u\u2028v\x0bw\x0c.png", "z\x85\x1c.png", os.fsdecode(b"\xfe\xff.png")]
    for name in bad:
        (tmp_path / "i" / name).write_bytes(b"bad")
    tiny_model.get_quantizer().vision_model.save_pretrained(tmp_path / "encoder")
    AutoImageProcessor.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "encoder")
    encoder, source = Encoder(str(tmp_path / "encoder")), ImageSource(str(tmp_path / "i"))
    ((_, _, skipped),) = read_batches(source, encoder, 0, len(source))
    assert len(skipped) == len("\n".join(skipped).splitlines()) == len(bad)
    assert all("3 bytes) cannot be read as an image" in line for line in skipped)
    assert [positions for positions, *_ in encode_all(source, encoder)] == [[0, 1]]


def make_tar(path: Path, count: int = 6, **options) -> None:
    with tarfile.open(path, "w", **options) as tar:
        for number in range(count):
            member = tarfile.TarInfo(f"{number:03d}.png")
            member.size = len(picture(number))
            tar.addfile(member, io.BytesIO(picture(number)))


def offsets(path: Path) -> list[int]:
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


@pytest.mark.parametrize("record", [None, 1024])
def test_joined_tars_are_read_whole(tmp_path, record):
    """As written, and with the shortest end that a tar may have."""
    make_tar(tmp_path / "a.tar")
    content = (tmp_path / "a.tar").read_bytes()
    if record:
        content = content.rstrip(b"\0")
        content += b"\0" * (-len(content) % 512 + 1024)
    (tmp_path / "b.tar").write_bytes(content + content)
    assert numbers(ImageSource(str(tmp_path / "b.tar"))) == [*range(6), *range(6)]


@pytest.mark.parametrize("hole", [(8192, 16384), (16384, None), (0, 16384)])
def test_zeros_where_images_may_have_been_are_refused(tmp_path, hole):
    """A download that stopped in a file of full length leaves such zeros."""
    make_tar(tmp_path / "a.tar", 30)
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[slice(*hole)] = bytes(len(content[slice(*hole)]))
    (tmp_path / "b.tar").write_bytes(content)
    with pytest.raises(ValueError, match="bytes of zeros from byte .* where images may have been"):
        ImageSource(str(tmp_path / "b.tar"))


def test_a_stream_refuses_a_damaged_tar_among_whole_ones(tmp_path):
    for name in "ab":
        make_tar(tmp_path / f"{name}.tar", 20)
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[offsets(tmp_path / "a.tar")[7] + 3] ^= 1
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match="a.tar is no whole, uncompressed tar"):
        ImageSource(str(tmp_path), limit=25, streaming=True)


def test_zeros_in_the_middle_of_a_tar_end_nothing(tmp_path):
    make_tar(tmp_path / "a.tar")
    content, place = (tmp_path / "a.tar").read_bytes(), offsets(tmp_path / "a.tar")[3]
    (tmp_path / "b.tar").write_bytes(content[:place] + b"\0" * 1024 + content[place:])
    assert numbers(ImageSource(str(tmp_path / "b.tar"))) == list(range(6))


def damage(content: bytes, places: list[int], how: str) -> bytes:
    place = places[3]
    if how.startswith("header"):
        at = place + {"header name": 2, "header size": 130, "header checksum": 150, "header first": 0}[how]
        return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]
    cuts = {
        "cut in a header": place + 200,
        "cut before a header": place,
        "cut in a content": place + 512 + 20,
        "cut before the end": places[-1] + 1024,
    }
    if how in cuts:
        return content[: cuts[how]]
    return {"garbage after the end": content + b"garbage", "nothing": b"", "no tar": b"no tar" * 1000}[how]


@pytest.mark.parametrize(
    "how",
    [
        *("header name", "header size", "header checksum", "header first", "cut in a header", "cut before a header"),
        *("cut in a content", "cut before the end", "garbage after the end", "nothing", "no tar"),
    ],
)
def test_damaged_tars_are_refused(tmp_path, how):
    make_tar(tmp_path / "a.tar")
    (tmp_path / "b.tar").write_bytes(damage((tmp_path / "a.tar").read_bytes(), offsets(tmp_path / "a.tar"), how))
    with pytest.raises(ValueError, match="b.tar is no whole, uncompressed tar"):
        ImageSource(str(tmp_path / "b.tar"))


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_tars_are_refused_by_their_content(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar", f"w:{kind}") as tar:
        tar.add(__file__, "a.png")
    with pytest.raises(ValueError, match="it is compressed"):
        ImageSource(str(tmp_path / "x.tar"))


def test_members_of_every_kind(tmp_path):
    """Long names, folders, links, repeated names, hidden files and texts; each image is an image."""
    folder, long = tmp_path / "f", "x" * 120
    fill(folder, "0.png", "same.jpg", f"{long}.png", "ü\n.png", ".hidden.png", "blob")
    (folder / "0.txt").touch()
    os.link(folder / "0.png", folder / "zhard.png")
    (folder / "zlink.png").symlink_to("0.png")
    (folder / "zblob.png").symlink_to("blob")
    (folder / "zgone.png").symlink_to("nowhere.png")
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
            for name in sorted(os.listdir(folder)):
                tar.add(folder / name, f"./d/{name}")
            tar.add(folder, "./folder", recursive=False)
            tar.add(folder / "same.jpg", "./d/0.png")
        source = ImageSource(str(tmp_path / "a.tar"))
        assert sorted(numbers(source)) == [0, 0, 1, 1, 2, 3, 5]
        assert source.left_out == {
            "hidden file": 1,
            ".txt": 1,
            "without a suffix": 1,
            "repeated link": 1,
            "broken link": 1,
        }


def test_a_sparse_member_and_a_link_to_nothing_are_refused(tmp_path):
    make_tar(tmp_path / "a.tar")
    content = bytearray((tmp_path / "a.tar").read_bytes())
    member = tarfile.TarInfo("zz.png")
    member.type, member.linkname = tarfile.LNKTYPE, "nowhere.png"
    end = offsets(tmp_path / "a.tar")[-1] + 1024
    (tmp_path / "b.tar").write_bytes(content[:end] + member.tobuf() + b"\0" * 1024)
    with pytest.raises(ValueError, match="zz.png is a link to nowhere.png, which is not before it"):
        ImageSource(str(tmp_path / "b.tar"))
    member.type = b"Z"
    (tmp_path / "b.tar").write_bytes(content[:end] + member.tobuf() + b"\0" * 1024)
    with pytest.raises(ValueError, match="zz.png is stored as type b'Z', which is not read"):
        ImageSource(str(tmp_path / "b.tar"))


def test_several_images_of_a_key_are_images(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, name in enumerate(("0.png", "0.depth.png", "0.JPG", "1.png")):
            member = tarfile.TarInfo(name)
            member.size = len(picture(number))
            tar.addfile(member, io.BytesIO(picture(number)))
    assert numbers(ImageSource(str(tmp_path / "a.tar"))) == [0, 1, 2, 3]


def test_a_stream_with_several_images_in_a_row_is_refused(tmp_path):
    """`datasets` makes a column of each suffix."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number, name in enumerate(("0.png", "0.depth.png", "1.png", "1.depth.png")):
            member = tarfile.TarInfo(name)
            member.size = len(picture(number))
            tar.addfile(member, io.BytesIO(picture(number)))
    with pytest.raises(ValueError, match="has several images in row 0, png and depth.png; without --streaming each is"):
        list(ImageSource(str(tmp_path), limit=2, streaming=True).read(0, 2))
    assert numbers(ImageSource(str(tmp_path))) == [0, 1, 2, 3]


def test_a_stream_takes_the_column_that_holds_something(tmp_path):
    columns = {"jpg": [picture(0), None, None], "png": [None, picture(1), None], "caption": ["x"] * 3}
    write_table(pa.table(columns), tmp_path / "0.parquet")
    source = ImageSource(str(tmp_path), limit=3, streaming=True)
    *found, nothing = (content for _, content in source.read(0, 3))
    assert found == [picture(0), picture(1)] and "there is no image" in str(nothing)


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
        tokenize(tmp_path, tiny_checkpoint, tmp_path / "out")


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


def test_an_image_beyond_the_memory_is_unreadable(tmp_path):
    fill(tmp_path, "0.png")
    with pytest.raises(ValueError, match="8 x 8 pixels are more than the limit of 63"):
        numbers(ImageSource(str(tmp_path), max_pixels=63))
    assert fitting_pixels(8 * 2**30) == MAX_PIXELS and fitting_pixels(2**30) < 13_000_000


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "I;16", "F"])
def test_an_image_takes_no_more_memory_than_is_reckoned_with(tmp_path, mode):
    image = Image.new(mode, (4000, 4000))
    image.save(tmp_path / "i.tif" if mode == "F" else tmp_path / "i.png")
    script = f"""
import resource, sys
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers_unicode2.codebook.images import PIXEL_BYTES, ImageSource
processor = SiglipImageProcessorPil(size={{"height": 32, "width": 32}})
processor(Image.new("RGB", (9, 9)), return_tensors="pt")
source = ImageSource({str(tmp_path)!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
processor(source.decode(next(source.read(0, 1))[1]), return_tensors="pt")
assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < PIXEL_BYTES * 4000 * 4000
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def tokenize(folder: Path, model: Path, output: Path) -> list[list[int]]:
    from transformers_unicode2.training import tokenize as command

    words = ["--data", str(folder), "--model", str(model), "--output", str(output)]
    command.main(command.make_parser().parse_args(words))
    return parquet.read_table(output / "train-0.parquet").to_pydict()["codes"]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([picture(0), None], r"train-0.parquet row 1: there is no image"),
        ([picture(0), b"\xff\xd8 broken"], r"row 1: The file \(9 bytes\) cannot be read as an image"),
        (["0.png", "../0.png"], "row 1: ../0.png is outside the table's folder"),
        (["0.png", "nowhere.png"], "row 1: There is no image file nowhere.png"),
        ([1, 2], "has a column image of int64"),
    ],
)
def test_tokenize_names_the_row_that_cannot_be_read(tmp_path, tiny_checkpoint, cells, message):
    fill(tmp_path / "data", "0.png")
    fill(tmp_path, "0.png")
    parquet.write_table(pa.table({"image": cells, "caption": ["x", "y"]}), tmp_path / "data" / "train-0.parquet")
    with pytest.raises(ValueError, match=message):
        tokenize(tmp_path / "data", tiny_checkpoint, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_tokenize_and_the_images_of_a_stage_read_tables_of_every_type(tmp_path, tiny_checkpoint):
    from transformers_unicode2.training import data

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
        rows = data.load_images_with_codes(str(tmp_path / "d[0]"), str(tmp_path / str(number)))
        pixels.append(data.pixel_collator(list(rows))["pixel_values"].numpy())
    assert all(code == codes[0] for code in codes) and codes[0][0] != codes[0][1]
    assert all(np.array_equal(values, pixels[0]) for values in pixels)


def test_shards_of_several_types_are_one_data_set(tmp_path, tiny_checkpoint):
    """Also with a shard without rows, an empty content beside a path, and types that `datasets` does not read."""
    from transformers_unicode2.training import data
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
    rows = data.load_images_with_codes(str(tmp_path / "d"), str(tmp_path / "t"))
    assert [row["image"]["bytes"] for row in rows] == [picture(0), picture(1)] * 3
    assert [row["codes"] for row in rows] == [rows[0]["codes"], rows[1]["codes"]] * 3
    assert rows["row"][:] == list(range(6))


def test_an_image_that_a_stage_cannot_read_has_a_row(tmp_path):
    from transformers_unicode2.training import data

    table = pa.table({"image": [picture(0), b"\xff\xd8 broken"]})
    parquet.write_table(table, tmp_path / "train-0.parquet")
    rows = data.load_images(str(tmp_path))
    with pytest.raises(ValueError, match=r"Row 1 of the data: The file \(9 bytes\) cannot be read as an image"):
        data.pixel_collator([rows[0], rows[1]])
