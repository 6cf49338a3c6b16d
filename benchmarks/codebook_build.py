"""Distortion, time and memory of the two-stage builder beside FAISS, on the same features and the same cores.

    python benchmarks/codebook_build.py --features outputs/features --num-features 1000000 --codebook-size 4096

Peers: flat `faiss.Kmeans` and `faiss.contrib.clustering.two_level_clustering` with their defaults, 25 iterations over
all features. The builder runs plain (20 iterations on all features of each cell), and with fewer iterations in the
cells followed by Lloyd passes across cell borders.

Each method runs in its own process, whose peak resident memory is reported. The peers' time is that of their call
alone, on float32 features in memory. The builder's time is that of all phases after feature extraction, from float16
shards on disk to the codebook on disk. Distortion is the exact mean squared distance of an evenly spaced sample of the
features to the nearest code, by the same function for all methods. Each number of cells is a separate comparison; flat
k-means has no cells. `two_level_clustering` crashes if it allots no centroid to a small cell. Here that cell gets none,
and the table says so. Finished rows are kept: after a kill, the same command resumes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from real_features import load_features, read_float32
from rows import Rows, describe_run, read_peak

# Methods of the builder: backend, iterations and Lloyd passes across cell borders.
METHODS = {
    "ours, faiss": ("faiss", 20, 0),
    "ours, torch": ("torch", 20, 0),
    "ours, torch, 5 iterations": ("torch", 5, 0),
    "ours, torch, 8 iterations": ("torch", 8, 0),
    "ours, torch, 8 iterations, polish 3": ("torch", 8, 3),
}
# Features in a shard.
SHARD = 50_000


def write_shards(folder: str, num_features: int) -> None:
    """Writes the features in the form of the first phase of a build. Each build links to these files."""
    from transformers_unicode2.codebook.features import shard_path, write_arrays

    shards = Path(folder) / "shards"
    shards.mkdir(exist_ok=True)
    features = load_features(folder, num_features)[0]
    for shard, start in enumerate(range(0, len(features), SHARD)):
        path = shard_path(shards, shard)
        rows = features[start : start + SHARD]
        if not path.exists() or path.stat().st_size < rows.nbytes:
            write_arrays(path, {"features": np.array(rows)})


def define_build(folder: str, num_features: int, said: list) -> type:
    """A `Build` that starts from the files of `write_shards` and appends its messages to `said`."""
    from transformers_unicode2.codebook.build import Build
    from transformers_unicode2.codebook.features import read_rows, shard_path, write_arrays, write_file

    dim = load_features(folder)[0].shape[1]

    class FeatureBuild(Build):
        def prepare(self):
            self.source, self.encoder = SimpleNamespace(listing=list, left_out=None), None
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

    return FeatureBuild


def build_ours(
    folder: str, num_features: int, codebook_size: int, num_cells: int, method: tuple, memory: float, said: list
) -> np.ndarray:
    """All phases of `unicode2 codebook build` after feature extraction; appends the build's messages to `said`."""
    from transformers_unicode2.codebook.build import make_parser
    from transformers_unicode2.codebook.storage import load_codebook

    backend, iterations, polish = method
    with tempfile.TemporaryDirectory(dir=folder) as output:
        options = {"images": "-", "encoder": "-", "output": output, "preview-size": 0, "backend": backend}
        options |= {"codebook-size": codebook_size, "num-cells": num_cells, "iterations": iterations, "polish": polish}
        options |= {"allocation": "proportional", "max-memory-gib": memory}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        alone = {"process_index": 0, "num_processes": 1, "is_main_process": True, "device": "cpu"}
        state = SimpleNamespace(**alone, wait_for_everyone=lambda: None)
        define_build(folder, num_features, said)(make_parser().parse_args(words), state).run()
        return load_codebook(output).codes.numpy()


def run_two_level(points: np.ndarray, args: argparse.Namespace, said: list) -> np.ndarray:
    """Centroids of `two_level_clustering`. Cells without a centroid stay empty instead of raising an error."""
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
    """Runs one method in this process: seconds, peak memory in GiB, distortion and messages."""
    import faiss
    import torch

    from transformers_unicode2.codebook.clustering import TorchBackend

    faiss.omp_set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    said = []
    if args.method in METHODS:
        method, start = METHODS[args.method], time.perf_counter()
        count, size, cells = args.num_features, args.codebook_size, args.num_cells[0]
        codes = build_ours(args.features, count, size, cells, method, args.max_memory_gib, said)
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
    memory = read_peak()
    features, backend, errors = load_features(args.features, args.num_features)[0], TorchBackend(), []
    chosen = np.unique(np.linspace(0, len(features) - 1, min(len(features), args.num_measured)).astype(int))
    for rows in np.array_split(chosen, -(-len(chosen) // 65536)) if len(chosen) else ():
        errors.append(backend.assign(backend.put(features[rows].astype(np.float32)), codes)[1])
    distortion = float(np.concatenate(errors).mean(dtype=np.float64)) if errors else None
    return {"seconds": seconds, "memory": memory, "distortion": distortion, "said": said}


def run_in_process(method: str, **options) -> dict:
    """Runs `run_method` in its own process. What that prints goes to standard error."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, str(Path(__file__)), "--method", method, "--row", f"{folder}/row.json"]
        words += [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        subprocess.run(words, stdout=sys.stderr, check=True)
        return json.loads((Path(folder) / "row.json").read_text())


def measure_rate(threads: int) -> float:
    """Operations per second of a large float32 product."""
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
    parser.add_argument("--results", help="file for finished rows (default: FEATURES/codebook_build.json)")
    parser.add_argument("--num-features", type=int, default=1_000_000)
    parser.add_argument("--codebook-size", type=int, default=4096)
    parser.add_argument("--num-cells", type=int, nargs="+", default=[64, 8], help="one comparison each")
    parser.add_argument("--max-memory-gib", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--num-measured", type=int, default=250_000, help="features to measure the distortion on")
    parser.add_argument("--method", help="run only this method and write its figures to --row")
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
    not_setting = ("results", "method", "row", "num_cells")
    setting = {name: value for name, value in vars(args).items() if name not in not_setting}
    setting["num_features"] = count
    rows = Rows(args.results or f"{args.features}/codebook_build.json", setting)

    def measure(method: str, num_cells: int) -> dict:
        name = f"{method}, {num_cells} cells"
        return rows.measure(name, lambda: run_in_process(method, **setting, num_cells=num_cells))

    table = {}
    for num_cells in args.num_cells:
        table[num_cells] = {method: measure(method, num_cells) for method in ("two_level_clustering", *METHODS)}
    flat = measure("faiss.Kmeans", 1)
    rate = rows.measure("rate", lambda: {"rate": measure_rate(args.threads)})["rate"]
    products = 2.0 * min(count, 512 * args.codebook_size) * args.codebook_size * dim * 25
    print(describe_run(args.threads, "faiss-cpu"))
    measured = min(count, args.num_measured)
    print(f"\n{count} features of width {dim}, {args.codebook_size} codes; distortion of {measured} of them.")
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
            print(f"\n`two_level_clustering` would crash at {len(died)} of {num_cells} cells: {', '.join(died)}.")


def format_row(row: dict, flat: dict, peer: dict | None = None) -> str:
    """The columns of a row from the seconds on. Those that compare with a peer are empty without one."""
    faster = f"{peer['seconds'] / row['seconds']:.2f}" if peer else ""
    of_peer = f"{row['distortion'] / peer['distortion']:.4f}" if peer else ""
    shared = f"{row['memory']:.2f} | {row['distortion']:.5g} | {row['distortion'] / flat['distortion']:.4f}"
    return f"| {row['seconds']:.1f} | {faster} | {shared} | {of_peer} |"


if __name__ == "__main__":
    main()
