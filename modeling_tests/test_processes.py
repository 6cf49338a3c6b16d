"""Processes end with what started them, and say which peers they miss."""

import os
import subprocess
import sys
import time

import psutil
import pytest
from commands import RECIPES

LAUNCHERS = {
    "torchrun, build": (
        "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc_per_node 2",
        "codebook.build",
    ),
    "torchrun, sft": (
        "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc_per_node 2",
        "training.sft",
    ),
    "accelerate, sft": (f"-m accelerate.commands.launch --config_file {RECIPES}/accelerate/cpu.yaml", "training.sft"),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("seconds", [0.3, 8])
def test_workers_end_with_a_launcher_that_is_killed(launcher, seconds, inputs, tmp_path):
    """While they import, and while they work."""
    folder, commands = inputs
    start, module = LAUNCHERS[launcher]
    words = commands["sft" if "sft" in module else "codebook build"].replace("{}", str(tmp_path / "output"))
    more = ["--max_steps", "100000"] if "sft" in module else ["--polish", "20000"]
    job = subprocess.Popen(
        [sys.executable, *start.split(), "-m", f"transformers_unicode2.{module}", *words.split(), *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    num_workers = 1 if "accelerate" in launcher else 2
    while len(psutil.Process(job.pid).children(recursive=True)) < num_workers:
        assert job.poll() is None
        time.sleep(0.05)
    with pytest.raises(subprocess.TimeoutExpired):
        job.wait(seconds)
    workers = psutil.Process(job.pid).children(recursive=True)
    try:
        job.kill()
        job.wait()
        assert workers and psutil.wait_procs(workers, timeout=60)[1] == []
    finally:
        for worker in workers:
            if worker.is_running():
                worker.kill()


@pytest.mark.slow
def test_a_run_lives_on_when_the_shell_that_started_it_ends(inputs, tmp_path):
    words = inputs[1]["sft"].replace("{}", str(tmp_path / "output"))
    command = f"{sys.executable} -m transformers_unicode2.training.sft {words}"
    # A shell may have this variable.
    environment = {**os.environ, "ACCELERATE_MIXED_PRECISION": "no"}
    subprocess.run(["bash", "-c", f"nohup {command} > {tmp_path}/log 2>&1 & echo $! > {tmp_path}/pid"], env=environment)
    pid = int((tmp_path / "pid").read_text())
    psutil.wait_procs([psutil.Process(pid)], timeout=120)
    assert (tmp_path / "output" / "model.safetensors").is_file(), (tmp_path / "log").read_text()[-2000:]


@pytest.mark.slow
def test_processes_that_miss_a_peer_end_in_a_sentence(monkeypatch):
    from datetime import timedelta

    script = (
        "import transformers_unicode2.processes as p; from datetime import timedelta\n"
        "from transformers_unicode2.cli import sentences\n"
        "p.RENDEZVOUS = timedelta(seconds=3)\nwith sentences('x'): p.join(cpu=True)"
    )
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29671"}
    said = subprocess.run([sys.executable, "-c", script], env={**os.environ, **alone}, capture_output=True, text=True)
    assert said.returncode == 2 and "did not find each other (" in said.stderr.splitlines()[-1]
    from transformers_unicode2 import processes

    assert processes.RENDEZVOUS < timedelta(minutes=30) < processes.PATIENCE
