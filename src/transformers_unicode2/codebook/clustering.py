"""K-means on points in memory: two backends behind one protocol, and what turns centroids into codes (Algorithm 1)."""

import copy
from collections.abc import Callable
from typing import Protocol

import numpy as np

CACHED_SCORES = 2**19  # float32 scores that stay in the cache of a CPU core between their steps


class Backend(Protocol):
    """What k-means needs from a library. Points and centroids are float32 `(num_points, dim)` and `(num_centroids, dim)`."""

    def put(self, points: np.ndarray):
        """Points as the backend holds them, on its device."""

    def kmeans(
        self, points, num_centroids: int, seed: int, num_iterations: int, progress: Callable = iter
    ) -> np.ndarray:
        """Lloyd's algorithm from a seeded random start; `progress` goes around the range of its iterations, as `tqdm` does."""

    def assign(self, points, centroids: np.ndarray, exact: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Nearest centroid of each point, ties to the lowest: int64 indices and float32 squared distances, both `(num_points,)`.

        A backend that has faster products may use them where `exact` is false; a few points then get a centroid next to the nearest.
        """

    def describe(self) -> str:
        """Library, version and device, for the provenance of a codebook."""


class FaissBackend:
    """`faiss.Kmeans` and `faiss.IndexFlatL2`, on the GPUs when faiss was built for them."""

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
    K-means on any device of torch, without a matrix of all points by all centroids.

    Lloyd's iterations find the nearest centroid by bfloat16 products of centred points where the device is fast at them, their
    last two and `assign`, unless it need not be exact, by float32 products.

    Args:
        device (`str`, *optional*, defaults to `"cpu"`): where the points live.
        max_points_per_centroid (`int`, *optional*, defaults to 512): k-means uses a seeded sample of so many points a centroid.
        max_scores (`int`, *optional*, defaults to 2**24): scores of points by centroids held at a time.
    """

    def __init__(self, device: str = "cpu", max_points_per_centroid: int = 512, max_scores: int = 2**24):
        import torch

        self.device, self.max_points, self.max_scores = torch.device(device), max_points_per_centroid, max_scores
        able = torch.cpu.get_capabilities()  # bfloat16 without instructions for it is slower than float32
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
        """Indices of the nearest centroids, and the products with them less half of their squared length, both `(num_queries,)`."""
        import torch

        half_norms = centroids.square().sum(1) / 2
        weights = centroids.to(queries.dtype).T
        rows = max(1, self.max_scores // len(centroids))
        if self.device.type == "cpu":
            rows = min(rows, max(64, CACHED_SCORES // len(centroids)))
        best = [
            ((queries[start : start + rows] @ weights).float() - half_norms).max(1)  # of (rows, num_centroids)
            for start in range(0, len(queries), rows)
        ]
        return torch.cat([part.indices for part in best]), torch.cat([part.values for part in best])

    def _means(self, points, indices, distances, centroids):
        """Means of the points at each centroid; one without points moves to the farthest point of the cluster that is worst off."""
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
        mean = centroids.mean(0)  # differences of large numbers are inexact
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
    """`"faiss"` or `"torch"`."""
    return FaissBackend() if name == "faiss" else TorchBackend(device)


def move_codebook(codebook, device):
    """A copy on another device, or the codebook itself if it is there."""
    return codebook if codebook.codes.device == device else copy.deepcopy(codebook).to(device)


def find_codes(codebook, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The codebook's own search: nearest code of each of the points `(num_points, dim)` among all, int64, and float32 squared distances."""
    import torch

    indices, distances = [], []
    for part in torch.from_numpy(np.ascontiguousarray(points, dtype=np.float32)).split(8192):
        part = part.to(codebook.codes.device)
        indices.append(codebook(part))
        distances.append((part - codebook(indices[-1], task="decode")).square().sum(-1))
    return torch.cat(indices).cpu().numpy(), torch.cat(distances).cpu().numpy()


def add_groups(sums: np.ndarray, points: np.ndarray, indices: np.ndarray, block: int = 65536) -> None:
    """Adds each point to the row of float64 `sums` `(num_groups, dim)` at its index: in float32 within a block of points, in their order."""
    import torch

    for start in range(0, len(points), block):
        rows = torch.from_numpy(to_float32(points[start : start + block]))
        order = np.argsort(indices[start : start + block], kind="stable")
        used, starts = np.unique(indices[start : start + block][order], return_index=True)
        bags = torch.nn.functional.embedding_bag(torch.from_numpy(order), rows, torch.from_numpy(starts), mode="sum")
        sums[used] += bags.numpy()


def farthest_points(indices, distances, num_centroids: int, count: int):
    """Points to start new centroids at, `(count,)`: of each of the clusters with the largest sums of distances the farthest point,
    of the clusters that are left over the next ones. All arguments and the result are torch tensors of one device."""
    import torch

    total = torch.zeros(num_centroids).index_add_(0, indices.cpu(), distances.cpu())  # in one order, unlike on a GPU
    total = total.to(distances.device)
    order = torch.argsort(distances, descending=True, stable=True)
    order = order[torch.argsort(total[indices[order]], descending=True, stable=True)]  # by cluster, then by distance
    clusters = indices[order]
    start = torch.ones_like(clusters, dtype=torch.bool)
    start[1:] = clusters[1:] != clusters[:-1]
    position = torch.arange(len(order), device=order.device)
    rank = position - torch.where(start, position, 0).cummax(0).values  # 0 for the farthest point of its cluster
    return order[torch.argsort(rank, stable=True)][:count]


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


def cluster_cell(
    points: np.ndarray, num_codes: int, backend: Backend, seed: int, forbidden: np.ndarray, num_iterations: int = 20
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
    """K-means inside one cell, to codes: float32 `(num_codes, dim)`, rounded to bfloat16, distinct and finite (Algorithm 1), and
    what `Backend.assign` says of the points and these codes, if it was asked.

    Centroids that are not finite, that no point is nearest to, that fall together once rounded or whose hash is among `forbidden`
    (uint64 and ascending, the codes of other cells) start again from points far from their code. Returns fewer codes when the points,
    float32 `(num_points, dim)`, do not hold as many distinct ones.
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
    """Positions at which each value occurs for the first time, in ascending order."""
    return np.sort(np.unique(indices, return_index=True)[1])


def keep_distinct(codes: np.ndarray, forbidden: np.ndarray) -> np.ndarray:
    """Finite rows, each once, in their order, without those whose hash is among `forbidden`, ascending."""
    codes = codes[np.isfinite(codes).all(-1)]
    hashes = hash_rows(codes)
    first = first_of_each(hashes)
    return codes[first[~contains(forbidden, hashes[first])]]


def contains(ascending: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which of the values are in an array that ascends: as `np.isin`, which would sort it each time."""
    place = np.searchsorted(ascending, values)
    inside = place < len(ascending)
    inside[inside] = ascending[place[inside]] == values[inside]
    return inside


def to_float32(points: np.ndarray) -> np.ndarray:
    """As `astype`, several times as fast on float16."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(points)).float().numpy()


def round_to_bfloat16(points: np.ndarray) -> np.ndarray:
    """Float32 to the nearest values that bfloat16 holds, with -0 as 0."""
    import torch

    return (torch.from_numpy(np.ascontiguousarray(points)).bfloat16() + 0).float().numpy()


def hash_rows(points: np.ndarray, block: int = 4096) -> np.ndarray:
    """64-bit hashes of rows once rounded to bfloat16, uint64 `(num_rows,)`: odd random multiples of four values each, summed."""
    import torch

    width = -(-points.shape[1] // 4)
    multipliers = np.random.default_rng(0).integers(2**63, size=width, dtype=np.uint64) * 2 + 1
    rows = torch.from_numpy(np.ascontiguousarray(points))
    hashes = np.zeros(len(points), np.uint64)
    for start in range(0, len(points), block):
        rounded = rows[start : start + block].bfloat16() + 0  # -0 is 0
        bits = torch.nn.functional.pad(rounded, (0, 4 * width - points.shape[1]))
        bits = bits.view(torch.int16).numpy().view(np.uint64)  # (block, width)
        bits = bits ^ (
            bits >> np.uint64(32)
        )  # the high bits of a sum of products hang on all bits, the low ones on the low
        hashes[start : start + block] = (bits * multipliers).sum(1, dtype=np.uint64)
    return hashes
