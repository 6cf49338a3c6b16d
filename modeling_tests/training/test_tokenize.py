"""What `unicode2 tokenize` writes: the codes of the model, once an image, the same bytes however it is run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import load_dataset
from pyarrow import parquet
from tokenizing import content, picture, read, run, stop_at

from transformers_unicode2 import UniCode2ForConditionalGeneration
from transformers_unicode2.training import image_codes, row_index, shards, tokenize
from transformers_unicode2.training.sources import open_source


@pytest.fixture(scope="module")
def whole(llava_data, quantizer_folder, tmp_path_factory):
    """Both, of several shards, with few images in a shard of codes; what a run that is not disturbed writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_codes, "IMAGES_PER_SHARD", 3)
        return read(run_both(llava_data, quantizer_folder, tmp_path_factory.mktemp("whole") / "out"))


def run_both(folder: Path, model, output: Path, *more) -> Path:
    options = ["--rows-per-shard", 4, "--batch-size", 2, "--task", "both", *more]
    return run([folder / "llava.json", folder / "table"], model, output, *options)


def test_codes_are_those_of_the_model_and_chats_those_of_the_data(
    llava_data, tiny_model, processor, tiny_checkpoint, tmp_path
):
    output = run(llava_data / "llava.json", tiny_checkpoint, tmp_path / "out", "--rows-per-shard", 4)
    names = ["train-00000.parquet", "train-00001.parquet", "train-00002.parquet"]
    assert sorted(read(output)) == [".unicode2/train.json", *names]
    rows = load_dataset(str(output), split="train")
    assert rows.column_names == ["messages", "codes", "source", "row"] and rows["row"][:] == list(range(9))
    assert rows.features["codes"].feature.feature.dtype == "uint16"
    pixels = processor.image_processor([picture(number) for number in range(7)], return_tensors="pt")["pixel_values"]
    codes = tiny_model.get_quantizer().encode_images(pixels).tolist()
    named = [[0], [1], [0, 2], [], [3, 3], [4], [5], [6], [0]]
    assert rows["codes"][:] == [[codes[image] for image in images] for images in named]
    source = open_source(str(llava_data / "llava.json"))
    assert [shards.complete(turn, []) for row in source.rows() for turn in row.messages] == [
        turn for turns in rows["messages"] for turn in turns
    ]


def test_each_image_is_encoded_once(llava_data, quantizer_folder, tmp_path, monkeypatch):
    """However often a file is named or a content stands in a table, in how many tasks, and whatever a run had done."""
    encoded = []
    preprocess = image_codes.Preprocessing.__getitem__

    def count(self, item):
        encoded.append(item[0])
        return preprocess(self, item)

    monkeypatch.setattr(image_codes.Preprocessing, "__getitem__", count)
    monkeypatch.setattr(image_codes, "IMAGES_PER_SHARD", 3)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenize, "write_shards", stop_at(tokenize.write_shards, 1))
        run_both(llava_data, quantizer_folder, tmp_path / "out", "--num-workers", 0)
    assert encoded == list(range(10))
    run_both(llava_data, quantizer_folder, tmp_path / "out", "--num-workers", 0)
    assert encoded == list(range(10))


@pytest.mark.parametrize(
    ("module", "name", "number"),
    [(row_index, "read_block", 3), (image_codes, "write_codes", 1), (image_codes, "write_codes", 3)]
    + [(tokenize, "write_shard", number) for number in (1, 4)],
)
def test_an_interrupted_run_resumes_to_the_same_bytes(
    module, name, number, llava_data, whole, quantizer_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(image_codes, "IMAGES_PER_SHARD", 3)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, name, stop_at(getattr(module, name), number))
        run_both(llava_data, quantizer_folder, tmp_path / "out")
    assert (tmp_path / "out/work-train").is_dir()
    with pytest.raises(ValueError, match="was begun with something else .rows_per_shard was 4 and is 5."):
        run_both(llava_data, quantizer_folder, tmp_path / "out", "--rows-per-shard", 5)
    assert read(run_both(llava_data, quantizer_folder, tmp_path / "out")) == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_place_of_data_do_not_matter(workers, llava_data, whole, quantizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(image_codes, "IMAGES_PER_SHARD", 3)
    shutil.copytree(llava_data, tmp_path / "moved")
    assert read(run_both(tmp_path / "moved", quantizer_folder, tmp_path / "out", "--num-workers", workers)) == whole


def test_a_quantizer_that_is_alone_makes_the_codes_of_its_model(
    llava_data, tiny_checkpoint, tiny_model, processor, tmp_path
):
    tiny_model.get_quantizer().save_pretrained(tmp_path / "quantizer")
    processor.image_processor.save_pretrained(tmp_path / "quantizer")
    rows = [
        parquet.read_table(run(llava_data / "table", model, tmp_path / name, "--task", "draw") / "train-00000.parquet")
        for name, model in (("a", tiny_checkpoint), ("b", tmp_path / "quantizer"))
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 5


def test_each_task_has_a_folder_and_chats_have_one_of_their_own(whole, llava_data, quantizer_folder, tmp_path):
    names = {name for name in whole if name.endswith(".parquet")}
    assert names == {f"chats/train-0000{n}.parquet" for n in range(3)} | {
        f"{task}/train-0000{n}.parquet" for task in ("read", "draw") for n in range(2)
    }
    read_, drawn = (
        parquet.read_table(pa.BufferReader(whole[f"{task}/train-00000.parquet"])).to_pylist()
        for task in ("read", "draw")
    )
    assert [row["codes"] for row in read_] == [row["codes"] for row in drawn]
    assert [part["type"] for part in drawn[0]["messages"][1]["content"]] == ["image"]
    assert {row["source"] for row in drawn} == {2}
    # One task writes no folder
    run(llava_data / "table", quantizer_folder, tmp_path / "out", "--task", "draw")
    assert sorted(read(tmp_path / "out")) == [".unicode2/train.json", "train-00000.parquet"]


def test_chats_of_other_tasks_do_not_mix(llava_data, quantizer_folder, tmp_path):
    before = read(run(llava_data / "table", quantizer_folder, tmp_path, "--task", "both"))
    with pytest.raises(ValueError, match="begun with something else .chats 1 was nothing and is .*; chats read 1 was"):
        run(llava_data / "table", quantizer_folder, tmp_path, "--task", "draw")
    assert read(tmp_path) == before


def test_rows_that_cannot_be_used_are_listed_and_left_out(llava_data, quantizer_folder, tmp_path, capsys):
    """Broken images, markers that do not match, missing files: refused above a share, and named."""
    (tmp_path / "x").mkdir()
    rows = json.loads((llava_data / "llava.json").read_text())
    shutil.copytree(llava_data / "images", tmp_path / "x/images")
    (tmp_path / "x/images/5.png").write_bytes(b"no image")
    rows[1]["image"] = ["images/1.png", "images/1.png"]
    rows[4]["image"] = ["images/nowhere.png"] * 2
    (tmp_path / "x/llava.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="2 of 9 rows cannot be used, and --max-bad-share allows") as error:
        run(tmp_path / "x/llava.json", quantizer_folder, tmp_path / "out")
    assert "refused-train.log lists them, and the first is " in str(error.value)
    assert "a share of 0.01; " in str(error.value) and "json row 1: it has " in str(error.value)
    # Also without an output to look at
    assert len((tmp_path / "out/refused-train.log").read_text().splitlines()) == 2
    assert str(error.value).endswith(
        "1 of them names an image file that is not there (--image-root says where images are)."
    )
    with pytest.raises(ValueError, match=r"3 of 9 rows cannot be used, .* share of 0.23; .* the first is .* row 1: "):
        run(tmp_path / "x/llava.json", quantizer_folder, tmp_path / "out", "--max-bad-share", 0.23)
    assert not list((tmp_path / "out").glob("*.parquet"))
    output = run(tmp_path / "x/llava.json", quantizer_folder, tmp_path / "out", "--max-bad-share", 0.4)
    assert load_dataset(str(output), split="train")["row"][:] == [0, 2, 3, 5, 7, 8]
    said = capsys.readouterr().out
    assert f"{output}: 6 chats with 4 different images; 3 rows are left out, see {output}/refused-train.log\n" in said
    run(tmp_path / "x/llava.json", quantizer_folder, output, "--max-bad-share", 0.4)
    assert f"nothing to do; 3 rows are left out, see {output}/refused-train.log\n" in capsys.readouterr().out
    lines = (output / "refused-train.log").read_text().splitlines()
    assert [line.split(": ")[0].rpartition(" ")[2] for line in lines] == ["1", "4", "6"]
    assert "there is no image file images/nowhere.png" in lines[1] and "cannot be read as an image" in lines[2]


def test_repaired_files_are_read_again_and_codes_are_kept(llava_data, quantizer_folder, tmp_path, monkeypatch):
    """Another `--image-root`, an image in the place of a broken one: the same command goes on."""
    monkeypatch.setattr(image_codes, "IMAGES_PER_SHARD", 3)
    shutil.copytree(llava_data, tmp_path / "x")
    with pytest.raises(ValueError, match="8 of 9 rows cannot be used"):
        run(tmp_path / "x/llava.json", quantizer_folder, tmp_path / "out", "--image-root", tmp_path)
    (tmp_path / "x/images/5.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="1 of 9 rows cannot be used"):
        run(tmp_path / "x/llava.json", quantizer_folder, tmp_path / "out")
    kept = {file.name for file in (tmp_path / "out/work-train").glob("*.npy")}
    assert kept == {"codes-000000.npy", "codes-000002.npy"}
    shutil.copy(llava_data / "images/5.png", tmp_path / "x/images/5.png")
    output = run(tmp_path / "x/llava.json", quantizer_folder, tmp_path / "out")
    assert read(output) == read(run(llava_data / "llava.json", quantizer_folder, tmp_path / "other"))


def test_data_without_a_row_that_can_be_used_are_refused(quantizer_folder, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"conversations": [{"from": "human", "value": "hello"}]}\n')
    with pytest.raises(ValueError, match="1 of 1 rows cannot be used"):
        run(tmp_path / "x.jsonl", quantizer_folder, tmp_path / "out", "--max-bad-share", 1)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.parquet"))


def test_a_table_that_changes_while_it_is_read_is_noticed(llava_data, quantizer_folder, tmp_path, monkeypatch):
    shutil.copytree(llava_data / "table", tmp_path / "table")
    index = tokenize.load_quantizer

    def change(*args):
        table = pa.table({"image": [content(99)] * 5, "caption": ["x"] * 5})
        parquet.write_table(table, tmp_path / "table/train-0.parquet")
        return index(*args)

    monkeypatch.setattr(tokenize, "load_quantizer", change)
    with pytest.raises(ValueError, match="Row 0 of .*table changed while it was read"):
        run(tmp_path / "table", quantizer_folder, tmp_path / "out", "--num-workers", 0)


def test_two_splits_share_a_folder(llava_data, quantizer_folder, tmp_path):
    for split in ("train", "test"):
        run(llava_data / "llava.json", quantizer_folder, tmp_path, "--split", split)
    opened = load_dataset(str(tmp_path))
    assert {name: len(rows) for name, rows in opened.items()} == {"train": 9, "test": 9}


def test_codes_of_two_codebooks_do_not_mix(llava_data, tiny_checkpoint, tmp_path):
    """The same model may write to a folder of codes again; one with another codebook is refused and changes nothing."""
    for _ in range(2):
        before = read(run(llava_data / "table", tiny_checkpoint, tmp_path / "tokens"))
    model = UniCode2ForConditionalGeneration.from_pretrained(tiny_checkpoint)
    model.get_quantizer().codebook.codes[0] += 1
    model.save_pretrained(tmp_path / "other")
    shutil.copy(Path(tiny_checkpoint) / "processor_config.json", tmp_path / "other")
    with pytest.raises(ValueError, match="was begun with something else .quantizer was .* and is "):
        run(llava_data / "table", tmp_path / "other", tmp_path / "tokens")
    assert read(tmp_path / "tokens") == before


def test_an_encoder_that_computes_something_else_is_another_quantizer(tiny_checkpoint, tmp_path):
    from transformers_unicode2.tokens import hash_quantizer

    def hash_with(**settings):
        model.config.vision_config.update(settings)
        model.save_pretrained(tmp_path)
        return hash_quantizer(str(tmp_path))

    model = UniCode2ForConditionalGeneration.from_pretrained(tiny_checkpoint)
    own = hash_quantizer(str(tiny_checkpoint))
    assert hash_with(attention_dropout=0.1) == own
    model.get_quantizer().save_pretrained(tmp_path / "quantizer")
    assert hash_quantizer(str(tmp_path / "quantizer")) == own
    assert (
        len({own, hash_with(layer_norm_eps=0.1), hash_with(num_attention_heads=6), hash_with(hidden_act="relu")}) == 4
    )


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torch.distributed.run", "accelerate.commands.launch"])
def test_two_processes_write_what_one_writes(launcher, llava_data, quantizer_folder, tmp_path):
    """Also with the shards of codes that a run would have with few images."""
    start = [
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--cpu",
    ]
    if launcher == "torch.distributed.run":
        start = ["--standalone", "--local-addr", "127.0.0.1", "--nproc_per_node", "2"]
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom transformers_unicode2.training import image_codes, tokenize\n"
        "image_codes.IMAGES_PER_SHARD = 3\ntokenize.main(tokenize.make_parser().parse_args(sys.argv[1:]))\n"
    )
    words = ["--data", llava_data / "llava.json", llava_data / "table", "--model", quantizer_folder, "--task", "both"]
    words += ["--rows-per-shard", 4, "--batch-size", 2, "--output"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for prefix, output in (([], "one"), (["-m", launcher, *start], "two")):
        command = [sys.executable, *prefix, script, *words, tmp_path / output]
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    assert read(tmp_path / "one") == read(tmp_path / "two")


def test_rows_that_the_model_cannot_learn_are_listed(llava_data, tiny_checkpoint, quantizer_folder, tmp_path):
    """They would stop a stage. A quantizer that is alone knows no chats, so it takes them."""
    rows = json.loads((llava_data / "llava.json").read_text())
    rows[3]["conversations"][1]["value"] = "a turn ends by <|im_end|>"
    rows[5]["conversations"][0]["value"] += "<|image_pad|>"
    shutil.copytree(llava_data / "images", tmp_path / "images")
    (tmp_path / "llava.json").write_text(json.dumps(rows))
    output = run(tmp_path / "llava.json", tiny_checkpoint, tmp_path / "out", "--max-bad-share", 0.3)
    lines = (output / "refused-train.log").read_text().splitlines()
    assert [line.split("llava.json ")[1][:36] for line in lines] == [
        "row 3: turn 2 has <|im_end|> in its ",
        "row 5: turn 1 has <|image_pad|> in i",
    ]
    assert len(load_dataset(str(output), split="train")) == 7
    run(tmp_path / "llava.json", quantizer_folder, tmp_path / "alone")


def test_pictures_that_no_row_names_are_counted(quantizer_folder, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(content(number))
    lines = [json.dumps({"file_name": f"{number}.png", "text": "a"}) for number in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    run(folder, quantizer_folder, tmp_path / "out")
    assert f"{folder}: no row names 1 of 3 image files, such as 2.png\n" in capsys.readouterr().out
    (folder / "2.png").rename(folder / "2.heic")
    run(folder, quantizer_folder, tmp_path / "other")
    said = capsys.readouterr().out
    assert "no row names" not in said
    assert f"{folder}: 1 files are images of kinds that are not read, such as 2.heic\n" in said


@pytest.mark.parametrize(
    "pattern", ["data/*.parquet", "**/*.parquet", "data/../data/*.parquet", "data/out/*/*.parquet"]
)
def test_a_glob_that_would_take_in_the_output_is_refused(pattern, llava_data, quantizer_folder, tmp_path):
    """At once, not when the second run finds what the first has written."""
    shutil.copytree(llava_data / "table", tmp_path / "data")
    output = tmp_path / "data" if pattern.startswith("data/*") or ".." in pattern else tmp_path / "data/out"
    with pytest.raises(ValueError, match=f"--data .* would take in what is written to --output {output}; choose"):
        run(tmp_path / pattern, quantizer_folder, output)
    assert not (tmp_path / "data/out").exists()
    # Beside the data, one folder above its own files
    run(tmp_path / "data/*.parquet", quantizer_folder, tmp_path / "data/out")
    run(tmp_path / "data/*.parquet", quantizer_folder, tmp_path / "data/out")


def test_an_output_that_holds_the_data_and_no_data_are_refused(llava_data, quantizer_folder, tmp_path):
    shutil.copytree(llava_data / "table", tmp_path / "out/table")
    with pytest.raises(ValueError, match=f"--output {tmp_path}/out has .* of --data .* in it; choose another folder"):
        run(tmp_path / "out/table/*.parquet", quantizer_folder, tmp_path / "out")
    with pytest.raises(ValueError, match="--data is empty; give a file"):
        run("", quantizer_folder, tmp_path / "new")
