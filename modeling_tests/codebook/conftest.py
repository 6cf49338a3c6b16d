from functools import partial

import numpy as np
import pytest
import torch
from builds import build, words
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from transformers_unicode2 import cli

ENCODER = {
    "hidden_size": 16,
    "image_size": 32,
    "patch_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


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
    SiglipVisionModel(SiglipVisionConfig(**ENCODER)).save_pretrained(folder / "encoder")
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "encoder")
    with pytest.MonkeyPatch.context() as monkeypatch:
        words = ["--images", folder / "images", "--encoder", folder / "encoder", "--output", folder / "codebook"]
        call(monkeypatch, "codebook", "build", *words, "--codebook-size", 96, "--num-cells", 5)
    return folder


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with 40 images, a SigLIP and a CLIP encoder."""
    folder = tmp_path_factory.mktemp("codebook")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(40):
        image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        image.resize((32, 32), Image.Resampling.BICUBIC).save(folder / "images" / f"{i:02d}.png")
    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**ENCODER)).save_pretrained(folder / "encoder")
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "encoder")
    CLIPVisionModel(CLIPVisionConfig(**ENCODER)).save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(folder / "clip")
    return folder


@pytest.fixture(scope="session")
def reference(place):
    """Bytes of the codebook of an uninterrupted build, per backend."""
    output = {}
    for backend in ("faiss", "torch"):
        with pytest.MonkeyPatch.context() as monkeypatch:
            build(monkeypatch, *words(place, place / backend, "--backend", backend))
        output[backend] = (place / backend / "codebook.safetensors").read_bytes()
    return output
