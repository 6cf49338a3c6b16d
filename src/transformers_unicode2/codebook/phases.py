"""The phases between features and codes. Each writes its files whole or not at all, so that a killed build resumes."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from .clustering import Backend, add_groups, cluster_cell, hash_rows, keep_distinct, round_to_bfloat16, to_float32
from .features import count_columns, count_rows, open_shard, read_rows, shard_path, write_arrays

# Rows of a shard held in float32 at a time.
ROWS = 65536
# The same where several steps read each row. They stay in the cache of a CPU.
CACHED_ROWS = 4096
# A Lloyd pass across cell borders compares a feature with the codes of this many cells; 8 gave the same distortion.
NEAR_CELLS = 4


def train_cells(
    paths: list[Path],
    num_cells: int,
    num_sampled: int,
    backend: Backend,
    seed: int,
    output: Path,
    num_iterations: int,
) -> None:
    """Coarse k-means on a seeded sample of the features in the shards `paths`.

    Writes `centroids`, float32 `(num_cells, dim)`, to `output`. Raises `ValueError` when there are fewer features than
    cells.
    """
    from tqdm import tqdm

    total = sum(count_rows(path) for path in paths)
    if total < num_cells:
        raise ValueError(f"{total} features are too few for {num_cells} cells; add images or ask for fewer cells.")
    points = sample_features(paths, num_sampled, seed)
    progress = partial(tqdm, unit="iteration", desc="k-means of the cells")
    centroids = backend.kmeans(backend.put(to_float32(points)), num_cells, seed, num_iterations, progress)
    write_arrays(output, {"centroids": np.float32(centroids)})


def sample_features(paths: list[Path], num_sampled: int, seed: int) -> np.ndarray:
    """A seeded sample of the features of all shards, in their order, float16 `(num_sampled, dim)`; all if too few."""
    counts = np.array([count_rows(path) for path in paths])
    chosen = np.sort(np.random.default_rng(seed).choice(counts.sum(), min(counts.sum(), num_sampled), replace=False))
    ends = np.cumsum(counts)
    parts = []
    for shard, rows in enumerate(np.split(chosen, np.searchsorted(chosen, ends[:-1]))):
        rows = rows - (ends[shard] - counts[shard])
        for start in range(0, counts[shard], ROWS):
            inside = rows[(rows >= start) & (rows < start + ROWS)] - start
            if len(inside):
                parts.append(read_rows(paths[shard], "features", start, start + ROWS)[inside])
    return np.concatenate(parts)


def sort_shard(features: Path, output: Path, centroids: np.ndarray, backend: Backend) -> None:
    """Sorts a shard of features by cell, and deletes it once the sorted one is written.

    The sorted shard has the same arrays, uint64 `hashes` of the rows rounded to codes, and int64 `offsets`
    `(num_cells + 1,)`.
    """
    with open_shard(features) as shard:
        arrays = {name: shard.get_tensor(name) for name in shard.keys()}
    cells, hashes = [], []
    for start in range(0, len(arrays.get("features", [])), ROWS):
        points = arrays["features"][start : start + ROWS]
        cells.append(backend.assign(backend.put(to_float32(points)), centroids, exact=False)[0])
        hashes.append(hash_rows(points))
    if cells:
        cells = np.concatenate(cells)
        order = np.argsort(cells, kind="stable")
        arrays["hashes"] = np.concatenate(hashes)
        arrays = {name: np.take(array, order, axis=0) for name, array in arrays.items()}
        counts = np.bincount(cells, minlength=len(centroids))
    else:
        counts = np.zeros(len(centroids), np.int64)
    write_arrays(output, {**arrays, "offsets": np.concatenate([[0], np.cumsum(counts)])})
    features.unlink()


class CellReader:
    """The rows of each cell, gathered from shards that are sorted by cell."""

    def __init__(self, folder: Path, num_shards: int):
        self.paths = [shard_path(folder, shard) for shard in range(num_shards)]
        offsets, self.names = [], set()
        for path in self.paths:
            with open_shard(path) as shard:
                offsets.append(shard.get_tensor("offsets"))
                self.names.update(shard.keys())
        self.offsets = np.stack(offsets)  # (num_shards, num_cells + 1)

    def width(self, name: str) -> int:
        return next(width for width in (count_columns(path, name) for path in self.paths) if width)

    def count(self, cell: int) -> int:
        return int((self.offsets[:, cell + 1] - self.offsets[:, cell]).sum())

    def read(self, cell: int, name: str, block: int | None = None):
        """Yields the rows of a cell, shard by shard, in blocks of at most `block` rows."""
        for path, offsets in zip(self.paths, self.offsets):
            start, stop = int(offsets[cell]), int(offsets[cell + 1])
            for first in range(start, stop, block or max(1, stop - start)):
                yield read_rows(path, name, first, min(stop, first + (block or stop)))

    def sample(self, cell: int, count: int, seed: int) -> np.ndarray:
        """All features of a cell, or a seeded sample of `count` of them, float32 `(num_rows, dim)`."""
        total = self.count(cell)
        keep = None
        if total > count:
            keep = np.zeros(total, bool)
            keep[np.random.default_rng(seed).choice(total, count, replace=False)] = True
        parts, position = [], 0
        for block in self.read(cell, "features", ROWS):
            parts.append(block if keep is None else block[keep[position : position + len(block)]])
            position += len(block)
        return to_float32(np.concatenate(parts))


def count_distinct(reader: CellReader, cell: int) -> int:
    """Number of distinct features of a cell, rounded to bfloat16: the most codes that it can hold."""
    return len(np.unique(np.concatenate([np.zeros(0, np.uint64), *reader.read(cell, "hashes")])))


def train_cell(
    reader: CellReader,
    cell: int,
    num_codes: int,
    max_points: int,
    backend: Backend,
    seed: int,
    forbidden: np.ndarray,
    num_iterations: int = 20,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
    """Fine k-means inside one cell (Algorithm 1), on at most `max_points` of its features.

    `forbidden` are uint64 hashes, ascending, of codes that the cell may not have. Returns float32 codes
    `(num_codes, dim)`, fewer if the cell has fewer distinct features; and `assign_rows` of the cell, `None` if unknown.
    """
    if num_codes == 0:
        return np.zeros((0, reader.width("features")), np.float32), None
    points = reader.sample(cell, max_points, seed)
    codes, assigned = cluster_cell(points, num_codes, backend, seed, forbidden, num_iterations)
    if assigned and len(points) == reader.count(cell):
        return codes, assigned
    del points, assigned
    # The whole cell may hold distinct features that the sample lacks.
    for block in reader.read(cell, "features", ROWS):
        if len(codes) == num_codes:
            break
        codes = keep_distinct(np.concatenate([codes, round_to_bfloat16(block)]), forbidden)[:num_codes]
    return codes, None


def assign_rows(reader: CellReader, cell: int, codes: np.ndarray, backend: Backend) -> tuple[np.ndarray, np.ndarray]:
    """`Backend.assign` of all rows of a cell."""
    blocks = reader.read(cell, "features", ROWS)
    parts = [backend.assign(backend.put(to_float32(block)), codes) for block in blocks]
    indices, distances = zip(*parts) if parts else ([np.zeros(0, np.int64)], [np.zeros(0, np.float32)])
    return np.concatenate(indices), np.concatenate(distances)


def use_codes(indices: np.ndarray, distances: np.ndarray, num_codes: int) -> dict[str, np.ndarray]:
    """Counts how the rows of a cell use its codes.

    Args:
        indices: int64 `(num_rows,)`, the nearest code of each row.
        distances: `(num_rows,)`, the squared distances to them.
        num_codes: codes to count for.

    Returns:
        Int64 `counts` and float64 `distortions` (sums of squared distances), both `(num_codes,)`.
    """
    return {
        "counts": np.bincount(indices, minlength=num_codes),
        "distortions": np.bincount(indices, distances.astype(np.float64), minlength=num_codes),
    }


def sum_thumbnails(
    reader: CellReader, cell: int, indices: np.ndarray, num_codes: int, memory: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Adds up the thumbnails of the rows of each code, for as many codes at a time as fit `memory` bytes.

    `indices`, int64 `(num_rows,)`, are the codes of the rows of the cell. Yields the codes as a slice, and float64 sums
    `(codes of the slice, width)`. The thumbnails are read once for each slice.
    """
    width = reader.width("thumbnails")
    # Sums, what is added to them, and as many rows.
    fitting = max(1, memory // (32 * width))
    for first in range(0, num_codes, fitting):
        chosen = slice(first, min(first + fitting, num_codes))
        sums, start = np.zeros((chosen.stop - first, width)), 0
        for block in reader.read(cell, "thumbnails", min(ROWS, fitting)):
            places = indices[start : start + len(block)] - first
            inside = (places >= 0) & (places < len(sums))
            add_groups(sums, block[inside], places[inside])
            start += len(block)
        yield chosen, sums


def sum_features(reader: CellReader, cell: int, codes: np.ndarray, backend: Backend) -> dict[str, np.ndarray]:
    """Like `use_codes`, by the backend's faster products, with the float64 `sums` of the features, `(num_codes, dim)`.

    The distortions are exact for the codes that these products find.
    """
    center = codes.mean(0)
    shifted, counts = codes - center, np.zeros(len(codes), np.int64)
    squares, sums = np.zeros(len(codes)), np.zeros(codes.shape)
    for block in reader.read(cell, "features", CACHED_ROWS):
        points = to_float32(block) - center
        indices = backend.assign(backend.put(points), shifted, exact=False)[0]
        counts += np.bincount(indices, minlength=len(codes))
        squares += np.bincount(indices, np.einsum("ij,ij->i", points, points), minlength=len(codes))
        add_groups(sums, points, indices)
    distortions = squares - 2 * (sums * shifted).sum(1) + counts * np.square(shifted, dtype=np.float64).sum(1)
    return {"counts": counts, "distortions": distortions, "sums": sums + counts[:, None] * center}


def average_previews(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean thumbnails, uint8 `(num_codes, width)`, from sums of thumbnails; black for unused codes.

    Overwrites the sums, float64 `(num_codes, width)`.
    """
    sums /= np.maximum(counts, 1)[:, None]
    return np.round(sums, out=sums).astype(np.uint8)


def average_thumbnails(
    reader: CellReader, cell: int, indices: np.ndarray, counts: np.ndarray, memory: int
) -> np.ndarray:
    """Mean thumbnails of the codes of a cell, uint8 `(num_codes, width)`.

    `counts` are the uses of the codes; the other arguments are those of `sum_thumbnails`.
    """
    means = np.zeros((len(counts), reader.width("thumbnails")), np.uint8)
    for chosen, sums in sum_thumbnails(reader, cell, indices, len(counts), memory):
        means[chosen] = average_previews(sums, counts[chosen])
    return means


def find_near_codes(centroids: np.ndarray, shares: np.ndarray) -> list[np.ndarray]:
    """For each cell the ids, int64 and ascending, of its own codes and those of the nearest cells that have any.

    `centroids` are `(num_cells, dim)`, `shares` the codes per cell; `NEAR_CELLS` cells count in all.
    """
    points = centroids.astype(np.float64) - centroids.mean(0)
    distances = np.square(points).sum(1) - 2 * points @ points.T
    distances[:, shares == 0] = np.inf
    np.fill_diagonal(distances, -np.inf)
    near = np.sort(np.argsort(distances, axis=1, kind="stable")[:, :NEAR_CELLS])
    ends = np.cumsum(shares)
    return [np.concatenate([np.arange(ends[c] - shares[c], ends[c]) for c in cells]) for cells in near]


def pass_over_cell(
    reader: CellReader, cell: int, codes: np.ndarray, ids: np.ndarray, backend: Backend, last: bool, memory: int
) -> dict[str, np.ndarray]:
    """One Lloyd pass over the rows of one cell, which may use the codes `ids` of the whole codebook `codes`.

    Returns int64 `ids` of the codes in use, ascending, with their `counts` and `distortions`, and float32 `sums`. The
    sums are those of the features; in the last pass of the thumbnails, see `sum_thumbnails`, unless `memory` is 0.
    """
    if last:
        indices, distances = assign_rows(reader, cell, codes[ids], backend)
        output = use_codes(indices, distances, len(ids))
        if memory:
            output["sums"] = np.empty((len(ids), reader.width("thumbnails")), np.float32)
            for chosen, sums in sum_thumbnails(reader, cell, indices, len(ids), memory):
                output["sums"][chosen] = sums
    else:
        output = sum_features(reader, cell, codes[ids], backend)
        output["sums"] = output["sums"].astype(np.float32)
    used = output["counts"] > 0
    return {"ids": ids[used], **{name: array[used] for name, array in output.items()}}


def average_sums(passes: list[Path], first: int, count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over the files of one pass, for the `count` codes from `first` on.

    Returns float64 means `(count, width)`, zeros for a code without rows, and the number of rows of each code. Files
    are always added in the same order, so that every process gets the same means.
    """
    sums, counts = np.zeros((count, width)), np.zeros(count, np.int64)
    for path in passes:
        with open_shard(path) as file:
            ids = file.get_tensor("ids")
            low, high = np.searchsorted(ids, [first, first + count])
            if low < high:
                sums[ids[low:high] - first] += file.get_slice("sums")[low:high]
                counts[ids[low:high] - first] += file.get_slice("counts")[low:high]
    return sums / np.maximum(counts, 1)[:, None], counts


def settle(before: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Moves codes back to `before` if they are not finite or would equal another code. Changes `codes` in place."""
    while True:
        hashes = hash_rows(codes)
        first = np.unique(hashes, return_index=True)[1]
        doubled = np.ones(len(codes), bool)
        doubled[first] = False
        clash = np.isin(hashes, hashes[doubled]) | ~np.isfinite(codes.sum(1, dtype=np.float64))
        rows = np.flatnonzero(clash)
        rows = rows[(codes[rows] != before[rows]).any(-1)]
        if not len(rows):
            return codes
        codes[rows] = before[rows]
