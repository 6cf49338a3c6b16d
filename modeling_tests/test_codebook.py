import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from transformers_unicode2 import cli
from transformers_unicode2.codebook.clustering import allocate, assign, kmeans, two_stage_kmeans
from transformers_unicode2.codebook.statistics import compute_statistics
from transformers_unicode2.codebook.storage import load_codebook


def make_points(count=6000, dim=8, blobs=40, seed=0):
    rng = np.random.default_rng(seed)
    centres = 3 * rng.standard_normal((blobs, dim))
    return (centres[rng.integers(blobs, size=count)] + rng.standard_normal((count, dim))).astype(np.float32)


@pytest.mark.parametrize("allocation", ["uniform", "proportional"])
def test_two_stage_distortion_is_close_to_flat_kmeans(allocation):
    points = make_points()
    codes, centroids, offsets = two_stage_kmeans(points, 200, 10, seed=0, allocation=allocation)
    flat = kmeans(points, 200, seed=0)
    assert assign(points, codes)[1].mean() < 1.1 * assign(points, flat)[1].mean()
    assert codes.shape == (200, 8) and centroids.shape == (10, 8) and offsets[-1] == 200
    assert len(np.unique(codes, axis=0)) == 200
    assert np.array_equal(codes, torch.from_numpy(codes).bfloat16().float().numpy())


def test_features_that_are_not_finite_are_left_out():
    points = make_points(2000)
    dirty = np.concatenate([points, np.full((5, 8), np.nan, dtype=np.float32)])
    assert np.array_equal(two_stage_kmeans(dirty, 50, 4, seed=0)[0], two_stage_kmeans(points, 50, 4, seed=0)[0])


@pytest.mark.parametrize("allocation", ["uniform", "proportional"])
def test_allocation_uses_every_code_and_no_cell_beyond_its_points(allocation):
    rng = np.random.default_rng(0)
    for _ in range(50):
        counts = rng.integers(0, 60, 12)
        size = int(rng.integers((counts > 0).sum(), counts.sum() + 1))
        shares = allocate(counts, size, allocation)
        assert shares.sum() == size
        assert (shares <= counts).all() and (shares[counts > 0] >= 1).all()
    with pytest.raises(ValueError, match="10 distinct features are too few for 11 codes"):
        allocate(np.array([4, 6]), 11, allocation)


def test_statistics_of_known_counts():
    statistics = compute_statistics(np.array([2, 2, 0, 4]), squared_error=4.0)
    assert statistics["utilization"] == 0.75
    assert statistics["entropy"] == pytest.approx(0.5 * np.log(4) + 0.5 * np.log(2))
    assert statistics["distortion"] == 0.5


def test_build_command_writes_a_codebook_with_its_provenance(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=16, image_size=32, patch_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    SiglipVisionModel(config).save_pretrained(tmp_path / "encoder")
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "encoder")
    words = ["--images", "images", "--encoder", "encoder", "--codebook-size", "24", "--num-cells", "3"]
    monkeypatch.chdir(tmp_path)
    for folder in ("first", "second"):
        monkeypatch.setattr("sys.argv", ["unicode2", "codebook", "build", *words, "--output", folder])
        cli.main()
    codebook = load_codebook("first")
    assert codebook.codes.shape == (24, 16) and codebook.previews.shape == (24, 8, 8, 3)
    assert codebook.cell_offsets.tolist()[-1] == 24
    provenance = json.loads((tmp_path / "first" / "codebook.json").read_text())["provenance"]
    assert provenance["statistics"]["num_features"] == 12 * 16
    assert (tmp_path / "first/codebook.safetensors").read_bytes() == (
        tmp_path / "second/codebook.safetensors"
    ).read_bytes()


def test_load_of_an_incomplete_folder_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="it has no codebook.json"):
        load_codebook(tmp_path)
