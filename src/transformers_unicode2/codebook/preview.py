"""A mean thumbnail for each code, and a picture of them. Thumbnails show any codes as a mosaic, without a decoder.

    unicode2 codebook preview codebook --images images --output preview.png

With --images, the thumbnails are computed and stored in the codebook. Without, the picture shows those that it has.
"""

import argparse
import io
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from PIL import Image

from ..cli import at_least
from ..files import make_folders, write_file
from ..record import held
from .clustering import add_groups, find_codes, move_codebook
from .features import Encoder, encode_all, patch_thumbnails
from .images import ImageSource
from .storage import codebook_from_arrays, load_codebook, load_encoder, load_provenance, save_codebook

# Codes in the picture.
MAX_SHOWN = 16384


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 codebook preview", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("codebook", help="folder that `unicode2 codebook build` wrote")
    parser.add_argument("--images", help="images to take the thumbnails from")
    parser.add_argument("--encoder", help="default: the encoder that the codebook was built with")
    parser.add_argument("--num-images", type=at_least(1), help="use only the first N images")
    parser.add_argument(
        "--preview-size", type=at_least(1), default=8, help="side of a thumbnail (default: %(default)s)"
    )
    parser.add_argument("--output", help="PNG file (default: CODEBOOK/preview.png)")
    return parser


def main(args: argparse.Namespace) -> None:
    with held(args.codebook, option="codebook") if args.images else nullcontext():
        preview(args)


def preview(args: argparse.Namespace) -> None:
    codebook = load_codebook(args.codebook)
    if args.images:
        provenance = load_provenance(args.codebook)
        encoder = load_encoder(args.codebook, codebook, args.encoder)
        source = ImageSource(args.images, args.num_images)
        previews, counts = compute_previews(source, encoder, codebook, args.preview_size)
        kept = codebook.previews is not None and codebook.previews.shape[1] == args.preview_size
        if kept:
            previews[counts == 0] = codebook.previews.numpy()[counts == 0]
        recall, centroids, offsets = codebook.probe_recall, codebook.cell_centroids, codebook.cell_offsets
        codebook = codebook_from_arrays(codebook.codes, centroids, offsets, previews, codebook.encoder_dtype)
        codebook.probe_recall = recall
        provenance["previews"] = {"images": args.images, "num_images": len(source)}
        save_codebook(codebook, args.codebook, provenance)
        print(
            f"{args.codebook}: thumbnails of {(counts > 0).sum()} of {len(counts)} codes; "
            f"the others are not in the images and {'keep theirs' if kept else 'are black'}"
        )
    elif codebook.previews is None:
        raise ValueError(f"{args.codebook} has no thumbnails; give --images to make them.")
    output = Path(args.output or Path(args.codebook) / "preview.png")
    make_folders(output.parent)
    write_file(output, draw_atlas(codebook))
    print(f"{output}: {min(MAX_SHOWN, len(codebook.codes))} of {len(codebook.codes)} codes, sorted by cell")


def compute_previews(source: ImageSource, encoder: Encoder, codebook, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean thumbnails, uint8 `(codebook_size, side, side, 3)`, and the uses of each code, int64 `(codebook_size,)`.

    Unused codes are black.
    """
    codebook, size = move_codebook(codebook, encoder.model.device), len(codebook.codes)
    sums, counts = np.zeros((size, side * side * 3)), np.zeros(size, np.int64)
    for _, features, pixels in encode_all(source, encoder):
        indices = find_codes(codebook, features.reshape(-1, encoder.dim))[0]
        tiles = patch_thumbnails(pixels, encoder.patch_size, side)
        add_groups(sums, tiles.reshape(len(indices), -1), indices)
        counts += np.bincount(indices, minlength=size)
    means = np.round(sums / np.maximum(counts, 1)[:, None]).astype(np.uint8)
    return means.reshape(-1, side, side, 3), counts


def draw_atlas(codebook) -> bytes:
    """Thumbnails in rows, in the order of the codes, as PNG. A large codebook shows evenly spaced codes."""
    shown = np.linspace(0, len(codebook.codes) - 1, min(MAX_SHOWN, len(codebook.codes))).round().astype(int)
    tiles = codebook.previews.numpy()[shown]
    side, columns = tiles.shape[1], int(np.ceil(len(tiles) ** 0.5))
    rows = -(-len(tiles) // columns)
    atlas = np.zeros((rows * columns, side, side, 3), np.uint8)
    atlas[: len(tiles)] = tiles
    atlas = atlas.reshape(rows, columns, side, side, 3).transpose(0, 2, 1, 3, 4).reshape(rows * side, columns * side, 3)
    scale = max(1, 16 // side)
    size, buffer = (columns * side * scale, rows * side * scale), io.BytesIO()
    Image.fromarray(atlas).resize(size, Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()
