"""Outputs are made from one set of inputs, by one run at a time, whenever that is killed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import COMMANDS, SLOW, execute, train_on
from kills import read

from transformers_unicode2.files import NotWrittenError, whole_folder
from transformers_unicode2.record import Record, compare, held


@pytest.mark.parametrize("command", [*COMMANDS[:5], *SLOW])
def test_a_finished_output_is_left_alone_and_another_making_is_refused(command, inputs, wanted, capsys):
    bytes_, _, folder = wanted(command)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert execute(command, inputs[1][command], folder) == (0, "")
    assert "is finished; nothing to do" in capsys.readouterr().out
    changes = {
        "scenes": ("--seed", "7", "seed was 0 and is 7"),
        "codebook build": ("--seed", "7", "seed was 0 and is 7"),
        "codebook grow": ("--seed", "7", "seed was 0 and is 7"),
        "init": ("--visual-head", "two_level", "visual_head was flat and is two_level"),
        "assemble": ("--num-candidates", "4", "num_candidates was 1 and is 4"),
        "sft": ("--learning_rate", "0.5", "learning_rate was 0.001 and is 0.5"),
        "mapper": ("--seed", "7", "seed was 42 and is 7"),
        "tokenize": ("--model", str(inputs[0] / "other_codes"), "quantizer was"),
    }
    *more, sentence = changes[command]
    code, said = execute(command, inputs[1][command], folder, *more)
    assert code == 2 and sentence in said and "Traceback" not in said, said
    assert read(folder) == bytes_ and times == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "codebook build"])
def test_a_second_run_and_a_folder_of_someone_else_are_refused(command, inputs, tmp_path):
    with held(tmp_path / "held"):
        code, said = execute(command, inputs[1][command], tmp_path / "held")
    assert code == 2 and "Another run is writing to" in said
    names = {"scenes": "train-00000.parquet", "tokenize": "train-00000.parquet", "codebook grow": "codebook.json"}
    file = tmp_path / "mine" / names.get(command, "config.json")
    file.parent.mkdir()
    file.write_text("mine")
    code, said = execute(command, inputs[1][command], file.parent)
    assert code == 2 and (f"holds {file.name}, and nothing tells" in said or "holds a codebook already" in said), said
    assert [path.name for path in file.parent.iterdir()] == [file.name] and file.read_text() == "mine"


def test_a_lock_is_let_go_of_by_a_killed_run_and_leaves_nothing(tmp_path):
    script = "from transformers_unicode2.record import held; "
    script += f"held = held({str(tmp_path / 'out')!r}); held.__enter__(); print(1); input()"
    run = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert run.stdout.readline()
    with pytest.raises(ValueError, match="Another run is writing to"), held(tmp_path / "out"):
        pass
    run.kill()
    run.wait()
    with held(tmp_path / "out"), pytest.raises(ValueError, match="Another run"), held(tmp_path / "out"):
        pass
    with held(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists() and not list((tmp_path / "out").iterdir())


def test_what_killed_writers_left_is_removed_wherever_the_output_has_files(tmp_path):
    record, left = Record(tmp_path, {}, ("[0-9]*",)), [".a.png.12.tmp", "00000/samples/.b.png.12.tmp", "00000/.c.7.tmp"]
    kept = ["00000/samples/b.png", "00000/.d.tmp", "mine/.e.png.12.tmp"]
    with pytest.raises(Killed), record.making():
        for name in (*left, *kept):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        raise Killed
    with record.making() as finished:
        assert not finished
    assert not [name for name in left if (tmp_path / name).exists()]
    assert all((tmp_path / name).exists() for name in kept)


class Killed(BaseException):
    pass


def test_a_folder_that_was_half_moved_is_moved_again(tmp_path, monkeypatch):
    """Whenever the move is interrupted, the file that a loader reads first is missing, and the same command resumes."""

    def make(output, broken_off_after=100):
        moves = []

        def rename(self, target):
            if len(moves) == broken_off_after:
                raise Killed
            moves.append(os.rename(self, target))

        with Record(output, {"a": 1}).making() as finished, monkeypatch.context() as patch:
            if not finished:
                with whole_folder(output) as new:
                    for name in ("config.json", "model.safetensors", "tokenizer.json"):
                        (new / name).write_text(name)
                    (new / "vae").mkdir()
                    (new / "vae" / "config.json").write_text("vae")
                    patch.setattr(Path, "rename", rename)

    make(tmp_path / "whole")
    for count in range(4):
        with pytest.raises(Killed):
            make(tmp_path / str(count), count)
        assert not (tmp_path / str(count) / "config.json").exists()
        if count:
            with pytest.raises(ValueError, match="a was 1 and is 2"), Record(tmp_path / str(count), {"a": 2}).making():
                pass
        make(tmp_path / str(count))
        assert read(tmp_path / str(count)) == read(tmp_path / "whole")


def test_nothing_stays_of_a_making_that_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), Record(tmp_path / "new", {}).making(), whole_folder(tmp_path / "new") as new:
        (new / "config.json").write_text("{}")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with pytest.raises(NotWrittenError, match="/proc/out cannot be made"), Record("/proc/out", {}).making():
        pass


def test_what_was_changed_or_lost_afterwards_is_noticed(tmp_path):
    def make():
        with Record(tmp_path, {}).making() as finished:
            if not finished:
                with whole_folder(tmp_path) as new:
                    (new / "a").write_text("a")
                    (new / "b").write_text("b")
        return finished

    assert [make(), make()] == [False, True]
    (tmp_path / "a").unlink()
    assert [make(), make()] == [False, True] and (tmp_path / "a").read_text() == "a"
    (tmp_path / "b").write_text("longer")
    with pytest.raises(ValueError, match=r"b is not as it was written \(1 bytes .* then, 6 bytes .* now\); delete it"):
        make()
    (tmp_path / ".unicode2" / "record.json").write_text("{")
    with pytest.raises(ValueError, match="record.json is damaged"):
        make()


def test_differences_are_named_with_what_was_and_is():
    before = {"tasks": {"caption": 1.0, "questions": 1.0}, "data": {"a": "0" * 64}, "seed": 0}
    now = {"tasks": {"caption": 0.5}, "data": {"a": "0" * 64, "b": "1" * 64}, "seed": None}
    assert compare(before, now, growing=("data",)) == [
        "tasks caption was 1.0 and is 0.5",
        "tasks questions was 1.0 and is nothing",
        "seed was 0 and is None",
    ]
    assert compare(before, now)[2] == f"data b was nothing and is {'1' * 12}, by the SHA-256 of its content"


def test_data_that_changed_are_refused(inputs, wanted, tmp_path):
    folder, commands = inputs
    data, output = tmp_path / "data", tmp_path / "tokens"
    data.mkdir()
    shutil.copy(folder / "scenes" / "train-00000.parquet", data)
    words = commands["tokenize"].replace(str(folder / "scenes"), str(data))
    assert execute("tokenize", words, output) == (0, "")
    # The place of the data does not matter.
    assert read(output) == wanted("tokenize")[0]
    assert execute("scenes", "--num-scenes 4 --seed 3 --output {}", tmp_path / "more") == (0, "")
    for name in ("train-00001.parquet", "train-00000.parquet"):
        shutil.copy(tmp_path / "more" / "train-00000.parquet", data / name)
        code, said = execute("tokenize", words, output)
        assert code == 2 and "was begun with something else (data 1 was " in said
        assert read(output) == wanted("tokenize")[0]
    # As after a copy of the visible files. Each of them records what made it.
    shutil.rmtree(output / ".unicode2")
    assert execute("sft", train_on(output, inputs, tmp_path / "sft.yaml"), tmp_path / "stage") == (0, "")
    recipe = (folder / "mapper.yaml").read_text().replace(str(folder / "tokenize"), str(output))
    (tmp_path / "mapper.yaml").write_text(recipe.replace(str(folder / "scenes"), str(data)))
    words = commands["mapper"].replace(str(folder / "mapper.yaml"), str(tmp_path / "mapper.yaml"))
    code, said = execute("mapper", words, tmp_path / "mapper")
    assert code == 2 and f"{output} was not made of what source 1 of `images` holds now" in said


def test_what_is_not_finished_is_no_input(inputs, tmp_path):
    """An unfinished data set or checkpoint is refused as an input."""
    folder, commands = inputs
    for name, command in (("scenes", "tokenize"), ("tokenize", "sft"), ("model", "sft"), ("codebook_build", "init")):
        copy = tmp_path / name
        shutil.copytree(folder / name, copy)
        part = "train" if name in ("scenes", "tokenize") else "record"
        record = {"made_of": {"command": "x y"}, "finished": False, "files": {}}
        (copy / ".unicode2").mkdir(exist_ok=True)
        (copy / ".unicode2" / f"{part}.json").write_text(json.dumps(record))
        words = commands[command].replace(str(folder / name), str(copy))
        words = train_on(copy, inputs, tmp_path / "sft.yaml") if name == "tokenize" else words
        code, said = execute(command, words, tmp_path / "output")
        assert code == 2 and "is not finished; run `x y` again" in said, said


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sft", "mapper", "assemble", "init", "tokenize"])
def test_twenty_kills_while_a_command_writes_all_go_on_to_the_same_bytes(command, inputs, wanted, tmp_path):
    wanted("tokenize")
    script, environment = Path(__file__).with_name("kills.py"), {**os.environ, "OMP_NUM_THREADS": "1"}
    words = inputs[1][command].replace("--max_steps 2", "--max_steps 3").split()
    job = [sys.executable, str(script), command, "20", str(tmp_path), *words]
    environment["HF_DATASETS_CACHE"] = str(tmp_path / "cache")
    said = subprocess.run(job, env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-3000:]
    report = json.loads(said.stdout.splitlines()[-1])
    assert report["status"] == 0 and report["wrong"] == [] and report["kills"] == 20, report
