"""Other pictures in the places of those that were tokenized are noticed, and equal ones are not."""

import json
import os
import shutil

import pytest
from tokenizing import picture, read, run, stop_at

from transformers_unicode2.training import image_codes, row_index
from transformers_unicode2.training.image_files import check_later
from transformers_unicode2.training.pairs import open_pictures


@pytest.fixture
def chats(llava_data, tmp_path):
    """A file of chats apart from its pictures, which are in the folders `a` and, other ones, `b`."""
    for folder, first in (("a", 0), ("b", 20)):
        (tmp_path / folder / "images").mkdir(parents=True)
        for number in range(7):
            picture(first + number).save(tmp_path / folder / "images" / f"{number}.png")
    return shutil.copy(llava_data / "llava.json", tmp_path / "llava.json")


def test_pictures_of_another_folder_are_refused(chats, quantizer_folder, tmp_path):
    """Of a finished output; equal pictures are not, wherever they are."""
    output = run(chats, quantizer_folder, tmp_path / "out", "--image-root", tmp_path / "a")
    before = read(output)
    with pytest.raises(ValueError, match=r"b/images/0.png is another than it was in row 0 of .*llava.json"):
        run(chats, quantizer_folder, output, "--image-root", tmp_path / "b")
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    os.utime(tmp_path / "c/images/3.png", (0, 0))
    run(chats, quantizer_folder, output, "--image-root", tmp_path / "c")
    os.remove(tmp_path / "c/images/3.png")
    with pytest.raises(ValueError, match=r"Now there is no image file images/3.png in .*c, in row 4 of"):
        run(chats, quantizer_folder, output, "--image-root", tmp_path / "c")
    picture(50).save(tmp_path / "a/images/6.png")
    with pytest.raises(ValueError, match=r"a/images/6.png is another than it was in row 7 of"):
        run(chats, quantizer_folder, output, "--image-root", tmp_path / "a")
    assert read(output) == before


def test_a_later_command_notices_other_pictures(chats, quantizer_folder, tmp_path):
    output = run(chats, quantizer_folder, tmp_path / "out", "--image-root", tmp_path / "a")

    def check(images, folder=output):
        check_later(open_pictures([str(chats)], "train", str(images)), folder, "train", "`images`")

    check(tmp_path / "a")
    with pytest.raises(ValueError, match=r"b/images/0.png is another than it was in row 0 of .*`images`.*tokenize it"):
        check(tmp_path / "b")
    # Copied without its notes, it cannot say
    alone = tmp_path / "elsewhere/alone"
    alone.mkdir(parents=True)
    for file in output.glob("*.parquet"):
        shutil.copy(file, alone)
    check(tmp_path / "b", alone)
    os.remove(tmp_path / "a/images/3.png")
    with pytest.raises(ValueError, match="Now there is no image file images/3.png in .*a, in row 4 of"):
        check(tmp_path / "a")


@pytest.mark.parametrize("task", ["read", "both"])
def test_a_later_command_knows_the_sources_of_tasks(task, captioned, quantizer_folder, tmp_path):
    output = run(captioned, quantizer_folder, tmp_path / "out", "--task", task)
    for place in {file.parent for file in output.rglob("*.parquet")}:
        check_later(open_pictures([str(captioned)], "train"), place, "train", "`images`")
    picture(50).save(captioned / "2.png")
    for place in {file.parent for file in output.rglob("*.parquet")}:
        with pytest.raises(ValueError, match="2.png is another than it was in row 2 of"):
            check_later(open_pictures([str(captioned)], "train"), place, "train", "`images`")


@pytest.fixture
def captioned(tmp_path):
    """An imagefolder with captions."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        picture(number).save(folder / f"{number}.png")
    rows = [{"file_name": f"{number}.png", "text": f"picture {number}"} for number in range(4)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(("module", "name", "number"), [(row_index, "read_block", 2), (image_codes, "write_codes", 1)])
def test_a_killed_run_does_not_go_on_with_other_pictures(
    module,
    name,
    number,
    chats,
    quantizer_folder,
    tmp_path,
    monkeypatch,
):
    options = ("--rows-per-shard", 4, "--image-root")
    whole = read(run(chats, quantizer_folder, tmp_path / "whole", *options, tmp_path / "a"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, name, stop_at(getattr(module, name), number))
        run(chats, quantizer_folder, tmp_path / "out", *options, tmp_path / "a")
    with pytest.raises(ValueError, match="b/images/0.png is another than it was in row 0 of"):
        run(chats, quantizer_folder, tmp_path / "out", *options, tmp_path / "b")
    assert read(run(chats, quantizer_folder, tmp_path / "out", *options, tmp_path / "a")) == whole


def test_a_picture_that_comes_where_none_was_is_noticed(chats, quantizer_folder, tmp_path):
    os.rename(tmp_path / "a/images/5.png", tmp_path / "5.png")
    words = ("--max-bad-share", 0.2, "--image-root", tmp_path / "a")
    run(chats, quantizer_folder, tmp_path / "out", *words)
    run(chats, quantizer_folder, tmp_path / "out", *words)
    os.rename(tmp_path / "5.png", tmp_path / "a/images/5.png")
    with pytest.raises(ValueError, match="There are 1 image files, and there were 0, in row 6 of"):
        run(chats, quantizer_folder, tmp_path / "out", *words)


def test_equal_files_that_rows_name_are_no_unread_ones(captioned, quantizer_folder, tmp_path, capsys):
    shutil.copy(captioned / "0.png", captioned / "1.png")
    picture(60).save(captioned / "more.png")
    run(captioned, quantizer_folder, tmp_path / "out", "--task", "read")
    assert "no row names 1 of 5 image files, such as more.png" in capsys.readouterr().out


def test_equal_files_are_encoded_once(chats, quantizer_folder, tmp_path, capsys):
    rows = json.loads((tmp_path / "llava.json").read_text())
    for number, row in enumerate(rows[:2]):
        shutil.copy(tmp_path / "a/images/0.png", tmp_path / f"a/images/same{number}.png")
        row["image"] = [f"images/same{number}.png"]
    (tmp_path / "llava.json").write_text(json.dumps(rows[:2]))
    run(chats, quantizer_folder, tmp_path / "out", "--image-root", tmp_path / "a")
    assert "2 chats with 1 different images" in capsys.readouterr().out


def test_an_output_among_the_data_is_refused(llava_data, quantizer_folder, tmp_path):
    with pytest.raises(ValueError, match="--output .*table/out is inside --data .*table; choose"):
        run(llava_data / "table", quantizer_folder, llava_data / "table/out")
