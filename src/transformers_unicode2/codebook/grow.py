"""Adds codes to a codebook where its distortion is highest; existing ids stay (the paper names this as future work).

    unicode2 codebook grow codebook --add 1000 --images new_images --output larger

With `--model checkpoint --model-output larger_checkpoint` it also grows a checkpoint that holds the codebook.
"""

import argparse
import heapq
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ..cli import SEED, at_least
from ..files import whole_folder
from ..record import Record, hash_source, read_record
from .clustering import (
    add_groups,
    contains,
    find_codes,
    hash_rows,
    keep_distinct,
    move_codebook,
    round_to_bfloat16,
)
from .features import Encoder, patch_thumbnails, read_batches
from .folder import GIB
from .grow_checkpoint import check_checkpoint, grow_checkpoint
from .images import ImageSource, fitting_pixels
from .phases import average_previews
from .statistics import compute_probe_recall, compute_statistics
from .storage import codebook_from_arrays, load_codebook, load_encoder, load_provenance, save_codebook

# Globs of the files of a codebook.
CODEBOOK = ("codebook.*", "README.md")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 codebook grow", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("codebook", help="folder that `unicode2 codebook build` wrote")
    parser.add_argument("--add", type=at_least(1), required=True, help="number of codes to add")
    parser.add_argument("--images", required=True, help="images that the codebook should serve better")
    parser.add_argument("--encoder", help="default: the encoder that the codebook was built with")
    parser.add_argument("--num-images", type=at_least(1), help="use only the first N images")
    parser.add_argument("--output", required=True, help="folder for the larger codebook")
    parser.add_argument("--model", help="checkpoint that holds this codebook, to grow with it")
    parser.add_argument("--model-output", help="folder for the grown checkpoint")
    parser.add_argument(
        "--max-memory-gib", type=at_least(0.0), default=8.0, help="limits the sample (default: %(default)s)"
    )
    parser.add_argument("--seed", type=SEED, default=0, help="of the samples and of k-means (default: %(default)s)")
    return parser


def main(args: argparse.Namespace) -> dict:
    codebook, provenance = load_codebook(args.codebook), load_provenance(args.codebook)
    check_places(args, codebook)
    encoder = load_encoder(args.codebook, codebook, args.encoder)
    source = ImageSource(args.images, args.num_images, max_pixels=fitting_pixels(int(args.max_memory_gib * GIB)))
    made_of = {
        "command": "codebook grow",
        **{name: getattr(args, name) for name in ("add", "num_images", "max_memory_gib", "seed")},
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
    """Writes the larger codebook, unless it is `finished`, and the checkpoint of the record `model`.

    Returns statistics before and after on images that were not used for growing.
    """
    device, side = encoder.model.device, 0 if codebook.previews is None else codebook.previews.shape[1]
    fit, held_out = read_features(source, encoder, side, int(args.max_memory_gib * GIB), args.seed)
    codes = codebook.codes.numpy()
    nearest = find_codes(move_codebook(codebook, device), fit["features"])
    new, parents = split_codes(fit["features"], codes, nearest, args.add, args.seed)
    grown, order = append_codes(codebook, new, parents)
    if side:
        indices = find_codes(move_codebook(grown, device), fit["features"])[0] - len(codes)
        grown.previews[len(codes) :] = torch.from_numpy(mean_previews(fit["thumbnails"], indices, len(new)))
    report = {"added": len(new), "images": args.images, "num_images": len(source)}
    for name, table in (("before", codebook), ("after", grown)):
        indices, distances = find_codes(table, held_out["features"])
        report[name] = compute_statistics(np.bincount(indices, minlength=len(table.codes)), float(distances.sum()))
    grown.probe_recall = compute_probe_recall(grown, held_out["features"])
    provenance["probe_recall_of"] = f"{len(held_out['features'])} features that it was not grown on"
    if model is not None:
        write_checkpoint(model, args.model, codebook, grown, parents[order])
    if not finished:
        save_codebook(grown, args.output, {**provenance, "grown": [*provenance.get("grown", []), report]})
    print(f"{args.output}: {len(codes)} codes and {len(new)} more; on every fifth image, which was not used:")
    for name in ("distortion", "utilization", "perplexity"):
        print(f"  {name:<12} {report['before'][name]:.5g} -> {report['after'][name]:.5g}")
    return report


def write_checkpoint(record: Record, source: str, before, after, parents: np.ndarray) -> None:
    """Writes the grown checkpoint of a record, unless it is finished; see `grow_checkpoint`."""
    with record.making() as finished:
        if not finished:
            with whole_folder(record.folder) as target:
                grow_checkpoint(source, target, before, after, parents)


def check_places(args: argparse.Namespace, codebook) -> None:
    """Raises `ValueError` when an output would overwrite something, or the checkpoint holds another codebook."""
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
    """Features and thumbnails to grow on, and features of every fifth readable image to measure with.

    Both are seeded samples of the patches that fit a quarter of `memory` bytes. If one patch per image is too much,
    evenly spaced images are read. Raises `ValueError` on features that are not finite, and on fewer than five readable
    images.
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
    batches = tqdm(read_single(source, encoder, used.tolist()), total=len(used), unit="image")
    for index, (positions, pixel_values, skipped) in zip(used.tolist(), batches):
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


def read_single(source: ImageSource, encoder: Encoder, positions: list[int]) -> Iterator[tuple[list, list, list]]:
    """`read_batches` with one image in each batch, for the images at the given positions."""
    # Consecutive images are read in one go, which a stream needs.
    if len(positions) == len(source):
        yield from read_batches(source, encoder, 0, len(source), batch_size=1)
        return
    for position in positions:
        yield from read_batches(source, encoder, position, position + 1)


def split_codes(
    points: np.ndarray, codes: np.ndarray, nearest: tuple[np.ndarray, np.ndarray], num_new: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """New codes in the regions of the codes with the largest total distortion. Old codes do not move.

    Args:
        points: float32 `(num_points, dim)`, features that the codes should serve.
        codes: float32 `(codebook_size, dim)`.
        nearest: the nearest code of each point and the squared distance to it, as of `find_codes`.
        num_new: codes to add.
        seed: of the starting points.

    Returns:
        New codes, float32 `(num_new, dim)`, distinct and rounded to bfloat16, and their parents, int64 `(num_new,)`.

    Raises:
        `ValueError`: when the points hold too few distinct new codes.
    """
    indices, distances = nearest
    order = np.argsort(indices, kind="stable")
    parents, starts = np.unique(indices[order], return_index=True)
    members = np.split(order, starts[1:])
    known = np.sort(hash_rows(codes))
    room = count_fresh(points, indices, known, len(codes))[parents]
    if room.sum() < num_new:
        raise ValueError(
            f"{room.sum()} distinct features are too few for {num_new} more codes; add images or ask for fewer."
        )
    shares = share_by_distortion(np.array([distances[m].sum(dtype=np.float64) for m in members]), room, num_new)
    new, seen = [], set()
    for i in np.flatnonzero(shares):
        part = split_apart(points[members[i]], codes, parents[i], int(shares[i]), known, seen, seed)
        seen.update(hash_rows(part).tolist())
        new.append(part)
    return np.concatenate(new), np.repeat(parents, shares)


def count_fresh(points: np.ndarray, indices: np.ndarray, known: np.ndarray, num_codes: int) -> np.ndarray:
    """Distinct points in the region of each code whose hash is not among `known`, int64 `(num_codes,)`."""
    hashes = hash_rows(points)
    fresh = ~contains(known, hashes)
    pairs = np.unique(np.stack([indices[fresh].astype(np.uint64), hashes[fresh]]), axis=1)
    return np.bincount(pairs[0].astype(np.int64), minlength=num_codes)


def split_apart(
    region: np.ndarray, codes: np.ndarray, parent: int, count: int, known: np.ndarray, seen: set[int], seed: int
) -> np.ndarray:
    """`split_region` of the code `parent`, with none of its new codes among the hashes `seen`.

    Raises `ValueError` when the region holds too few distinct features.
    """
    part = split_region(region, codes[parent], count, known, np.random.default_rng([seed, parent]))
    # Rounding can make a new code equal to one of a neighbouring region.
    if not seen.isdisjoint(hash_rows(part).tolist()):
        taken = np.sort(np.concatenate([known, np.fromiter(seen, np.uint64, len(seen))]))
        part = split_region(region, codes[parent], count, taken, np.random.default_rng([seed, parent]))
    if len(part) < count:
        raise ValueError(
            f"Code {parent} has distinct features for only {len(part)} of {count} new codes; "
            "add images or ask for fewer."
        )
    return part


def share_by_distortion(distortions: np.ndarray, room: np.ndarray, num_new: int) -> np.ndarray:
    """New codes of each region, int64 `(num_regions,)`.

    Each goes, in turn, to the region with the largest distortion per code that has room.
    """
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
    """Lloyd's algorithm on the points of one code, which stays in place as a centroid.

    Returns the `count` other centroids as codes, none of them among the hashes `known`; fewer if the points hold fewer.
    """
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
    """Probabilities in proportion to the squared distance from the parent, as in k-means++.

    Returns `None`, for equal probabilities, when too few candidates differ from the parent.
    """
    weights = np.square(candidates - parent).sum(1, dtype=np.float64)
    return weights / weights.sum() if (weights > 0).sum() >= count else None


def squared_distances(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return np.square(centroids).sum(1) - 2 * points @ centroids.T


def append_codes(codebook, new: np.ndarray, parents: np.ndarray):
    """Appends the new codes in new cells, one for each cell that holds a parent. Their thumbnails are black.

    Returns the larger codebook and the order of the new codes in it, int64 `(num_new,)`.
    """
    offsets = codebook.cell_offsets.numpy()
    cells = np.searchsorted(offsets, parents, side="right") - 1
    order = np.argsort(cells, kind="stable")
    used, counts = np.unique(cells, return_counts=True)
    sums = np.zeros((len(used), new.shape[1]))
    add_groups(sums, new, np.searchsorted(used, cells))
    codes = np.concatenate([codebook.codes.numpy(), new[order]])
    centroids = np.concatenate([codebook.cell_centroids.numpy(), np.float32(sums / counts[:, None])])
    offsets = np.concatenate([offsets, offsets[-1] + np.cumsum(counts)])
    previews = codebook.previews
    if previews is not None:
        previews = np.concatenate([previews.numpy(), np.zeros((len(new), *previews.shape[1:]), np.uint8)])
    return codebook_from_arrays(codes, centroids, offsets, previews, codebook.encoder_dtype), order


def mean_previews(thumbnails: np.ndarray, indices: np.ndarray, num_new: int) -> np.ndarray:
    """Mean thumbnails of the features of each new code, uint8 `(num_new, side, side, 3)`.

    `thumbnails` and `indices` are those of the features; an index below 0 is of an old code.
    """
    inside = indices >= 0
    sums = np.zeros((num_new, thumbnails.shape[1]))
    add_groups(sums, thumbnails[inside], indices[inside])
    counts = np.bincount(indices[inside], minlength=num_new)
    side = round((sums.shape[1] / 3) ** 0.5)
    return average_previews(sums, counts).reshape(-1, side, side, 3)
