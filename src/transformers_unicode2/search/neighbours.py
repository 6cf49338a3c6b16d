"""The nearest other codes of each code, from the cells that are nearest to it instead of from all codes."""

from collections.abc import Callable

import torch

from ..search_unicode2 import WORKSPACE, find_cells

# Codes that are compared at a time with as many others.
ROWS = 4096


@torch.no_grad()
def find_neighbours(
    codes: torch.Tensor,
    offsets: torch.LongTensor,
    count: int,
    num_probes: int = 4,
    progress: Callable = iter,
) -> torch.IntTensor:
    r"""
    The nearest other codes of each code, as far as they lie in the cells that it looks into: its own, and the cells
    whose means are the nearest. That takes `2 * codebook_size * num_probes * codes of a cell * codebook_dim`
    operations, so time is quadratic in the codes of a cell; memory is not. With as many probes as there are cells, the
    neighbours are the nearest of all but for float32's rounding.

    Args:
        codes (`torch.Tensor` of shape `(codebook_size, codebook_dim)`): codes, or the vectors of C2, sorted by cell.
        offsets (`torch.LongTensor` of shape `(num_cells + 1,)`): cell i holds codes `offsets[i]` to `offsets[i + 1]`.
        count (`int`): neighbours of each code.
        num_probes (`int`, *optional*, defaults to 4): cells that each code looks into, its own included.
        progress (`Callable`, *optional*): wraps the range of cells, as `tqdm` does.

    Returns:
        `torch.IntTensor` of shape `(codebook_size, count)`, the nearest first; -1 where the cells have fewer codes.
    """
    offsets = offsets.to(codes.device)
    means = torch.stack([codes[first:last].float().mean(0) for first, last in zip(offsets[:-1], offsets[1:])])
    found = torch.full((len(codes), count), -1, dtype=torch.int32, device=codes.device)
    best = torch.full((len(codes), count), torch.inf, device=codes.device)
    step = max(1, min(ROWS, WORKSPACE // (64 * len(means))))
    parts = zip(codes.split(step), torch.repeat_interleave(offsets.diff()).split(step))
    cells = torch.cat([look_around(*part, means, offsets, num_probes) for part in parts])
    order = cells.flatten().argsort(stable=True)
    rows = (order // cells.shape[1]).split(torch.bincount(cells.flatten(), minlength=len(means)).tolist())
    bounds = offsets.tolist()
    for cell in progress(range(len(means))):
        for first in range(bounds[cell], bounds[cell + 1], ROWS):
            others = codes[first : min(first + ROWS, bounds[cell + 1])].float() - means[cell]
            for part in rows[cell].split(ROWS):
                update(best, found, part, codes[part].float() - means[cell], others, first)
    return found


def look_around(codes, home, means, offsets, num_probes: int) -> torch.LongTensor:
    """The cells that codes `(num_rows, codebook_dim)` look into, `(num_rows, num_probes)`; `home`, `(num_rows,)`, is
    one of them."""
    near = find_cells(codes.float(), means.nan_to_num(), offsets, num_probes)
    lost = (near != home[:, None]).all(1)
    near[lost, -1] = home[lost]
    return near


def update(best, found, rows: torch.LongTensor, queries, others, first: int) -> None:
    """Enters those of `others`, the codes from number `first` on, that are nearer to `rows` than what was found."""
    squares = others.square().sum(1)
    distances = torch.addmm(queries.square().sum(1)[:, None] + squares, queries, others.T, alpha=-2)
    # Not the code itself
    itself = rows - first
    inside = ((itself >= 0) & (itself < len(others))).nonzero()[:, 0]
    distances[inside, itself[inside]] = torch.inf
    nearest = distances.topk(min(found.shape[1], len(others)), largest=False)
    numbers = (nearest.indices + first).int().masked_fill(nearest.values.isinf(), -1)
    joined, ids = torch.cat([best[rows], nearest.values], 1), torch.cat([found[rows], numbers], 1)
    kept = joined.topk(found.shape[1], largest=False)
    best[rows], found[rows] = kept.values, ids.gather(1, kept.indices)
