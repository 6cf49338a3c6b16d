"""The benchmark of the paper's codebook size, at a hundredth of the size, with small parts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from browser import find_chromium
from encoders import save_encoder
from language_models import make_language_model, make_tokenizer
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "half_a_million.py"
sys.path.append(str(SCRIPT.parent))

import half_a_million_codebook as codebook_steps  # noqa: E402
import rows as benchmark_rows  # noqa: E402

# 256 patches each: enough for 5,000 codes when every 20th picture is held out, and 16 of these.
NUM_PICTURES = 320


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    make_language_model("qwen2").save_pretrained(folder / "llm")
    make_tokenizer("chatml", "bytes").save_pretrained(folder / "llm")
    save_encoder(folder / "encoder", "siglip2")
    (folder / "pictures").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_PICTURES, 32, 32, 3), np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).resize((256, 256)).save(folder / "pictures" / f"{number}_red-cat.png")
    return folder


def test_peak_of_a_child_is_without_that_of_its_parent():
    """This process has torch in its memory; a child that starts from it has had nothing of that."""
    child = benchmark_rows.start_child(["-c", "import time; x = b'x' * 2**26; time.sleep(0.3)"])
    assert 2**-4 < benchmark_rows.watch_peak(child) < 0.12 and child.returncode == 0
    assert benchmark_rows.read_peak() > 0.2 and benchmark_rows.read_peak(child.pid) == 0


def test_children_die_with_the_process_that_started_them():
    code = "import rows, time; print(rows.start_child(['-c', 'input()']).pid, flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=SCRIPT.parent)
    child = int(parent.stdout.readline())
    os.kill(child, 0)
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not benchmark_rows.read_peak(child):
            break
        time.sleep(0.02)
    assert not benchmark_rows.read_peak(child)


def test_a_build_is_told_from_its_log_after_a_kill_of_all_processes(tmp_path, monkeypatch):
    """In turn: a kill that was wanted, one of all processes, a run to the end, and one that finds nothing to do."""
    log, clock = tmp_path / "build.log", iter([0, 10, 15, 20, 25, 29, 100, 130, 140, 150, 200])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    lines = [("extract", "begin", 1.0), ("extract", "end", 2.0), ("sort", "begin", 2.0), ("", "killed", 3.0, 7.0)]
    lines += [("sort", "begin", 1.0), ("", "watched", 2.5, 9.0)]
    lines += [("sort", "begin", 1.0), ("sort", "end", 2.0), ("save", "begin", 1.0), ("save", "end", 1.0)]
    for line in [*lines, ("", "watched", 0.5, 4.0)]:
        codebook_steps.note(log, *line)
    expected = dict.fromkeys(codebook_steps.PHASES, 0) | {"extract": 10, "sort": 5 + 4 + 30, "save": 10}
    assert codebook_steps.sum_phases(log) == expected and codebook_steps.count_kills(log) == 1


@pytest.mark.skipif(not (SCRIPT.parents[1] / ".git").exists(), reason="no repository")
def test_commit_is_that_of_the_scripts_wherever_they_are_started(tmp_path, monkeypatch):
    commit = benchmark_rows.find_commit()
    monkeypatch.chdir(tmp_path)
    assert commit and benchmark_rows.find_commit() == commit


def kill_behind_first_kill(command: list[str], log: Path) -> None:
    """Kills the benchmark once it has killed its first build, and has gone on with it."""
    process = subprocess.Popen([*command, "--steps", "limits", "build-synthetic"], stderr=subprocess.DEVNULL)
    while not (log.exists() and '"killed"' in (text := log.read_text()) and "watched" in text.splitlines()[-1]):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_all_steps_run_at_a_hundredth_of_the_size(parts):
    find_chromium()
    places = {"--images": "pictures", "--encoder": "encoder", "--llm": "llm", "--output": "output"}
    words = [word for option, name in places.items() for word in (option, str(parts / name))]
    command = [sys.executable, str(SCRIPT), *words, "--divide", "100", "--threads", "2"]
    kill_behind_first_kill(command, parts / "output" / "synthetic.log")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    steps = {file.stem: json.loads(file.read_text()) for file in (parts / "output" / "steps").glob("*.json")}
    rows = {row["what"]: row for step in steps.values() for row in step["rows"]}
    assert len(done.stdout.splitlines()) == 5 + len(rows)
    for name in ("build (a), 0.1M x 1152", "build (b), 0.0778M x 16, from images"):
        assert rows[f"{name}: all phases, 2 kills"]["found"] == "5,000 distinct, finite codes"
    assert "resumed" in " ".join(rows) and "bare language model" in " ".join(rows)
