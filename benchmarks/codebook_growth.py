"""How do time and memory of the codebook builder grow, and what does that say of the paper's 500,000 codes?

    python benchmarks/codebook_growth.py --images images --encoder clip-vit-b16

The builder's phases after the features, on growing numbers of features and codes, each in a process of its own. The last line scales
the seconds of each phase at the largest size to the paper's by the products that the phase computes.
"""

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path

from real_features import add_arguments, load_features

PHASES = ("train cells", "sort", "train codes")


def count_products(num_features: int, codebook_size: int, num_cells: int, dim: int) -> dict[str, float]:
    """Multiplications of each phase: 20 iterations on at most 512 points a centroid, and one pass over all features."""
    sampled = min(num_features, 512 * num_cells)
    per_cell = codebook_size / num_cells
    return {
        "train cells": 20.0 * sampled * num_cells * dim,
        "sort": 1.0 * num_features * num_cells * dim,
        "train codes": (20.0 * min(num_features, 512 * codebook_size) + num_features) * per_cell * dim,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_arguments(parser)
    parser.add_argument(
        "--num-features", type=int, nargs="+", default=[250_000, 500_000, 1_000_000, 2_000_000, 4_000_000]
    )
    parser.add_argument("--codebook-sizes", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--num-cells", type=int, default=256)
    parser.add_argument("--max-memory-gib", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    fit = load_features(args)[0]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(
        f"{date.today()}, {args.threads} threads, commit {commit}; width {fit.shape[1]}, {args.num_cells} cells, torch backend,"
    )
    print(f"memory budget {args.max_memory_gib:g} GiB, `{' '.join(sys.argv)}`\n")
    print(f"| features | codes | {' | '.join(f'{phase}, s' for phase in PHASES)} | all, s | peak GiB |")
    print("| ---: " * (len(PHASES) + 4) + "|", flush=True)
    for count, size in zip(args.num_features, args.codebook_sizes):
        words = [sys.executable, str(Path(__file__).with_name("codebook_build.py")), "--method", "ours torch"]
        options = {"images": args.images, "encoder": args.encoder, "cache": args.cache, "num-features": count}
        options |= {"codebook-size": size, "num-cells": args.num_cells, "max-memory-gib": args.max_memory_gib}
        options |= {"threads": args.threads, "num-measured": 0}
        words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        row = json.loads(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
        said = dict(line.rsplit(": ", 1) for line in row["phases"] if line.endswith(" s"))
        seconds = {phase: float(said[phase].split()[0]) for phase in PHASES}
        cells = " | ".join(f"{seconds[phase]:.1f}" for phase in PHASES)
        print(f"| {min(count, len(fit))} | {size} | {cells} | {row['seconds']:.1f} | {row['memory']:.2f} |", flush=True)
    ours = count_products(min(count, len(fit)), size, args.num_cells, fit.shape[1])
    paper = count_products(150_000_000, 500_000, 1000, 1152)
    scaled = {phase: seconds[phase] * paper[phase] / ours[phase] for phase in PHASES}
    cells = " | ".join(f"{scaled[phase]:.0f}" for phase in PHASES)
    print(f"| 150000000 of 1152 | 500000 | {cells} | {sum(scaled.values()):.0f}, projected | |")


if __name__ == "__main__":
    main()
