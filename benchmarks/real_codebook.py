"""Codebooks of the features of `real_features.py`, for benchmarks. Each is kept in a file beside the features."""

from pathlib import Path

import numpy as np
from real_features import load_features

from transformers_unicode2 import UniCode2Codebook
from transformers_unicode2.codebook.clustering import TorchBackend, allocate, cluster_cell, hash_rows, to_float32
from transformers_unicode2.codebook.storage import codebook_from_arrays

CODES_PER_CELL = 500
# Half the k-means iterations of `unicode2 codebook build`.
ITERATIONS = 10
# Features held in float32 at a time.
ROWS = 16384


def load_real_codebook(folder: str, size: int) -> UniCode2Codebook:
    """A codebook by two-stage k-means, as in `unicode2 codebook build`, with 500 codes per cell on average."""
    from safetensors.numpy import load_file, save_file

    file = Path(folder) / f"codebook-{size}.safetensors"
    if not file.exists():
        arrays = cluster_features(load_features(folder)[0], size)
        save_file(arrays, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").rename(file)
    arrays = load_file(file)
    return codebook_from_arrays(arrays["codes"], arrays["cell_centroids"], arrays["cell_offsets"])


def cluster_features(features: np.ndarray, size: int) -> dict[str, np.ndarray]:
    from tqdm import tqdm

    backend, num_cells = TorchBackend(max_points_per_centroid=256), max(16, size // CODES_PER_CELL)
    sample = np.sort(np.random.default_rng(0).choice(len(features), min(len(features), 256 * num_cells), replace=False))
    centroids = backend.kmeans(backend.put(to_float32(features[sample])), num_cells, 0, ITERATIONS)
    parts = (features[start : start + ROWS] for start in range(0, len(features), ROWS))
    cells = np.concatenate([backend.assign(backend.put(to_float32(part)), centroids)[0] for part in parts])
    order, ends = np.argsort(cells, kind="stable"), np.cumsum(np.bincount(cells, minlength=num_cells))
    rows = [features[np.sort(order[first:last])] for first, last in zip([0, *ends[:-1]], ends)]
    counts = np.array([len(np.unique(hash_rows(to_float32(part)))) for part in rows])
    shares, codes, hashes = allocate(counts, size, "uniform"), [], np.zeros(0, np.uint64)
    for part, share in zip(tqdm(rows, unit="cell", desc=f"{size} codes"), shares):
        codes.append(cluster_cell(to_float32(part), share, backend, 0, hashes, ITERATIONS)[0])
        hashes = np.concatenate([hashes, hash_rows(codes[-1])])
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in codes])])
    return {"codes": np.concatenate(codes), "cell_centroids": np.float32(centroids), "cell_offsets": offsets}
