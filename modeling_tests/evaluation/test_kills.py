"""Commands that draw are killed at random moments, and go on to the same pictures and the same card."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

QUICK = "--steps 1 --image-size 32"


def write_inputs(folder: Path) -> dict[str, str]:
    """Prompts and pictures; the words of each command."""
    metadata = [
        {"prompt": f"a {color} circle", "tag": "single_object", "include": [{"class": "circle", "count": 1}]}
        for color in ("red", "blue", "green")
    ]
    (folder / "geneval.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in metadata))
    (folder / "dpg").mkdir()
    (folder / "dpg/one.txt").write_text("a red circle")
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).save(folder / f"photos/{number}.png")
    written = f"{QUICK} --num-candidates 1 --max-plan-tokens 0 --prior-guidance 1 --output {{}}"
    return {
        "geneval": f"--benchmark geneval --prompts {folder}/geneval.jsonl --images-per-prompt 2 {written}",
        "dpg": f"--benchmark dpg --prompts {folder}/dpg {written}",
        "reconstruction": f"--images {folder}/photos {QUICK} --output {{}}",
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["geneval", "dpg", "reconstruction"])
def test_ten_kills_go_on_to_the_same_pictures(name, tiny_checkpoint, tmp_path):
    words = f"--model {tiny_checkpoint} {write_inputs(tmp_path)[name]}".split()
    command = "evaluate reconstruction" if name == "reconstruction" else "evaluate generation"
    script, environment = Path(__file__).parents[1] / "kills.py", {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, command, "10", tmp_path, *words], capture_output=True, text=True, env=environment
    )
    assert not done.returncode, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["status"] == 0 and report["wrong"] == [] and report["kills"] == 10, report
