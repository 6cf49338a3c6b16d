"""Nine forms of data, from files to a stage that learns them: each alone, and all of them in one mixture."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from PIL import Image
from pyarrow import parquet

from transformers_unicode2.scenes import write
from transformers_unicode2.training import tokenize
from transformers_unicode2.training.mixtures import find_parts, open_mixture

ROWS = 6
# Name, options beside the data, and turns of the first chat
FORMS = {
    "llava.json": ([], ["user: [image: 0.png] what is it?", "assistant: it is 0"]),
    "llava.jsonl": ([], ["system: be brief", "user: [image: 0.png] [image: 1.png] which?", "assistant: it is 0"]),
    "journeydb.jsonl": (["--task", "draw"], ["user: a prompt of 0", "assistant: [image: 0.png]"]),
    "imagefolder": ([], ["user: [image: 0.png] describe the image.", "assistant: it is 0"]),
    "web.tar": (["--task", "draw"], ["user: it is 0", "assistant: [image: "]),
    "messages.parquet": ([], ["user: draw 0", "assistant: here [image: ", "user: thanks", "assistant: welcome"]),
    "captions.csv": ([], ["user: [image: 0.png] describe the image.", "assistant: it is 0"]),
    "scenes": ([], ["user: [image: "]),
    "texts.jsonl": ([], ["user: hello 0", "assistant: hi"]),
}


def content(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_lines(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with all forms, of 6 rows each."""
    folder = tmp_path_factory.mktemp("forms")
    (folder / "imagefolder").mkdir()
    for number in range(ROWS):
        for place in (folder, folder / "imagefolder"):
            (place / f"{number}.png").write_bytes(content(number))
    said = [f"it is {number}" for number in range(ROWS)]
    turns = [[{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": text}] for text in said]
    rows = [{"id": n, "image": f"{n}.png", "conversations": chat} for n, chat in enumerate(turns)]
    (folder / "llava.json").write_text(json.dumps(rows))
    for number, chat in enumerate(turns):
        rows[number]["image"] = [f"{number}.png", f"{(number + 1) % ROWS}.png"]
        chat[0]["value"] = "<image><image>which?"
        chat.insert(0, {"from": "system", "value": "be brief"})
    write_lines(folder / "llava.jsonl", rows)
    about = [{"img_path": f"{n}.png", "prompt": f"a prompt of {n}"} for n in range(ROWS)]
    about[1:] = [{**row, "Task2": {"Caption": "a caption"}} for row in about[1:]]
    write_lines(folder / "journeydb.jsonl", about)
    captions = [{"file_name": f"{n}.png", "text": text} for n, text in enumerate(said)]
    write_lines(folder / "imagefolder/metadata.jsonl", captions)
    with tarfile.open(folder / "web.tar", "w") as tar:
        for number, text in enumerate(said):
            for name, part in ((f"{number}.png", content(number)), (f"{number}.txt", text.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))
    chats = [
        [
            {"role": "user", "content": [{"type": "text", "text": f"draw {number}"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "here"}, {"type": "image", "text": None}]},
            {"role": "user", "content": [{"type": "text", "text": "thanks"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "welcome"}]},
        ]
        for number in range(ROWS)
    ]
    images = [[{"bytes": content(number), "path": None}] for number in range(ROWS)]
    parquet.write_table(pa.table({"messages": chats, "images": images}), folder / "messages.parquet")
    (folder / "captions.csv").write_text("image,caption\n" + "".join(f"{n}.png,{said[n]}\n" for n in range(ROWS)))
    write.main(write.make_parser().parse_args(["--output", str(folder / "scenes"), "--num-scenes", str(ROWS)]))
    texts = [[{"role": "user", "content": f"hello {n}"}, {"role": "assistant", "content": "hi"}] for n in range(ROWS)]
    write_lines(folder / "texts.jsonl", [{"messages": chat} for chat in texts])
    return folder


def tokenize_form(name: str, data: Path, model: Path, output: Path) -> Path:
    words = ["--data", data / name, "--model", model, "--output", output, "--num-workers", 0, *FORMS[name][0]]
    tokenize.main(tokenize.make_parser().parse_args(list(map(str, words))))
    return output


def place_stage(tokens: list[Path], recipe: Path) -> Path:
    """A recipe of a stage on these folders."""
    stage = yaml.safe_load((Path(__file__).parents[2] / "training_recipes/unicode2-tiny/stage2.yaml").read_text())
    stage["datasets"] = [{"path": str(folder)} for folder in tokens]
    recipe.write_text(yaml.safe_dump(stage, sort_keys=False))
    return recipe


@pytest.mark.parametrize("name", FORMS)
def test_a_form_of_data_becomes_chats_and_its_first_one_is_printed(name, data, tiny_run, tmp_path, capsys):
    output = tokenize_form(name, data, tiny_run / "model", tmp_path / "out")
    said = capsys.readouterr().out.splitlines()
    assert f"{ROWS} rows of {data / name}" in said[0]
    for turn, wanted in zip(said[1:], FORMS[name][1]):
        assert turn.strip().startswith(wanted), said
    rows = open_mixture(find_parts([{"path": str(output)}], "`datasets`"), 0)
    assert len(rows) == ROWS
    for messages, codes in zip(rows["messages"], rows["codes"]):
        assert [len(image) for image in codes] == [64] * sum(
            part["type"] == "image" for turn in messages for part in turn["content"]
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_a_stage_learns_from_a_form_of_data(name, data, tiny_run, run_stage, tmp_path):
    tokens = tokenize_form(name, data, tiny_run / "model", tmp_path / "tokens")
    run = run_stage(place_stage([tokens], tmp_path / "stage.yaml"), tmp_path / "out", "--max_steps", "2")
    assert (tmp_path / "out/model.safetensors").is_file() and "loss" in run.stdout + run.stderr


@pytest.mark.slow
def test_a_mixture_of_all_forms_is_learnt_and_resumed_to_the_same_weights(data, tiny_run, run_stage, tmp_path):
    tokens = [tokenize_form(name, data, tiny_run / "model", tmp_path / "tokens" / name) for name in FORMS]
    recipe = place_stage(tokens, tmp_path / "stage.yaml")
    options = ("--max_steps", "20", "--save_steps", "10", "--save_total_limit", "9")
    run_stage(recipe, tmp_path / "whole", *options)
    # As a kill after step 10 leaves it
    shutil.copytree(tmp_path / "whole/checkpoint-10", tmp_path / "killed/checkpoint-10")
    run_stage(recipe, tmp_path / "killed", *options)
    name = "model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
