"""The benchmark of the paper's codebook size, at a hundredth of the size, with small parts."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from browser import find_chromium
from encoders import save_encoder
from language_models import make_language_model, make_tokenizer
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "half_a_million.py"
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


@pytest.mark.slow
def test_all_steps_run_at_a_hundredth_of_the_size(parts):
    find_chromium()
    places = {"--images": "pictures", "--encoder": "encoder", "--llm": "llm", "--output": "output"}
    words = [word for option, name in places.items() for word in (option, str(parts / name))]
    command = [sys.executable, str(SCRIPT), *words, "--divide", "100", "--threads", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    steps = {file.stem: json.loads(file.read_text()) for file in (parts / "output" / "steps").glob("*.json")}
    rows = {row["what"]: row for step in steps.values() for row in step["rows"]}
    assert len(done.stdout.splitlines()) == 5 + len(rows)
    for name in ("build (a), 0.1M x 1152", "build (b), 0.0778M x 16, from images"):
        assert rows[f"{name}: all phases, 2 kills"]["found"] == "5,000 distinct, finite codes"
    assert "resumed" in " ".join(rows) and "bare language model" in " ".join(rows)
