"""Numbers about how a codebook is used (section 3.1 of the paper)."""

import numpy as np


def compute_statistics(counts: np.ndarray, squared_error: float) -> dict[str, float]:
    """Utilization, entropy and distortion from how often each code was used.

    Args:
        counts: int array `(codebook_size,)`, uses of each code.
        squared_error: sum over all features of the squared distance to their code, Eq. 2.

    Returns:
        `num_features`, `utilization` (share of codes used at least once), `entropy` in nats (Eq. 3), `perplexity` and
        `distortion`, the mean squared distance (Eq. 12).
    """
    used = counts[counts > 0] / counts.sum()
    entropy = float(-(used * np.log(used)).sum())
    return {
        "num_features": int(counts.sum()),
        "utilization": float((counts > 0).mean()),
        "entropy": entropy,
        "perplexity": float(np.exp(entropy)),
        "distortion": float(squared_error / counts.sum()),
    }
