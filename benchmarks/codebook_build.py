"""How good, how fast and how large is the two-stage builder beside FAISS? On the same features and the same cores.

    python benchmarks/codebook_build.py --images images --encoder clip-vit-b16 --num-features 1000000 --codebook-size 4096

Peers: flat `faiss.Kmeans` and `faiss.contrib.clustering.two_level_clustering` with their default of 25 iterations; the builder has 20. Distortion is the mean squared distance of all features to their nearest code, exact, by the same function for all.
Each method runs in a process of its own, whose peak resident memory is told; the builder's time has all of its phases after the
features, with its reading and writing. The limit is the time of the products of the k-means alone, at the rate of a large product
measured in the same run.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from real_features import add_arguments, load_features

METHODS = ("flat", "two_level", "ours faiss", "ours torch", "ours torch, polished")


def build_ours(
    features: np.ndarray, args: argparse.Namespace, backend: str, polish: int, phases: list | None = None
) -> np.ndarray:
    """All phases of `unicode2 codebook build` after the features, on shards as the first phase writes them.

    What the build says of its phases is added to `phases`.
    """
    from transformers_unicode2.codebook.build import Build, make_parser
    from transformers_unicode2.codebook.features import shard_path, write_arrays, write_file
    from transformers_unicode2.codebook.storage import load_codebook

    class FeatureBuild(Build):
        def prepare(self):
            self.source, self.encoder, self.record = None, None, {}
            self.dim, self.shard_bytes, self.images_per_shard = features.shape[1], 2 * features.shape[1], 65536
            self.num_images = self.num_rows = len(features)
            self.num_shards = -(-len(features) // self.images_per_shard)

        def extract(self):
            for shard in range(self.num_shards):
                rows = np.asarray(features[shard * self.images_per_shard : (shard + 1) * self.images_per_shard])
                write_file(self.features / f"{shard:05d}.skipped.txt", b"")
                write_arrays(shard_path(self.features, shard), {"features": rows})

        def say(self, text):
            if phases is not None:
                phases.append(text)

    Path(args.cache).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.cache) as output:
        options = {"images": "-", "encoder": "-", "output": output, "preview-size": 0, "backend": backend}
        options |= {"codebook-size": args.codebook_size, "num-cells": args.num_cells, "polish": polish}
        options |= {"allocation": "proportional", "max-memory-gib": args.max_memory_gib}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        alone = {"process_index": 0, "num_processes": 1, "is_main_process": True, "device": "cpu"}
        state = SimpleNamespace(**alone, wait_for_everyone=lambda: None)
        Build.run(FeatureBuild(make_parser().parse_args(words), state))
        return load_codebook(output).codes.numpy()


def run_method(args: argparse.Namespace) -> dict:
    """One method in this process: seconds, peak memory in GiB, distortion and, of ours, what it said of its phases."""
    import faiss
    import torch
    from faiss.contrib.clustering import two_level_clustering

    from transformers_unicode2.codebook.clustering import TorchBackend

    faiss.omp_set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    features, phases = load_features(args)[0][: args.num_features], []
    start = time.perf_counter()
    if args.method == "flat":
        points = features.astype(np.float32)
        kmeans = faiss.Kmeans(points.shape[1], args.codebook_size, niter=25, max_points_per_centroid=512, seed=0)
        kmeans.train(points)
        codes = kmeans.centroids
    elif args.method == "two_level":
        points = features.astype(np.float32)
        codes = two_level_clustering(points, args.num_cells, args.codebook_size, min_points_per_centroid=1, seed=0)[0]
    else:
        backend = args.method.split()[1].strip(",")
        codes = build_ours(features, args, backend, int("polished" in args.method), phases)
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    backend, measured, error = TorchBackend(), features[: args.num_measured], 0.0
    for row in range(0, len(measured), 65536):
        error += float(backend.assign(backend.put(measured[row : row + 65536].astype(np.float32)), codes)[1].sum())
    return {"seconds": seconds, "memory": memory, "distortion": error / max(1, len(measured)), "phases": phases}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--num-features", type=int, default=1_000_000)
    parser.add_argument("--codebook-size", type=int, default=4096)
    parser.add_argument("--num-cells", type=int, default=64)
    parser.add_argument("--max-memory-gib", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--num-measured", type=int, help="features to measure the distortion on; default: all of them")
    parser.add_argument("--method", help="run this method alone and print its figures")
    args = parser.parse_args()
    if args.method:
        print(json.dumps(run_method(args)))
        return
    features = load_features(args)[0]
    count, dim = min(args.num_features, len(features)), features.shape[1]
    rows = {}
    for method in METHODS:
        output = subprocess.run(
            [sys.executable, *sys.argv, "--method", method], stdout=subprocess.PIPE, text=True, check=True
        )
        rows[method] = json.loads(output.stdout.splitlines()[-1])
        print(method, rows[method], file=sys.stderr)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    flat_products = 2.0 * min(count, 512 * args.codebook_size) * args.codebook_size * dim * 25
    print(
        f"{date.today()}, {args.threads} threads, commit {commit}, {count} features of width {dim}, {args.codebook_size} codes,"
    )
    print(
        f"`{' '.join(sys.argv)}`. The products of flat k-means alone: {flat_products / measure_rate(args.threads):.0f} s.\n"
    )
    print("| method | s | of two_level | peak GiB | distortion | of flat |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for method, row in rows.items():
        print(
            f"| {method} | {row['seconds']:.1f} | {row['seconds'] / rows['two_level']['seconds']:.2f} | {row['memory']:.2f} "
            f"| {row['distortion']:.5g} | {row['distortion'] / rows['flat']['distortion']:.4f} |"
        )


if __name__ == "__main__":
    main()
