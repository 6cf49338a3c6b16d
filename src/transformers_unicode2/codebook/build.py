"""Builds codebook C1 from images (section 3.2 and Algorithm 1 of the paper).

    unicode2 codebook build --images data --encoder siglip --codebook-size 4096 --num-cells 64 --output codebook

Images are a folder of image files or parquet files with an `image` column. The encoder is a folder or Hub name of a SigLIP.
"""

import argparse

import numpy as np

from .clustering import assign, two_stage_kmeans
from .features import ImageSource, iterate_features
from .statistics import compute_statistics
from .storage import codebook_from_arrays, save_codebook


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 codebook build", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", required=True, help="folder of images, or parquet files with an `image` column")
    parser.add_argument("--encoder", required=True, help="SigLIP vision encoder with its image processor")
    parser.add_argument("--output", required=True, help="folder for codebook.safetensors and codebook.json")
    parser.add_argument("--codebook-size", type=int, default=500_000)
    parser.add_argument("--num-cells", type=int, default=1000, help="coarse clusters")
    parser.add_argument("--allocation", choices=("uniform", "proportional"), default="uniform", help="codes per cell")
    parser.add_argument("--num-images", type=int, help="use the first so many images only")
    parser.add_argument(
        "--patches-per-image", type=int, help="a seeded sample of so many patches per image (default: all)"
    )
    parser.add_argument(
        "--preview-size", type=int, default=8, help="side of each code's mean thumbnail in pixels, 0 for none"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(args: argparse.Namespace) -> dict:
    import faiss
    import torch
    import transformers
    from transformers import AutoImageProcessor, SiglipVisionModel

    source = ImageSource(args.images, args.num_images)
    vision_model = SiglipVisionModel.from_pretrained(args.encoder).eval()
    image_processor = AutoImageProcessor.from_pretrained(args.encoder)
    rng = np.random.default_rng(args.seed)
    features, patches = [], []
    for batch, pixel_values in iterate_features(source, vision_model, image_processor):
        chosen = np.stack([rng.permutation(batch.shape[1])[: args.patches_per_image] for _ in batch])
        features.append(np.take_along_axis(batch, chosen[..., None], 1).reshape(-1, batch.shape[-1]))
        if args.preview_size:
            tiles = patch_thumbnails(pixel_values, vision_model.config.patch_size, args.preview_size)
            patches.append(np.take_along_axis(tiles, chosen[..., None], 1).reshape(-1, tiles.shape[-1]))
    points = np.concatenate(features)  # (num_patches, codebook_dim)
    print(f"{len(source)} images, {len(points)} patch features of width {points.shape[1]}, {args.codebook_size} codes")
    codes, centroids, offsets = two_stage_kmeans(points, args.codebook_size, args.num_cells, args.seed, args.allocation)
    nearest, distance = assign(points, codes)
    counts = np.bincount(nearest, minlength=len(codes))
    previews = (
        mean_thumbnails(np.concatenate(patches), nearest, counts, args.preview_size) if args.preview_size else None
    )
    statistics = compute_statistics(counts, float(distance.sum()))
    provenance = {
        "command": vars(args),
        "num_images": len(source),
        "encoder_dtype": str(vision_model.dtype),
        "statistics": statistics,
        "versions": {"faiss": faiss.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    save_codebook(codebook_from_arrays(codes, centroids, offsets, previews), args.output, provenance)
    print(f"{args.output}: {len(codes)} codes, " + ", ".join(f"{key} {value:.4g}" for key, value in statistics.items()))
    return statistics


def patch_thumbnails(pixel_values, patch_size: int, side: int) -> np.ndarray:
    """Patches of images in [-1, 1] `(n, 3, height, width)` as thumbnails, uint8 `(n, num_patches, side * side * 3)`."""
    import torch

    scaled = (
        torch.nn.functional.interpolate(pixel_values, scale_factor=side / patch_size, mode="area")
        if side != patch_size
        else pixel_values
    )
    tiles = torch.nn.functional.unfold(scaled, side, stride=side).unflatten(
        1, (3, side, side)
    )  # (n, 3, side, side, num_patches)
    tiles = ((tiles.clamp(-1, 1) + 1) * 127.5).round().byte()
    return tiles.permute(0, 4, 2, 3, 1).flatten(2).numpy()


def mean_thumbnails(patches: np.ndarray, nearest: np.ndarray, counts: np.ndarray, side: int) -> np.ndarray:
    """Mean of the thumbnails `(num_patches, side * side * 3)` that map to each code: uint8 `(codebook_size, side, side, 3)`."""
    order = np.argsort(nearest, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)])
    means = np.zeros((len(counts), patches.shape[1]), dtype=np.uint8)
    for code in np.flatnonzero(counts):
        means[code] = patches[order[starts[code] : starts[code + 1]]].mean(0).round()
    return means.reshape(len(counts), side, side, 3)


if __name__ == "__main__":
    main(make_parser().parse_args())
