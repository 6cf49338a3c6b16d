"""How time and memory of the codebook builder grow, projected to the paper's 500,000 codes.

    python benchmarks/codebook_growth.py --features outputs/features

Runs the builder's phases after feature extraction, with the torch backend, on growing numbers of features and codes.
Each size runs in its own process. Sizes with too few features, or too long for --max-minutes, are left out and named.
The last row projects the largest size to the paper's. The part of a phase that its products take, at the rate of a
large float32 product, grows with the products; the rest grows with the numbers that the phase reads.
Finished rows are kept: after a kill, the same command resumes.
"""

import argparse
import time

from codebook_build import measure_rate, run_in_process, write_shards
from real_features import load_features
from rows import Rows, describe_run

PHASES = ("train cells", "sort", "train codes")
METHOD = "ours, torch"


def count_products(num_features: int, codebook_size: int, num_cells: int, dim: int) -> dict[str, float]:
    """Multiplications of each phase: 20 iterations on at most 512 points per centroid, two passes over all features."""
    sampled = min(num_features, 512 * num_cells)
    per_cell = codebook_size / num_cells
    return {
        "train cells": 20.0 * sampled * num_cells * dim,
        "sort": 1.0 * num_features * num_cells * dim,
        "train codes": (20.0 * min(num_features, 512 * codebook_size) + 2 * num_features) * per_cell * dim,
    }


def count_numbers(num_features: int, num_cells: int, dim: int) -> dict[str, int]:
    """Numbers that each phase reads, up to a constant factor."""
    sampled = min(num_features, 512 * num_cells)
    return {"train cells": sampled * dim, "sort": num_features * dim, "train codes": num_features * dim}


def read_seconds(row: dict) -> dict[str, float]:
    said = dict(line.rsplit(": ", 1) for line in row["said"] if line.endswith(" s"))
    return {phase: float(said[phase].split()[0]) for phase in PHASES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--features", default="outputs/features", help="folder that real_features.py wrote")
    parser.add_argument("--results", help="file for finished rows (default: FEATURES/codebook_growth.json)")
    sizes = [250_000, 500_000, 1_000_000, 2_000_000, 4_000_000]
    parser.add_argument("--num-features", type=int, nargs="+", default=sizes)
    parser.add_argument("--codebook-sizes", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--num-cells", type=int, default=256)
    parser.add_argument("--max-memory-gib", type=float, default=8.0)
    parser.add_argument("--max-minutes", type=float, default=25)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    begun = time.monotonic()
    total, dim = load_features(args.features)[0].shape
    common = {name: vars(args)[name] for name in ("features", "num_cells", "max_memory_gib", "threads")}
    rows, done, notes = Rows(args.results or f"{args.features}/codebook_growth.json", common), [], []
    for count, size in zip(args.num_features, args.codebook_sizes):
        name, products = f"{count} features, {size} codes", count_products(count, size, args.num_cells, dim)
        if count > total:
            notes.append(f"{name}: left out, since there are only {total} features.")
            continue
        if done and name not in rows.rows:
            last_count, last_size, last_row = done[-1]
            before = count_products(last_count, last_size, args.num_cells, dim)
            expected = last_row["seconds"] * sum(products.values()) / sum(before.values())
            if time.monotonic() - begun + expected > 60 * args.max_minutes:
                notes.append(f"{name}: left out, since it would take about {expected / 60:.0f} minutes.")
                continue
        write_shards(args.features, count)
        options = common | {"num_features": count, "codebook_size": size, "num_measured": 0}
        done.append((count, size, rows.measure(name, lambda options=options: run_in_process(METHOD, **options))))
    print(describe_run(args.threads))
    print(f"\nWidth {dim}, {args.num_cells} cells, torch backend, memory budget {args.max_memory_gib:g} GiB.\n")
    print(f"| features | codes | {' | '.join(f'{phase}, s' for phase in PHASES)} | all, s | peak GiB |")
    print("| ---: " * (len(PHASES) + 4) + "|")
    for count, size, row in done:
        cells = " | ".join(f"{seconds:.1f}" for seconds in read_seconds(row).values())
        print(f"| {count} | {size} | {cells} | {row['seconds']:.1f} | {row['memory']:.2f} |")
    if done:
        rate = rows.measure("rate", lambda: {"rate": measure_rate(args.threads) / 2})["rate"]
        count, size, row = done[-1]
        ours, paper = count_products(count, size, args.num_cells, dim), count_products(150_000_000, 500_000, 1000, 1152)
        read, to_read = count_numbers(count, args.num_cells, dim), count_numbers(150_000_000, 1000, 1152)
        scaled = []
        for phase, seconds in read_seconds(row).items():
            products = min(seconds, ours[phase] / rate)
            rest = seconds - products
            scaled.append(products * paper[phase] / ours[phase] + rest * to_read[phase] / read[phase])
        cells = " | ".join(f"{seconds:.0f}" for seconds in scaled)
        print(f"| 150000000 of 1152 | 500000, 1000 cells | {cells} | {sum(scaled):.0f}, projected | |")
    print("\n".join(["", *notes]))


if __name__ == "__main__":
    main()
