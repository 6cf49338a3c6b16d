"""More codes for a codebook, where it is worst; the codes that it has keep their ids (the paper names this as future work).

unicode2 codebook grow codebook --add 1000 --images new_images --output larger --model checkpoint --model-output larger_checkpoint
"""

import argparse
import heapq
from pathlib import Path

import numpy as np

from ..cli import at_least
from ..files import whole_folder
from ..record import Record, hash_source, read_record
from .clustering import (
    Backend,
    add_groups,
    contains,
    find_codes,
    hash_rows,
    keep_distinct,
    make_backend,
    round_to_bfloat16,
)
from .features import Encoder, patch_thumbnails, read_batches
from .folder import GIB
from .grow_checkpoint import check_checkpoint, grow_checkpoint
from .images import ImageSource, fitting_pixels
from .statistics import compute_probe_recall, compute_statistics
from .storage import codebook_from_arrays, load_codebook, load_encoder, load_provenance, save_codebook

CODEBOOK = ("codebook.*", "README.md")  # files of one


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 codebook grow", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("codebook", help="folder that `unicode2 codebook build` wrote")
    parser.add_argument("--add", type=at_least(1), required=True, help="number of codes to add")
    parser.add_argument("--images", required=True, help="images that the codebook should serve better")
    parser.add_argument("--encoder", help="default: the encoder that it was built with")
    parser.add_argument("--num-images", type=at_least(1), help="use the first N images only")
    parser.add_argument("--output", required=True, help="folder for the larger codebook")
    parser.add_argument("--model", help="checkpoint with this codebook, to be grown with it")
    parser.add_argument("--model-output", help="folder for the grown checkpoint")
    parser.add_argument("--backend", choices=("faiss", "torch"), default="torch", help="library for nearest codes")
    parser.add_argument(
        "--max-memory-gib", type=at_least(0.0), default=8.0, help="a sample of the features is used that fits"
    )
    parser.add_argument("--seed", type=at_least(0), default=0)
    return parser


def main(args: argparse.Namespace) -> dict:
    codebook, provenance = load_codebook(args.codebook), load_provenance(args.codebook)
    check_places(args, codebook)
    encoder = load_encoder(args.codebook, codebook, args.encoder)
    source = ImageSource(args.images, args.num_images, max_pixels=fitting_pixels(int(args.max_memory_gib * GIB)))
    made_of = {
        "command": "codebook grow",
        **{name: getattr(args, name) for name in ("add", "num_images", "backend", "max_memory_gib", "seed")},
        "images": source.fingerprint(),
        "codebook": hash_source(args.codebook),
    }
    model = None
    if args.model:
        made_with = {**made_of, "model": hash_source(args.model)}
        model = Record(args.model_output, made_with, option="--model-output")
    with Record(args.output, made_of, CODEBOOK).making() as finished:
        if finished and (model is None or model.check()):
            print(f"{args.output} is finished; nothing to do")
            return load_provenance(args.output)["grown"][-1]
        return grow(args, codebook, provenance, source, encoder, model, finished)


def grow(
    args: argparse.Namespace,
    codebook,
    provenance: dict,
    source: ImageSource,
    encoder: Encoder,
    model: Record | None,
    finished: bool,
) -> dict:
    """Writes the larger codebook, unless it is `finished`, and the checkpoint that `model` is the record of.

    Returns how much better the codebook serves images that it was not grown on.
    """
    backend = make_backend(args.backend, str(encoder.model.device))
    side = 0 if codebook.previews is None else codebook.previews.shape[1]
    fit, held_out = read_features(source, encoder, side, int(args.max_memory_gib * GIB), args.seed)
    codes = codebook.codes.numpy()
    new, parents = split_codes(fit["features"], codes, args.add, backend, args.seed)
    grown, order = append_codes(codebook, new, parents, mean_previews(fit, codes, new, backend) if side else None)
    report = {"added": len(new), "images": args.images, "num_images": len(source)}
    for name, table in (("before", codebook), ("after", grown)):
        indices, distances = find_codes(table, held_out["features"])
        report[name] = compute_statistics(np.bincount(indices, minlength=len(table.codes)), float(distances.sum()))
    grown.probe_recall = compute_probe_recall(grown, held_out["features"])
    provenance["probe_recall_of"] = f"{len(held_out['features'])} features that it was not grown on"
    if model is not None:
        with model.making() as has_model:
            if not has_model:
                with whole_folder(args.model_output) as target:
                    grow_checkpoint(args.model, target, codebook, grown, parents[order])
    if not finished:
        save_codebook(grown, args.output, {**provenance, "grown": [*provenance.get("grown", []), report]})
    print(
        f"{args.output}: {len(codes)} codes and {len(new)} more; on features of every fifth image, which were not used:"
    )
    for name in ("distortion", "utilization", "perplexity"):
        print(f"  {name:<12} {report['before'][name]:.5g} -> {report['after'][name]:.5g}")
    return report


def check_places(args: argparse.Namespace, codebook) -> None:
    """Raises `ValueError` when something would be written over, or the checkpoint has another codebook."""
    if (args.model is None) != (args.model_output is None):
        raise ValueError("--model and --model-output belong together.")
    if (Path(args.output) / "codebook.json").exists() and read_record(args.output) is None:
        raise ValueError(f"{args.output} holds a codebook already; choose another --output.")
    if args.model is None:
        return
    if Path(args.model_output).exists() and read_record(args.model_output) is None:
        raise ValueError(f"{args.model_output} exists already; choose another --model-output.")
    check_checkpoint(args.model, args.codebook, codebook)


def read_features(source: ImageSource, encoder: Encoder, side: int, memory: int, seed: int) -> tuple[dict, dict]:
    """Features, and thumbnails, of the images to grow on, and features of every fifth readable image, to measure with.

    Both are seeded samples of the patches, at most as many as fit a quarter of `memory` bytes; of so many images that not even one
    patch of each fits, evenly many are read from everywhere. Raises `ValueError` on features that are not finite, and when fewer
    than five images can be read.
    """
    from tqdm import tqdm

    room = memory // 4 // (16 * encoder.dim + 3 * side**2)
    if room < 5:
        raise ValueError(f"--max-memory-gib is {memory / GIB:g}; it has room for {room} features.")
    if source.left_out:
        tqdm.write(source.left_out.sentence())
    used = np.unique(np.linspace(0, len(source) - 1, min(len(source), room)).astype(int))
    patches = min(encoder.num_patches, room // len(used))
    rows, readable = ({"features": [], "thumbnails": []}, {"features": [], "thumbnails": []}), 0
    if len(used) == len(source):
        batches = read_batches(source, encoder, 0, len(source), batch_size=1)
    else:
        batches = (next(read_batches(source, encoder, index, index + 1)) for index in used.tolist())
    for index, (positions, pixel_values, skipped) in zip(used.tolist(), tqdm(batches, total=len(used), unit="image")):
        for line in skipped:
            tqdm.write(f"left out: {line.expandtabs(1)}")
        if not positions:
            continue
        features, pixels = encoder(pixel_values)
        if not np.isfinite(features).all():
            raise ValueError(f"Image {index} has features that are not finite; check the encoder.")
        chosen = np.random.default_rng([seed, index]).permutation(encoder.num_patches)[:patches]
        readable += 1
        part = rows[readable % 5 == 0]
        part["features"].append(features[0, chosen])
        if side and readable % 5:
            part["thumbnails"].append(patch_thumbnails(pixels, encoder.patch_size, side)[0, chosen])
    if readable < 5:
        raise ValueError(f"{readable} readable images are too few; growing needs at least 5.")
    return tuple({name: np.concatenate(parts) for name, parts in part.items() if parts} for part in rows)


def split_codes(
    points: np.ndarray, codes: np.ndarray, num_new: int, backend: Backend, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """New codes inside the regions of the codes with the largest total distortion; the old ones stay where they are.

    Args:
        points: float32 `(num_points, dim)`, features to serve.
        codes: float32 `(codebook_size, dim)`.
        num_new: codes to add.
        backend: finds the nearest codes.
        seed: of the starting points.

    Returns:
        New codes, float32 `(num_new, dim)`, distinct, rounded to bfloat16, and the code that each was split from, int64 `(num_new,)`.

    Raises:
        `ValueError`: when the points hold fewer distinct new codes.
    """
    indices, distances = backend.assign(backend.put(points), codes)
    order = np.argsort(indices, kind="stable")
    parents, starts = np.unique(indices[order], return_index=True)
    members = np.split(order, starts[1:])
    known, hashes = np.sort(hash_rows(codes)), hash_rows(points)
    fresh = ~contains(known, hashes)
    pairs = np.unique(np.stack([indices[fresh].astype(np.uint64), hashes[fresh]]), axis=1)  # distinct in each region
    room = np.bincount(pairs[0].astype(np.int64), minlength=len(codes))[parents]
    if room.sum() < num_new:
        raise ValueError(
            f"{room.sum()} distinct features are too few for {num_new} more codes; add images or ask for fewer."
        )
    shares = share_by_distortion(np.array([distances[m].sum(dtype=np.float64) for m in members]), room, num_new)
    new, seen = [], set()
    for i in np.flatnonzero(shares):
        region, share, parent = points[members[i]], int(shares[i]), codes[parents[i]]
        part = split_region(region, parent, share, known, np.random.default_rng([seed, parents[i]]))
        if not seen.isdisjoint(hash_rows(part).tolist()):  # rounded to a new code of a region next to it
            taken = np.sort(np.concatenate([known, np.fromiter(seen, np.uint64, len(seen))]))
            part = split_region(region, parent, share, taken, np.random.default_rng([seed, parents[i]]))
        if len(part) < share:
            raise ValueError(
                f"Code {parents[i]} has distinct features for {len(part)} of {share} new codes only; add images or ask for fewer."
            )
        seen.update(hash_rows(part).tolist())
        new.append(part)
    return np.concatenate(new), np.repeat(parents, shares)


def share_by_distortion(distortions: np.ndarray, room: np.ndarray, num_new: int) -> np.ndarray:
    """New codes of each region, int64: one after the other goes where the distortion per code is largest and there is room."""
    shares = np.zeros(len(room), np.int64)
    heap = [(-distortion, i) for i, distortion in enumerate(distortions) if room[i]]
    heapq.heapify(heap)
    for _ in range(num_new):
        _, i = heapq.heappop(heap)
        shares[i] += 1
        if shares[i] < room[i]:
            heapq.heappush(heap, (-distortions[i] / (shares[i] + 1), i))
    return shares


def split_region(
    points: np.ndarray,
    parent: np.ndarray,
    count: int,
    known: np.ndarray,
    rng: np.random.Generator,
    num_iterations: int = 10,
) -> np.ndarray:
    """Lloyd's algorithm on the points of one code with that code as a centroid that stays: the `count` others, as codes."""
    candidates = keep_distinct(round_to_bfloat16(points), known)
    count = min(count, len(candidates))
    far = rng.choice(len(candidates), count, replace=False, p=start_weights(candidates, parent, count))
    free = candidates[far]
    for _ in range(num_iterations):
        nearest = squared_distances(points, np.concatenate([parent[None], free])).argmin(1)
        sums, counts = np.zeros((count + 1, points.shape[1])), np.bincount(nearest, minlength=count + 1)
        add_groups(sums, points, nearest)
        moved = counts[1:] > 0
        free[moved] = (sums[1:][moved] / counts[1:][moved, None]).astype(np.float32)
    rounded = keep_distinct(round_to_bfloat16(free), known)
    return keep_distinct(np.concatenate([rounded, candidates[far], candidates]), known)[:count]


def start_weights(candidates: np.ndarray, parent: np.ndarray, count: int) -> np.ndarray | None:
    """Chances in proportion to the squared distance from the parent, as k-means++ has them; even when too few are apart from it."""
    weights = np.square(candidates - parent).sum(1, dtype=np.float64)
    return weights / weights.sum() if (weights > 0).sum() >= count else None


def squared_distances(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return np.square(centroids).sum(1) - 2 * points @ centroids.T


def append_codes(codebook, new: np.ndarray, parents: np.ndarray, previews: np.ndarray | None):
    """A codebook with new cells at its end, one for each cell that a parent lies in, and the order of the new codes in it."""
    offsets = codebook.cell_offsets.numpy()
    cells = np.searchsorted(offsets, parents, side="right") - 1
    order = np.argsort(cells, kind="stable")
    used, counts = np.unique(cells, return_counts=True)
    sums = np.zeros((len(used), new.shape[1]))
    add_groups(sums, new, np.searchsorted(used, cells))
    codes = np.concatenate([codebook.codes.numpy(), new[order]])
    centroids = np.concatenate([codebook.cell_centroids.numpy(), np.float32(sums / counts[:, None])])
    offsets = np.concatenate([offsets, offsets[-1] + np.cumsum(counts)])
    if previews is not None:
        previews = np.concatenate([codebook.previews.numpy(), previews[order]])
    return codebook_from_arrays(codes, centroids, offsets, previews), order


def mean_previews(fit: dict, codes: np.ndarray, new: np.ndarray, backend: Backend) -> np.ndarray:
    """Mean thumbnails of the features that are nearest to new codes, uint8 `(num_new, side, side, 3)`."""
    indices = backend.assign(backend.put(fit["features"]), np.concatenate([codes, new]))[0] - len(codes)
    inside = indices >= 0
    sums = np.zeros((len(new), fit["thumbnails"].shape[1]))
    add_groups(sums, fit["thumbnails"][inside], indices[inside])
    counts = np.bincount(indices[inside], minlength=len(new))
    side = round((sums.shape[1] / 3) ** 0.5)
    return np.round(sums / np.maximum(counts, 1)[:, None]).astype(np.uint8).reshape(-1, side, side, 3)
