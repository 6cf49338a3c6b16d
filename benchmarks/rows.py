"""Rows of a slow table. Each is kept in a JSON file once it is measured, so that a killed benchmark resumes."""

import ctypes
import hashlib
import json
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

LIBC = ctypes.CDLL(None)
# Of `prctl`: the signal that a process gets when the one that started it dies
PR_SET_PDEATHSIG = 1


class Rows:
    """Finished rows of one setting, by name. Another setting or another commit measures them again."""

    def __init__(self, path: str, setting: dict):
        self.path = Path(path)
        self.setting = json.loads(json.dumps(setting | {"commit": find_commit()}))
        kept = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.rows = kept["rows"] if kept.get("setting") == self.setting else {}

    def measure(self, name: str, function: Callable[[], dict]) -> dict:
        if name in self.rows:
            print(f"{name}: kept from {self.path}", file=sys.stderr)
            return self.rows[name]
        print(f"{name}: running", file=sys.stderr, flush=True)
        self.rows[name] = json.loads(json.dumps(function()))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"setting": self.setting, "rows": self.rows}, indent=2))
        temporary.rename(self.path)
        return self.rows[name]


def find_commit() -> str:
    """The commit, followed by a hash of uncommitted changes if there are any."""
    # Of the repository that this file is in, wherever the script was started
    options = {"capture_output": True, "cwd": Path(__file__).parent}
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], text=True, **options).stdout.strip()
    changes = subprocess.run(["git", "diff", "HEAD"], **options).stdout
    return f"{commit}-{hashlib.sha256(changes).hexdigest()[:8]}" if changes else commit


def name_processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def describe_run(threads: int, *packages: str) -> str:
    """Date, hardware, commit, versions and command for the head of a table. Paths are cut to their last part."""
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", *packages))
    options = [Path(option).name if "/" in option else option for option in sys.argv[1:]]
    command = " ".join(["python", "benchmarks/" + Path(sys.argv[0]).name, *options])
    return f"{date.today()}, {name_processor()}, {threads} threads, commit {find_commit()}, {versions},\n`{command}`"


def start_child(words: list, **options) -> subprocess.Popen:
    """Starts Python as a process that is killed when this one dies, so that nothing runs on behind a kill."""
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(command, preexec_fn=lambda: LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL), **options)


def read_peak(process: int | str = "self") -> float:
    """GiB that a process had resident at most, 0 once it has ended.

    `ru_maxrss` would count the peak of the process that started it, too.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM:")), 0.0)


def watch_peak(process: subprocess.Popen) -> float:
    """Waits for a process; returns its `read_peak`, but for what its last twentieth of a second added."""
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, read_peak(process.pid))
        time.sleep(0.05)
    return peak
