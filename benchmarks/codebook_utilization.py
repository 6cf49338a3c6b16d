"""How much of a codebook held-out images use: clustered codes beside learnt ones (Table 3), on real features.

    python benchmarks/codebook_utilization.py --features outputs/features --codebook-sizes 1000 10000 100000

Ours is the builder of `unicode2 codebook build`. The peer is `VectorQuantize` of vector-quantize-pytorch, with a random
start, trained by moving averages on the same features. It runs with and without its revival of codes that are used less
than a tenth as often as under even use. Training stops after --vq-epochs or --vq-minutes, whichever comes first.

The column "seen a code" is the number of features shown per code; for ours, each pass over the features counts.
Utilization is the share of codes that the held-out features use at least once. The column "even use" is the share that
as many features would use if all codes were equally likely. Distortion is the mean squared distance of the held-out
features to the nearest code. Finished rows are kept: after a kill, the same command resumes.
"""

import argparse
import sys
import time
from functools import partial

import numpy as np
import torch
from codebook_build import build_ours, write_shards
from real_features import load_features
from rows import Rows, describe_run
from tqdm import tqdm

from transformers_unicode2.codebook.clustering import TorchBackend
from transformers_unicode2.codebook.statistics import compute_statistics


def train_ours(count: int, size: int, args: argparse.Namespace) -> tuple[np.ndarray, int]:
    """Codes of the builder, and the features that it saw in 8 iterations inside cells and the passes across borders."""
    cells = max(16, round(size**0.5 / 2))
    codes = build_ours(args.features, count, size, cells, ("torch", 8, args.polish), args.max_memory_gib, [])
    return codes, (8 + args.polish) * count


def train_vq(features: np.ndarray, size: int, args: argparse.Namespace, revive: float) -> tuple[np.ndarray, int]:
    """Codes of a `VectorQuantize`, and the number of features that it saw, in random order."""
    from vector_quantize_pytorch import VectorQuantize

    torch.manual_seed(0)
    # Uses of a code per batch under even use.
    even = args.vq_batch_size / size
    options = {"codebook_size": size, "decay": args.vq_decay, "threshold_ema_dead_code": revive * even}
    vq = VectorQuantize(features.shape[1], **options).train()
    # Gives a revived code some batches to be used in.
    vq._codebook.reset_cluster_size = even
    rng, end, seen = np.random.default_rng(0), time.monotonic() + 60 * args.vq_minutes, 0
    for epoch in range(args.vq_epochs):
        order = rng.permutation(len(features))
        for start in tqdm(range(0, len(order), args.vq_batch_size), desc=f"VQ of {size}, epoch {epoch + 1}"):
            if time.monotonic() > end:
                break
            rows = features[np.sort(order[start : start + args.vq_batch_size])]
            with torch.no_grad():
                vq(torch.from_numpy(rows.astype(np.float32))[None])
            seen += len(rows)
    return vq.codebook.detach().numpy(), seen


def measure(train, held_out: np.ndarray) -> dict[str, float]:
    """Statistics of the held-out features; seconds, and number of features seen, of the training."""
    start = time.perf_counter()
    codes, seen = train()
    seconds = time.perf_counter() - start
    backend, counts, error = TorchBackend(), np.zeros(len(codes), np.int64), 0.0
    for start in tqdm(range(0, len(held_out), 16384), desc="held out"):
        rows = backend.put(held_out[start : start + 16384].astype(np.float32))
        indices, distances = backend.assign(rows, codes)
        counts += np.bincount(indices, minlength=len(codes))
        error += float(distances.sum(dtype=np.float64))
    return {"seconds": seconds, "seen": seen, **compute_statistics(counts, error)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--features", default="outputs/features", help="folder that real_features.py wrote")
    parser.add_argument("--results", help="file for finished rows (default: FEATURES/codebook_utilization.json)")
    parser.add_argument("--codebook-sizes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--num-features", type=int, default=1_000_000)
    parser.add_argument("--max-memory-gib", type=float, default=8.0)
    parser.add_argument("--polish", type=int, default=3)
    parser.add_argument("--vq-epochs", type=int, default=2)
    parser.add_argument("--vq-minutes", type=float, default=4)
    parser.add_argument("--vq-batch-size", type=int, default=2048)
    parser.add_argument(
        "--vq-decay", type=float, default=0.8, help="decay of the moving averages (the library's default)"
    )
    parser.add_argument("--vq-revive", type=float, default=0.1, help="share of even use below which a code is revived")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    fit, held_out = load_features(args.features, args.num_features)
    write_shards(args.features, len(fit))
    setting = {name: value for name, value in vars(args).items() if name not in ("results", "codebook_sizes")}
    rows = Rows(args.results or f"{args.features}/codebook_utilization.json", setting | {"num_features": len(fit)})
    lines = []
    for size in args.codebook_sizes:
        for name, train in (
            ("clustered (ours)", partial(train_ours, len(fit), size, args)),
            ("VQ, random start", partial(train_vq, fit, size, args, 0)),
            ("VQ, dead codes revived", partial(train_vq, fit, size, args, args.vq_revive)),
        ):
            row = rows.measure(f"{size}, {name}", partial(measure, train, held_out))
            lines.append(
                f"| {size} | {name} | {row['seen'] / size:.0f} | {len(held_out) / size:.1f} "
                f"| {100 * (1 - (1 - 1 / size) ** len(held_out)):.1f} % | {100 * row['utilization']:.1f} % "
                f"| {row['perplexity']:.0f} | {row['distortion']:.4g} | {row['seconds']:.0f} |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
    print(describe_run(args.threads, "vector-quantize-pytorch"))
    print(f"\n{len(fit)} features to fit, {len(held_out)} of other images held out, width {fit.shape[1]}.\n")
    print("| codes | method | seen a code | held out a code | even use | used | perplexity | distortion | s |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
