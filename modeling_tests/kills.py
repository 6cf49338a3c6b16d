"""Runs a command repeatedly, kills it while it writes, and reports whether it resumed to the same bytes.

    python modeling_tests/kills.py COMMAND NUM_KILLS FOLDER WORDS...

One process does the slow imports and forks a child for each run. It watches the output: each entry that appears,
changes size or disappears is an event. A child is killed at an event drawn beforehand. `{}` in the words stands for the
output. Prints JSON.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

import datasets  # noqa: F401
import diffusers  # noqa: F401
import trl  # noqa: F401
from transformers import TrainingArguments

from transformers_unicode2 import UniCode2FluxPipeline, cli  # noqa: F401
from transformers_unicode2.training import mapper, sft
from transformers_unicode2.training.stage import run


def work(command: str, words: list[str], log: Path) -> None:
    """One run, in its own child process. Never returns."""
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [command, *words]
    code = 0
    try:
        if command == "sft":
            run(sft.main, sft.StageArguments, sft.SFTConfig)
        elif command == "mapper":
            run(mapper.main, mapper.MapperArguments, TrainingArguments)
        else:
            sys.argv = ["unicode2", *command.split(), *words]
            cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def look(folder: Path) -> dict[str, int]:
    """Sizes of all files of an output, and -1 for its folders."""
    state, left = {}, [str(folder)]
    while left:
        try:
            with os.scandir(left.pop()) as entries:
                for entry in entries:
                    is_folder = entry.is_dir(follow_symlinks=False)
                    state[entry.path] = -1 if is_folder else entry.stat().st_size
                    left += [entry.path] if is_folder else []
        except FileNotFoundError:
            pass
    return state


def follow(pid: int, folder: Path, kill_at: int) -> tuple[int, int | None]:
    """Counts the events in an output until its run ends, or kills the run at event `kill_at`.

    Returns the count and the exit status, `None` for a killed run.
    """
    events, before = 0, look(folder)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return events, os.waitstatus_to_exitcode(status)
        now = look(folder)
        events += len(now.items() ^ before.items())
        before = now
        if events >= kill_at:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return events, None


def start(command: str, words: list[str], output: Path, kill_at: int = sys.maxsize) -> tuple[int, int | None]:
    pid = os.fork()
    if pid == 0:
        work(command, [word.replace("{}", str(output)) for word in words], output.with_suffix(".log"))
    return follow(pid, output, kill_at)


def read(output: Path) -> dict[str, bytes]:
    """The result in an output, without the files of a single run and without copied code; of score cards, what does not
    depend on the moment.
    """
    files = [path for path in output.rglob("*") if path.is_file() and path.suffix != ".py"]
    names = {path: path.relative_to(output) for path in files}
    return {
        str(name): read_file(path)
        for path, name in names.items()
        if not any(part.startswith((".unicode2", "checkpoint-")) for part in name.parts)
    }


def read_file(path: Path) -> bytes:
    card = path.with_suffix(".json")
    if path.suffix in (".json", ".md") and card.is_file() and b'"protocol_hash"' in card.read_bytes():
        return json.dumps({**json.loads(card.read_text()), "run": None}).encode()
    return path.read_bytes()


def main(command: str, num_kills: int, folder: Path, words: list[str]) -> dict:
    random.seed(command)
    # Cards name their folders, so all outputs have one name
    whole = folder / "whole" / "output"
    whole.parent.mkdir()
    events, status = start(command, words, whole)
    report = {"events": events, "kills": 0, "wrong": [], "status": status}
    wanted, chain = read(whole), 0
    while report["kills"] < num_kills and chain < 2 * num_kills:
        output, chain = folder / f"killed-{chain}" / "output", chain + 1
        output.parent.mkdir()
        at = [random.randrange(1, events) for _ in range(min(2, num_kills - report["kills"]))]
        report["kills"] += sum(start(command, words, output, kill_at)[1] is None for kill_at in at)
        status = start(command, words, output)[1]
        if status or read(output) != wanted:
            report["wrong"].append([at, status, output.with_suffix(".log").read_text()[-1000:]])
    return report


if __name__ == "__main__":
    print("\n" + json.dumps(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])))
