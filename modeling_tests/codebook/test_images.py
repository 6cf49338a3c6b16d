"""Folders of images as people have them: read whole, or refused; what is left out is counted."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
from base64 import b64encode
from pathlib import Path

import pytest
from builds import refusal, words
from numbered import fill, numbers, picture
from PIL import Image

from transformers_unicode2.codebook import images
from transformers_unicode2.codebook.images import ImageSource, fitting_pixels, open_stream
from transformers_unicode2.images_unicode2 import MAX_PIXELS


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


def write_parquet(folder, files, rows_per_group=7):
    import pyarrow
    from pyarrow import parquet

    rows = [{"image": {"bytes": file.read_bytes(), "path": None}, "text": file.name} for file in files]
    for part, chunk in enumerate((rows[:25], rows[25:])):
        parquet.write_table(pyarrow.Table.from_pylist(chunk), folder / f"{part}.parquet", row_group_size=rows_per_group)


def write_arrow(folder, files):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    rows = {"image": [{"bytes": file.read_bytes(), "path": None} for file in files], "text": [f.name for f in files]}
    features = Features({"image": ImageFeature(), "text": Value("string")})
    Dataset.from_dict(rows, features=features).save_to_disk(folder)


def write_tars(folder, files):
    for part, chunk in enumerate((files[:25], files[25:])):
        with tarfile.open(folder / f"{part}.tar", "w") as tar:
            for file in chunk:
                tar.add(file, file.name)
                tar.add(__file__, file.with_suffix(".json").name)


@pytest.mark.parametrize("write", [write_parquet, write_arrow, write_tars])
def test_sources_give_the_same_images_from_any_position(place, tmp_path, write):
    files = sorted((place / "images").iterdir())
    write(tmp_path, files)
    source = ImageSource(str(tmp_path))
    assert len(source) == 40
    for start, stop in ((0, 40), (0, 1), (6, 15), (24, 26), (39, 40), (13, 14)):
        assert [content for _, content in source.read(start, stop)] == [file.read_bytes() for file in files[start:stop]]
    assert len(ImageSource(str(tmp_path), limit=12)) == 12


def test_source_streams_a_data_set_from_any_position(place, tmp_path, monkeypatch):
    files = sorted((place / "images").iterdir())
    write_parquet(tmp_path, files)
    source = ImageSource(str(tmp_path), limit=40, streaming=True)
    contents, opened = [file.read_bytes() for file in files], []
    monkeypatch.setattr(images, "open_stream", lambda name: opened.append(name) or open_stream(name))
    # Reads on, also after a gap.
    for start, stop in ((24, 27), (27, 30), (33, 40)):
        assert [content for _, content in source.read(start, stop)] == contents[start:stop]
    assert len(opened) == 1
    assert [content for _, content in source.read(2, 4)] == contents[2:4] and len(opened) == 2
    with pytest.raises(ValueError, match="--num-images"):
        ImageSource(str(tmp_path), streaming=True)
    before = source.fingerprint()
    assert ImageSource(str(tmp_path), limit=40, streaming=True).fingerprint() == before
    write_parquet(tmp_path, files[::-1])
    assert ImageSource(str(tmp_path), limit=40, streaming=True).fingerprint() != before


def test_streams_have_the_columns_of_webdataset_or_are_refused(place, tmp_path):
    import pyarrow
    from pyarrow import parquet

    content = next((place / "images").iterdir()).read_bytes()
    for column in ("png", "picture"):
        (tmp_path / column).mkdir()
        parquet.write_table(pyarrow.table({column: [content] * 3}), tmp_path / column / "0.parquet")
    source = ImageSource(str(tmp_path / "png"), limit=3, streaming=True)
    assert [found for _, found in source.read(1, 3)] == [content] * 2
    with pytest.raises(ValueError, match="has the columns picture, none of them image, jpg"):
        list(ImageSource(str(tmp_path / "picture"), limit=3, streaming=True).read(0, 3))
    (tmp_path / "png" / "0.parquet").rename(tmp_path / "png" / "validation.parquet")
    parquet.write_table(pyarrow.table({"png": [content]}), tmp_path / "png" / "test.parquet")
    with pytest.raises(ValueError, match="none of them named train"):
        ImageSource(str(tmp_path / "png"), limit=3, streaming=True).fingerprint()


def test_source_refuses_what_it_cannot_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="No images"):
        ImageSource(str(tmp_path))
    (tmp_path / "a.png").touch()
    (tmp_path / "b.parquet").touch()
    with pytest.raises(ValueError, match="1 parquet and 1 image files"):
        ImageSource(str(tmp_path))
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "c.tar.gz").touch()
    with pytest.raises(ValueError, match="is compressed"):
        ImageSource(str(tmp_path / "tars"))
    (tmp_path / "d.tar").write_bytes(b"nothing like a tar" * 100)
    with pytest.raises(ValueError, match="d.tar is no whole, uncompressed tar"):
        ImageSource(str(tmp_path / "d.tar"))
    with pytest.raises(FileNotFoundError, match="There is no folder or file"):
        ImageSource(str(tmp_path / "nowhere"))


def test_tables_hold_bytes_paths_or_nothing(place, tmp_path):
    import pyarrow
    from pyarrow import parquet

    files = [shutil.copy(place / "images" / f"0{i}.png", tmp_path) for i in range(2)]
    contents = [Path(file).read_bytes() for file in files]
    columns = {
        "both": [{"bytes": contents[0], "path": None}, {"bytes": None, "path": files[1]}, None],
        "bytes": [contents[0], contents[1], None],
        "paths": ["00.png", files[1], None],
        "text": [b64encode(contents[0]).decode(), f"data:image/png;base64,{b64encode(contents[1]).decode()}", ""],
    }
    for name, column in columns.items():
        parquet.write_table(pyarrow.table({"image": column}), tmp_path / f"{name}.parquet")
        found = [content for _, content in ImageSource(str(tmp_path / f"{name}.parquet")).read(0, 3)]
        assert found[:2] == contents, name
        assert isinstance(found[2], ValueError) and "there is no image" in str(found[2])


def test_a_stream_that_ends_early_is_named(place, tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data", sorted((place / "images").iterdir()))
    arguments = ["--images", str(tmp_path / "data"), "--streaming", "--num-images", "60"]
    arguments += words(place, tmp_path / "o")[2:]
    assert "ends after 40 images; --num-images is 60" in refusal(monkeypatch, capsys, *arguments)
