"""The recipe of own parts: its pictures, and its commands in order."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from test_readme import make_parts

from transformers_unicode2.images_unicode2 import load_image

RECIPES = Path(__file__).parents[2] / "training_recipes"


@pytest.fixture
def source(tmp_path):
    """Nine captioned pictures, one of them a second "circle"; half of each is transparent."""
    folder = tmp_path / "source"
    folder.mkdir()
    names = ["circle", "square", "star", "heart", "moon", "sun", "tree", "circle", "a man"]
    for number, _ in enumerate(names):
        pixels = np.full((20, 30, 4), 20 * number, dtype=np.uint8)
        pixels[..., 3] = np.arange(30) // 15 * 255
        Image.fromarray(pixels).save(folder / f"{number}.png")
    rows = [f"{number}.png\t{name}" for number, name in enumerate(names)]
    (folder / "captions.tsv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def render(monkeypatch, source):
    monkeypatch.syspath_prepend(RECIPES / "unicode2-smol")
    import render

    def run(output, *words):
        render.main(render.make_parser().parse_args([str(source), str(output), *map(str, words)]))
        return {split: read_split(output / split) for split in ("train", "held", "unseen")}

    return run


def read_split(folder):
    """Captions and pixels of a split, in its order."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    return [(row["text"], load_image(folder / row["file_name"]).tobytes()) for row in rows]


WORDS = ("--skip", "^a man", "--num-held", 3, "--num-unseen", 2, "--image-size", 48)


def test_splits_hold_what_they_say(render, tmp_path):
    splits = render(tmp_path / "out", *WORDS)
    captions = {split: [caption for caption, _ in rows] for split, rows in splits.items()}
    assert [len(rows) for rows in captions.values()] == [10, 3, 2]
    assert set(captions["train"]) | set(captions["unseen"]) == {
        "circle",
        "square",
        "star",
        "heart",
        "moon",
        "sun",
        "tree",
    }
    assert not set(captions["train"]) & set(captions["unseen"]) and set(captions["held"]) <= set(captions["train"])
    assert captions["train"][:5] == captions["train"][5:] and len(set(captions["train"])) == 5
    assert len({pixels for rows in splits.values() for _, pixels in rows}) == 15


def test_splits_follow_the_seed_and_are_made_once(render, tmp_path):
    first = render(tmp_path / "out", *WORDS)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.jpg")}
    # As a kill before the last split was begun leaves it
    shutil.rmtree(tmp_path / "out/unseen")
    assert render(tmp_path / "out", *WORDS) == first == render(tmp_path / "again", *WORDS)
    assert all(file.stat().st_mtime_ns == time for file, time in times.items() if file.parent.name != "unseen")
    assert render(tmp_path / "other", *WORDS, "--seed", 1) != first
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        render(tmp_path / "out", *WORDS, "--seed", 1)


def test_pictures_stand_on_a_pale_ground(render, tmp_path):
    render(tmp_path / "out", *WORDS)
    for file in (tmp_path / "out").rglob("*.jpg"):
        pixels = np.asarray(load_image(file))
        assert pixels.shape == (48, 48, 3)
        # The transparent half shows the ground, the other is one grey of at most 160
        shown = (pixels.max(-1) < 180).mean()
        assert 0.05 < shown < 0.4 and (pixels.min(-1) > 215).mean() > 0.5


def test_too_few_pictures_are_counted(render, tmp_path):
    with pytest.raises(ValueError, match="has 8 pictures with different captions; --num-unseen 6 and --num-held 3"):
        render(tmp_path / "out", "--num-unseen", 6, "--num-held", 3)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_command_of_the_smol_recipe_runs_in_order(tmp_path):
    """Two steps of each stage on small random parts and 32 pictures a split."""
    readme = (RECIPES / "unicode2-smol/README.md").read_text()
    script = "\n".join(re.findall(r"<!-- commands -->\n```bash\n(.*?)```", readme, re.S))
    for old, new in {
        "--num-images 1482": "",
        "--codebook-size 4096 --num-cells 64": "--codebook-size 128 --num-cells 4",
    }.items():
        assert old in script, old
        script = script.replace(old, new)
    script = re.sub(r"(evaluate captions.*)", r"\1 --num-choices 3 --num-rows 6 --guidance 1", script)
    shutil.copytree(RECIPES, tmp_path / "training_recipes")
    for path in (tmp_path / "training_recipes/unicode2-smol").glob("*.yaml"):
        recipe = yaml.safe_load(path.read_text())
        recipe |= {"max_steps": 2, "per_device_train_batch_size": 4, "warmup_steps": 1, "save_steps": 2}
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    make_parts(tmp_path, "llm", "vision")
    pictures = tmp_path / "outputs/unicode2-smol/pictures"
    for split in ("train", "held", "unseen"):
        shutil.copytree(tmp_path / "pictures", pictures / split)
        (pictures / split / "0.png").rename(pictures / split / "000000.jpg")
        metadata = pictures / split / "metadata.jsonl"
        metadata.write_text(metadata.read_text().replace('"0.png"', '"000000.jpg"'))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "-euo", "pipefail", "-c", f"llm=llm vision=vision\n{script}"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "image gap | " in done.stdout and "drawn, by vectors | " in done.stdout
    assert json.loads((tmp_path / "outputs/unicode2-smol/held.json").read_text())["protocol"]["num_rows"] == 6


@pytest.mark.parametrize("kind", ["turned", "turned and transparent", "grey of 16 bits"])
def test_pictures_are_read_as_everywhere(render, tmp_path, kind):
    """The side to which EXIF turns them, and all of their levels."""
    import render as recipe

    pixels, options = np.zeros((20, 30, 4), np.uint8), {}
    pixels[:, :15] = pixels[..., 3] = 255
    image = Image.fromarray(pixels)
    if kind == "grey of 16 bits":
        image = Image.fromarray(np.repeat(np.arange(30, dtype=np.uint16)[None] * 2200, 20, 0))
    else:
        exif = Image.Exif()
        exif[0x0112] = 6
        image, options = image if "transparent" in kind else image.convert("RGB"), {"exif": exif}
    image.save(tmp_path / "x.png", **options)
    ours, theirs = recipe.read_rgba((tmp_path / "x.png").read_bytes()), load_image(tmp_path / "x.png")
    assert ours.mode == "RGBA" and ours.convert("RGB").tobytes() == theirs.tobytes()
    assert ours.size == ((30, 20) if kind == "grey of 16 bits" else (20, 30))
