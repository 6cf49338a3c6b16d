"""Pictures in the folders of the official scorers, the same for any number of processes and after any kill."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tokenizing import stop_at

from transformers_unicode2.evaluation import generation
from transformers_unicode2.evaluation.card_files import read_card
from transformers_unicode2.evaluation.geneval import find_folders
from transformers_unicode2.evaluation.prompts import read_dpg

PROMPTS = [
    {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a circle"},
    {"tag": "counting", "include": [{"class": "ring", "count": 2}], "exclude": [{"class": "ring", "count": 3}],
     "prompt": "two rings"},
]  # fmt: skip
QUICK = "--steps 1 --num-candidates 1 --true-cfg-scale 1 --max-plan-tokens 0 --prior-guidance 1 --images-per-prompt 2"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in PROMPTS))
    return file


def words(prompts, model, output, *more) -> list[str]:
    own = ["--benchmark", "geneval", "--prompts", prompts, "--model", model, "--output", output, *QUICK.split(), *more]
    return list(map(str, own))


def run(*args):
    generation.main(generation.make_parser().parse_args(words(*args)))


def read(folder) -> dict:
    """All files of an output but for the card and its page."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("generation.")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if ".unicode2" not in file.parts}


@pytest.fixture(scope="module")
def drawn(prompts, tiny_checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("drawn") / "out"
    run(prompts, tiny_checkpoint, output)
    return output


def test_folders_are_those_of_the_official_scorer(drawn, capsys, prompts, tiny_checkpoint):
    names = {f"{i:05d}/samples/{j:05d}.png" for i in range(2) for j in range(2)}
    assert read(drawn).keys() == names | {"00000/metadata.jsonl", "00001/metadata.jsonl"}
    assert json.loads((drawn / "00001/metadata.jsonl").read_text()) == PROMPTS[1]
    pictures = [np.asarray(Image.open(drawn / name)) for name in sorted(names)]
    assert pictures[0].shape == (64, 64, 3) and not (pictures[0] == pictures[1]).all()
    card = read_card(drawn / "generation.json")
    assert card.protocol["decoder"]["num_inference_steps"] == 1 and card.protocol["rewritten"] == "none"
    assert card.protocol["language model"]["max_plan_tokens"] == 0 and card.protocol["num_candidates"] == 1
    assert not card.figures and (drawn / "generation.md").is_file()
    run(prompts, tiny_checkpoint, drawn)
    assert "is finished; nothing to do" in capsys.readouterr().out


def test_a_killed_run_resumes_to_the_same_pictures(prompts, drawn, tiny_checkpoint, tmp_path, monkeypatch):
    for number in (1, 3):
        monkeypatch.setattr(generation, "draw", stop_at(generation.draw, number))
        with pytest.raises(KeyboardInterrupt):
            run(prompts, tiny_checkpoint, tmp_path / "out")
        monkeypatch.undo()
    run(prompts, tiny_checkpoint, tmp_path / "out")
    assert read(tmp_path / "out") == read(drawn)
    cards = [read_card(folder / "generation.json") for folder in (tmp_path / "out", drawn)]
    assert cards[0].protocol_hash == cards[1].protocol_hash and cards[0].subject == cards[1].subject


@pytest.mark.slow
def test_two_processes_draw_the_same(prompts, drawn, tiny_checkpoint, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--local-addr", "127.0.0.1", "-m", "transformers_unicode2.evaluation.generation"]
    command += words(prompts, tiny_checkpoint, tmp_path / "out")
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    assert read(tmp_path / "out") == read(drawn)


def test_grids_of_dpg_have_the_pictures_in_rows(drawn, tiny_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "prompts").mkdir()
    for name, text in (("a", "a circle"), ("b", "two rings")):
        (tmp_path / "prompts" / f"{name}.txt").write_text(text)
    own = ["--benchmark", "dpg", "--prompts", tmp_path / "prompts", "--model", tiny_checkpoint, *QUICK.split()]
    own = [*map(str, own), "--images-per-prompt", "4", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(generation, "draw", stop_at(generation.draw, 6))
    with pytest.raises(KeyboardInterrupt):
        generation.main(generation.make_parser().parse_args(own))
    monkeypatch.undo()
    generation.main(generation.make_parser().parse_args(own))
    assert read(tmp_path / "out").keys() == {"a.png", "b.png"}
    grid = Image.open(tmp_path / "out/a.png")
    tiles = [grid.crop(box) for box in ((0, 0, 64, 64), (64, 0, 128, 64))]
    singles = [Image.open(drawn / f"00000/samples/{j:05d}.png") for j in range(2)]
    assert grid.size == (128, 128) and [tile.tobytes() for tile in tiles] == [one.tobytes() for one in singles]


def test_another_protocol_in_the_same_folder_is_refused(prompts, drawn, tiny_checkpoint, tmp_path):
    (tmp_path / "texts").write_text("a very round circle\ntwo shiny rings\n")
    with pytest.raises(ValueError, match="begun with something else .protocol seed was 0 and is 1"):
        run(prompts, tiny_checkpoint, drawn, "--seed", "1")
    with pytest.raises(ValueError, match="protocol rewritten was none and is"):
        run(prompts, tiny_checkpoint, drawn, "--rewritten", tmp_path / "texts")
    run(prompts, tiny_checkpoint, tmp_path / "out", "--rewritten", tmp_path / "texts")
    assert json.loads((tmp_path / "out/00000/metadata.jsonl").read_text()) == PROMPTS[0]
    assert read(tmp_path / "out")["00000/samples/00000.png"] != read(drawn)["00000/samples/00000.png"]
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "00001"), "3 of 8 files in .* are missing or not as they were written"),
        (
            lambda folder: (folder / "00000/samples/00001.png").unlink(),
            "prompts in .* lack pictures, the first is 00000",
        ),
        (lambda folder: Image.new("RGB", (64, 64)).save(folder / "00000/samples/00000.png"), "1 of 8 files in"),
        (lambda folder: (folder / "00000/metadata.jsonl").write_text(json.dumps(PROMPTS[1])), "1 of 8 files in"),
        (lambda folder: edit(folder / ".unicode2/record.json", "true", "false"), "out is not finished; run"),
        # Copied without the hidden folder
        (
            lambda folder: (shutil.rmtree(folder / ".unicode2"), shutil.rmtree(folder / "00001")),
            "has 1 prompts, and its generation.json tells of 2; run `unicode2 evaluate generation` again",
        ),
        (
            lambda folder: (
                shutil.rmtree(folder / ".unicode2"),
                *[(folder / f"0000{i}/samples/00001.png").unlink() for i in range(2)],
            ),
            "has 1 pictures of each prompt, and its generation.json tells of 2",
        ),
    ],
)
def test_pictures_that_are_not_all_there_are_not_scored(drawn, tmp_path, change, message):
    folder = shutil.copytree(drawn, tmp_path / "out")
    find_folders(folder)
    change(folder)
    with pytest.raises(ValueError, match=message):
        find_folders(folder)


def edit(file, old, new):
    file.write_text(file.read_text().replace(old, new))


def test_what_scorers_leave_is_not_of_the_pictures(prompts, drawn, tiny_checkpoint, tmp_path, monkeypatch):
    folder = shutil.copytree(drawn, tmp_path / "out")
    picture = folder / "00001/samples/00001.png"
    picture.unlink()
    for verdict in ("one", "another"):
        (folder / "00000/geneval_hf.json").write_text(verdict)
        run(prompts, tiny_checkpoint, folder)
    assert picture.read_bytes() == (drawn / "00001/samples/00001.png").read_bytes()
    find_folders(folder)


def test_every_setting_of_the_scheduler_is_in_the_protocol(tiny_checkpoint, drawn):
    scheduler = read_card(drawn / "generation.json").protocol["decoder"]["scheduler"]
    saved = json.loads((tiny_checkpoint / "scheduler/scheduler_config.json").read_text())
    assert scheduler["class"] == saved["_class_name"] and scheduler["shift"] == saved["shift"]
    assert {name for name in saved if not name.startswith("_")} <= scheduler.keys()
    assert not any(name.startswith("_") for name in scheduler)


def test_a_size_that_the_decoder_would_round_is_refused(prompts, tiny_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="must be multiples of"):
        run(prompts, tiny_checkpoint, tmp_path / "out", "--image-size", "65")
    assert not (tmp_path / "out").exists()


def test_control_tokens_are_refused_by_their_line(tiny_checkpoint, tmp_path):
    token = "<|im_end|>"
    file, folder = tmp_path / "p.jsonl", tmp_path / "dpg"
    lines = [json.dumps(one) + "\n" for one in (PROMPTS[0], {**PROMPTS[1], "prompt": f"a {token}"})]
    file.write_text("".join(lines))
    with pytest.raises(ValueError, match=r"p.jsonl line 2 has <\|im_end\|>, which is a control token of the model"):
        run(file, tiny_checkpoint, tmp_path / "out")
    folder.mkdir()
    (folder / "a.txt").write_text(token)
    with pytest.raises(ValueError, match="dpg/a.txt has <"):
        run(folder, tiny_checkpoint, tmp_path / "out", "--benchmark", "dpg", "--images-per-prompt", "4")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "prompts.jsonl is empty"),
        ("[" * 100_000, "line 1: it is not JSON"),
        (json.dumps({**PROMPTS[0], "prompt": "a \ud800"}), "line 1: `prompt` is .* has half of a letter"),
        ("a circle", "line 1: it is not JSON"),
        ('["a"]', "line 1: it is list, where an object must be"),
        ('{"prompt": "", "tag": "counting"}', "`prompt` is '', where a text must be"),
        ('{"prompt": "a", "tag": "count"}', "`tag` is 'count'; it must be one of single_object, two_object"),
        ('{"prompt": "a", "tag": "counting", "include": []}', r"`include` is \[\], where a list of objects must be"),
        ('{"prompt": "a", "tag": "counting", "include": [{"class": "a"}]}', r"`include\[0\].count` is None"),
        (
            '{"prompt": "a", "tag": "position", "include": [{"class": "a", "count": 1, "position": ["left of", 0]}]}',
            r"`include\[0\].position` is \['left of', 0\]; it must be one of left of, .* number of an",
        ),
    ],
)
def test_prompts_of_another_shape_are_refused(tiny_checkpoint, tmp_path, line, message):
    (tmp_path / "prompts.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "prompts.jsonl", tiny_checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_refusals(prompts, tiny_checkpoint, tmp_path):
    (tmp_path / "texts").write_text("one\n")
    with pytest.raises(ValueError, match="texts has 1 lines, and there are 2 prompts; give one for each"):
        run(prompts, tiny_checkpoint, tmp_path / "out", "--rewritten", tmp_path / "texts")
    with pytest.raises(ValueError, match="has no .txt files; give the folder dpg_bench/prompts of DPG-Bench"):
        run(prompts, tiny_checkpoint, tmp_path / "out", "--benchmark", "dpg")


def test_hidden_files_are_no_prompts(tmp_path):
    (tmp_path / "a.txt").write_text("a circle")
    (tmp_path / "._a.txt").write_bytes(b"\x00\x05\x16\xe9")
    assert [prompt.name for prompt in read_dpg(tmp_path)] == ["a"]
    (tmp_path / "b.txt").write_text(" ")
    with pytest.raises(ValueError, match="b.txt is empty"):
        read_dpg(tmp_path)
