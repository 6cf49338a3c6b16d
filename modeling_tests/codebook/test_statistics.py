import numpy as np
import pytest
import torch
from memory import MadeTensors
from vectors import equal_cells

from transformers_unicode2.codebook import statistics
from transformers_unicode2.codebook.statistics import (
    compute_gini,
    compute_probe_recall,
    compute_statistics,
    compute_utilization_curve,
    fit_rate_distortion,
)
from transformers_unicode2.codebook.storage import codebook_from_arrays


def test_statistics_of_known_counts():
    statistics = compute_statistics(np.array([2, 2, 0, 4]), squared_error=4.0)
    assert statistics["utilization"] == 0.75
    assert statistics["entropy"] == pytest.approx(0.5 * np.log(4) + 0.5 * np.log(2))
    assert statistics["distortion"] == 0.5


def test_gini_of_equal_and_of_concentrated_counts():
    assert compute_gini(np.full(10, 3)) == pytest.approx(0)
    assert compute_gini(np.array([0] * 9 + [7])) == pytest.approx(0.9)
    counts = np.array([1, 2, 5, 9, 9])
    mean_difference = np.abs(counts[:, None] - counts).mean()
    assert compute_gini(counts) == pytest.approx(mean_difference / (2 * counts.mean()))


def test_utilization_curve_ends_where_the_counts_say_and_agrees_with_counting():
    rng = np.random.default_rng(0)
    images, codes = np.repeat(np.arange(30), 8), rng.zipf(1.5, 240) % 50
    curve = compute_utilization_curve(codes, images, 50, num_orders=4)
    counts = np.bincount(codes, minlength=50)
    for n in (1, 2, 5):
        assert curve["curves"][n]["mean"][-1] == pytest.approx((counts >= n).mean())
        assert (np.diff(curve["curves"][n]["mean"]) >= 0).all()
    first = [len(set(codes[images == image])) / 50 for image in range(30)]
    assert curve["curves"][1]["low"][0] <= np.mean(first) <= curve["curves"][1]["high"][0]


def test_utilization_band_holds_nine_in_ten_other_samples():
    rng = np.random.default_rng(0)

    def sample():
        # Images of a kind use the same part of the codes.
        kinds = rng.integers(0, 10, 40)
        return np.repeat(np.arange(40), 8), (kinds[:, None] * 50 + rng.integers(0, 50, (40, 8))).ravel()

    inside = np.zeros(2)
    for _ in range(60):
        curve = compute_utilization_curve(*sample()[::-1], 500)
        fresh = sample()
        for i, n in enumerate((len(curve["num_images"]) // 2, -1)):
            count = curve["num_images"][n]
            share = len(set(fresh[1][fresh[0] < count])) / 500
            inside[i] += curve["curves"][1]["low"][n] <= share <= curve["curves"][1]["high"][n]
    # At the end the sample's own mean is off as well, so the band holds three in four.
    assert inside[0] > 60 * 0.8 and inside[1] > 60 * 0.6


def test_rate_distortion_exponent_of_a_power_law():
    sizes = np.array([16, 64, 256, 1024])
    fit = fit_rate_distortion(sizes, 3.0 * sizes ** (-2 / 7))
    assert fit["exponent"] == pytest.approx(-2 / 7) and fit["dimension"] == pytest.approx(7)


def test_recall_of_few_cells_is_counted_in_a_workspace(monkeypatch):
    """500 features in 300 cells; a part of the features at a time gives the same."""
    generator = torch.Generator().manual_seed(0)
    codes, features = (torch.randn(count, 8, generator=generator) for count in (900, 500))
    centroids, offsets = equal_cells(codes, 300)
    codebook = codebook_from_arrays(codes, centroids, offsets)
    near = torch.cdist(features.double(), centroids.double()).argsort(1)  # (num_features, num_cells)
    nearest = torch.cdist(features.double(), codes.double()).argmin(1)
    ranks = (near == nearest[:, None] // 3).nonzero()[:, 1]
    monkeypatch.setattr(statistics, "find_codes", lambda *_: (nearest.numpy(), None))
    monkeypatch.setattr(statistics, "WORKSPACE", 64 * 300 * 7)
    with MadeTensors() as made:
        recall = compute_probe_recall(codebook, features.numpy())
    assert list(recall)[:3] == ["1", "2", "3"] and list(recall)[-1] == "300"
    assert recall == {count: (ranks < int(count)).double().mean().item() for count in recall}
    assert made.largest <= features.numel()
