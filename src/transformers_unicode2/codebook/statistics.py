"""Statistics of how a codebook is used (sections 3.1 and 4 of the paper). Nothing here reads files."""

import numpy as np

from ..search_unicode2 import WORKSPACE
from .clustering import find_codes


def compute_statistics(counts: np.ndarray, squared_error: float) -> dict[str, float]:
    """Utilization, entropy and distortion from the uses of each code.

    Args:
        counts: int array `(codebook_size,)`, uses of each code.
        squared_error: sum over all features of the squared distance to their code (Eq. 2).

    Returns:
        `num_features`, `utilization` (share of codes used at least once), `entropy` in nats (Eq. 3), `perplexity`,
        `gini` (0: all codes are used equally often) and `distortion`, the mean squared distance (Eq. 12).
    """
    used = counts[counts > 0] / counts.sum()
    entropy = float(-(used * np.log(used)).sum())
    return {
        "num_features": int(counts.sum()),
        "utilization": float((counts > 0).mean()),
        "entropy": entropy,
        "perplexity": float(np.exp(entropy)),
        "gini": compute_gini(counts),
        "distortion": float(squared_error / counts.sum()),
    }


def compute_gini(counts: np.ndarray) -> float:
    """Gini coefficient of counts `(num_groups,)`: 0 if all are equal, near 1 if one group has everything."""
    ordered = np.sort(counts).astype(np.float64)
    ranks = np.arange(1, len(ordered) + 1)
    return float((2 * ranks - len(ordered) - 1) @ ordered / (len(ordered) * ordered.sum()))


def compute_objective(
    codes: np.ndarray, squared_error: float, entropy: float, num_features: int, beta: float = 1.0
) -> dict:
    """Both terms of Eq. 1, unweighted, and Eq. 14.

    Returns:
        `within`, the first sum of Eq. 1; `spread`, the sum of squared distances of the codes to their mean; and
        `regularised`, D - beta H(q) of Eq. 14. Eq. 1 as printed adds the spread, weighted by lambda, although the text
        wants it large.
    """
    mean = codes.mean(0, dtype=np.float64)
    spread = sum(float(np.square(codes[i : i + 4096] - mean).sum()) for i in range(0, len(codes), 4096))
    return {"within": squared_error, "spread": spread, "regularised": squared_error / num_features - beta * entropy}


def compute_utilization_curve(
    codes: np.ndarray,
    images: np.ndarray,
    codebook_size: int,
    at_least: tuple[int, ...] = (1, 2, 5),
    num_orders: int = 20,
    seed: int = 0,
) -> dict:
    """Share of the codes that the first n images use, for growing n, averaged over random orders of the images.

    Args:
        codes, images: int arrays `(num_features,)`: the code of each feature, and the number of its image, from 0.
        codebook_size: number of codes.
        at_least: a code counts as used after this many uses; one curve for each number.
        num_orders: random orders of the images.

    Returns:
        `num_images`, the list of n; and `curves`, which maps each of `at_least` to the lists `mean`, `low` and `high`
        (see `compute_band`).
    """
    total = int(images.max()) + 1
    points = np.unique(np.geomspace(1, total, 40).round().astype(int))
    rng = np.random.default_rng(seed)
    shares = {n: [] for n in at_least}
    for _ in range(num_orders):
        rank = rng.permutation(total)
        order = np.lexsort((rank[images], codes))
        ranks, sorted_codes = rank[images][order], codes[order]
        starts = np.flatnonzero(np.r_[True, sorted_codes[1:] != sorted_codes[:-1]])
        sizes = np.diff(np.r_[starts, len(sorted_codes)])
        for n in at_least:
            # Ranks of the images that bring the n-th use of a code.
            reached = np.sort(ranks[starts[sizes >= n] + n - 1])
            shares[n].append(np.searchsorted(reached, points) / codebook_size)
    return {"num_images": points.tolist(), "curves": {n: compute_band(rows, points) for n, rows in shares.items()}}


def compute_band(shares: list[np.ndarray], points: np.ndarray) -> dict[str, list[float]]:
    """`mean` and 90 % band (`low`, `high`) of shares over random orders, for `points` other images of the same kind.

    The band is normal, from the spread over the orders. Orders share images, so the spread is corrected as for samples
    of a finite population. Beyond half of the images, where they share most, the spread at half is used.
    """
    total = points[-1]
    mean, spread = np.mean(shares, 0), np.std(shares, 0, ddof=1)
    half = max(1, np.searchsorted(points, total / 2, side="right"))
    spread[:half] /= np.sqrt(1 - points[:half] / total) if total > 1 else 1
    spread[half:] = spread[half - 1]
    low, high = (np.clip(mean + sign * 1.645 * spread, 0, 1) for sign in (-1, 1))
    return {"mean": mean.tolist(), "low": low.tolist(), "high": high.tolist()}


def fit_rate_distortion(sizes: np.ndarray, distortions: np.ndarray) -> dict[str, float]:
    """Fits Eq. 17, D = C K^(-2/d): `exponent`, the slope of log D over log K; `constant` C; and `dimension` d."""
    slope, intercept = np.polyfit(np.log(sizes), np.log(distortions), 1)
    return {"exponent": float(slope), "constant": float(np.exp(intercept)), "dimension": float(-2 / slope)}


def compute_probe_recall(codebook, features: np.ndarray) -> dict[str, float]:
    """Recall of the approximate search: share of features whose nearest code lies in the N nearest cells.

    `features` are float `(num_features, dim)`. The keys are the numbers N as text, for JSON. Each is about a fifth
    larger than the one before; the last is the number of cells.
    """
    import torch

    codes = torch.from_numpy(find_codes(codebook, features)[0])
    home, centroids = codebook.locate(codes), codebook.cell_centroids.double()
    filled, ranks = codebook.cell_offsets.diff() > 0, []
    # Each row takes 8 bytes a cell, several times.
    rows = max(1, min(1024, WORKSPACE // (64 * len(centroids))))
    for part, cell in zip(torch.from_numpy(features).split(rows), home.split(rows)):
        distance = torch.cdist(part.double(), centroids).masked_fill(~filled, torch.inf)  # (num_rows, num_cells)
        ranks.append((distance < distance.gather(1, cell[:, None])).sum(-1))
    ranks, most = torch.cat(ranks), len(centroids)
    counts = sorted({min(most, int(2 ** (step / 4))) for step in range(4 * most.bit_length() + 1)})
    return {str(count): (ranks < count).double().mean().item() for count in counts}
