"""95 % intervals of shares and means, over items or over groups of items that depend on each other."""

import numpy as np

# Resamples of a bootstrap, and the quantile of a normal distribution for 95 % on two sides
RESAMPLES, NORMAL = 2000, 1.959963984540054
# Of them computed at a time
CHUNK = 50


def group_of(item: str) -> str:
    """The group of an item: what its name has before the first slash, or all of it."""
    return item.split("/", 1)[0]


def mean_of(values: dict[str, float], strata: dict[str, str] | None = None) -> float:
    """The mean of the items, or the mean over strata of their means."""
    parts = {}
    for item, value in values.items():
        parts.setdefault(strata[group_of(item)] if strata else "", []).append(value)
    return float(np.mean([np.mean(part) for part in parts.values()]))


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a binomial share, exact at 0 and 1."""
    if not count:
        return 0.0, 1.0
    share, square = right / count, NORMAL**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = NORMAL / (1 + square / count) * (share * (1 - share) / count + square / (4 * count**2)) ** 0.5
    return middle - half if right else 0.0, middle + half if right < count else 1.0


def bootstrap(values: dict[str, float], strata: dict[str, str] | None = None) -> tuple[float | None, float | None]:
    """
    A 95 % percentile interval of `mean_of`, the same in every run: groups of items are resampled with replacement,
    within their strata.

    Args:
        values: by item.
        strata: the stratum of each group.

    Returns:
        Its limits; `None` of fewer than two groups, or of a stratum of one, which cannot tell how much it varies.
    """
    groups = {}
    for item, value in values.items():
        total = groups.setdefault(group_of(item), np.zeros(2))
        total += value, 1
    if len(groups) < 2:
        return None, None
    rng, parts = np.random.default_rng(0), {}
    for group, total in groups.items():
        parts.setdefault(strata[group] if strata else "", []).append(total)
    if min(map(len, parts.values())) < 2:
        return None, None
    means = np.zeros(RESAMPLES)
    for part in map(np.array, parts.values()):
        for start in range(0, RESAMPLES, CHUNK):
            drawn = part[rng.integers(len(part), size=(CHUNK, len(part)))].sum(1)  # sums and counts
            means[start : start + CHUNK] += drawn[:, 0] / drawn[:, 1] / len(parts)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
