import json
import os
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from builds import break_off, build, refusal, words
from PIL import Image

from transformers_unicode2.codebook.build import make_parser
from transformers_unicode2.codebook.storage import load_codebook


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_build_makes_distinct_finite_bfloat16_codes_and_leaves_nothing_else(place, reference, backend):
    codebook = load_codebook(place / backend)
    codes = codebook.codes.numpy()
    assert codes.shape == (96, 16) and np.isfinite(codes).all() and len(np.unique(codes, axis=0)) == 96
    assert np.array_equal(codes, codebook.codes.bfloat16().float().numpy())
    assert codebook.previews.shape == (96, 8, 8, 3) and codebook.cell_offsets[-1] == 96
    provenance = json.loads((place / backend / "codebook.json").read_text())["provenance"]
    names = ["README.md", "codebook.json", "codebook.safetensors"]
    assert sorted(file.name for file in (place / backend).iterdir()) == names
    card = (place / backend / "README.md").read_text()
    assert "**The encoder in float32 defines the ids**" in card and "--codebook-size 96 --num-cells 5" in card
    assert str(place) not in card
    options = next(line for line in card.splitlines() if line.startswith("    unicode2 codebook build ")).split()[3:]
    again = vars(make_parser().parse_args(["--images", "-", "--encoder", "-", "--output", "-", *options]))
    assert all(
        again[name] == value
        for name, value in provenance["command"].items()
        if name in again and name not in ("images", "encoder")
    )
    assert provenance["statistics"]["num_features"] == 40 * 16
    before, after = provenance["polish_distortions"]
    assert after < before


def launch(place, output, num_processes: int, *more) -> list[str]:
    """The build as a command, started by `torchrun` if it has several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    launcher += ["--nproc_per_node", str(num_processes)]
    module = ["-m", "transformers_unicode2.codebook.build", *words(place, output, *more)]
    return [sys.executable, *(launcher if num_processes > 1 else []), *module]


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_two_processes_build_the_same_bytes(place, reference, tmp_path, backend):
    said = subprocess.run(
        launch(place, tmp_path, 2, "--backend", backend), check=True, capture_output=True, text=True, timeout=300
    ).stdout
    assert "5 cells, 2 processes" in said
    assert (tmp_path / "codebook.safetensors").read_bytes() == reference[backend]
    # A refusal ends both processes.
    if backend == "faiss":
        refused = subprocess.run(launch(place, tmp_path, 2, "--seed", "7"), capture_output=True, text=True, timeout=120)
        assert refused.returncode and refused.stderr.count("seed was 0 and is 7") == 1


def kill_tree(pid: int) -> None:
    """Sends SIGKILL to a launcher and its workers, which have their own process groups."""
    launcher = psutil.Process(pid)
    launcher.suspend()
    workers = launcher.children(recursive=True)
    for process in (launcher, *workers):
        process.kill()
    psutil.wait_procs(workers)


def kill_and_resume(place, folder, delay: float, num_processes: int) -> bool:
    """Starts a build, kills all its processes `delay` seconds after its first file, and resumes it.

    Returns whether the kill came before the end.
    """
    command = launch(place, folder, num_processes)
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while job.poll() is None and not (folder / "work" / "run.json").exists():
        time.sleep(0.01)
    time.sleep(delay)
    running = job.poll() is None
    if running:
        kill_tree(job.pid)
    job.wait()
    resumed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, f"killed after {delay:.3f} s: {resumed.stdout}{resumed.stderr[-6000:]}"
    return running


@pytest.mark.parametrize("count", [17, 41, 60, 82, 89, 92, 93, 97])
def test_build_that_was_broken_off_at_a_write_resumes_to_the_same_bytes(place, reference, tmp_path, monkeypatch, count):
    break_off(place, tmp_path, monkeypatch, count)
    assert not (tmp_path / "codebook.json").exists()
    build(monkeypatch, *words(place, tmp_path))
    assert (tmp_path / "codebook.safetensors").read_bytes() == reference["faiss"]
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_twenty_kills_at_random_times_resume_to_the_same_bytes(place, reference, tmp_path):
    rng = np.random.default_rng(int(os.environ.get("UNICODE2_KILL_SEED", 0)))
    # Latest kill in seconds, by number of processes; shortened after a build that ended before its kill.
    latest = {1: 2.5, 2: 2.5}
    stopped = 0
    for trial in range(20):
        num_processes = 1 + trial % 2
        running = kill_and_resume(place, tmp_path / str(trial), rng.uniform(0, latest[num_processes]), num_processes)
        latest[num_processes] *= 1 if running else 0.7
        stopped += running
        assert (tmp_path / str(trial) / "codebook.safetensors").read_bytes() == reference["faiss"], trial
    assert stopped >= 12, latest


def test_a_full_disk_stops_the_build_in_one_sentence_and_it_resumes(place, reference, tmp_path):
    command = [sys.executable, "-m", "transformers_unicode2.codebook.build", *words(place, tmp_path)]
    limited = (
        "import resource, sys, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (1400, 1400)); "
        f"sys.argv = {command[2:]!r}; "
        "runpy.run_module('transformers_unicode2.codebook.build', run_name='__main__')"
    )
    stopped = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, timeout=300)
    assert stopped.returncode == 2 and "Traceback" not in stopped.stderr
    assert "could not be written" in stopped.stderr and "run the same command again" in stopped.stderr
    assert not list(tmp_path.rglob("*.tmp"))
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert (tmp_path / "codebook.safetensors").read_bytes() == reference["faiss"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--codebook-size", "4", "--num-cells", "5"], "--num-cells is 5, more than the 4 codes"),
        (["--codebook-size", "0"], "--codebook-size: 0 is not allowed; it must be at least 1"),
        (["--polish", "-1"], "--polish: -1 is not allowed; it must be at least 0"),
        (["--preview-size", "-1"], "--preview-size: -1 is not allowed"),
        (["--patches-per-image", "0"], "--patches-per-image: 0 is not allowed"),
        (["--num-images", "-5"], "--num-images: -5 is not allowed"),
        (["--max-unreadable", "1.5"], "--max-unreadable: 1.5 is not allowed; it must be from 0 to 1"),
        (
            ["--max-memory-gib", "0.1"],
            "--max-memory-gib is 0.1; 96 codes of width 16 and this encoder need at least 0.75",
        ),
        # Two codebooks with their thumbnails, and the sums of 76 of these, twice
        (["--max-memory-gib", "2", "--preview-size", "1000"], "this encoder need at least 2.99"),
    ],
)
def test_options_that_make_no_codebook_are_refused(place, tmp_path, monkeypatch, capsys, options, message):
    assert message in refusal(monkeypatch, capsys, *words(place, tmp_path, *options))
    assert not (tmp_path / "codebook.json").exists()


def test_shards_that_the_memory_cannot_hold_are_refused(place, tmp_path, monkeypatch, capsys):
    options = ["--images-per-shard", "40", "--preview-size", "800"]
    message = refusal(monkeypatch, capsys, *words(place, tmp_path, *options, "--max-memory-gib", "6"))
    assert (
        "--images-per-shard is 40; a shard of 1.14 GiB needs --max-memory-gib of at least 9.2, and it is 6" in message
    )


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_cells_without_features_are_no_obstacle(place, tmp_path, monkeypatch, backend):
    (tmp_path / "images").mkdir()
    for i, color in enumerate(("red", "navy")):
        Image.new("RGB", (32, 32), color).save(tmp_path / "images" / f"{i}.png")
    arguments = ["--images", str(tmp_path / "images"), "--encoder", str(place / "encoder"), "--backend", backend]
    build(monkeypatch, *arguments, "--codebook-size", "30", "--num-cells", "28", "--output", str(tmp_path / "o"))
    codes = load_codebook(tmp_path / "o").codes
    assert len(codes.unique(dim=0)) == 30
