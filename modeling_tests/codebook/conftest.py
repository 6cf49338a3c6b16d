from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from transformers_unicode2 import cli


def draw_images(folder, count, seed, low=0, high=256):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(low, high, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")


def call(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["unicode2", *map(str, words)])
    cli.main()


@pytest.fixture
def run(monkeypatch):
    """Runs a command as the shell does: `run("codebook", "report", ...)`."""
    return partial(call, monkeypatch)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """Images in two styles, an encoder, a codebook of the first style and a checkpoint with it."""
    folder = tmp_path_factory.mktemp("report")
    draw_images(folder / "images", 40, 0)
    draw_images(folder / "dark", 40, 1, high=60)
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=16, image_size=32, patch_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    SiglipVisionModel(config).save_pretrained(folder / "encoder")
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "encoder")
    with pytest.MonkeyPatch.context() as monkeypatch:
        words = ["--images", folder / "images", "--encoder", folder / "encoder", "--output", folder / "codebook"]
        call(monkeypatch, "codebook", "build", *words, "--codebook-size", 96, "--num-cells", 5)
    return folder
