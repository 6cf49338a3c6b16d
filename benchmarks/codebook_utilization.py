"""How much of a codebook do held-out images use? Clustered codes beside learnt ones (the paper's Table 3), on real features.

    python benchmarks/codebook_utilization.py --images images --encoder clip-vit-b16 --codebook-sizes 1000 10000 100000

Ours is the builder of `unicode2 codebook build`. The peer is `VectorQuantize` of vector-quantize-pytorch, from its random start,
trained on as many features by moving averages, without and with its revival of dead codes. Utilization is the share of codes that the
features of the held-out images use at least once; distortion is their mean squared distance to the nearest code.
"""

import argparse
import subprocess
import time
from datetime import date
from functools import partial

import numpy as np
import torch
from codebook_build import build_ours
from real_features import add_arguments, load_features
from tqdm import tqdm

from transformers_unicode2.codebook.clustering import TorchBackend
from transformers_unicode2.codebook.statistics import compute_statistics


def train_vq(features: np.ndarray, codebook_size: int, args: argparse.Namespace, revive: int) -> np.ndarray:
    """Codes of a `VectorQuantize` after `args.vq_epochs` passes over the features in random order."""
    from vector_quantize_pytorch import VectorQuantize

    torch.manual_seed(0)
    vq = VectorQuantize(
        features.shape[1], codebook_size=codebook_size, decay=args.vq_decay, threshold_ema_dead_code=revive
    ).train()
    rng = np.random.default_rng(0)
    for epoch in range(args.vq_epochs):
        order = rng.permutation(len(features))
        for start in tqdm(range(0, len(order), args.vq_batch_size), desc=f"VQ of {codebook_size}, epoch {epoch + 1}"):
            rows = features[np.sort(order[start : start + args.vq_batch_size])]
            with torch.no_grad():
                vq(torch.from_numpy(rows.astype(np.float32))[None])
    return vq.codebook.detach().numpy()


def measure(features: np.ndarray, codes: np.ndarray) -> dict[str, float]:
    backend, counts, error = TorchBackend(), np.zeros(len(codes), np.int64), 0.0
    for start in range(0, len(features), 65536):
        rows = backend.put(features[start : start + 65536].astype(np.float32))
        indices, distances = backend.assign(rows, codes)
        counts += np.bincount(indices, minlength=len(codes))
        error += float(distances.sum(dtype=np.float64))
    return compute_statistics(counts, error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--codebook-sizes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--num-features", type=int, default=1_000_000)
    parser.add_argument("--max-memory-gib", type=float, default=8.0)
    parser.add_argument("--vq-epochs", type=int, default=1)
    parser.add_argument("--vq-batch-size", type=int, default=2048)
    parser.add_argument("--vq-decay", type=float, default=0.8, help="of the moving averages; the library's default")
    parser.add_argument("--vq-revive", type=int, default=2, help="codes used less often, on average, start again")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    fit, held_out = load_features(args)
    fit = np.asarray(fit[: args.num_features])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(
        f"{date.today()}, {args.threads} threads, commit {commit}; {len(fit)} features to fit, {len(held_out)} held out,"
    )
    print(f"width {fit.shape[1]}; VQ: decay {args.vq_decay}, {args.vq_epochs} epoch, batches of {args.vq_batch_size}\n")
    print("| codes | patches a code | method | used | perplexity | distortion | s |", flush=True)
    print("| ---: | ---: | --- | ---: | ---: | ---: | ---: |", flush=True)
    for size in args.codebook_sizes:
        args.codebook_size, args.num_cells = size, max(16, round(size**0.5 / 2))
        for name, fit_codes in (
            ("clustered (ours)", partial(build_ours, fit, args, "torch", 0)),
            ("VQ, random start", partial(train_vq, fit, size, args, 0)),
            ("VQ, dead codes revived", partial(train_vq, fit, size, args, args.vq_revive)),
        ):
            start = time.perf_counter()
            codes = fit_codes()
            seconds = time.perf_counter() - start
            row = measure(held_out, codes)
            print(
                f"| {size} | {len(fit) / size:.0f} | {name} | {100 * row['utilization']:.1f} % | {row['perplexity']:.0f} "
                f"| {row['distortion']:.4g} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
