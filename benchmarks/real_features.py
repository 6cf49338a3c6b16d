"""Patch features of real images, read once and kept on disk, for the benchmarks of codebooks.

    python benchmarks/real_features.py --images images --encoder clip-vit-b16 --cache outputs/features

Every 20th image, in a random order, is held out. The others come first as they are, then mirrored.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from transformers_unicode2.codebook.features import Encoder
from transformers_unicode2.codebook.images import ImageSource, decode_image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", required=True, help="folder of images")
    parser.add_argument("--encoder", required=True, help="SigLIP or CLIP vision encoder")
    parser.add_argument("--cache", default="outputs/features", help="folder for the features")


def load_features(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Features to fit and held-out ones, both float16 `(num_features, dim)`, mapped from files that are written when they lack."""
    cache = Path(args.cache)
    if not (cache / "features.json").exists():
        write_features(args, cache)
    dim = json.loads((cache / "features.json").read_text())["dim"]
    return tuple(
        np.memmap(cache / name, np.float16, "r").reshape(-1, dim) for name in ("fit.float16", "held_out.float16")
    )


def write_features(args: argparse.Namespace, cache: Path) -> None:
    from PIL import ImageOps
    from tqdm import tqdm

    cache.mkdir(parents=True, exist_ok=True)
    encoder, source = Encoder(args.encoder, "bfloat16"), ImageSource(args.images)
    order, skipped = np.random.default_rng(0).permutation(len(source)), 0
    with open(cache / "fit.float16", "wb") as fit, open(cache / "held_out.float16", "wb") as held_out:
        for mirror in (False, True):
            batches = [order[::20]] * (not mirror) + [order[np.arange(len(order)) % 20 != 0]]
            for indices, file in zip(batches, (held_out, fit) if not mirror else (fit,)):
                for start in tqdm(range(0, len(indices), 32), unit="batch", desc=Path(file.name).stem):
                    images = []
                    for index in indices[start : start + 32]:
                        try:
                            image = decode_image(next(source.read(index, index + 1))[1])
                            images.append(encoder.preprocess(ImageOps.mirror(image) if mirror else image))
                        except ValueError:
                            skipped += 1
                    file.write(encoder(images)[0].astype(np.float16).tobytes())
    (cache / "features.json").write_text(json.dumps({"dim": encoder.dim, "images": len(source), "unreadable": skipped}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_arguments(parser)
    for name, rows in zip(("fit", "held out"), load_features(parser.parse_args())):
        print(f"{name}: {len(rows)} features of width {rows.shape[1]}")
