"""K-means on points in memory: two backends behind one protocol, and the step from centroids to codes (Algorithm 1)."""

import copy
from collections.abc import Callable
from typing import Protocol

import numpy as np

# Float32 scores that stay in the cache of a CPU core between two steps.
CACHED_SCORES = 2**19
# Rows of a bfloat16 product on a CPU. For 10,000 points, 500 centroids and 1152 values a Xeon with AMX takes 12 ms, and
# 16 to 19 ms with 512 to 1,024 rows.
FAST_ROWS = 256


class Backend(Protocol):
    """What k-means needs from a library.

    Points are float32 `(num_points, dim)`, centroids float32 `(num_centroids, dim)`.
    """

    def put(self, points: np.ndarray):
        """Returns the points in the backend's own form, on its device."""

    def kmeans(
        self, points, num_centroids: int, seed: int, num_iterations: int, progress: Callable = iter
    ) -> np.ndarray:
        """Lloyd's algorithm from a seeded random start. `progress` wraps the range of iterations, as `tqdm` does."""

    def assign(self, points, centroids: np.ndarray, exact: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Nearest centroid of each point; ties go to the lowest index.

        Returns int64 indices and float32 squared distances, both `(num_points,)`. Without `exact`, a backend may use
        faster products, which give a few points a centroid that is only almost the nearest.
        """

    def describe(self) -> str:
        """Library, version and device, for the provenance of a codebook."""


class FaissBackend:
    """`faiss.Kmeans` and `faiss.IndexFlatL2`, on GPUs if FAISS was built for them."""

    def __init__(self, max_points_per_centroid: int = 512):
        import faiss

        self.faiss, self.max_points = faiss, max_points_per_centroid
        self.gpu = faiss.get_num_gpus() > 0

    def put(self, points: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(points, dtype=np.float32)

    def kmeans(
        self, points: np.ndarray, num_centroids: int, seed: int, num_iterations: int = 20, progress: Callable = iter
    ) -> np.ndarray:
        order = np.random.default_rng(seed).permutation(len(points))[: num_centroids * self.max_points]
        points = points[order]  # (num_sampled, dim), in random order
        centroids = points[:num_centroids]
        for _ in progress(range(num_iterations)):
            step = self.faiss.Kmeans(
                points.shape[1],
                num_centroids,
                niter=1,
                seed=seed,
                min_points_per_centroid=1,
                max_points_per_centroid=len(points),
                gpu=self.gpu,
            )
            step.train(points, init_centroids=centroids)
            centroids = step.centroids
        return centroids

    def assign(self, points: np.ndarray, centroids: np.ndarray, exact: bool = True) -> tuple[np.ndarray, np.ndarray]:
        index = self.faiss.IndexFlatL2(points.shape[1])
        if self.gpu:
            index = self.faiss.index_cpu_to_all_gpus(index)
        index.add(np.ascontiguousarray(centroids, dtype=np.float32))
        distances, indices = index.search(points, 1)
        return indices[:, 0], np.maximum(distances[:, 0], 0)

    def describe(self) -> str:
        return f"faiss {self.faiss.__version__} on {self.faiss.get_num_gpus()} GPUs"


class TorchBackend:
    r"""
    K-means on any torch device, without a matrix of all points by all centroids.

    Where the device is fast at bfloat16, all but the last two Lloyd iterations use bfloat16 products of centred points.
    The last two use float32 products, and so does an exact `assign`.

    Args:
        device (`str`, *optional*, defaults to `"cpu"`): where the points live.
        max_points_per_centroid (`int`, *optional*, defaults to 512): size of k-means' seeded sample, per centroid.
        max_scores (`int`, *optional*, defaults to 2**24): number of point-centroid scores held at a time.
    """

    def __init__(self, device: str = "cpu", max_points_per_centroid: int = 512, max_scores: int = 2**24):
        import torch

        self.device, self.max_points, self.max_scores = torch.device(device), max_points_per_centroid, max_scores
        # A CPU without bfloat16 instructions is slower at it than at float32.
        able = torch.cpu.get_capabilities()
        fast = able.get("avx512_bf16") or able.get("amx_bf16") or self.device.type != "cpu"
        self.fast_dtype = torch.bfloat16 if fast else torch.float32

    def put(self, points: np.ndarray):
        import torch

        return torch.as_tensor(points, dtype=torch.float32, device=self.device)

    def kmeans(
        self, points, num_centroids: int, seed: int, num_iterations: int = 20, progress: Callable = iter
    ) -> np.ndarray:
        import torch

        rng = np.random.default_rng(seed)
        order = torch.from_numpy(rng.permutation(len(points))[: num_centroids * self.max_points])
        points = points[order.to(self.device)]  # (num_sampled, dim), in random order
        mean = points.mean(0)
        points -= mean
        norms = points.square().sum(1)
        centroids = points[:num_centroids].clone()
        coarse = points.to(self.fast_dtype)
        for iteration in progress(range(num_iterations)):
            screened = iteration < num_iterations - 2
            indices, scores = self._nearest(coarse if screened else points, centroids)
            centroids = self._means(points, indices, (norms - 2 * scores).clamp(min=0), centroids)
        return (centroids + mean).cpu().numpy()

    def _nearest(self, queries, centroids):
        """Indices of the nearest centroids and their scores, both `(num_queries,)`.

        A score is the product of query and centroid minus half the centroid's squared norm.
        """
        import torch

        half_norms = centroids.square().sum(1) / 2
        weights = centroids.to(queries.dtype).T
        rows = max(1, self.max_scores // len(centroids))
        if self.device.type == "cpu":
            cached = max(64, CACHED_SCORES // len(centroids))
            rows = min(rows, cached if queries.dtype == torch.float32 else FAST_ROWS)
        rows = max(1, min(rows, len(queries)))
        indices = torch.zeros(len(queries), dtype=torch.long, device=self.device)
        best = torch.zeros(len(queries), device=self.device)
        # Allocated once: large blocks that come and go between small results that stay would fragment the heap.
        scores = torch.empty(rows, len(centroids), device=self.device)
        products = torch.empty_like(scores, dtype=queries.dtype) if queries.dtype != scores.dtype else scores
        for start in range(0, len(queries), rows):
            part = queries[start : start + rows]
            product, score = products[: len(part)], scores[: len(part)]  # (rows, num_centroids)
            torch.sub(torch.mm(part, weights, out=product), half_norms, out=score)
            torch.max(score, 1, out=(best[start : start + rows], indices[start : start + rows]))
        return indices, best

    def _means(self, points, indices, distances, centroids):
        """Mean of the points of each centroid. One without points moves to the farthest point of the worst cluster."""
        import torch

        counts = torch.bincount(indices, minlength=len(centroids))
        order = torch.argsort(indices, stable=True)
        sums = torch.nn.functional.embedding_bag(order, points, counts.cumsum(0) - counts, mode="sum")
        means = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centroids)
        dead = (counts == 0).nonzero()[:, 0]
        if len(dead):
            means[dead[: len(points)]] = points[farthest_points(indices, distances, len(centroids), len(dead))]
        return means

    def assign(self, points, centroids: np.ndarray, exact: bool = True) -> tuple[np.ndarray, np.ndarray]:
        import torch

        centroids = self.put(centroids)
        # Centring keeps the numbers small: differences of large ones are inexact.
        mean = centroids.mean(0)
        dtype = torch.float32 if exact else self.fast_dtype
        best = torch.full((len(points),), -torch.inf, device=self.device)
        norms = torch.zeros(len(points), device=self.device)
        indices = torch.zeros(len(points), dtype=torch.long, device=self.device)
        columns = min(len(centroids), 16384)
        rows = max(1, min(8192 if self.device.type == "cpu" else 65536, self.max_scores // columns))
        for row in range(0, len(points), rows):
            query = points[row : row + rows] - mean
            norms[row : row + rows] = query.square().sum(1)
            query = query.to(dtype)
            for start in range(0, len(centroids), columns):
                index, scores = self._nearest(query, centroids[start : start + columns] - mean)
                nearer = scores > best[row : row + rows]
                indices[row : row + rows][nearer] = index[nearer] + start
                best[row : row + rows][nearer] = scores[nearer]
        return indices.cpu().numpy(), (norms - 2 * best).clamp(min=0).cpu().numpy()

    def describe(self) -> str:
        import torch

        return f"torch {torch.__version__} on {self.device.type}, iterations in {self.fast_dtype}"


def make_backend(name: str, device: str = "cpu") -> Backend:
    """Returns the backend named `"faiss"` or `"torch"`."""
    return FaissBackend() if name == "faiss" else TorchBackend(device)


def move_codebook(codebook, device):
    """Returns a copy on `device`, or the codebook itself if it is there already."""
    return codebook if codebook.codes.device == device else copy.deepcopy(codebook).to(device)


def find_codes(codebook, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest of all codes for each of the points `(num_points, dim)`, by the codebook's own search.

    Returns int64 indices and float32 squared distances, both `(num_points,)`.
    """
    import torch

    indices, distances = [], []
    for part in torch.from_numpy(np.ascontiguousarray(points, dtype=np.float32)).split(8192):
        part = part.to(codebook.codes.device)
        indices.append(codebook(part))
        distances.append((part - codebook(indices[-1], task="decode")).square().sum(-1))
    return torch.cat(indices).cpu().numpy(), torch.cat(distances).cpu().numpy()


def add_groups(sums: np.ndarray, points: np.ndarray, indices: np.ndarray, block: int = 65536) -> None:
    """Adds each point to the row of float64 `sums` `(num_groups, dim)` at its index.

    Points of one block are summed in float32, in their order.
    """
    import torch

    for start in range(0, len(points), block):
        rows = torch.from_numpy(to_float32(points[start : start + block]))
        order = np.argsort(indices[start : start + block], kind="stable")
        used, starts = np.unique(indices[start : start + block][order], return_index=True)
        bags = torch.nn.functional.embedding_bag(torch.from_numpy(order), rows, torch.from_numpy(starts), mode="sum")
        sums[used] += bags.numpy()


def farthest_points(indices, distances, num_centroids: int, count: int):
    """Indices `(count,)` of points where new centroids start.

    Takes the farthest point of each cluster, clusters with the largest sum of distances first, then the second farthest
    of each, and so on. All tensors are on one device.
    """
    import torch

    # On the CPU, since a GPU adds in no fixed order.
    total = torch.zeros(num_centroids).index_add_(0, indices.cpu(), distances.cpu())
    total = total.to(distances.device)
    order = torch.argsort(distances, descending=True, stable=True)
    # Sorted by cluster, then by distance.
    order = order[torch.argsort(total[indices[order]], descending=True, stable=True)]
    clusters = indices[order]
    start = torch.ones_like(clusters, dtype=torch.bool)
    start[1:] = clusters[1:] != clusters[:-1]
    position = torch.arange(len(order), device=order.device)
    # 0 for the farthest point of its cluster.
    rank = position - torch.where(start, position, 0).cummax(0).values
    return order[torch.argsort(rank, stable=True)][:count]


def allocate(counts: np.ndarray, codebook_size: int, allocation: str) -> np.ndarray:
    """Codes per cell, int64 `(num_cells,)`, that sum to `codebook_size`.

    A cell gets at least one code if it has points, and at most one per distinct point. `counts` are distinct points per
    cell. `"uniform"` gives each cell the same share (Algorithm 1), `"proportional"` shares by `counts`. Codes that a
    small cell cannot use go to the others. Raises `ValueError` when there are fewer points than codes.
    """
    if counts.sum() < codebook_size:
        raise ValueError(
            f"{counts.sum()} distinct features are too few for {codebook_size} codes; "
            "add images or ask for fewer codes."
        )
    weights = (counts > 0).astype(float) if allocation == "uniform" else counts.astype(float)
    low, high = 0.0, float(codebook_size)
    # Bisection for the scale at which the capped shares just fit.
    for _ in range(100):
        scale = (low + high) / 2
        shares = np.minimum(np.maximum(weights * scale, counts > 0), counts)
        low, high = (scale, high) if shares.sum() <= codebook_size else (low, scale)
    shares = np.floor(np.minimum(np.maximum(weights * low, counts > 0), counts)).astype(np.int64)
    room = np.argsort(shares - weights * low, kind="stable")
    while shares.sum() < codebook_size:
        open_cells = room[shares[room] < counts[room]][: codebook_size - shares.sum()]
        shares[open_cells] += 1
    return shares


def cluster_cell(
    points: np.ndarray, num_codes: int, backend: Backend, seed: int, forbidden: np.ndarray, num_iterations: int = 20
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
    """K-means inside one cell, from points to codes (Algorithm 1).

    A centroid restarts from a point far from its code if it is not finite, has no points, equals another once rounded,
    or is forbidden. `points` are float32 `(num_points, dim)`; `forbidden` are uint64 hashes, ascending, of the codes of
    other cells.

    Returns codes, float32 `(num_codes, dim)`, rounded to bfloat16, distinct and finite; fewer if the points hold fewer.
    The second result is `Backend.assign` for the points and these codes, or `None` if it is not known.
    """
    held = backend.put(points)
    codes = round_to_bfloat16(backend.kmeans(held, num_codes, seed, num_iterations))
    codes = keep_distinct(codes, forbidden)
    if not len(codes):
        codes = keep_distinct(round_to_bfloat16(points), forbidden)[:num_codes]
    if not len(codes):
        return codes, None
    for attempt in range(10):
        indices, distances = backend.assign(held, codes)
        counts = np.bincount(indices, minlength=len(codes))
        if attempt < 9:
            codes = codes[counts > 0]
        if len(codes) == num_codes:
            return codes, (indices, distances)
        order = np.argsort(-distances, kind="stable")
        spread = np.concatenate([first_of_each(indices[order]), np.arange(len(order))])
        candidates = round_to_bfloat16(points[order[spread]])
        codes = keep_distinct(np.concatenate([codes, candidates]), forbidden)[:num_codes]
    return codes, None


def first_of_each(indices: np.ndarray) -> np.ndarray:
    """Positions where each value first occurs, in ascending order."""
    return np.sort(np.unique(indices, return_index=True)[1])


def keep_distinct(codes: np.ndarray, forbidden: np.ndarray) -> np.ndarray:
    """Finite rows, each once and in their order, without those whose hash is in `forbidden` (ascending)."""
    codes = codes[np.isfinite(codes).all(-1)]
    hashes = hash_rows(codes)
    first = first_of_each(hashes)
    return codes[first[~contains(forbidden, hashes[first])]]


def contains(ascending: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which of the values are in an ascending array. Unlike `np.isin`, it does not sort the array each time."""
    place = np.searchsorted(ascending, values)
    inside = place < len(ascending)
    inside[inside] = ascending[place[inside]] == values[inside]
    return inside


def to_float32(points: np.ndarray) -> np.ndarray:
    """Like `astype`, but several times faster on float16."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(points)).float().numpy()


def round_to_bfloat16(points: np.ndarray) -> np.ndarray:
    """Rounds to the nearest bfloat16 values, held as float32, with -0 as 0."""
    import torch

    return (torch.from_numpy(np.ascontiguousarray(points)).bfloat16() + 0).float().numpy()


def hash_rows(points: np.ndarray, block: int = 4096) -> np.ndarray:
    """64-bit hashes of rows rounded to bfloat16, uint64 `(num_rows,)`.

    Each four values make one integer; a hash is the sum of these integers times odd random numbers.
    """
    import torch

    width = -(-points.shape[1] // 4)
    multipliers = np.random.default_rng(0).integers(2**63, size=width, dtype=np.uint64) * 2 + 1
    rows = torch.from_numpy(np.ascontiguousarray(points))
    hashes = np.zeros(len(points), np.uint64)
    for start in range(0, len(points), block):
        # Adding 0 turns -0 into 0.
        rounded = rows[start : start + block].bfloat16() + 0
        bits = torch.nn.functional.pad(rounded, (0, 4 * width - points.shape[1]))
        bits = bits.view(torch.int16).numpy().view(np.uint64)  # (block, width)
        # The low bits of a sum of products depend on low bits only, so the high bits are mixed into them.
        bits = bits ^ (bits >> np.uint64(32))
        hashes[start : start + block] = (bits * multipliers).sum(1, dtype=np.uint64)
    return hashes
