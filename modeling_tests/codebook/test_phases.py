import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from transformers_unicode2.codebook.clustering import (
    add_groups,
    cluster_cell,
    hash_rows,
    make_backend,
    round_to_bfloat16,
)
from transformers_unicode2.codebook.features import shard_path, write_arrays
from transformers_unicode2.codebook.phases import (
    CellReader,
    average_sums,
    average_thumbnails,
    find_near_codes,
    pass_over_cell,
    sort_shard,
)


def points_of_clusters(count, dim, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(40, dim))[rng.integers(40, size=count)] * 3 + rng.normal(size=(count, dim))).astype(
        np.float32
    )


@pytest.mark.parametrize("backend", ["faiss", "torch", "torch in float32"])
def test_lloyd_pass_over_near_cells_is_one_of_flat_k_means_when_all_cells_are_near(tmp_path, backend):
    rough = backend == "torch"
    backend = make_backend(backend.split()[0])
    if not rough:
        backend.fast_dtype = torch.float32
    points, centroids = points_of_clusters(900, 12).astype(np.float16), points_of_clusters(4, 12, seed=1)
    for shard, rows in enumerate(np.array_split(points, 3)):
        write_arrays(tmp_path / f"{shard}.safetensors", {"features": rows})
        sort_shard(tmp_path / f"{shard}.safetensors", shard_path(tmp_path, shard), centroids, backend)
    reader, codes = CellReader(tmp_path, 3), round_to_bfloat16(points_of_clusters(30, 12, seed=2))
    near = find_near_codes(centroids, np.array([7, 0, 12, 11]))
    passes = [tmp_path / f"pass-{cell}.safetensors" for cell in range(4)]
    for cell, path in enumerate(passes):
        write_arrays(path, pass_over_cell(reader, cell, codes, near[cell], backend, last=False, memory=0))
    means, counts = average_sums(passes, 0, 30, 12)
    distances = np.square(points.astype(np.float64)[:, None] - codes).sum(-1)
    distortion = sum(load_file(path)["distortions"].sum() for path in passes)
    assert distortion == pytest.approx(distances.min(1).sum(), rel=1e-2 if rough else 1e-5)
    # Products in bfloat16 choose another code for a few points.
    if not rough:
        nearest = distances.argmin(1)
        assert np.array_equal(counts, np.bincount(nearest, minlength=30))
        for code in np.flatnonzero(counts):
            assert means[code] == pytest.approx(points[nearest == code].mean(0, dtype=np.float64), abs=1e-5)


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_a_cell_without_features_of_its_own_has_no_codes(backend):
    points = np.ones((4, 8), np.float32)
    codes, assigned = cluster_cell(points, 1, make_backend(backend), 0, hash_rows(points[:1]))
    assert codes.shape == (0, 8) and assigned is None


def test_near_codes_are_those_of_the_cell_and_of_its_neighbours():
    centroids = np.array([[0.0], [1], [2], [3], [10], [11], [12]])
    near = find_near_codes(centroids, np.array([2, 1, 0, 1, 1, 1, 1]))
    assert near[0].tolist() == [0, 1, 2, 3, 4] and near[6].tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize("dim", [1, 3, 8, 10])
def test_hashes_tell_rows_apart_that_differ_in_one_or_two_values(dim):
    rng = np.random.default_rng(0)
    row = round_to_bfloat16(rng.normal(size=(1, dim)))
    rows = row.repeat(20_000, 0)
    for column in rng.permutation(dim)[:2]:
        rows[:, column] = round_to_bfloat16(rng.normal(size=20_000))
    assert len(np.unique(hash_rows(rows))) == len(np.unique(rows, axis=0))
    assert np.array_equal(hash_rows(rows)[7:9], hash_rows(rows[7:9]))


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_groups_add_up_in_float64(dtype):
    rng = np.random.default_rng(0)
    points, indices = rng.integers(0, 255, (1000, 5)).astype(dtype), rng.integers(0, 7, 1000)
    sums = np.ones((9, 5))
    add_groups(sums, points, indices, block=130)
    expected = np.ones((9, 5))
    np.add.at(expected, indices, points.astype(np.float64))
    assert np.array_equal(sums, expected)


@pytest.mark.parametrize("memory", [2**18, 2**30])
def test_thumbnails_are_averaged_within_a_memory(tmp_path, memory):
    """Float64 sums of all are 2.4 MB; the last code has no rows."""
    rng = np.random.default_rng(0)
    thumbnails, indices = rng.integers(0, 256, (1200, 768), np.uint8), rng.integers(0, 399, 1200)
    for shard, rows in enumerate(np.array_split(thumbnails, 3)):
        arrays = {"features": np.zeros((len(rows), 1), np.float16), "thumbnails": rows}
        write_arrays(shard_path(tmp_path, shard), arrays | {"offsets": np.array([0, len(rows)])})
    reader, counts = CellReader(tmp_path, 3), np.bincount(indices, minlength=400)
    tracemalloc.start()
    means = average_thumbnails(reader, 0, indices, counts, memory)
    peak = tracemalloc.get_traced_memory()[1] - means.nbytes
    tracemalloc.stop()
    assert peak < memory
    expected = [thumbnails[indices == code].mean(0).round() if counts[code] else np.zeros(768) for code in range(400)]
    assert np.array_equal(means, expected)


BUILD = """
import resource, sys
from types import SimpleNamespace
import numpy as np
from transformers_unicode2.codebook.build import Build, make_parser
from transformers_unicode2.codebook.features import shard_path, write_arrays, write_file

class FeatureBuild(Build):
    def prepare(self):
        self.source, self.encoder, self.record = SimpleNamespace(listing=list, left_out=None), None, {}
        self.dim, self.shard_bytes, self.images_per_shard = 256, 512, 50_000
        self.num_images = self.num_rows = self.num_shards * 50_000

    num_shards = int(sys.argv[1])

    def extract(self):
        for shard in range(self.num_shards):
            rows = np.random.default_rng(shard).standard_normal((50_000, 256), np.float32).astype(np.float16)
            write_file(self.features / f"{shard:05d}.skipped.txt", b"")
            write_arrays(shard_path(self.features, shard), {"features": rows})

words = ["--images", "-", "--encoder", "-", "--output", sys.argv[2], "--codebook-size", "512", "--num-cells", "4"]
words += ["--preview-size", "0", "--max-memory-gib", "1", "--iterations", "3", "--polish", "1"]
words += ["--backend", sys.argv[3]]
alone = SimpleNamespace(process_index=0, num_processes=1, is_main_process=True, device="cpu", wait_for_everyone=list)
FeatureBuild(make_parser().parse_args(words), alone).run()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_memory_stays_within_the_budget_however_many_features_there_are(tmp_path, backend):
    """2 million features of width 256 in 4 cells take 1.9 GiB in float32, half in float16; the budget is 1 GiB."""
    words = [sys.executable, "-c", BUILD, "40", str(tmp_path / "o"), backend]
    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    assert float(said.split()[-1]) < 1.0
