"""The phases between features and codes: each writes files that are whole or absent, so that a killed build goes on where it was."""

from pathlib import Path

import numpy as np

from .clustering import Backend, add_groups, cluster_cell, find_codes, hash_rows, keep_distinct, round_to_bfloat16
from .features import count_columns, count_rows, open_shard, read_rows, shard_path, write_arrays

ROWS = 65536  # rows of a shard held in float32 at a time


def train_cells(
    folder: Path, num_shards: int, num_cells: int, num_sampled: int, backend: Backend, seed: int, output: Path
) -> None:
    """Coarse k-means on a seeded sample of the features: `centroids`, float32 `(num_cells, dim)`, in `output`."""
    paths = [shard_path(folder, shard) for shard in range(num_shards)]
    total = sum(count_rows(path) for path in paths)
    if total < num_cells:
        raise ValueError(f"{total} features are too few for {num_cells} cells; add images or ask for fewer cells.")
    points = sample_features(paths, num_sampled, seed)
    centroids = backend.kmeans(backend.put(points.astype(np.float32)), num_cells, seed)
    write_arrays(output, {"centroids": np.float32(centroids)})


def sample_features(paths: list[Path], num_sampled: int, seed: int) -> np.ndarray:
    """A seeded sample of the features of all shards, float16 `(num_sampled, dim)`, in their order; all where there are fewer."""
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
    """A shard of features to one sorted by cell: its arrays, uint64 `hashes` of the rows as codes, and `offsets` `(num_cells + 1,)`.

    The shard of features is deleted once the sorted one is there.
    """
    with open_shard(features) as shard:
        arrays = {name: shard.get_tensor(name) for name in shard.keys()}
    cells, hashes = [], []
    for start in range(0, len(arrays.get("features", [])), ROWS):
        points = arrays["features"][start : start + ROWS].astype(np.float32)
        cells.append(backend.assign(backend.put(points), centroids)[0])
        hashes.append(hash_rows(round_to_bfloat16(points)))
    if cells:
        cells = np.concatenate(cells)
        order = np.argsort(cells, kind="stable")
        arrays = {name: array[order] for name, array in {**arrays, "hashes": np.concatenate(hashes)}.items()}
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
        """Yields the rows of a cell, shard by shard and in blocks of at most `block`."""
        for path, offsets in zip(self.paths, self.offsets):
            start, stop = int(offsets[cell]), int(offsets[cell + 1])
            for first in range(start, stop, block or max(1, stop - start)):
                yield read_rows(path, name, first, min(stop, first + (block or stop)))

    def sample(self, cell: int, count: int, seed: int) -> np.ndarray:
        """All features of a cell, or a seeded sample of `count`, float32."""
        total = self.count(cell)
        keep = None
        if total > count:
            keep = np.zeros(total, bool)
            keep[np.random.default_rng(seed).choice(total, count, replace=False)] = True
        parts, position = [], 0
        for block in self.read(cell, "features", ROWS):
            parts.append(block if keep is None else block[keep[position : position + len(block)]])
            position += len(block)
        return np.concatenate(parts).astype(np.float32)


def count_distinct(reader: CellReader, cell: int) -> int:
    """Distinct features of a cell once rounded to bfloat16: as many codes as it can hold."""
    return len(np.unique(np.concatenate([np.zeros(0, np.uint64), *reader.read(cell, "hashes")])))


def train_cell(
    reader: CellReader, cell: int, num_codes: int, max_points: int, backend: Backend, seed: int, forbidden: np.ndarray
) -> dict[str, np.ndarray]:
    """Fine k-means inside one cell (Algorithm 1), and how its rows use its codes.

    `forbidden` are hashes of codes that it may not have. Returns float32 `codes` `(num_codes, dim)`, int64 `counts` and float64
    `distortions` (sums of squared distances), both `(num_codes,)`, and with thumbnails their means, uint8 `previews`
    `(num_codes, side * side * 3)`. There are fewer codes when the cell has fewer distinct features.
    """
    if num_codes == 0:
        return empty_cell(reader)
    codes = cluster_cell(reader.sample(cell, max_points, seed), num_codes, backend, seed, forbidden)
    for block in reader.read(cell, "features", ROWS):  # what a sample may lack, the whole cell may have
        if len(codes) == num_codes:
            break
        codes = keep_distinct(np.concatenate([codes, round_to_bfloat16(block)]), forbidden)[:num_codes]
    counts, distortions = np.zeros(len(codes), np.int64), np.zeros(len(codes))
    thumbnails = reader.read(cell, "thumbnails", ROWS) if "thumbnails" in reader.names else None
    colors = None
    for block in reader.read(cell, "features", ROWS):
        indices, distances = backend.assign(backend.put(block.astype(np.float32)), codes)
        counts += np.bincount(indices, minlength=len(codes))
        distortions += np.bincount(indices, distances.astype(np.float64), minlength=len(codes))
        if thumbnails is not None:
            tiles = next(thumbnails)
            colors = np.zeros((len(codes), tiles.shape[1])) if colors is None else colors
            add_groups(colors, tiles, indices)
    output = {"codes": codes, "counts": counts, "distortions": distortions}
    if colors is not None:
        output["previews"] = np.round(colors / np.maximum(counts, 1)[:, None]).astype(np.uint8)
    return output


def empty_cell(reader: CellReader) -> dict[str, np.ndarray]:
    """What `train_cell` returns of a cell without codes."""
    output = {
        "codes": np.zeros((0, reader.width("features")), np.float32),
        "counts": np.zeros(0, np.int64),
        "distortions": np.zeros(0),
    }
    return output | (
        {"previews": np.zeros((0, reader.width("thumbnails")), np.uint8)} if "thumbnails" in reader.names else {}
    )


def assign_shard(sorted_shard: Path, codebook, output: Path) -> None:
    """Nearest code of every row of a shard among all of the codebook: int32 `codes` `(num_rows,)` and their `distortion` `(1,)`."""
    found, distortion = [np.zeros(0, np.int32)], 0.0
    for start in range(0, count_rows(sorted_shard), ROWS):
        points = read_rows(sorted_shard, "features", start, start + ROWS).astype(np.float32)
        indices, distances = find_codes(codebook, points)
        found.append(indices.astype(np.int32))
        distortion += float(distances.sum(dtype=np.float64))
    write_arrays(output, {"codes": np.concatenate(found), "distortion": np.array([distortion])})


def average_rows(
    sorted_shards: list[Path], assigned: list[Path], name: str, first: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Means of the rows, of an array of that name, assigned to the codes from `first` on: float64 `(count, width)`, and how many rows
    each has, `(count,)`. A code without rows has zeros. The rows are added in the order of the shards, whoever does it.
    """
    sums, counts = 0.0, np.zeros(count, np.int64)
    for shard, ids in zip(sorted_shards, assigned):
        for start in range(0, count_rows(ids, "codes"), ROWS):
            indices = read_rows(ids, "codes", start, start + ROWS).astype(np.int64) - first
            inside = (indices >= 0) & (indices < count)
            if inside.any():
                rows = read_rows(shard, name, start, start + ROWS)[inside]
                sums = np.zeros((count, rows.shape[1])) if np.isscalar(sums) else sums
                add_groups(sums, rows, indices[inside])
                counts += np.bincount(indices[inside], minlength=count)
    return sums / np.maximum(counts, 1)[:, None], counts


def settle(before: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Moved codes, changed in place: those that are not finite or that would fall on another code go back to where they were."""
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
