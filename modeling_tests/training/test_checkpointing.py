"""A stage resumes from its newest whole checkpoint, and from none of another stage."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import execute
from kills import read


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def fill(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = {
    "empty folder": lambda last: [shutil.rmtree(last), last.mkdir()],
    "no trainer_state.json": lambda last: (last / "trainer_state.json").unlink(),
    "half an optimizer": lambda last: cut(last / "optimizer.pt"),
    "empty weights": lambda last: os.truncate(last / "model.safetensors", 0),
    "an optimizer of zeros": lambda last: fill(last / "optimizer.pt"),
    "random states of zeros": lambda last: fill(last / "rng_state.pth"),
    "a trainer_state.json of zeros": lambda last: fill(last / "trainer_state.json"),
}


FREQUENT = ("no trainer_state.json", "half an optimizer", "an optimizer of zeros")


@pytest.mark.parametrize(
    "damage", [name if name in FREQUENT else pytest.param(name, marks=pytest.mark.slow) for name in DAMAGES]
)
def test_a_stage_goes_on_from_its_newest_whole_checkpoint(damage, stage_runs, tmp_path, capsys):
    words, whole = stage_runs
    output = tmp_path / "output"
    for name in ("checkpoint-1", "checkpoint-2", "checkpoint-3"):
        shutil.copytree(whole / name, output / name)
    DAMAGES[damage](output / "checkpoint-3")
    DAMAGES["no trainer_state.json"](output / "checkpoint-2")
    kept = (output / "checkpoint-1" / "model.safetensors").stat().st_mtime_ns
    assert execute("sft", words, output) == (0, "")
    assert "checkpoint-3 is not whole; it is removed, and the stage resumes from" in capsys.readouterr().out
    assert read(output) == read(whole)
    assert (output / "checkpoint-1" / "model.safetensors").stat().st_mtime_ns == kept


def test_a_checkpoint_that_tells_nothing_is_left_alone(stage_runs, tmp_path):
    words, whole = stage_runs
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.copytree(whole / name, tmp_path / "output" / name)
    shutil.rmtree(tmp_path / "output" / "checkpoint-2" / ".unicode2")
    code, said = execute("sft", words, tmp_path / "output")
    assert code == 2 and "checkpoint-2 was not written by this stage; move it out of" in said
    assert (tmp_path / "output" / "checkpoint-2" / "model.safetensors").is_file()


def test_a_checkpoint_of_another_stage_is_refused(stage_runs, tmp_path):
    words, whole = stage_runs
    assert execute("sft", words, tmp_path / "other", "--seed", "7", "--max_steps", "2") == (0, "")
    shutil.copytree(whole / "checkpoint-3", tmp_path / "other" / "checkpoint-3")
    code, said = execute("sft", words, tmp_path / "other", "--seed", "7")
    assert code == 2 and "checkpoint-3 was begun with something else (seed was 0 and is 7)" in said
    shutil.copytree(whole / "checkpoint-3", tmp_path / "new" / "checkpoint-3")
    code, said = execute("sft", words, tmp_path / "new", "--seed", "7", "--learning_rate", "0.1")
    assert code == 2 and "(learning_rate was 0.001 and is 0.1; seed was 0 and is 7)" in said


def test_a_longer_stage_goes_on_and_a_shorter_one_is_refused(stage_runs, tmp_path):
    words, whole = stage_runs
    shutil.copytree(whole, tmp_path / "output")
    code, said = execute("sft", words, tmp_path / "output", "--max_steps", "2")
    assert code == 2 and "checkpoint-3 is at step 3 and `max_steps` is 2" in said
    longer = ("--max_steps", "4")
    assert execute("sft", words, tmp_path / "output", *longer) == (0, "")
    history = json.loads((tmp_path / "output" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    # One step of warm-up, then the third of three along a cosine.
    last = 0.001 * 0.5 * (1 + np.cos(np.pi * 2 / 3))
    assert history[-1]["step"] == 4 and history[-1]["learning_rate"] == pytest.approx(last)
    weights = [folder / "model.safetensors" for folder in (whole, tmp_path / "output")]
    assert weights[0].read_bytes() != weights[1].read_bytes()
    code, said = execute("sft", words, tmp_path / "output", *longer, "--per_device_train_batch_size", "4")
    assert code == 2 and "per_device_train_batch_size was 2 and is 4" in said
    spread = ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2")
    # The same sequences in each step.
    assert execute("sft", words, tmp_path / "output", *longer, *spread) == (0, "")


def test_a_stage_that_was_killed_after_its_last_step_takes_no_further_one(stage_runs, tmp_path):
    words, whole = stage_runs
    shutil.copytree(whole / "checkpoint-3", tmp_path / "output" / "checkpoint-3")
    shutil.copytree(whole / "checkpoint-2", tmp_path / "output" / ".unicode2" / "checkpoints" / "checkpoint-4")
    assert execute("sft", words, tmp_path / "output") == (0, "")
    assert not list((tmp_path / "output" / ".unicode2").glob("*/")) and read(tmp_path / "output") == read(whole)
    assert not (tmp_path / "output" / "checkpoint-4").exists()


@pytest.mark.slow
def test_checkpoints_without_an_optimizer_are_no_start(stage_runs, tmp_path, capsys):
    words, whole = stage_runs
    output = tmp_path / "output"
    assert execute("sft", words, output, "--save_only_model", "true", "--max_steps", "2") == (0, "")
    assert execute("sft", words, output) == (0, "")
    assert "has no optimizer (`save_only_model`)" in capsys.readouterr().out
    assert read(output) == read(whole)
