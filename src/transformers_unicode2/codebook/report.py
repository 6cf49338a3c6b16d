"""A page about a codebook: how images use it, and the patches of any code (section 4.3 and Figure 5 of the paper).

unicode2 codebook report codebook --images held_out --encoder siglip --output report
"""

import argparse
import base64
import io
import json
from pathlib import Path
from string import Template

import numpy as np

from ..cli import SEED, at_least
from ..files import whole_folder
from ..record import held
from ..search.neighbours import find_neighbours
from .clustering import find_codes, move_codebook
from .features import Encoder, encode_all
from .images import ImageSource
from .statistics import (
    compute_gini,
    compute_objective,
    compute_statistics,
    compute_utilization_curve,
    fit_rate_distortion,
)
from .storage import codebook_from_arrays, load_codebook, load_encoder

# Side of an embedded image in pixels.
THUMBNAIL = 112
# What the page calls the statistics.
MEANINGS = {
    "num_features": "patches",
    "utilization": "utilization: share of the codes that are used",
    "entropy": "entropy of the uses in nats (Eq. 3)",
    "perplexity": "perplexity: codes in equal use of the same entropy",
    "gini": "inequality of the uses, Gini, from 0 for equal use",
    "distortion": "distortion: mean squared distance of a feature to its code (Eq. 12)",
}
# Features that Eq. 17 is fitted to.
NUM_SAMPLED = 20_000
NUM_NEIGHBOURS = 5


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 codebook report", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("codebook", help="folder that `unicode2 codebook build` wrote")
    parser.add_argument("--images", required=True, help="images that it was not built from")
    parser.add_argument("--encoder", help="default: the encoder that the codebook was built with")
    parser.add_argument("--output", help="folder for the page, its curves and report.json (default: CODEBOOK/report)")
    parser.add_argument(
        "--num-images", type=at_least(1), help="use only the first N images; each patch takes about 50 bytes of memory"
    )
    parser.add_argument(
        "--gallery-images", type=at_least(0), default=500, help="images on the page (default: %(default)s)"
    )
    parser.add_argument(
        "--beta", type=at_least(0.0), default=1.0, help="weight of the entropy, Eq. 14 (default: %(default)s)"
    )
    parser.add_argument("--seed", type=SEED, default=0, help="of the samples (default: %(default)s)")
    return parser


def main(args: argparse.Namespace) -> dict:
    codebook = load_codebook(args.codebook)
    encoder = load_encoder(args.codebook, codebook, args.encoder)
    output = Path(args.output or Path(args.codebook) / "report")
    with held(output):
        return write_report(args, codebook, encoder, output)


def write_report(args: argparse.Namespace, codebook, encoder: Encoder, output: Path) -> dict:
    """Writes the page, its curves and `report.json`; returns the content of the latter."""
    source = ImageSource(args.images, args.num_images)
    codes, images, error, sample, gallery = read_images(source, encoder, codebook, args.gallery_images, args.seed)
    report = compute_report(codebook, codes, images, error, sample, args.beta, args.seed)
    report["codebook"], report["images"] = str(args.codebook), args.images
    figures = draw_curves(report)
    neighbours = find_neighbours(codebook.codes, codebook.cell_offsets, NUM_NEIGHBOURS).numpy()
    page = make_page(report, figures, codebook, codes, images, gallery, encoder, neighbours)
    with whole_folder(output, last=("report.html",)) as target:
        for name, figure in figures.items():
            (target / f"{name}.png").write_bytes(figure)
        (target / "report.json").write_text(json.dumps(report, indent=2))
        (target / "report.html").write_text(page)
    statistics = ", ".join(f"{name} {value:.4g}" for name, value in report["statistics"].items())
    print(f"{output / 'report.html'}: {statistics}")
    return report


def read_images(source: ImageSource, encoder: Encoder, codebook, gallery_images: int, seed: int):
    """Codes of all readable images.

    Returns int32 `codes` and `images` `(num_features,)`, the sum of squared distances, a seeded sample of features,
    float32 `(num_sampled, dim)`, and WebP thumbnails of the first `gallery_images` images.
    """
    codebook = move_codebook(codebook, encoder.model.device)
    codes, sample, gallery, error = [], [], [], 0.0
    total = len(source) * encoder.num_patches
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(total, NUM_SAMPLED), replace=False))
    for positions, features, pixels in encode_all(source, encoder):
        features = features.reshape(-1, encoder.dim)
        indices, distances = find_codes(codebook, features)
        codes.append(indices.astype(np.int32))
        error += float(distances.sum(dtype=np.float64))
        rows = (np.array(positions)[:, None] * encoder.num_patches + np.arange(encoder.num_patches)).ravel()
        low, high = np.searchsorted(chosen, [rows[0], rows[-1] + 1])
        sample.append(features[np.isin(rows, chosen[low:high])])
        for image in pixels[: max(0, gallery_images - len(gallery))]:
            gallery.append(encode_thumbnail(image))
    codes = np.concatenate(codes)
    images = np.repeat(np.arange(len(codes) // encoder.num_patches, dtype=np.int32), encoder.num_patches)
    return codes, images, error, np.concatenate(sample), gallery


def encode_thumbnail(pixels) -> bytes:
    """Encodes what the patches show, float32 `(3, side, side)` in [0, 1], as WebP."""
    from PIL import Image

    array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).resize((THUMBNAIL, THUMBNAIL)).save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


def compute_report(codebook, codes, images, error: float, sample, beta: float, seed: int) -> dict:
    """The numbers of the page, as JSON has them; the arguments are as `read_images` returns them."""
    counts, table = np.bincount(codes, minlength=len(codebook.codes)), codebook.codes.numpy()
    statistics = compute_statistics(counts, error)
    ranks = np.unique(np.geomspace(1, len(counts), 200).astype(int))
    return {
        "num_images": int(images.max()) + 1,
        "codebook_size": len(counts),
        "statistics": statistics,
        "objective": compute_objective(table, error, statistics["entropy"], len(codes), beta),
        "beta": beta,
        "utilization": compute_utilization_curve(codes, images, len(counts), seed=seed),
        "rate_distortion": compute_rate_distortion(codebook, sample, seed),
        "cells": describe_cells(counts, codebook.cell_offsets.numpy()),
        "usage": np.sort(counts)[::-1][ranks - 1].tolist(),
        "usage_ranks": ranks.tolist(),
    }


def compute_rate_distortion(codebook, sample: np.ndarray, seed: int) -> dict:
    """Distortion of nested random parts of a codebook on a sample of features, and the fit of Eq. 17."""
    table, offsets = codebook.codes.numpy(), codebook.cell_offsets.numpy()
    sizes = np.unique(np.geomspace(max(2, len(table) // 256), len(table), 7).round().astype(int))
    order, distortions = np.random.default_rng(seed).permutation(len(table)), []
    for size in sizes:
        chosen = np.sort(order[:size])
        part = codebook_from_arrays(table[chosen], codebook.cell_centroids, np.searchsorted(chosen, offsets))
        distortions.append(float(find_codes(part, sample)[1].mean(dtype=np.float64)))
    fit = fit_rate_distortion(sizes, np.array(distortions))
    return {"sizes": sizes.tolist(), "distortions": distortions, **fit}


def describe_cells(counts: np.ndarray, offsets: np.ndarray) -> dict:
    """How evenly codes and uses are spread over the cells."""
    cells = np.add.reduceat(np.r_[counts, 0], offsets[:-1]) * (np.diff(offsets) > 0)
    return {
        "num_cells": len(cells),
        "codes_per_cell": np.percentile(np.diff(offsets), [0, 50, 100]).tolist(),
        "gini": compute_gini(cells),
        "largest_share": float(cells.max() / cells.sum()),
    }


def draw_curves(report: dict) -> dict[str, bytes]:
    """The curves `utilization`, `usage` and `rate_distortion` as PNG."""
    return {
        "utilization": draw_utilization(report["utilization"]),
        "usage": draw_usage(report["usage_ranks"], report["usage"]),
        "rate_distortion": draw_rate_distortion(report["rate_distortion"]),
    }


def draw_utilization(utilization: dict) -> bytes:
    figure, axes = start_figure("Codes in use", "images", "share of the codes")
    for n, curve in utilization["curves"].items():
        axes.plot(utilization["num_images"], curve["mean"], label=f"used at least {n}×")
        axes.fill_between(utilization["num_images"], curve["low"], curve["high"], alpha=0.2)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    axes.legend()
    return save_figure(figure)


def draw_usage(ranks: list[int], usage: list[int]) -> bytes:
    figure, axes = start_figure("How often each code is used", "code, most used first", "uses")
    axes.loglog(ranks, np.maximum(usage, 0.5))
    return save_figure(figure)


def draw_rate_distortion(fit: dict) -> bytes:
    title = "Distortion of nested parts of the codebook (Eq. 17)"
    figure, axes = start_figure(title, "codes", "mean squared distance")
    axes.loglog(fit["sizes"], fit["distortions"], "o")
    line = fit["constant"] * np.array(fit["sizes"], float) ** fit["exponent"]
    axes.loglog(fit["sizes"], line, label=f"K^{fit['exponent']:.3f}, as in dimension {fit['dimension']:.1f}")
    axes.legend()
    return save_figure(figure)


def start_figure(title: str, x: str, y: str):
    """A matplotlib figure and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def save_figure(figure) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()


def make_page(report, figures: dict[str, bytes], codebook, codes, images, gallery, encoder: Encoder, neighbours) -> str:
    """One HTML page that loads nothing from the network: figures, numbers and, for any code, its patches in context."""
    template = Template((Path(__file__).parent / "report.html").read_text())
    data = collect_data(codebook, codes, images, gallery, encoder, neighbours)
    rows = "".join(f"<tr><td>{name}</td><td>{value:.5g}</td></tr>" for name, value in list_numbers(report))
    encoded = ((name, base64.b64encode(figure).decode()) for name, figure in figures.items())
    pictures = "".join(f'<img alt="{name}" src="data:image/png;base64,{figure}">' for name, figure in encoded)
    title = f"{len(codebook.codes):,} codes, {report['num_images']:,} images"
    return template.substitute(title=title, table=rows, figures=pictures, data=json.dumps(data))


def list_numbers(report: dict) -> list[tuple[str, float]]:
    """The rows of the page's table."""
    objective, cells = report["objective"], report["cells"]
    least, median, most = cells["codes_per_cell"]
    return [
        *((MEANINGS.get(name, name), value) for name, value in report["statistics"].items()),
        ("squared distances of features to their codes, summed (Eq. 1, within)", objective["within"]),
        ("squared distances of codes to their mean, summed (Eq. 1, spread)", objective["spread"]),
        (f"distortion less {report['beta']:g} times the entropy (Eq. 14)", objective["regularised"]),
        ("slope of log distortion over log number of codes (Eq. 17)", report["rate_distortion"]["exponent"]),
        ("codes of a cell, least", least),
        ("codes of a cell, median", median),
        ("codes of a cell, most", most),
        ("inequality of the uses of cells, Gini", cells["gini"]),
        ("share of the largest cell in all uses", cells["largest_share"]),
    ]


def collect_data(codebook, codes, images, gallery, encoder: Encoder, neighbours) -> dict:
    """The data of the page's script."""
    shown = images < len(gallery)
    # Image * num_patches + patch, sorted by code
    order = np.argsort(codes[shown], kind="stable").astype(np.uint32)
    used = np.bincount(codes[shown], minlength=len(codebook.codes))
    counts = np.bincount(codes, minlength=len(codebook.codes))
    return {
        "codebookSize": len(codebook.codes),
        "numPatches": encoder.num_patches,
        "thumbnail": THUMBNAIL,
        "order": pack(order),
        "offsets": pack(np.r_[0, np.cumsum(used)].astype(np.uint32)),
        "counts": pack(counts.astype(np.uint32)),
        "neighbours": pack(neighbours.astype(np.int32)),
        "numNeighbours": NUM_NEIGHBOURS,
        "images": [base64.b64encode(image).decode() for image in gallery],
        **pack_previews(codebook.previews),
    }


def pack_previews(previews, max_bytes: int = 2**25) -> dict:
    """Thumbnails for the page; their side is halved until they fit `max_bytes`."""
    if previews is None:
        return {"previewSize": 0, "previews": ""}
    tiles = previews.numpy()
    while tiles.size > max_bytes and tiles.shape[1] % 2 == 0:
        side = tiles.shape[1] // 2
        tiles = tiles.reshape(-1, side, 2, side, 2, 3).mean((2, 4)).astype(np.uint8)
    return {"previewSize": tiles.shape[1], "previews": pack(tiles)}


def pack(array: np.ndarray) -> str:
    """The little-endian bytes of an array as base64."""
    return base64.b64encode(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()).decode()
