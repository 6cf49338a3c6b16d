"""Exact nearest-code search in a fraction of the arithmetic of a scan (Eq. 5 of the paper).

The nearest code is the one with the smallest distance in float64, on the values as given; of equal distances the lowest code wins.
It is found in three steps, each of which drops only codes that cannot be the nearest: two integer products with bounds
(`screen_unicode2.py`), whose threshold is the distance of the best code so far, at first from the nearest cells; then the distance
itself. Where the bounds exclude too little, as on data without structure, all codes are scanned in float32, or in float64 where
that is too coarse, and what its rounding error cannot exclude is compared. The result is the same by every way: on a CPU
with the C kernel of `kernel_unicode2.py`, with torch alone, on any device that has float64, and for any split of a batch.
"""

import operator
import weakref

import torch

from .kernel_unicode2 import Queries, Tables, load_kernel
from .screen_unicode2 import UNIT, Screen, integer_products_work, products_are_exact

WORKSPACE = 256 * 2**20
MIN_SIZE, MIN_DIM = 8192, 160  # of the codes: below, a plain scan is as fast
NUM_NEAR = 2  # nearest parts that are searched first, the first of them after a look at its best few codes
NUM_SEED_CODES, NUM_SEEDS = 256, 4  # without the kernel: codes of a part that are looked at, and the best of them
KERNEL_SHARE, PAIR_SHARE = 0.3, 0.05  # of the work of a scan, and of its pairs: when the bounds have failed
GROUP = 512  # features that a thread takes at a time
BLOCK_SCORES = 2**19  # of a scan on a CPU: stay in its cache
CHUNK = 2**18  # numbers of a pass over the codes, for the same reason


class NearestCodeSearch:
    r"""
    Tables derived from a codebook, and the search in them.

    The tables take a tenth of the memory of the codes in float32 and are derived in seconds. They are no state, and they hold no
    reference to the codes, which may move.

    Args:
        codes (`torch.FloatTensor` of shape `(codebook_size, codebook_dim)`): the codes; rows that are not finite are never found.
        offsets (`torch.LongTensor` of shape `(num_cells + 1,)`): where the cells of the codebook begin and end.
    """

    def __init__(self, codes: torch.Tensor, offsets: torch.LongTensor):
        with torch.autocast(codes.device.type, enabled=False):
            self.make_tables(codes, offsets)

    def make_tables(self, codes: torch.Tensor, offsets: torch.LongTensor) -> None:
        self.size, self.dim = size, dim = codes.shape
        self.offsets = offsets.clone()
        self.dtype, device, rows = codes.dtype, codes.device, max(1, CHUNK // dim)
        middle = (
            codes[:: max(1, size // 1024)].float().median(0).values
        )  # what to subtract: any will do, a few far codes do not move it
        self.mean = middle if middle.abs().max() < 1e15 else torch.zeros_like(middle)
        hashes, norm = hash_rows(codes), find_norms(codes, self.mean)
        if not norm.isfinite().all():
            norm = torch.cat([(part.double() - self.mean).norm(dim=-1) for part in codes.split(rows)])
        finite, self.half_norm = norm.isfinite(), norm.square() / 2
        self.unused = find_repeated(codes, hashes, rows) | ~finite
        self.all_finite = bool(finite.all())
        self.half_norm.masked_fill_(self.unused, 0)
        self.source, self.version = weakref.ref(codes), version_of(codes)
        self.checksum, self.sampled = sum_up(hashes), sample_sum(codes)
        spread, largest = (2 * value.double().item() for value in (self.half_norm.mean(), self.half_norm.max()))
        self.moderate = 1e-24 < spread and largest < 1e30  # float32 can hold the squares
        self.shifted = (
            self.mean.double().square().sum().item() > 16 * spread
        )  # differences of large numbers are inexact
        self.screen = None
        if size >= MIN_SIZE and dim >= MIN_DIM and self.moderate and self.all_finite and device.type in ("cpu", "cuda"):
            kernel = load_kernel() if device.type == "cpu" and codes.dtype == torch.float32 else None
            if kernel or (
                device.type == "cuda" and integer_products_work(device)
            ):  # in plain torch they pay on a GPU only
                self.screen = Screen(codes, self.mean, self.half_norm, self.unused, offsets, kernel)

    def fits(self, codes: torch.Tensor, offsets: torch.LongTensor) -> bool:
        """Whether the tables were made from these, on the same device; quick for the same, unchanged codes."""
        known = ((self.size, self.dim), self.dtype, self.mean.device)
        if (codes.shape, codes.dtype, codes.device) != known or sample_sum(codes) != self.sampled:
            return False
        if not torch.equal(offsets, self.offsets):
            return False
        version = version_of(codes)
        if self.source() is codes and version is not None and self.version == version:
            return True
        if sum_up(hash_rows(codes)) != self.checksum:
            return False
        self.source, self.version = weakref.ref(codes), version
        return True

    def auxiliary_bytes(self) -> int:
        """Bytes of all tables."""
        held = [*vars(self).values(), *(vars(self.screen).values() if self.screen else ())]
        return sum(value.nbytes for value in held if isinstance(value, torch.Tensor))

    @torch.no_grad()
    def __call__(self, features, codes, cells: "Cells", num_probes: int | None = None, workspace: int = WORKSPACE):
        r"""
        Nearest codes.

        Args:
            features (`torch.FloatTensor` of shape `(num_features, codebook_dim)`): finite features, on the device of the codes.
            codes (`torch.FloatTensor` of shape `(codebook_size, codebook_dim)`): the codes that the tables were made from.
            cells (`Cells`): their cells; the ids do not depend on them unless `num_probes` is given.
            num_probes (`int`, *optional*): looks in that many nearest cells only; all codes by default.
            workspace (`int`, *optional*, defaults to 256 MiB): bytes that the search may use at a time.

        Returns:
            `torch.LongTensor` of shape `(num_features,)`.
        """
        if not len(features):
            return torch.zeros(0, dtype=torch.long, device=features.device)
        features, codes = features.float().contiguous(), codes.contiguous()  # as the kernel reads them
        rows = min(4096, workspace // (64 * self.dim), workspace // (64 * len(cells.centroids)))
        if self.screen and not self.screen.kernel:  # squares, bounds and thresholds, in torch
            rows = min(rows, workspace // (192 * len(self.screen.centres)))
        with torch.autocast(features.device.type, enabled=False):
            parts = [self.search(part, codes, cells, num_probes, workspace) for part in features.split(max(1, rows))]
        return torch.cat(parts)

    def search(self, features, codes, cells: "Cells", num_probes: int | None, workspace: int) -> torch.LongTensor:
        best = Best(features, codes, workspace)
        centred = features - self.mean
        if self.screen:
            query = self.screen.prepare(centred)
            way = self.search_with_kernel if self.screen.kernel else self.search_with_torch
            if num_probes:
                spans = cells.spans().clamp(0, self.size)  # whatever a file said
                way(query, best, spans, cells.find(centred, self.mean, num_probes), True)
            else:
                way(query, best, self.screen.spans(), self.screen.find(query, NUM_NEAR), False)
            best.forget(~query["usable"])
        elif num_probes:
            for near in cells.find(centred, self.mean, num_probes).unbind(1):
                self.visit(None, best, cells.spans()[near])
        missing = (best.found == self.size).nonzero()[:, 0]
        if len(missing):
            best.found[missing] = self.scan(features[missing], codes, workspace)
        return best.found

    def search_with_kernel(self, query: dict, best: "Best", spans, near: torch.LongTensor, near_only: bool) -> None:
        screen, count = self.screen, len(best.features)
        parts = screen.find_parts(spans[:, :1].contiguous())
        kept = [screen.prefix, screen.rest, screen.constant, screen.units, screen.rest_units, screen.more]
        kept += [best.codes, torch.cat([spans, parts], -1), screen.centre_norms, screen.extents]
        sizes = (self.size, self.dim, screen.lead, screen.rest_size, len(screen.centres), len(spans))
        costs = (screen.lead / 48, 16 + screen.rest_size / 2, 128 + self.dim / 2, self.dim / 16)  # cycles
        limits = (*screen.largest, 1 + screen.margin, (self.dim + 64) * UNIT)
        tables = Tables(*(x.data_ptr() for x in kept), *sizes, costs, limits)
        held = [query["prefix"], query["rest"], best.features, query["scales"], query["lost"], query["norm"]]
        held = [x.contiguous() for x in (*held, query["squares"], near)]
        queries = Queries(*(x.data_ptr() for x in held), count, near.shape[1], best.found.data_ptr())

        group = min(GROUP, -(-count // torch.get_num_threads()))
        bytes_of_group = screen.kernel.workspace_size(group, near.shape[1], len(spans))
        space = torch.empty(-(-count // group) * bytes_of_group, dtype=torch.uint8, device="cpu")
        screen.kernel.search(tables, queries, group, near_only, KERNEL_SHARE, space.data_ptr())

    def search_with_torch(self, query: dict, best: "Best", spans, near: torch.LongTensor, near_only: bool) -> None:
        count, query = len(best.features), {**query, "bounds": self.screen.bound(query)}
        for place in near.unbind(1)[: None if near_only else NUM_NEAR]:
            self.visit(query, best, spans[place], None if near_only else NUM_SEED_CODES)
        if near_only:
            return
        pairs = 0
        for code, part, score, bound in self.screen.all_bounds(query, max(8, best.workspace // (32 * count) // 8 * 8)):
            threshold = self.screen.thresholds(query, best.distance)
            row, column = (bound >= threshold[part].T).nonzero(as_tuple=True)
            pairs += len(row)
            if pairs > PAIR_SHARE * count * (code[-1] + 1 + self.size / 10):
                return best.forget(torch.ones_like(query["usable"]))
            self.refine(query, best, threshold, row, code[column], score[row, column])

    def refine(self, query: dict, best: "Best", threshold, row, code, score) -> None:
        """Distances of the pairs that the second bound does not exclude."""
        step = max(1, best.workspace // (16 * self.screen.rest_size + 1024))
        for a, b, c in zip(row.split(step), code.split(step), score.split(step)):
            alive = self.screen.second_bound(query, a, b, c) >= threshold[self.screen.find_parts(b), a]
            best.improve(a[alive], b[alive])

    def visit(self, query: dict | None, best: "Best", span: torch.LongTensor, limit: int | None = None) -> None:
        """A cell of each feature, given as first and last code, `(num_features, 2)`: all its codes, or the best of the first `limit`."""
        width = min(limit or self.size, int((span[:, 1] - span[:, 0]).max()))
        columns = max(1, min(width, 1024))
        rows = max(1, best.workspace // ((8 * self.screen.lead if query else 64) * columns))
        for row in torch.arange(len(span), device=span.device).split(rows):
            for start in range(0, width, columns):
                place = torch.arange(start, min(start + columns, width), device=span.device)
                code = span[row, :1] + place  # (num_rows, num_codes)
                inside = code < span[row, 1:]
                code = code.where(inside, 0)
                inside &= ~self.unused[code]
                if query:
                    self.visit_codes(query, best, row, code, inside, limit is None)
                else:
                    hit, column = inside.nonzero(as_tuple=True)
                    best.improve(row[hit], code[hit, column])

    def visit_codes(self, query: dict, best: "Best", row, code, inside, every: bool) -> None:
        """Codes `(num_rows, num_codes)` of features: the best by the first product, and with `every` all that the bounds do not exclude."""
        part, score, bound = self.screen.first_bounds(query, row, code)
        top = score.masked_fill(~inside, -torch.inf).topk(min(NUM_SEEDS, code.shape[1]), dim=-1).indices
        hit, column = inside.gather(1, top).nonzero(as_tuple=True)
        best.improve(row[hit], code[hit, top[hit, column]])
        if every:
            threshold = self.screen.thresholds(query, best.distance)
            hit, column = ((bound >= threshold[part, row[:, None]]) & inside).nonzero(as_tuple=True)
            self.refine(query, best, threshold, row[hit], code[hit, column], score[hit, column])

    def scan(self, features: torch.Tensor, codes: torch.Tensor, workspace: int) -> torch.LongTensor:
        """All codes: every score, and the distance where it reaches the best so far, less its error."""
        best = Best(features, codes, workspace)
        scan = Scan(self, best)
        moderate = self.moderate and bool(scan.squared.max() < 1e30)
        dtype = torch.float32 if moderate and products_are_exact() else torch.float64
        best.kernel = self.screen.kernel if moderate and self.screen else None
        step = max(1, min(self.size, workspace // (32 * len(features) + 32 * self.dim)))
        if features.device.type == "cpu":
            step = min(step, max(512, BLOCK_SCORES // len(features) // 512 * 512))
        kept = torch.arange(self.size, device=codes.device)
        if self.unused.sum() > self.size / 2:  # worth to copy the others
            kept = kept[~self.unused]
        waiting = []  # pairs that are measured together
        for start in range(0, len(kept), step):
            number = kept[start : start + step]
            place = number if len(kept) < self.size else slice(start, start + step)
            score, error = scan.scores(slice(None), place, dtype)  # (step, num_features), (num_features,)
            threshold = scan.threshold(dtype, error)
            near = ((score - threshold).amax(1) >= 0).nonzero()[:, 0]  # to any feature, to look closely at few
            hits = score[near] >= threshold
            if hits.sum() > 4 * len(features):  # fewer are left after the best
                best.improve(torch.arange(len(features), device=codes.device), number[score.argmax(0)])
                hits = score[near] >= scan.threshold(dtype, error)
                crowded = hits.sum(0) > 32 + step // 64
                if dtype == torch.float32 and crowded.any():  # too coarse for these: again in float64
                    score, error = scan.scores(crowded, place, torch.float64)
                    hits[:, crowded] = score[near] >= scan.threshold(torch.float64, error, crowded)
            code, row = hits.nonzero(as_tuple=True)
            waiting.append((row, number[near[code]]))
            if sum(len(row) for row, _ in waiting) > len(features):
                best.improve(*map(torch.cat, zip(*waiting)))
                waiting.clear()
        if waiting:
            best.improve(*map(torch.cat, zip(*waiting)))
        if (best.found == self.size).any():
            raise ValueError(f"None of the {self.size} codes is finite.")
        return best.found


class Cells:
    """The cells of a codebook: `centroids` `(num_cells, codebook_dim)` and `offsets` `(num_cells + 1,)`, where they begin and end."""

    def __init__(self, centroids: torch.Tensor, offsets: torch.LongTensor):
        self.centroids, self.offsets = centroids, offsets

    def spans(self) -> torch.LongTensor:
        """First code of each cell, and that after the last, `(num_cells, 2)`."""
        return torch.stack([self.offsets[:-1], self.offsets[1:]], -1)

    def find(self, centred: torch.Tensor, mean: torch.Tensor, count: int) -> torch.LongTensor:
        """The cells nearest to features less the mean, `(num_features, count)`, the nearest first; those without a code come last."""
        centroids = self.centroids.float() - mean
        bias = (-centroids.square().sum(-1) / 2).masked_fill(self.offsets.diff() == 0, -torch.inf)
        score = torch.addmm(bias, centred, centroids.T)
        return score.topk(min(count, len(centroids)), dim=-1).indices


class Best:
    """The nearest code so far of each feature: int64 `found` (the number of codes if there is none) and the float64 squared `distance`."""

    kernel = None  # to measure with: of numbers that are moderate only

    def __init__(self, features: torch.Tensor, codes: torch.Tensor, workspace: int):
        self.features, self.codes, self.workspace = features, codes, workspace
        self.distance = torch.full((len(features),), torch.inf, dtype=torch.double, device=features.device)
        self.found = torch.full((len(features),), len(codes), device=features.device)

    def forget(self, which: torch.Tensor) -> None:
        self.distance.masked_fill_(which, torch.inf)
        self.found.masked_fill_(which, len(self.codes))

    def improve(self, row: torch.LongTensor, code: torch.LongTensor) -> None:
        """Considers pairs of features and codes; of equal distances the lowest code wins."""
        if self.kernel:
            held = [self.features, self.codes, row.contiguous(), code.contiguous()]
            first, second, *pairs = (x.data_ptr() for x in held)
            found = self.distance.data_ptr(), self.found.data_ptr()
            return self.kernel.improve(first, second, self.features.shape[1], len(row), *pairs, *found)
        step = max(1, self.workspace // (64 * self.features.shape[1]))
        for a, b in zip(row.split(step), code.split(step)):
            distance = exact_distance(self.features[a], self.codes[b])
            before = self.distance.clone()
            self.distance.scatter_reduce_(0, a, distance, "amin")
            self.found.masked_fill_(self.distance < before, len(self.codes))
            winners = torch.where(distance == self.distance[a], b, len(self.codes))
            self.found.scatter_reduce_(0, a, winners, "amin")


class Scan:
    """Scores, and what they have to reach. The score of a code c is x·c - |c - mean|²/2 with x the feature less the mean."""

    def __init__(self, search: NearestCodeSearch, best: Best):
        self.search, self.best = search, best
        self.query = best.features.double() - search.mean.double()
        self.narrow, self.squared = self.query.float(), self.query.square().sum(-1)
        self.rest = search.mean.double() * (not search.shifted)  # of the mean, which the codes keep
        self.constant = self.squared / 2 + self.query @ self.rest  # the score is this less half the squared distance
        self.size = (
            self.squared.sqrt() * search.mean.double().norm() + self.squared
        )  # of the rounding errors in float64

    def scores(self, rows, place: slice | torch.LongTensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of codes for features, `(num_codes, num_rows)`, and float64 `(num_rows,)` by how much they may be too small."""
        search = self.search
        codes = self.best.codes[place].to(dtype)
        if not search.all_finite:
            codes = codes.masked_fill(search.unused[place, None], 0)
        half_norm = search.half_norm[place]
        if dtype == torch.float64:
            half_norm = (codes - search.mean).square().sum(-1) / 2
        if search.shifted:
            codes = codes - search.mean
        share = (search.dim + 32) * torch.finfo(dtype).eps / 2  # of products and sums, in any order
        largest = (2 * half_norm.double().max()).sqrt() + self.rest.norm()
        bias = (-half_norm * (1 - 2 * share)).masked_fill(search.unused[place], -torch.inf).to(dtype)
        query = self.narrow if dtype == torch.float32 else self.query
        score = torch.addmm(bias[:, None], codes, query[rows].T)  # in this order it is faster on some processors
        return score, share * self.squared[rows].sqrt() * largest

    def threshold(self, dtype: torch.dtype, error: torch.Tensor, rows=slice(None)) -> torch.Tensor:
        """What the score of a code has to reach to be as near as the best so far, `(num_rows,)`."""
        distance = self.best.distance[rows]
        score = self.constant[rows] - distance / 2 - error
        score = score - 1e-12 * (self.size[rows] + distance)
        limits = torch.finfo(dtype)
        score = score - score.abs() * limits.eps - self.search.dim * limits.tiny
        return score.clamp(min=limits.min).to(dtype)  # above that of a code that no search may find


def check_num_probes(num_probes) -> int | None:
    """A number of cells as Python's own, whichever library it is of. Raises `ValueError` unless it is a whole number from 1 on."""
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
    """Squared distances of rows `(num_rows, dim)` in float64, `(num_rows,)`; added in an order that gives the same bits everywhere."""
    square = (a.double() - b.double()).square()
    dim = square.shape[1]
    square = torch.nn.functional.pad(square, (0, (1 << (dim - 1).bit_length()) - dim))
    while square.shape[1] > 1:
        first, second = square.chunk(2, -1)
        square = first + second
    return square[:, 0]


def version_of(codes: torch.Tensor) -> int | None:
    """Grows whenever a tensor is written to; `None` for one that does not count."""
    return None if codes.is_inference() else codes._version


def sample_sum(codes: torch.Tensor, count: int = 64) -> int:
    """A number for a few rows: notices quickly when other codes were written around torch's count."""
    return sum_up(hash_rows(codes[:: max(1, len(codes) // count)]))


def state_of(codes: torch.Tensor) -> tuple[int, int | None, int] | None:
    """What tells later that codes have been written to; `None` where they are not there to be looked at."""
    return None if codes.is_meta else (codes.data_ptr(), version_of(codes), sample_sum(codes))


def have_changed(codes: torch.Tensor, before: tuple[int, int | None, int] | None) -> bool:
    """Whether codes have been written to since `state_of`; that they moved is no change."""
    now = state_of(codes)
    if now is None or before is None:
        return False
    return now[2] != before[2] or (now[0] == before[0] and now[1] != before[1])


def hash_rows(codes: torch.Tensor) -> torch.LongTensor:
    """A number for each row, `(len(codes),)`, equal for equal rows."""
    generator = torch.Generator("cpu").manual_seed(0)
    factors = torch.randint(-(2**31), 2**31, (codes.shape[1],), generator=generator, device="cpu")
    factors, hashes, parts = factors.to(codes.device) | 1, [], codes.split(max(1, CHUNK // codes.shape[1]))
    values, products = (
        torch.empty(parts[0].shape, dtype=dtype, device=codes.device) for dtype in (torch.float32, torch.long)
    )
    for part in parts:  # into the same memory, as to map some anew takes longer than to fill it
        bits = torch.add(part, 0.0, out=values[: len(part)]).view(torch.int32)  # -0.0 equals 0.0
        hashes.append(products[: len(part)].copy_(bits).mul_(factors).sum(-1))
    return torch.cat(hashes)


def find_norms(codes: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Norms of rows less a mean, float32 `(len(codes),)`."""
    parts = codes.split(max(1, CHUNK // codes.shape[1]))
    values = torch.empty(parts[0].shape, dtype=torch.float32, device=codes.device)
    return torch.cat([torch.sub(part, mean, out=values[: len(part)]).norm(dim=-1) for part in parts])


def sum_up(hashes: torch.LongTensor) -> int:
    """One number for rows in their order."""
    return (hashes * torch.arange(1, 2 * len(hashes), 2, device=hashes.device)).sum().item()


def find_repeated(codes: torch.Tensor, hashes: torch.LongTensor, rows: int) -> torch.BoolTensor:
    """Rows that equal an earlier one, `(len(codes),)`."""
    hashes, order = hashes.sort(stable=True)
    repeated = torch.zeros_like(order, dtype=torch.bool)
    places = (hashes[1:] == hashes[:-1]).nonzero()[:, 0] + 1
    for part in places.split(rows):
        repeated[order[part]] = (codes[order[part]] == codes[order[part - 1]]).all(-1)
    return repeated
