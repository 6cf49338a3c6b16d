"""Two-stage k-means (Algorithm 1 of the paper) with FAISS."""

import numpy as np


def kmeans(points: np.ndarray, num_centroids: int, seed: int, num_iterations: int = 20) -> np.ndarray:
    """Centroids of float32 points `(num_points, dim)`: float32 `(num_centroids, dim)`, by `faiss.Kmeans`."""
    import faiss

    clustering = faiss.Kmeans(
        points.shape[1],
        num_centroids,
        niter=num_iterations,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=512,
    )
    clustering.train(points)
    return clustering.centroids


def assign(points: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centroid of each point: int64 indices and float32 squared distances, both `(num_points,)`."""
    import faiss

    index = faiss.IndexFlatL2(points.shape[1])
    index.add(np.ascontiguousarray(centroids))
    distances, indices = index.search(points, 1)
    return indices[:, 0], distances[:, 0]


def allocate(counts: np.ndarray, codebook_size: int, allocation: str) -> np.ndarray:
    """Codes per cell, int64 `(num_cells,)`, that sum to `codebook_size`, at most one a point and at least one a cell with points.

    `counts` are distinct points per cell. `"uniform"` gives each cell the same share (Algorithm 1), `"proportional"` shares by
    `counts`; what a small cell cannot use goes to the others. Raises `ValueError` when there are fewer points than codes.
    """
    if counts.sum() < codebook_size:
        raise ValueError(
            f"{counts.sum()} distinct features are too few for {codebook_size} codes; add images or ask for fewer codes."
        )
    weights = (counts > 0).astype(float) if allocation == "uniform" else counts.astype(float)
    low, high = 0.0, float(codebook_size)
    for _ in range(100):  # the scale at which the capped shares just fit
        scale = (low + high) / 2
        shares = np.minimum(np.maximum(weights * scale, counts > 0), counts)
        low, high = (scale, high) if shares.sum() <= codebook_size else (low, scale)
    shares = np.floor(np.minimum(np.maximum(weights * low, counts > 0), counts)).astype(np.int64)
    room = np.argsort(shares - weights * low, kind="stable")
    while shares.sum() < codebook_size:
        open_cells = room[shares[room] < counts[room]][: codebook_size - shares.sum()]
        shares[open_cells] += 1
    return shares


def two_stage_kmeans(
    points: np.ndarray, codebook_size: int, num_cells: int, seed: int, allocation: str = "uniform"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Algorithm 1: coarse k-means into cells, k-means inside each cell, non-finite centroids removed, bfloat16 rounding.

    Takes float32 points `(num_points, dim)`; returns codes `(codebook_size, dim)` sorted by cell, coarse centroids
    `(num_cells, dim)`, both float32, and int64 `cell_offsets` `(num_cells + 1,)`.
    """
    import torch
    from tqdm import tqdm

    points = points[np.isfinite(points).all(-1)]
    centroids = kmeans(points, num_cells, seed)
    cells = assign(points, centroids)[0]
    order = np.argsort(cells, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(cells, minlength=num_cells))[:-1])
    distinct = np.array([len(np.unique(points[m], axis=0)) for m in members])
    shares = allocate(distinct, codebook_size, allocation)
    codes = []
    for cell in tqdm(range(num_cells), unit="cell", desc="k-means inside cells"):
        fine = kmeans(points[members[cell]], int(shares[cell]), seed + 1 + cell) if shares[cell] else points[:0]
        fine = fine[np.isfinite(fine).all(-1)]
        codes.append(torch.from_numpy(np.ascontiguousarray(fine)).bfloat16().float().numpy())
    offsets = np.concatenate([[0], np.cumsum([len(c) for c in codes])])
    return np.concatenate(codes), centroids, offsets
