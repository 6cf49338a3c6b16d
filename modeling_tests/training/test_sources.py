"""Everything that people have, as chats: nine forms, what is recognised, and what is refused."""

import csv
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from fake_hub import serve_hub
from numbered import fill, picture
from pyarrow import parquet

from transformers_unicode2.training.sources import Row, RowError, describe, open_source, read_image
from transformers_unicode2.training.templates import Task, read_tasks

IMAGE = {"type": "image"}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def spell(messages: list[dict]) -> list[str]:
    """Messages in short: `user: <image>What?`."""
    parts = [["<image>" if part == IMAGE else part["text"] for part in message["content"]] for message in messages]
    return [f"{message['role']}: {''.join(words)}" for message, words in zip(messages, parts)]


def read(data: Path | str, **options) -> list[tuple[list[str], list[int]] | str]:
    """Chats of a source in short, with the numbers of their pictures; of a row that is refused, why.

    Any row can be the first.
    """
    source = open_source(str(data), **options)
    rows = list(source.rows())
    assert [row.number for row in rows] == list(range(len(rows)))
    for start in range(len(rows) + 1):
        assert list(map(repr, source.rows(start))) == list(map(repr, rows[start:]))
    return [
        (spell(row.messages), [read_image(image).getpixel((0, 0))[0] for image in row.images])
        if isinstance(row, Row)
        else str(row)
        for row in rows
    ]


def write_lines(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return file


CAPTIONS = [(["user: <image>Describe the image.", f"assistant: c{n}"], [n]) for n in range(3)]

LLAVA = [
    {"id": "a", "image": "im/a/0.JPG", "conversations": [["human", "<image>\nWhat é?"], ["gpt", "A"]]},
    {"id": 3, "conversations": [["system", "be brief"], ["human", "hi"], ["gpt", "ho"]]},
    {"id": 4, "image": ["im/漢 1.png", "im/a/0.JPG"], "conversations": [["human", "<image> or <image>"], ["gpt", "B"]]},
    {"id": None, "image": "", "conversations": [["human", "draw"], ["gpt", "so"]]},
    {"image": "im/漢 1.png", "conversations": [["human", "draw"], ["gpt", "a plan\n<image>"]]},
    {"image": "im/none.png", "conversations": [["human", "<image>\nx"], ["gpt", "A"]]},
    {"image": "im/a/0.JPG", "conversations": [["human", "x"], ["gpt", "A"]]},
    {"image": "../0.png", "conversations": [["human", "<image>\nx"], ["gpt", "A"]]},
    {"image": "https://x.org/0.png", "conversations": [["human", "<image>\nx"], ["gpt", "A"]]},
    {"video": "0.mp4", "conversations": [["human", "x"], ["gpt", "A"]]},
]
for row in LLAVA:
    row["conversations"] = [{"from": role, "value": value} for role, value in row["conversations"]]


@pytest.mark.parametrize("name", ["l.json", "l.jsonl"])
@pytest.mark.parametrize("has_root", [False, True])
def test_llava(tmp_path, name, has_root):
    """Ids of several types, images of several forms or none, in any turn; what is wrong is named with its row."""
    root = tmp_path / ("elsewhere" if has_root else "here")
    fill(root / "im" / "a", "0.JPG")
    fill(root / "im", "漢 1.png", start=1)
    fill(tmp_path, "0.png")
    file = write_lines(tmp_path / "here" / name, LLAVA)
    if name == "l.json":
        file.write_text("\ufeff" + json.dumps(LLAVA, indent=1), encoding="utf-8")
    rows = read(file, image_root=str(root) if has_root else None)
    assert rows[:5] == [
        (["user: <image>What é?", "assistant: A"], [0]),
        (["system: be brief", "user: hi", "assistant: ho"], []),
        (["user: <image> or <image>", "assistant: B"], [1, 0]),
        (["user: draw", "assistant: so"], []),
        (["user: draw", "assistant: a plan<image>"], [1]),
    ]
    assert rows[5] == f"row 5: there is no image file im/none.png in {root}"
    assert rows[6] == "row 6: it has 0 places for images and 1 images"
    assert "row 7: ../0.png is outside the table's folder" in rows[7]
    assert "row 8: https://x.org/0.png is a URL; download it first" in rows[8]
    assert rows[9] == "row 9: it has something in its column video, which is not read"


def test_journeydb(tmp_path):
    fill(tmp_path / "000", "0.png", "1.png", "2.png")
    rows = [
        {"img_path": "./000/0.png", "prompt": "p0 --v 4", "Task1": {"Style": "x"}, "Task2": {"Caption": "c0"}},
        {"img_path": "./000/1.png", "prompt": "p1", "Task2": {"Caption": None}},
        {"img_path": "./000/2.png", "prompt": "p2", "Task2": None},
        {"img_path": "./000/0.png", "prompt": None},
    ]
    file = write_lines(tmp_path / "anno.jsonl", rows)
    *drawn, last = read(file, task=read_tasks("draw")["draw"])
    assert drawn == [([f"user: {words}", "assistant: <image>"], [n]) for n, words in enumerate(("c0", "p1", "p2"))]
    assert "row 3: it has None in the column `caption`" in last
    assert read(file, caption_column="prompt")[0] == (
        ["user: <image>Describe the image.", "assistant: p0 --v 4"],
        [0],
    )


@pytest.mark.parametrize("kind", ["jsonl", "csv", "nested", "tsv", "txt"])
def test_folders_of_images(tmp_path, kind):
    names = ["a/0.PNG", "b é 1.png", "z.2.png"]
    for number, name in enumerate(names):
        fill((tmp_path / name).parent, Path(name).name, start=number)
    about = [{"file_name": name, "text": f"c{n}"} for n, name in enumerate(names)]
    if kind == "jsonl":
        write_lines(tmp_path / "metadata.jsonl", about)
    elif kind == "csv":
        with open(tmp_path / "metadata.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(about)
    elif kind == "nested":
        write_lines(tmp_path / "a" / "metadata.jsonl", [{**about[0], "file_name": "0.PNG"}])
        write_lines(tmp_path / "metadata.jsonl", about[1:])
    elif kind == "tsv":
        lines = [f"{row['file_name']}\t{row['text']}\r\n" for row in about]
        (tmp_path / "captions.tsv").write_bytes("".join(lines).encode())
    else:
        for row in about:
            (tmp_path / row["file_name"]).with_suffix(".txt").write_text(f"{row['text']}\n")
        (tmp_path / "z.txt").write_text("of another name")
    (tmp_path / ".hidden.parquet").write_bytes(b"")
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "again").symlink_to(tmp_path)
    assert read(tmp_path) == CAPTIONS


def test_imagefolder_has_the_rows_of_datasets(tmp_path):
    from datasets import load_dataset

    for split in ("train", "test"):
        fill(tmp_path / split, "0.png", "1.png", start=10 * (split == "test"))
        write_lines(
            tmp_path / split / "metadata.jsonl", [{"file_name": f"{n}.png", "text": f"{split} {n}"} for n in (0, 1)]
        )
    for split in ("train", "test"):
        theirs = load_dataset("imagefolder", data_dir=str(tmp_path), split=split, cache_dir=tmp_path / ".cache")
        ours = read(tmp_path, split=split)
        assert [(row["image"].getpixel((0, 0))[0], f"assistant: {row['text']}") for row in theirs] == [
            (images[0], chat[1]) for chat, images in ours
        ]
    with pytest.raises(ValueError, match="has no files of the split dev; there is test, train"):
        open_source(str(tmp_path), split="dev")


def test_a_picture_without_a_text_beside_it_is_a_bad_row(tmp_path):
    fill(tmp_path, "0.png", "1.png")
    (tmp_path / "0.txt").write_text("c0")
    first, second = read(tmp_path)
    assert first == CAPTIONS[0] and "row 1: the text of 1.png cannot be read" in second
    (tmp_path / "0.txt").unlink()
    with pytest.raises(ValueError, match="has 2 images and no texts: it needs a table .*or a .txt"):
        open_source(str(tmp_path))


def test_webdataset(tmp_path):
    """Captions as texts or in JSON, and chats of several images; a shard a tar."""
    chat = [{"from": "human", "value": "<image>\n<image>\nsame?"}, {"from": "gpt", "value": "no"}]
    shards = {
        "captions-0": [{"0.png": picture(0), "0.txt": b"c0\n"}, {"1.jpg": picture(1), "1.txt": b"c1"}],
        "captions-1": [{"2.webp": picture(2), "2.txt": b"c2"}],
        "chats": [
            {"0.a.png": picture(0), "0.b.png": picture(1), "0.json": json.dumps({"conversations": chat}).encode()}
        ],
    }
    for name, samples in shards.items():
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for member, content in (pair for sample in samples for pair in sample.items()):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    assert read(tmp_path / "captions-*.tar") == CAPTIONS
    assert read(tmp_path / "chats.tar") == [(["user: <image><image>same?", "assistant: no"], [0, 1])]


CHAT = [{"role": "user", "content": [IMAGE, text("what?")]}, {"role": "assistant", "content": [text("it"), IMAGE]}]
ALONE = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "csv", "jsonl", "jsonl.gz", "json", "saved"])
def test_tables_of_chats(tmp_path, kind):
    """Images as contents, or as paths where a table has no contents; in any turn, or none."""
    fill(tmp_path, "0.png", "1.png")
    has_contents = kind in ("parquet", "arrow", "saved")
    images = [{"bytes": picture(n), "path": None} for n in (0, 1)] if has_contents else ["0.png", "1.png"]
    chats = [CHAT, [{**turn, "content": [text(turn["content"])]} for turn in ALONE] if has_contents else ALONE]
    rows = [{"messages": chats[0], "images": images, "id": 1}, {"messages": chats[1], "images": []}]
    file = tmp_path / f"t.{kind}"
    if kind in ("jsonl", "jsonl.gz", "json"):
        lines = json.dumps(rows) if kind == "json" else "\n\n".join(map(json.dumps, rows))
        content = lines.encode("utf-8-sig")
        import gzip

        file.write_bytes(gzip.compress(content) if kind == "jsonl.gz" else content)
    elif kind == "csv":
        with open(file, "w", newline="") as content:
            writer = csv.DictWriter(content, ["messages", "images"])
            writer.writeheader()
            writer.writerows({name: json.dumps(row[name]) for name in ("messages", "images")} for row in rows)
    elif kind == "saved":
        from datasets import Dataset

        Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
        file = tmp_path / "saved"
    else:
        write_table(pa.Table.from_pylist(rows), file)
    assert read(file) == [
        (["user: <image>what?", "assistant: it<image>"], [0, 1]),
        (["user: hi", "assistant: ho"], []),
    ]


def write_table(table: pa.Table, file: Path) -> None:
    if file.suffix == ".parquet":
        parquet.write_table(table, file, row_group_size=2)
        return
    with pa.ipc.new_file(str(file), table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    ("image", "caption"),
    [("image", "caption"), ("jpg", "txt"), ("image_path", "TEXT"), ("picture", "prompt"), ("scan", "text")],
)
def test_tables_of_images_and_captions(tmp_path, image, caption):
    """Columns of the usual names, or one that holds images whatever its name is."""
    rows = [{"n": n, image: {"bytes": picture(n), "path": "x.png"}, caption: f"c{n}"} for n in range(3)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet") == CAPTIONS


def test_of_several_captions_rows_take_another_in_turn(tmp_path):
    rows = [{"image": picture(n), "captions": [f"{n}a", f"{n}b"]} for n in range(3)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert [chat[1] for chat, _ in read(tmp_path)] == ["assistant: 0a", "assistant: 1b", "assistant: 2a"]


def test_a_row_takes_the_image_column_that_is_filled(tmp_path):
    columns = {"jpg": [picture(0), None, None, picture(1)], "png": [None, picture(1), None, picture(1)]}
    parquet.write_table(pa.table({**columns, "txt": ["c0", "c1", "c2", "c3"]}), tmp_path / "t.parquet")
    *found, none, both = read(tmp_path)
    assert found == CAPTIONS[:2]
    assert none == "row 2: it has 0 images (none), where a text is about one"
    assert both == "row 3: it has 2 images (1 in jpg, 1 in png), where a text is about one"


@pytest.fixture
def scenes(tmp_path):
    """Drawn scenes, as `unicode2 scenes` writes them."""
    from transformers_unicode2.scenes import write

    write.main(write.make_parser().parse_args(["--output", str(tmp_path / "s"), "--num-scenes", "4"]))
    return tmp_path / "s"


def test_drawn_scenes_are_questions_or_what_a_task_makes_of_them(scenes, tmp_path):
    stored = parquet.read_table(scenes).to_pylist()
    for (chat, images), row in zip(read(scenes), stored):
        asked, said = row["questions"], row["answers"]
        assert chat[0] == f"user: <image>{asked[0]}" and len(images) == 1
        assert chat[1:] == [
            f"assistant: {said[0]}",
            *(line for pair in zip(asked[1:], said[1:]) for line in (f"user: {pair[0]}", f"assistant: {pair[1]}")),
        ]
    plan = Task(["{caption}", "draw {caption}"], "{dense_caption}{image}")
    assert [chat for chat, _ in read(scenes, task=plan)] == [
        [f"user: {'draw ' * (n % 2)}{row['caption']}", f"assistant: {row['dense_caption']}<image>"]
        for n, row in enumerate(stored)
    ]
    with pytest.raises(ValueError, match="The task asks for {dense}; .* has the columns image, kind, caption"):
        open_source(str(scenes), task=Task("{dense}", "{image}"))
    Path(scenes / ".unicode2" / "train.json").write_text('{"made_of": {}, "finished": false, "files": {}}')
    with pytest.raises(ValueError, match="is not finished"):
        open_source(str(scenes))


def test_questions_in_a_csv_file_are_lists_in_json(tmp_path):
    fill(tmp_path, "0.png")
    (tmp_path / "t.csv").write_text('image,questions,answers\n0.png,"[""a?"", ""b?""]","[""x"", ""y""]"\n')
    assert read(tmp_path / "t.csv") == [(["user: <image>a?", "assistant: x", "user: b?", "assistant: y"], [0])]


def test_texts_alone_by_a_task(tmp_path):
    file = write_lines(tmp_path / "t.jsonl", [{"instruction": "say a", "output": "a"}])
    assert read(file, task=Task("{instruction}", "{output}")) == [(["user: say a", "assistant: a"], [])]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"words": "x"},
            {},
            "has the columns words, none of them known to hold chats or images; name it by --image-column",
        ),
        (
            {"image": "0.png", "words": "x"},
            {},
            "which column of .* is the caption: it has image, words; name it by --caption",
        ),
        ({"image": "0.png", "text": "x", "title": "y"}, {}, "is the caption: it has image, text, title"),
        ({"left.png": "0.png", "right.png": "0.png", "text": "x"}, {}, "which column of .* is the image"),
        ({"conversations": [], "messages": []}, {}, "has the columns conversations and messages; say --format"),
        ({"image": "0.png", "caption": "x"}, {"format": "llava"}, "--format llava needs the column conversations"),
        ({"image": "0.png", "caption": "x"}, {"format": "lava"}, "--format is lava; it must be one of llava, messages"),
        (
            {"image": "0.png", "caption": "x"},
            {"image_column": "picture"},
            "--image-column is picture, and .* has the col",
        ),
        ({"image": "0.png", "caption": "x"}, {"image_root": "/nowhere"}, "--image-root /nowhere is no folder"),
    ],
)
def test_what_cannot_be_told_is_asked(tmp_path, row, options, message):
    with pytest.raises(ValueError, match=message):
        open_source(str(write_lines(tmp_path / "t.jsonl", [row])), **options)


def test_columns_that_are_named_are_taken(tmp_path):
    fill(tmp_path, "0.png", "1.png")
    row = {"text": "t", "words": "w", "left.png": "0.png", "right.png": "1.png"}
    file = write_lines(tmp_path / "t.jsonl", [row])
    assert read(file, image_column="right.png", caption_column="words") == [
        (["user: <image>Describe the image.", "assistant: w"], [1])
    ]


def test_files_and_folders_that_are_no_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no file or folder none/such.jsonl"):
        open_source("none/such.jsonl")
    (tmp_path / "a.xlsx").write_bytes(b"")
    with pytest.raises(ValueError, match="a.xlsx is no table; give one of .json"):
        open_source(str(tmp_path / "a.xlsx"))
    write_lines(tmp_path / "a.jsonl", [])
    with pytest.raises(ValueError, match="a.jsonl has no row that can be read; it is empty"):
        open_source(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text("{]\n}")
    with pytest.raises(ValueError, match="has no row that can be read; row 0: it is no JSON"):
        open_source(str(tmp_path / "a.jsonl"))
    (tmp_path / "b.csv").write_text("image,caption\n0.png,x\n")
    with pytest.raises(ValueError, match="holds .csv and .jsonl files; name those of one kind"):
        open_source(str(tmp_path))


def test_the_digest_is_of_all_that_rows_depend_on(tmp_path):
    for folder in ("a", "b"):
        fill(tmp_path / folder, "0.png")
        write_lines(tmp_path / folder / "metadata.jsonl", [{"file_name": "0.png", "text": "x", "more": "y"}])
    tasks = read_tasks("both")
    digest = open_source(str(tmp_path / "a")).digest()
    assert open_source(str(tmp_path / "b")).digest() == digest == open_source(str(tmp_path / "a")).digest()
    others = [
        open_source(str(tmp_path / "a"), task=tasks["draw"]),
        open_source(str(tmp_path / "a"), caption_prompt="what?"),
        open_source(str(tmp_path / "a"), caption_column="more"),
    ]
    write_lines(tmp_path / "b" / "metadata.jsonl", [{"file_name": "0.png", "text": "z", "more": "y"}])
    others.append(open_source(str(tmp_path / "b")))
    assert len({digest, *(source.digest() for source in others)}) == 5


def test_what_was_recognised_is_shown_with_the_first_chat(tmp_path):
    fill(tmp_path, "0.png")
    rows = [{"image": "none.png", "caption": "x"}, {"image": "0.png", "caption": f"two\nlines {'x' * 400}"}]
    shown = describe(open_source(str(write_lines(tmp_path / "t.jsonl", rows)))).splitlines()
    of = f"captions: 2 rows of {tmp_path}/t.jsonl, a JSON file; images from image, captions from caption"
    assert shown[0] == of
    assert shown[1] == "  user: [image: 0.png] Describe the image."
    assert shown[2].startswith(r"  assistant: two\nlines xxx") and shown[2].endswith("xxx...") and len(shown[2]) < 330
    calls = {"role": "assistant", "tool_calls": [{"function": {"name": "look"}}]}
    file = write_lines(tmp_path / "u.jsonl", [{"messages": [ALONE[0], calls]}])
    assert describe(open_source(str(file))).splitlines()[2] == "  assistant: [1 tool calls]"


HUB = """
import json, sys
from transformers_unicode2.training.sources import describe, open_source, read_image

for data, streaming in json.loads(sys.argv[1]):
    try:
        source = open_source(data, streaming=streaming)
    except ValueError as error:
        print(json.dumps(str(error)))
        continue
    rows = list(source.rows())
    assert list(map(repr, source.rows(1))) == list(map(repr, rows[1:]))
    pixels = [[read_image(image).getpixel((0, 0))[0] for image in row.images] for row in rows]
    print(json.dumps([source.format, source.num_rows, source.digest(), [row.messages for row in rows], pixels]))
"""


def test_data_sets_of_the_hub_and_streams(tmp_path):
    """Parquet with two splits, an image folder, a WebDataset and chats in JSON, from a Hub on loopback."""
    for split in ("train", "test"):
        rows = [
            {"image": {"bytes": picture(n), "path": None}, "caption": f"c{n}"} for n in range(3 - (split == "test"))
        ]
        (tmp_path / "pairs").mkdir(exist_ok=True)
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs" / f"{split}-00000.parquet")
    fill(tmp_path / "folder", "0.png", "1.png", "2.png")
    write_lines(tmp_path / "folder" / "metadata.jsonl", [{"file_name": f"{n}.png", "text": f"c{n}"} for n in range(3)])
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        for name, content in ((f"{n}.{s}", c) for n in range(3) for s, c in (("png", picture(n)), ("txt", b"c%d" % n))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    calls = [{"function": {"name": "look", "arguments": {"x": 1}}}]
    called = [ALONE[0], {"role": "assistant", "content": [text("ho")], "tool_calls": calls}]
    write_lines(tmp_path / "chats" / "train.jsonl", [{"messages": ALONE, "id": 1}, {"messages": called, "id": "b"}])
    names = ("pairs", "folder", "tars", "chats")
    asked = [[f"org/{name}", streaming] for name in names for streaming in (False, True)]
    asked += [
        ["org/pairs:test", False],
        ["org/pairs:default:train[:1]", False],
        ["org/pairs:dev", False],
        ["org/no", True],
    ]
    with serve_hub({f"datasets/org/{name}": {"main": tmp_path / name} for name in names}) as (url, _):
        environment = {**os.environ, "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", HUB, json.dumps(asked)]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith(("[", '"'))]
    captions = [[spell(messages) for messages in result[3]] for result in found[:6]]
    assert captions == [[chat for chat, _ in CAPTIONS]] * 6
    assert [result[:2] + result[4:] for result in found[:6]] == [
        ["captions", rows, [[0], [1], [2]]] for rows in (3, None)
    ] * 3
    assert [result[2] for result in found[:6:2]] == [result[2] for result in found[1:6:2]]
    assert [result[:2] + result[4:] for result in found[6:8]] == [["messages", rows, [[], []]] for rows in (2, None)]
    assert all(result[3][1][1] == called[1] for result in found[6:8])
    assert [result[1] for result in found[8:10]] == [2, 1]
    assert 'org/pairs:dev is no file or folder, nor a data set that can be loaded: Unknown split "dev"' in found[10]
    assert "org/no is no file or folder, nor a data set that can be loaded" in found[11]


def test_absolute_paths_are_read_as_in_tables_of_images(tmp_path):
    fill(tmp_path / "im", "0.png")
    row = {"image": str(tmp_path / "im" / "0.png"), "caption": "c0"}
    file = write_lines(tmp_path / "d" / "t.jsonl", [row, {**row, "image": "[1].png"}])
    fill(tmp_path / "d", "[1].png", start=1)
    assert [images for _, images in read(file)] == [[0], [1]]


def test_row_errors_say_which_file_is_missing(tmp_path):
    file = write_lines(tmp_path / "t.jsonl", [{"image": "0.png", "caption": "x"}])
    (error,) = open_source(str(file)).rows()
    assert isinstance(error, RowError) and (error.number, error.missing) == (0, "0.png")


def test_columns_beside_a_chat_are_read_or_refused(tmp_path):
    chat = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    rows = [{"conversations": chat, "system": "be brief", "tools": "[]"}, {"conversations": chat, "system": ""}]
    rows.append({"conversations": chat, "tools": [{"type": "function"}]})
    first, second, third = read(write_lines(tmp_path / "t.jsonl", rows))
    assert first[0] == ["system: be brief", "user: hi", "assistant: ho"] and second[0] == ["user: hi", "assistant: ho"]
    assert third == "row 2: it has something in its column tools, which is not read"


def test_an_image_column_with_nan_or_an_odd_name(tmp_path):
    """pandas writes the first; a file may be named as a list is written."""
    fill(tmp_path, "0.png")
    (tmp_path / "0.png").rename(tmp_path / "[x]")
    rows = [{"messages": ALONE, "image": float("nan")}, {"messages": CHAT[:1] + ALONE[1:], "image": "[x]"}]
    assert read(write_lines(tmp_path / "t.jsonl", rows)) == [
        (["user: hi", "assistant: ho"], []),
        (["user: <image>what?", "assistant: ho"], [0]),
    ]


@pytest.mark.parametrize("name", ["completion", "answer", "chosen", "response"])
def test_a_question_is_not_taken_for_a_caption(tmp_path, name):
    fill(tmp_path, "0.png")
    file = write_lines(tmp_path / "t.jsonl", [{"image": "0.png", "text": "what?", name: "it"}])
    with pytest.raises(ValueError, match="cannot be told which column of .* is the caption: .* name it by --caption-c"):
        open_source(str(file))
    assert read(file, caption_column=name) == [(["user: <image>Describe the image.", "assistant: it"], [0])]


def test_links_of_the_user_lead_anywhere_and_dots_do_not(tmp_path):
    fill(tmp_path / "mnt/coco", "0.png")
    fill(tmp_path / "mnt", "0.png")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/coco").symlink_to(tmp_path / "mnt/coco")
    rows = [{"image": name, "caption": "c0"} for name in ("coco/0.png", "coco/../0.png", "../mnt/0.png")]
    file = write_lines(tmp_path / "links/t.jsonl", rows)
    for options in ({}, {"image_root": str(tmp_path / "links")}):
        first, *others = read(file, **options)
        assert first == CAPTIONS[0] and all("is outside the table's folder" in error for error in others)


def test_pictures_named_as_a_split_hide_no_others(tmp_path):
    for name in ("train_station", "cat"):
        fill(tmp_path, f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    assert [chat[1] for chat, _ in read(tmp_path)] == ["assistant: cat", "assistant: train_station"]


@pytest.mark.parametrize("names", [("train-0.jsonl", "more.jsonl"), ("train/0.jsonl", "bus/0.jsonl")])
def test_files_of_no_split_beside_those_of_one_are_refused(tmp_path, names):
    for name in names:
        write_lines(tmp_path / name, [{"image": "0.png", "caption": "x"}])
    with pytest.raises(ValueError, match="has 1 files of the split train, such as .*, and 1 of no split, such as"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    "entries",
    [
        {"image_path": "0.png"},
        {"img": "0.png"},
        {"Image": "0.png"},
        {"picture": {"bytes": None, "path": "0.png"}},
        {"jpg": "0.png"},
        {"path": "0.png"},
        {"image": {"url": "0.png"}},
        {"images": ["0.png"], "image": "0.png"},
        {"images": ["0.png"], "thumbnail": "1.png"},
    ],
)
def test_a_chat_has_the_images_of_its_columns_whatever_their_names(tmp_path, entries):
    fill(tmp_path, "0.png", "1.png")
    write_lines(tmp_path / "a.jsonl", [{"messages": ALONE}, {"messages": ALONE, **entries}])
    text_only, seen = read(tmp_path / "a.jsonl")
    assert text_only == (["user: hi", "assistant: ho"], [])
    assert seen == (["user: <image>hi", "assistant: ho"], [0])
    turns = [{"from": "human", "value": "<image>\nhi"}, {"from": "gpt", "value": "ho"}]
    write_lines(tmp_path / "b.jsonl", [{"conversations": turns, **entries}])
    assert read(tmp_path / "b.jsonl") == [seen]


@pytest.mark.parametrize(
    "entries, message",
    [
        (
            {"images": ["0.png"], "image": "1.png"},
            "it has 1 images in its column images and 1 others in its column image",
        ),
        ({"img": "0.png", "photo": "1.png"}, "it has images in its columns img and photo; name one by --image-column"),
        ({"screen": "0.png"}, "it has an image in its column screen, which is not read without --image-column"),
        ({"images": {"0": "0.png"}}, "an image is {'0': '0.png'}, where bytes, path or url must be"),
    ],
)
def test_images_that_would_be_lost_are_refused(tmp_path, entries, message):
    fill(tmp_path, "0.png", "1.png")
    write_lines(tmp_path / "a.jsonl", [{"messages": ALONE, **entries}])
    (row,) = read(tmp_path / "a.jsonl")
    assert row.startswith(f"row 0: {message}")


def test_entries_about_an_image_are_no_images(tmp_path):
    about = {"image_id": "0.png", "id": "1.png", "image_width": 64, "path": "train/a.json", "source": "llava"}
    write_lines(tmp_path / "a.jsonl", [{"messages": ALONE, **about}])
    assert read(tmp_path / "a.jsonl") == [(["user: hi", "assistant: ho"], [])]


def test_lists_and_objects_in_cells_are_read(tmp_path):
    fill(tmp_path, "0.png", "1.png")
    content = 'image,caption\n0.png,"[""a cat"", ""a dog""]"\n1.png,"[""a cat"", ""a dog""]"\n1.png,[laughs]\n'
    (tmp_path / "a.csv").write_text(content)
    assert [row[0][1] for row in read(tmp_path / "a.csv")] == [
        "assistant: a cat",
        "assistant: a dog",
        "assistant: [laughs]",
    ]
    about = ('{""Caption"": ""said""}', '{""Caption"": ""  ""}', "none")
    lines = ["img_path,prompt,Task2", *(f'0.png,asked,"{cell}"' for cell in about)]
    (tmp_path / "b.csv").write_text("\n".join(lines))
    assert [row[0][1] for row in read(tmp_path / "b.csv")] == [f"assistant: {w}" for w in ("said", "asked", "asked")]
