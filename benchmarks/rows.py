"""Rows of a slow table. Each is kept in a JSON file once it is measured, so that a killed benchmark resumes."""

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path


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
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    changes = subprocess.run(["git", "diff", "HEAD"], capture_output=True).stdout
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
