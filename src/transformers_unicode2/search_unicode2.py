"""Exact nearest-code search with torch alone (Eq. 5 of the paper).

The nearest code is the one with the smallest distance in float64, on the values as given. Of equal distances the
lowest code wins. Candidates come from products in float32, block by block. The bound on their rounding error decides
which codes may be the nearest, and these are compared in float64. Where float32 is too coarse, the products are in
float64. The ids are the same on every device.
"""

import copy
import operator
import os
from collections.abc import Callable
from functools import partial

import torch

WORKSPACE = 256 * 2**20
# A block of scores on a CPU stays in its cache.
BLOCK_SCORES = 2**19
# Squares of larger norms leave no room in float32.
LARGEST_SQUARE = 1e30
FPMATH_MODES = ("DNNL_DEFAULT_FPMATH_MODE", "ONEDNN_DEFAULT_FPMATH_MODE")


class Best:
    """The nearest code so far of each feature: int64 `found` (the number of codes if there is none) and the float64
    squared `distance`."""

    def __init__(self, features: torch.Tensor, codes: torch.Tensor, workspace: int):
        self.features, self.codes, self.workspace = features, codes, workspace
        self.distance = torch.full((len(features),), torch.inf, dtype=torch.double, device=features.device)
        self.found = torch.full((len(features),), len(codes), device=features.device)

    def missing(self) -> torch.LongTensor:
        """Features without a code so far."""
        return (self.found == len(self.codes)).nonzero()[:, 0]

    def update(self, rows: torch.LongTensor, search: Callable[["Best"], None]) -> None:
        """Improves some of the features by a search."""
        if len(rows):
            part = copy.copy(self)
            part.features, part.distance, part.found = self.features[rows], self.distance[rows], self.found[rows]
            search(part)
            self.distance[rows], self.found[rows] = part.distance, part.found

    def improve(self, row: torch.LongTensor, code: torch.LongTensor) -> None:
        """Considers pairs of features and codes, `(num_pairs,)` each. Of equal distances the lowest code wins."""
        step = max(1, self.workspace // (64 * self.features.shape[1]))
        for rows, codes in zip(row.split(step), code.split(step)):
            distance = exact_distance(self.features[rows], self.codes[codes])
            before = self.distance.clone()
            self.distance.scatter_reduce_(0, rows, distance, "amin")
            self.found.masked_fill_(self.distance < before, len(self.codes))
            winners = torch.where(distance == self.distance[rows], codes, len(self.codes))
            self.found.scatter_reduce_(0, rows, winners, "amin")


class Scores:
    r"""
    Scores of codes for features. With a feature x and a code c, both less `origin`, the score is x·c - |c|²/2. It is
    highest for the nearest code.

    Args:
        features (`torch.FloatTensor` of shape `(num_features, codebook_dim)`): finite features.
        codes (`torch.FloatTensor` of shape `(codebook_size, codebook_dim)`): the codes.
        origin (`torch.FloatTensor` of shape `(codebook_dim,)`): what is subtracted. The ids do not depend on it.
        shifted (`bool`): whether `origin` is far from zero, so that it is subtracted from the codes, too. Without
            `half_norm` an origin that is not subtracted must be zero.
        half_norm (`torch.FloatTensor` of shape `(codebook_size,)`, *optional*): half the squared norm of each code
            less `origin`, infinite for codes to ignore. All codes must be finite then. By default it is computed, and
            codes that are not finite are ignored.
    """

    def __init__(self, features, codes, origin, shifted: bool, half_norm: torch.Tensor | None = None):
        self.codes, self.origin, self.shifted, self.half_norm = codes, origin, shifted, half_norm
        self.query = features.double() - origin.double()
        self.narrow = self.query.float()
        squared = self.query.square().sum(-1)
        # What the codes keep of the origin is a constant of the feature.
        kept = origin.double() * (not shifted)
        self.constant = squared / 2 + self.query @ kept
        self.size = squared / 2 + squared.sqrt() * kept.norm()
        self.moderate = not len(squared) or squared.max().item() < LARGEST_SQUARE
        self.dtype = torch.float32 if products_are_exact() and self.moderate else torch.float64

    def compute(self, place, dtype: torch.dtype, rows=slice(None)) -> torch.Tensor:
        """Scores of the codes at `place` for features, `(num_codes, num_rows)`, in float64 where float32 cannot hold
        the squares."""
        codes = self.codes[place].to(dtype)
        codes = codes - self.origin if self.shifted else codes
        half_norm = self.find_half_norm(codes, place)
        if dtype == torch.float32 and self.half_norm is None and not half_norm.max() < LARGEST_SQUARE:
            return self.compute(place, torch.float64, rows)
        if self.half_norm is None and not half_norm.isfinite().all():
            codes = codes.masked_fill(~half_norm.isfinite()[:, None], 0)
            half_norm = half_norm.nan_to_num(nan=torch.inf, posinf=torch.inf)
        # Too large by more than the rounding errors that grow with the code.
        bias = -half_norm * (1 - 3 * find_share(codes.shape[1], dtype))
        query = self.narrow if dtype == torch.float32 else self.query
        # In this order the product is faster on some processors.
        return torch.addmm(bias[:, None], codes, query[rows].T)  # (num_codes, num_rows)

    def find_half_norm(self, codes: torch.Tensor, place) -> torch.Tensor:
        """Half the squared norms of codes less the origin, `(num_codes,)`."""
        if self.half_norm is not None and codes.dtype == torch.float32:
            return self.half_norm[place]
        known = self.half_norm is not None
        centred = codes - self.origin if known and not self.shifted else codes
        half_norm = torch.linalg.vector_norm(centred, dim=-1).square() / 2
        return half_norm.where(self.half_norm[place].isfinite(), torch.inf) if known else half_norm

    def threshold(self, distance: torch.Tensor, dtype: torch.dtype, rows=slice(None)) -> torch.Tensor:
        """What the score of a code must reach for it to be within squared `distance`, `(num_rows,)`, less the
        rounding errors."""
        size, dim, limits = self.size[rows], self.query.shape[1], torch.finfo(dtype)
        score = self.constant[rows] - distance / 2 - find_share(dim, dtype) * size
        score = score - 1e-12 * (2 * size + distance)
        score = score - score.abs() * limits.eps - 4 * dim * limits.tiny
        # A code to ignore has a score of minus infinity, which is below.
        return score.clamp(min=limits.min).to(dtype)


def find_nearest(
    features, codes, centroids, offsets, num_probes: int | None = None, workspace: int = WORKSPACE
) -> torch.LongTensor:
    r"""
    The nearest code of each feature.

    Args:
        features (`torch.FloatTensor` of shape `(num_features, codebook_dim)`): finite features, float32.
        codes (`torch.FloatTensor` of shape `(codebook_size, codebook_dim)`): the codes. Rows that are not finite are
            never found.
        centroids (`torch.FloatTensor` of shape `(num_cells, codebook_dim)`): the centroids of the cells of the
            codebook.
        offsets (`torch.LongTensor` of shape `(num_cells + 1,)`): cell i holds codes `offsets[i]` to `offsets[i + 1]`.
        num_probes (`int`, *optional*): looks only into this many cells, the nearest ones. All codes by default.
        workspace (`int`, *optional*, defaults to 256 MiB): bytes that the search may use at a time.

    Returns:
        `torch.LongTensor` of shape `(num_features,)`.

    Raises:
        `ValueError`: when no code is finite.
    """
    rows = max(1, min(4096, workspace // (64 * codes.shape[1]), workspace // (64 * len(centroids))))
    found = []
    with torch.autocast(features.device.type, enabled=False):
        for part in features.split(rows):
            best = Best(part, codes, workspace)
            if num_probes and len(part):
                scan_cells(best, centroids, offsets, num_probes)
            best.update(best.missing(), scan_all)
            found.append(best.found)
    return torch.cat(found)


def scan_all(best: Best) -> None:
    """Compares all codes. Raises `ValueError` when none is finite."""
    scan(best)
    if len(best.missing()):
        raise ValueError(f"None of the {len(best.codes)} codes is finite.")


def scan_cells(best: Best, centroids: torch.Tensor, offsets: torch.LongTensor, num_probes: int) -> None:
    """Compares the codes of the nearest cells of each feature."""
    near = find_cells(best.features, centroids, offsets, num_probes)  # (num_features, num_probes)
    cells, order = near.flatten().sort()
    found, counts = cells.unique_consecutive(return_counts=True)
    for cell, pairs in zip(found.tolist(), order.split(counts.tolist())):
        numbers = torch.arange(offsets[cell].item(), offsets[cell + 1].item(), device=offsets.device)
        best.update(pairs // near.shape[1], partial(scan, numbers=numbers))


def make_scores(features: torch.Tensor, codes: torch.Tensor) -> Scores:
    """Scores about the mean of the features where that is far from zero, as differences of large numbers are
    inexact."""
    mean = features.double().mean(0)
    spread = (features.double() - mean).square().sum(-1).mean()
    shifted = bool(mean.square().sum() > 16 * spread)
    origin = mean.float() if shifted else torch.zeros_like(features[0])
    return Scores(features, codes, origin, shifted)


def scan(best: Best, scores: Scores | None = None, numbers: torch.LongTensor | None = None) -> None:
    """Improves `best` by the codes with the given numbers, by default by all."""
    count, dim = best.features.shape
    scores = scores or make_scores(best.features, best.codes)
    size = len(best.codes) if numbers is None else len(numbers)
    step = max(1, min(size, best.workspace // (32 * (count + dim))))
    if best.features.device.type == "cpu":
        step = min(step, max(512, BLOCK_SCORES // count // 512 * 512))
    # Pairs that are measured together.
    waiting = []
    for start in range(0, size, step):
        stop = min(start + step, size)
        if numbers is None:
            place, codes = slice(start, stop), torch.arange(start, stop, device=best.codes.device)
        else:
            place = codes = numbers[start:stop]
        waiting.append(find_candidates(best, scores, place, codes))
        if sum(len(row) for row, _ in waiting) > count or stop == size:
            rows, found = zip(*waiting)
            best.improve(torch.cat(rows), torch.cat(found))
            waiting.clear()


def find_candidates(best: Best, scores: Scores, place, codes: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of features and of the codes at `place` that may be nearer than the best so far, `(num_pairs,)` each."""
    score = scores.compute(place, scores.dtype)  # (num_codes, num_features)
    threshold = scores.threshold(best.distance, score.dtype)
    # Codes near to any feature are few, and only they are looked at closely.
    near = ((score - threshold).amax(1) >= 0).nonzero()[:, 0]
    hits = score[near] >= threshold
    if hits.sum() > 4 * len(best.features):
        # Fewer are left after the best of the block.
        best.improve(torch.arange(len(best.features), device=codes.device), codes[score.argmax(0)])
        hits = score[near] >= scores.threshold(best.distance, score.dtype)
        crowded = hits.sum(0) > 32 + len(codes) // 64
        if crowded.any():
            # Codes that are all the same, as in a codebook without weights, are looked at once.
            rows = best.codes[place]
            hits &= torch.cat([hits.new_ones(1), (rows[1:] != rows[:-1]).any(-1)])[near, None]
        if score.dtype == torch.float32 and crowded.any():
            # Float32 is too coarse for these features.
            finer = scores.compute(place, torch.float64, crowded)[near]
            hits[:, crowded] &= finer >= scores.threshold(best.distance[crowded], torch.float64, crowded)
    code, row = hits.nonzero(as_tuple=True)
    return row, codes[near[code]]


def find_cells(features, centroids, offsets, num_probes: int) -> torch.LongTensor:
    """The cells nearest to features, `(num_features, num_probes)`, the nearest first. Those without a code come
    last."""
    dtype = torch.float32 if products_are_exact() else torch.float64
    mean = centroids.float().mean(0)
    centred, centroids = (x.to(dtype) - mean for x in (features, centroids))
    bias = -centroids.square().sum(-1) / 2
    # As an index, since a mask of another length would be broadcast.
    bias[offsets.diff() == 0] = -torch.inf
    score = torch.addmm(bias, centred, centroids.T)  # (num_features, num_cells)
    return score.topk(min(num_probes, len(centroids)), dim=-1).indices


def check_features(features: torch.Tensor, width: int) -> None:
    """Raises `ValueError` on features `(..., width)` of another width or kind, or that are not finite."""
    if not features.is_floating_point():
        raise ValueError(f"The features are {features.dtype}; give them in float32, bfloat16, float16 or float64.")
    if features.shape[-1] != width:
        raise ValueError(f"The features are {features.shape[-1]} wide and the codes {width}.")
    # In one pass: nothing in it is not finite.
    if features.sum(dtype=torch.float32).isfinite():
        return
    finite = torch.isfinite(features.float() if features.dtype == torch.float64 else features).all(-1).flatten()
    if not finite.all():
        bad = (~finite).nonzero().flatten()
        raise ValueError(f"{len(bad)} of {len(finite)} features are not finite; the first is number {bad[0].item()}.")


def check_num_probes(num_probes) -> int | None:
    """A number of cells as Python's own, whichever library it is of. Raises `ValueError` unless it is a whole number
    of at least 1."""
    if num_probes is None:
        return None
    try:
        count = operator.index(num_probes)
    except TypeError as error:
        raise ValueError(f"`num_probes` is {num_probes!r}; it must be a whole number from 1 on.") from error
    if count < 1:
        raise ValueError(f"`num_probes` is {count}; at least one cell has to be looked into.")
    return count


def exact_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Squared distances of rows `(num_rows, dim)` in float64, `(num_rows,)`, added in an order that gives the same
    bits everywhere."""
    square = (a.double() - b.double()).square()
    dim = square.shape[1]
    square = torch.nn.functional.pad(square, (0, (1 << (dim - 1).bit_length()) - dim))
    while square.shape[1] > 1:
        first, second = square.chunk(2, -1)
        square = first + second
    return square[:, 0]


def find_share(dim: int, dtype: torch.dtype) -> float:
    """The relative rounding error of sums of `dim` products, added in any order, at most."""
    return (dim + 32) * torch.finfo(dtype).eps / 2


def products_are_exact() -> bool:
    """Whether products of float32 matrices are in float32, as by default, and not in TF32 or bfloat16."""
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "1" or any(
        os.environ.get(name, "STRICT").upper() != "STRICT" for name in FPMATH_MODES
    ):
        return False
    try:
        return torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:
        # Set by other means.
        return False
