"""How good, how fast and how large is the two-stage builder beside FAISS? On the same features and the same cores.

    python benchmarks/codebook_build.py --features outputs/features --num-features 1000000 --codebook-size 4096

Peers: flat `faiss.Kmeans` and `faiss.contrib.clustering.two_level_clustering` with their defaults, 25 iterations of all features. The builder
comes plain (20 iterations, on all features in the cells), and with fewer iterations in the cells and Lloyd passes across their borders.

Each method runs in a process of its own, whose peak resident memory is told. The peers' seconds are those of their call alone, on
float32 features in memory; the builder's are those of all its phases after the features, from shards of float16 on disk to the
codebook on disk. Distortion is the mean squared distance of an even sample of the features to the nearest of all codes, exact, by the
same function for all. Each number of cells is a comparison of its own; flat k-means has none. Where `two_level_clustering` allots a small cell no centroid, at which it dies, that cell gets none here and the
table says so. Finished rows are kept: the same command goes on.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from real_features import load_features, read_float32
from rows import Rows, describe_run

METHODS = {  # of the builder: backend, iterations and Lloyd passes across the borders
    "ours, faiss": ("faiss", 20, 0),
    "ours, torch": ("torch", 20, 0),
    "ours, torch, 5 iterations": ("torch", 5, 0),
    "ours, torch, 8 iterations": ("torch", 8, 0),
    "ours, torch, 8 iterations, polish 3": ("torch", 8, 3),
}
SHARD = 50_000  # features


def write_shards(folder: str, num_features: int) -> None:
    """The features as the first phase of a build leaves them: of these files each build gets links."""
    from transformers_unicode2.codebook.features import shard_path, write_arrays

    shards = Path(folder) / "shards"
    shards.mkdir(exist_ok=True)
    features = load_features(folder, num_features)[0]
    for shard, start in enumerate(range(0, len(features), SHARD)):
        path = shard_path(shards, shard)
        rows = features[start : start + SHARD]
        if not path.exists() or path.stat().st_size < rows.nbytes:
            write_arrays(path, {"features": np.array(rows)})


def build_ours(
    folder: str, num_features: int, codebook_size: int, num_cells: int, method: tuple, memory: float, said: list
) -> np.ndarray:
    """All phases of `unicode2 codebook build` after the features; what the build says of its phases is added to `said`."""
    from transformers_unicode2.codebook.build import Build, make_parser
    from transformers_unicode2.codebook.features import read_rows, shard_path, write_arrays, write_file
    from transformers_unicode2.codebook.storage import load_codebook

    class FeatureBuild(Build):
        def prepare(self):
            self.source, self.encoder = SimpleNamespace(listing=list), None
            self.record, self.num_images = {}, num_features
            self.num_rows, self.dim = num_features, dim
            self.shard_bytes, self.images_per_shard = 2 * dim, SHARD
            self.num_shards = -(-num_features // SHARD)

        def extract(self):
            for shard in range(self.num_shards):
                source, target = shard_path(Path(folder) / "shards", shard), shard_path(self.features, shard)
                write_file(self.features / f"{shard:05d}.skipped.txt", b"")
                if (shard + 1) * SHARD <= num_features:
                    os.link(source, target)
                else:
                    write_arrays(target, {"features": read_rows(source, "features", 0, num_features % SHARD)})

        def say(self, text):
            said.append(text)

    dim = load_features(folder)[0].shape[1]
    backend, iterations, polish = method
    with tempfile.TemporaryDirectory(dir=folder) as output:
        options = {"images": "-", "encoder": "-", "output": output, "preview-size": 0, "backend": backend}
        options |= {"codebook-size": codebook_size, "num-cells": num_cells, "iterations": iterations, "polish": polish}
        options |= {"allocation": "proportional", "max-memory-gib": memory}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        alone = {"process_index": 0, "num_processes": 1, "is_main_process": True, "device": "cpu"}
        state = SimpleNamespace(**alone, wait_for_everyone=lambda: None)
        Build.run(FeatureBuild(make_parser().parse_args(words), state))
        return load_codebook(output).codes.numpy()


def run_two_level(points: np.ndarray, args: argparse.Namespace, said: list) -> np.ndarray:
    """Centroids of `two_level_clustering`, with cells that have none instead of an error."""
    import faiss
    from faiss.contrib.clustering import two_level_clustering

    class Kmeans(faiss.Kmeans):
        def train(self, x):
            if self.k:
                return super().train(x)
            said.append(f"{len(x)} features got no centroid")
            self.centroids, self.iteration_stats = np.zeros((0, self.d), np.float32), []

    stock, faiss.Kmeans = faiss.Kmeans, Kmeans
    try:
        options = {"min_points_per_centroid": 1, "verbose": True, "seed": 0}
        return two_level_clustering(points, args.num_cells[0], args.codebook_size, **options)[0]
    finally:
        faiss.Kmeans = stock


def run_method(args: argparse.Namespace) -> dict:
    """One method in this process: seconds, peak memory in GiB, distortion and, of ours, what it said of its phases."""
    import faiss
    import torch

    from transformers_unicode2.codebook.clustering import TorchBackend

    faiss.omp_set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    said = []
    if args.method in METHODS:
        method, start = METHODS[args.method], time.perf_counter()
        size = (args.num_features, args.codebook_size, args.num_cells[0])
        codes = build_ours(args.features, *size, method, args.max_memory_gib, said)
    else:
        points = read_float32(args.features, args.num_features)
        start = time.perf_counter()
        if args.method == "two_level_clustering":
            codes = run_two_level(points, args, said)
        else:
            options = {"niter": 25, "max_points_per_centroid": 512, "verbose": True, "seed": 0}
            kmeans = faiss.Kmeans(points.shape[1], args.codebook_size, **options)
            kmeans.train(points)
            codes = kmeans.centroids
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    features, backend, errors = load_features(args.features, args.num_features)[0], TorchBackend(), []
    chosen = np.unique(np.linspace(0, len(features) - 1, min(len(features), args.num_measured)).astype(int))
    for rows in np.array_split(chosen, -(-len(chosen) // 65536)) if len(chosen) else ():
        errors.append(backend.assign(backend.put(features[rows].astype(np.float32)), codes)[1])
    distortion = float(np.concatenate(errors).mean(dtype=np.float64)) if errors else None
    return {"seconds": seconds, "memory": memory, "distortion": distortion, "said": said}


def run_in_process(method: str, **options) -> dict:
    """`run_method` in a process of its own; what that prints goes to the standard error."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, str(Path(__file__)), "--method", method, "--row", f"{folder}/row.json"]
        words += [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        subprocess.run(words, stdout=sys.stderr, check=True)
        return json.loads((Path(folder) / "row.json").read_text())


def measure_rate(threads: int) -> float:
    """Operations a second of a large float32 product."""
    import torch

    torch.set_num_threads(threads)
    a, b = torch.randn(4096, 1024), torch.randn(1024, 4096)
    a @ b
    start = time.perf_counter()
    for _ in range(3):
        a @ b
    return 3 * 2 * 4096 * 4096 * 1024 / (time.perf_counter() - start)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--features", default="outputs/features", help="folder that real_features.py wrote")
    parser.add_argument("--results", help="file for finished rows; default: FEATURES/codebook_build.json")
    parser.add_argument("--num-features", type=int, default=1_000_000)
    parser.add_argument("--codebook-size", type=int, default=4096)
    parser.add_argument("--num-cells", type=int, nargs="+", default=[64, 8], help="8 of 512 codes, as in the paper")
    parser.add_argument("--max-memory-gib", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--num-measured", type=int, default=250_000, help="features to measure the distortion on")
    parser.add_argument("--method", help="run this method alone, its figures to --row")
    parser.add_argument("--row", help="file for the figures of --method")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if args.method:
        Path(args.row).write_text(json.dumps(run_method(args)))
        return
    dim = load_features(args.features)[0].shape[1]
    count = len(load_features(args.features, args.num_features)[0])
    write_shards(args.features, count)
    setting = {
        name: value for name, value in vars(args).items() if name not in ("results", "method", "row", "num_cells")
    }
    setting["num_features"] = count
    rows = Rows(args.results or f"{args.features}/codebook_build.json", setting)

    def measure(method: str, num_cells: int) -> dict:
        name = f"{method}, {num_cells} cells"
        return rows.measure(name, lambda: run_in_process(method, **setting, num_cells=num_cells))

    table = {
        num_cells: {method: measure(method, num_cells) for method in ("two_level_clustering", *METHODS)}
        for num_cells in args.num_cells
    }
    flat = measure("faiss.Kmeans", 1)
    rate = rows.measure("rate", lambda: {"rate": measure_rate(args.threads)})["rate"]
    products = 2.0 * min(count, 512 * args.codebook_size) * args.codebook_size * dim * 25
    print(describe_run(args.threads, "faiss-cpu"))
    print(
        f"\n{count} features of width {dim}, {args.codebook_size} codes; distortion of {min(count, args.num_measured)} of them."
    )
    print(f"The products of flat k-means alone: {products / rate:.0f} s.\n")
    print("| cells | method | s | times as fast as two_level | peak GiB | distortion | of flat | of two_level |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for num_cells, methods in table.items():
        peer = methods["two_level_clustering"]
        for method, row in methods.items():
            print(f"| {num_cells} | {method} {format_row(row, flat, peer)}")
    print(f"| | faiss.Kmeans {format_row(flat, flat)}")
    for num_cells, methods in table.items():
        died = methods["two_level_clustering"]["said"]
        if died:
            print(f"\nOf {num_cells} cells `two_level_clustering` would have died at {len(died)}: {', '.join(died)}.")


def format_row(row: dict, flat: dict, peer: dict | None = None) -> str:
    """The cells of a table from the seconds on, the last of them empty without a peer."""
    faster, of_peer = (
        (f"{peer['seconds'] / row['seconds']:.2f}", f"{row['distortion'] / peer['distortion']:.4f}")
        if peer
        else ("", "")
    )
    shared = f"{row['memory']:.2f} | {row['distortion']:.5g} | {row['distortion'] / flat['distortion']:.4f}"
    return f"| {row['seconds']:.1f} | {faster} | {shared} | {of_peer} |"


if __name__ == "__main__":
    main()
