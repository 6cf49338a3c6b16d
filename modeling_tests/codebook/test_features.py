"""Features of patches: which images and encoders they come from, and shards that are damaged."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from builds import SIZE, break_off, build, refusal, words
from PIL import Image
from transformers import (
    SiglipImageProcessor,
    SiglipVisionModel,
)


def test_clip_features_come_without_cls(place, tmp_path, monkeypatch):
    build(monkeypatch, *words(place, tmp_path, encoder="clip"))
    statistics = json.loads((tmp_path / "codebook.json").read_text())["provenance"]["statistics"]
    assert statistics["num_features"] == 40 * 16


def test_unreadable_images_are_listed_and_too_many_of_them_stop_the_build(place, tmp_path, monkeypatch, capsys):
    (tmp_path / "images").mkdir()
    for file in (place / "images").iterdir():
        (tmp_path / "images" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "images" / "07.png").write_bytes(b"")
    content = (tmp_path / "images" / "31.png").read_bytes()
    (tmp_path / "images" / "31.png").write_bytes(content[: len(content) // 2])
    # Reading it fails with an input/output error.
    (tmp_path / "images" / "40.png").symlink_to("/proc/self/mem")
    arguments = ["--images", str(tmp_path / "images"), "--encoder", str(place / "encoder"), *SIZE]
    message = refusal(monkeypatch, capsys, *arguments, "--output", str(tmp_path / "strict"), "--max-unreadable", "0.03")
    assert "2 of 41 images cannot be read" in message and "31.png" in message
    build(monkeypatch, *arguments, "--output", str(tmp_path / "loose"), "--max-unreadable", "0.1")
    listed = (tmp_path / "loose" / "skipped.txt").read_text().splitlines()
    assert len(listed) == 3 and "07.png" in listed[0] and "31.png" in listed[1]
    assert "40.png" in listed[2] and "the file cannot be read: Input/output error" in listed[2]


def test_too_few_features_and_features_that_are_not_finite_are_refused(place, tmp_path, monkeypatch, capsys):
    many = words(place, tmp_path / "a", "--codebook-size", "700")
    assert "40 images have 640 features, too few for 700 codes" in refusal(monkeypatch, capsys, *many)
    (tmp_path / "twins").mkdir()
    for i in range(2):
        shutil.copy(place / "images" / "03.png", tmp_path / "twins" / f"{i}.png")
    twins = ["--images", str(tmp_path / "twins"), *words(place, tmp_path / "t", "--codebook-size", "20")[2:]]
    assert "16 distinct features are too few for 20 codes" in refusal(monkeypatch, capsys, *twins)
    model = SiglipVisionModel.from_pretrained(place / "encoder")
    model.embeddings.position_embedding.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    SiglipImageProcessor.from_pretrained(place / "encoder").save_pretrained(tmp_path / "broken")
    arguments = ["--images", str(place / "images"), "--encoder", str(tmp_path / "broken"), *SIZE]
    message = refusal(monkeypatch, capsys, *arguments, "--output", str(tmp_path / "b"))
    assert "640 of 640 features are not finite" in message


@pytest.mark.parametrize("folder", ["cells", "features", "fine"])
def test_a_shard_that_was_cut_short_is_named_and_can_be_deleted(
    place, reference, tmp_path, monkeypatch, capsys, folder
):
    break_off(place, tmp_path, monkeypatch, {"features": 39, "cells": 60, "fine": 88}[folder])
    shard = next((tmp_path / "work" / folder).glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    message = refusal(monkeypatch, capsys, *words(place, tmp_path))
    assert f"{shard} is damaged" in message and "delete it and run the same command again" in message
    shard.unlink()
    build(monkeypatch, *words(place, tmp_path))
    assert (tmp_path / "codebook.safetensors").read_bytes() == reference["faiss"]


@pytest.mark.parametrize("folder", ["cells", "features", "fine"])
def test_a_flipped_bit_in_a_shard_is_noticed(place, reference, tmp_path, monkeypatch, capsys, folder):
    break_off(place, tmp_path, monkeypatch, {"features": 39, "cells": 60, "fine": 88}[folder])
    shard = sorted((tmp_path / "work" / folder).glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-9] ^= 0x40
    shard.write_bytes(content)
    message = refusal(monkeypatch, capsys, *words(place, tmp_path))
    assert f"{shard} is damaged" in message and "does not match its checksum" in message
    assert "delete it and run" in message
    shard.unlink()
    build(monkeypatch, *words(place, tmp_path))
    assert (tmp_path / "codebook.safetensors").read_bytes() == reference["faiss"]


def test_large_images_are_held_one_at_a_time(place, tmp_path):
    """16 images of 16 megapixels would take 730 MiB as RGB if they were held together."""
    (tmp_path / "images").mkdir()
    for i in range(16):
        Image.new("L", (4000, 4000), 8 * i).save(tmp_path / "images" / f"{i}.png", compress_level=1)
    script = (
        "import resource, sys; from transformers_unicode2.codebook.features import Encoder, encode_all; "
        "from transformers_unicode2.codebook.images import ImageSource; "
        f"encoder, source = Encoder({str(place / 'encoder')!r}), ImageSource({str(tmp_path / 'images')!r}); "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "[features for _, features, _ in encode_all(source, encoder)]; "
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    added = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(added.split()[-1]) < 400


def test_another_model_as_encoder_is_refused(place, monkeypatch, capsys, tmp_path, tiny_checkpoint):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    arguments = ["--images", str(place / "images"), "--encoder", str(tmp_path / "bert")]
    arguments += ["--output", str(tmp_path / "o")]
    assert "is a bert model; the encoder must be" in refusal(monkeypatch, capsys, *arguments)
