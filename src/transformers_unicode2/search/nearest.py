"""Exact nearest-code search in a fraction of the arithmetic of a scan (Eq. 5 of the paper).

The ids are those of the plain search of `search_unicode2.py`: the smallest distance in float64, of equal ones the
lowest code. They are found in three steps, each of which drops only codes that cannot be the nearest. The first two
are integer products with bounds (`tables.py`). Their threshold is the distance of the best code so far, at first from
the nearest cells. The third is the distance itself. The C kernel does this on a CPU. Where the bounds exclude too
little, as on data without structure, and where there is no kernel, all codes are scanned.
"""

from functools import partial

import torch

from ..search_unicode2 import (
    LARGEST_SQUARE,
    WORKSPACE,
    Best,
    Scores,
    find_cells,
    make_scores,
    scan,
    scan_cells,
)
from .kernel import Pairs, Queries, Tables, load_kernel
from .tables import UNIT, BoundTables, Query

# Of the codes: below, a scan is as fast.
MIN_SIZE, MIN_DIM = 8192, 160
# Squared norms below leave too little to the bounds in float32.
LEAST_SQUARE = 1e-24
# Nearest parts that are searched first, the first of them after a look at its best few codes.
NUM_NEAR = 2
# Of the work of a scan: where the bounds have failed.
KERNEL_SHARE = 0.3
# Features that a thread takes at a time.
GROUP = 512
# Numbers of a pass over the codes, which stay in the cache of a CPU.
CHUNK = 2**18


def search_codebook(
    codebook, features: torch.Tensor, num_probes: int | None = None, workspace: int = WORKSPACE
) -> torch.LongTensor:
    """`UniCode2Codebook.search` of the package: makes the tables at first, and searches in them."""
    codes, centroids, offsets = codebook.buffers_to_search()
    search = codebook.tables
    # The weights of an offloaded codebook come and go, its tables stay.
    if search is None or not search.fits(codes):
        search = codebook.tables = NearestCodeSearch(codes, offsets)
    return search(features.to(codes.device), codes, centroids, offsets, num_probes, workspace)


class NearestCodeSearch:
    r"""
    Tables derived from a codebook, and the search in them.

    The tables take a tenth of the memory of the codes in float32 and are derived in seconds. They hold no reference
    to the codes, which may move.

    Args:
        codes (`torch.FloatTensor` of shape `(codebook_size, codebook_dim)`): the codes. Rows that are not finite are
            never found.
        offsets (`torch.LongTensor` of shape `(num_cells + 1,)`): where the cells of the codebook begin and end.
    """

    def __init__(self, codes: torch.Tensor, offsets: torch.LongTensor):
        self.size, self.dim = codes.shape
        self.dtype, self.device = codes.dtype, codes.device
        self.half_norm = self.numbers = self.tables = None
        with torch.autocast(codes.device.type, enabled=False):
            # What to subtract: any will do. A few far codes do not move the median.
            middle = codes[:: max(1, self.size // 1024)].float().median(0).values
            self.mean = middle if middle.abs().max() < 1e15 else torch.zeros_like(middle)
            norm = find_norms(codes, self.mean)
            if norm.max().square() < LARGEST_SQUARE:
                self.make_tables(codes, offsets, norm.square() / 2)

    def make_tables(self, codes: torch.Tensor, offsets: torch.LongTensor, half_norm: torch.Tensor) -> None:
        """For finite codes whose half squared norms float32 can hold, `(codebook_size,)`."""
        unused = find_repeated(codes, offsets)
        spread = 2 * half_norm.masked_fill(unused, 0).double().mean().item()
        # Differences of large numbers are inexact.
        self.shifted = self.mean.double().square().sum().item() > 16 * spread
        self.half_norm = half_norm.masked_fill(unused, torch.inf)
        large = self.size >= MIN_SIZE and self.dim >= MIN_DIM and spread > LEAST_SQUARE
        if large and codes.device.type == "cpu" and codes.dtype == torch.float32 and load_kernel():
            self.tables = BoundTables(codes, self.mean, self.half_norm, offsets)
        # Worth copying the others.
        if unused.sum() > self.size / 2:
            self.numbers = (~unused).nonzero()[:, 0]

    def fits(self, codes: torch.Tensor) -> bool:
        """Whether codes have the shape, the dtype and the device of those that the tables were made from."""
        return (self.size, self.dim, self.dtype, self.device) == (*codes.shape, codes.dtype, codes.device)

    def auxiliary_bytes(self) -> int:
        """Bytes of all tables."""
        held = sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor))
        return held + (self.tables.auxiliary_bytes() if self.tables else 0)

    @torch.no_grad()
    def __call__(
        self, features, codes, centroids, offsets, num_probes: int | None = None, workspace: int = WORKSPACE
    ) -> torch.LongTensor:
        """Nearest codes, see `find_nearest` of `search_unicode2.py`. The codes are those that the tables were made
        from."""
        features, codes = features.float().contiguous(), codes.contiguous()
        rows = min(4096, workspace // (64 * self.dim), workspace // (64 * len(centroids)))
        found = []
        with torch.autocast(features.device.type, enabled=False):
            for part in features.split(max(1, rows)):
                best = Best(part, codes, workspace)
                if self.tables and len(part):
                    self.search_with_kernel(best, centroids, offsets, num_probes)
                if num_probes:
                    cells = {"centroids": centroids, "offsets": offsets, "num_probes": num_probes}
                    best.update(best.missing(), partial(scan_cells, **cells))
                best.update(best.missing(), self.scan)
                found.append(best.found)
        return torch.cat(found)

    def search_with_kernel(self, best: Best, centroids, offsets, num_probes: int | None) -> None:
        """All codes, or those of the nearest cells. Features that the bounds fail for, or that are too far for them,
        are left."""
        query = self.tables.prepare(best.features - self.mean)
        if num_probes:
            # Whatever a file said.
            spans = torch.stack([offsets[:-1], offsets[1:]], -1).clamp(0, self.size)
            near = find_cells(best.features, centroids, offsets, num_probes)
        else:
            spans, near = self.tables.spans(), self.tables.find(query, NUM_NEAR).contiguous()
        tables, queries = self.fill_tables(best.codes, spans), fill_queries(query, best, near)
        group = min(GROUP, -(-queries.count // torch.get_num_threads()))
        library = load_kernel()
        bytes_of_group = library.workspace_size(group, queries.num_near, tables.num_spans)
        space = torch.empty(-(-queries.count // group) * bytes_of_group, dtype=torch.uint8, device="cpu")
        library.search(tables, queries, group, bool(num_probes), KERNEL_SHARE, space.data_ptr())
        best.found.masked_fill_(~query.usable, self.size)

    def fill_tables(self, codes: torch.Tensor, spans: torch.LongTensor) -> Tables:
        """The tables for the kernel, with the first and last codes of the cells to look into, `(num_spans, 2)`."""
        tables = self.tables
        prefix_norm, prefix_error, rest_norm, rest_error = tables.largest
        return Tables.fill(
            prefix=tables.prefix,
            rest=tables.rest,
            constant=tables.constant,
            units=tables.units,
            rest_units=tables.rest_units,
            more=tables.more,
            codes=codes,
            spans=torch.cat([spans, tables.find_parts(spans[:, :1].contiguous())], -1),
            centre_norms=tables.centre_norms,
            extents=tables.extents,
            size=self.size,
            dim=self.dim,
            prefix_size=tables.lead,
            rest_size=tables.rest_size,
            num_parts=len(tables.centres),
            num_spans=len(spans),
            first_cost=tables.lead / 48,
            second_cost=16 + tables.rest_size / 2,
            distance_cost=128 + self.dim / 2,
            scan_cost=self.dim / 16,
            prefix_norm=prefix_norm,
            prefix_error=prefix_error,
            rest_norm=rest_norm,
            rest_error=rest_error,
            above=1 + tables.margin,
            error=(self.dim + 64) * UNIT,
        )

    def scan(self, best: Best) -> None:
        """Compares all codes. Raises `ValueError` when none is finite."""
        if self.half_norm is None:
            scores = make_scores(best.features, best.codes)
        else:
            scores = Scores(best.features, best.codes, self.mean, self.shifted, self.half_norm)
        kind = KernelBest if self.tables and scores.moderate else Best
        scanned = kind(best.features, best.codes, best.workspace)
        scan(scanned, scores, self.numbers)
        if len(scanned.missing()):
            raise ValueError(f"None of the {self.size} codes is finite.")
        best.distance, best.found = scanned.distance, scanned.found


def fill_queries(query: Query, best: Best, near: torch.LongTensor) -> Queries:
    """Features for the kernel, with the cells that each looks into first, `(num_features, num_near)`."""
    return Queries.fill(
        prefix=query.prefix,
        rest=query.rest,
        features=best.features,
        scales=query.scales,
        lost=query.lost,
        norms=query.norms,
        squares=query.squares,
        near=near,
        found=best.found,
        count=near.shape[0],
        num_near=near.shape[1],
    )


class KernelBest(Best):
    """Measures with the kernel: features and codes on a CPU, of which float32 can hold the squares."""

    def improve(self, row: torch.LongTensor, code: torch.LongTensor) -> None:
        pairs = Pairs.fill(
            features=self.features,
            codes=self.codes,
            rows=row.contiguous(),
            numbers=code.contiguous(),
            distances=self.distance,
            found=self.found,
            dim=self.features.shape[1],
            count=len(row),
        )
        load_kernel().improve(pairs)


def find_norms(codes: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Norms of rows less a mean, float32 `(len(codes),)`."""
    parts = codes.split(max(1, CHUNK // codes.shape[1]))
    values = torch.empty(parts[0].shape, dtype=torch.float32, device=codes.device)
    return torch.cat([torch.sub(part, mean, out=values[: len(part)]).norm(dim=-1) for part in parts])


def hash_rows(codes: torch.Tensor) -> torch.LongTensor:
    """A number for each row, `(len(codes),)`, equal for equal rows."""
    generator = torch.Generator("cpu").manual_seed(0)
    factors = torch.randint(-(2**31), 2**31, (codes.shape[1],), generator=generator, device="cpu")
    factors, hashes, parts = factors.to(codes.device) | 1, [], codes.split(max(1, CHUNK // codes.shape[1]))
    values, products = (
        torch.empty(parts[0].shape, dtype=dtype, device=codes.device) for dtype in (torch.float32, torch.long)
    )
    # Into the same memory, as to map some anew takes longer than to fill it.
    for part in parts:
        # Plus zero, as -0.0 equals 0.0.
        bits = torch.add(part, 0.0, out=values[: len(part)]).view(torch.int32)
        hashes.append(products[: len(part)].copy_(bits).mul_(factors).sum(-1))
    return torch.cat(hashes)


def find_repeated(codes: torch.Tensor, offsets: torch.LongTensor) -> torch.BoolTensor:
    """Rows that equal an earlier one of the same cell, `(len(codes),)`."""
    hashes, order = hash_rows(codes).sort(stable=True)
    repeated = torch.zeros_like(order, dtype=torch.bool)
    places = (hashes[1:] == hashes[:-1]).nonzero()[:, 0] + 1
    for part in places.split(max(1, CHUNK // codes.shape[1])):
        later, earlier = order[part], order[part - 1]
        same_cell = torch.searchsorted(offsets, later, right=True) == torch.searchsorted(offsets, earlier, right=True)
        repeated[later] = (codes[later] == codes[earlier]).all(-1) & same_cell
    return repeated
