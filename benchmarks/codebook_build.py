"""How good, how fast and how large is the two-stage builder beside FAISS? On the same features and the same cores.

    python benchmarks/codebook_build.py --images images --encoder clip-vit-b16 --num-features 1000000 --codebook-size 4096

Peers: flat `faiss.Kmeans` and `faiss.contrib.clustering.two_level_clustering`, each with as many iterations and points a centroid as
the builder has. Distortion is the mean squared distance of all features to their nearest code, exact, by the same function for all.
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

METHODS = ("flat", "two_level", "ours faiss", "ours torch", "ours torch, polished")


def read_features(args: argparse.Namespace) -> Path:
    """Patch features of the images, float16 `(num_features, dim)`, in a file that is made once."""
    from tqdm import tqdm

    from transformers_unicode2.codebook.features import Encoder
    from transformers_unicode2.codebook.images import ImageSource, decode_image

    path = Path(args.cache) / "features.npy"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    encoder, source, rows = Encoder(args.encoder, "bfloat16"), ImageSource(args.images), []
    for start in tqdm(range(0, len(source), 32), unit="batch", desc="features"):
        images = []
        for _, content in source.read(start, start + 32):
            try:
                images.append(decode_image(content))
            except (OSError, ValueError):
                continue
        rows.append(encoder(images)[0].reshape(-1, encoder.dim).astype(np.float16))
    np.save(path, np.concatenate(rows)[np.random.default_rng(0).permutation(sum(map(len, rows)))])
    return path


def build_ours(features: np.ndarray, args: argparse.Namespace, backend: str, polish: int) -> np.ndarray:
    """All phases of `unicode2 codebook build` after the features, on shards as the first phase writes them."""
    from transformers_unicode2.codebook.build import Build, make_parser
    from transformers_unicode2.codebook.features import shard_path, write_arrays, write_file
    from transformers_unicode2.codebook.storage import load_codebook

    class FeatureBuild(Build):
        def prepare(self):
            self.source, self.encoder, self.record = None, None, {}
            self.dim, self.row_bytes, self.images_per_shard = features.shape[1], 2 * features.shape[1], 65536
            self.num_images = self.num_rows = len(features)
            self.num_shards = -(-len(features) // self.images_per_shard)

        def extract(self):
            for shard in range(self.num_shards):
                rows = features[shard * self.images_per_shard : (shard + 1) * self.images_per_shard]
                write_file(self.features / f"{shard:05d}.skipped.txt", b"")
                write_arrays(shard_path(self.features, shard), {"features": rows})

    with tempfile.TemporaryDirectory(dir=args.cache) as output:
        words = ["--images", "-", "--encoder", "-", "--output", output, "--preview-size", "0", "--backend", backend]
        words += [
            "--codebook-size",
            str(args.codebook_size),
            "--num-cells",
            str(args.num_cells),
            "--polish",
            str(polish),
        ]
        words += ["--allocation", "proportional", "--max-memory-gib", str(args.max_memory_gib)]
        state = SimpleNamespace(
            process_index=0, num_processes=1, is_main_process=True, device="cpu", wait_for_everyone=lambda: None
        )
        Build.run(FeatureBuild(make_parser().parse_args(words), state))
        return load_codebook(output).codes.numpy()


def run_method(args: argparse.Namespace) -> dict:
    """One method in this process: seconds, peak memory in GiB and distortion."""
    import faiss
    import torch
    from faiss.contrib.clustering import two_level_clustering

    from transformers_unicode2.codebook.clustering import TorchBackend

    faiss.omp_set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    features = np.load(Path(args.cache) / "features.npy", mmap_mode="r")[: args.num_features]
    start = time.perf_counter()
    if args.method == "flat":
        points = features.astype(np.float32)
        kmeans = faiss.Kmeans(points.shape[1], args.codebook_size, niter=20, max_points_per_centroid=512, seed=0)
        kmeans.train(points)
        codes = kmeans.centroids
    elif args.method == "two_level":
        points = features.astype(np.float32)
        codes = two_level_clustering(
            points, args.num_cells, args.codebook_size, clustering_niter=20, niter=20, min_points_per_centroid=1, seed=0
        )[0]
    else:
        codes = build_ours(features, args, args.method.split()[1].strip(","), int("polished" in args.method))
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    backend, error = TorchBackend(), 0.0
    for row in range(0, len(features), 65536):
        error += float(backend.assign(backend.put(features[row : row + 65536].astype(np.float32)), codes)[1].sum())
    return {"seconds": seconds, "memory": memory, "distortion": error / len(features)}


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
    parser.add_argument("--images", required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--cache", default="outputs/benchmark-codebook", help="folder for the features")
    parser.add_argument("--num-features", type=int, default=1_000_000)
    parser.add_argument("--codebook-size", type=int, default=4096)
    parser.add_argument("--num-cells", type=int, default=64)
    parser.add_argument("--max-memory-gib", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--method", help="run this method alone and print its figures")
    args = parser.parse_args()
    if args.method:
        print(json.dumps(run_method(args)))
        return
    features = np.load(read_features(args), mmap_mode="r")
    count, dim = min(args.num_features, len(features)), features.shape[1]
    rows = {}
    for method in METHODS:
        output = subprocess.run(
            [sys.executable, *sys.argv, "--method", method], stdout=subprocess.PIPE, text=True, check=True
        )
        rows[method] = json.loads(output.stdout.splitlines()[-1])
        print(method, rows[method], file=sys.stderr)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    flat_products = 2.0 * min(count, 512 * args.codebook_size) * args.codebook_size * dim * 20
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
