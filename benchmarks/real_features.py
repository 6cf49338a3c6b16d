"""Patch features of real images, computed once and kept on disk, for the codebook benchmarks.

    python benchmarks/real_features.py --images emoji clipart --encoder clip-vit-b16 --num-patches 1000000
    python benchmarks/real_features.py --synthetic 4000000 --dim 768 --features outputs/synthetic  # too few images

Images come in random order. Every 20th is held out. The others are for fitting, first as they are, then mirrored if
more are needed. After a kill, the same command resumes. With a larger --num-patches it adds features.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np

# Every 20th image is held out.
HELD_OUT = 20
# Images that are encoded, and then counted as done, together.
BATCH = 32
# Synthetic features drawn at a time.
BLOCK = 50_000


def load_features(folder: str, num_features: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Features to fit and held-out features, both float16 `(num_features, dim)`, memory-mapped."""
    place = Path(folder)
    if not (place / "features.json").exists():
        raise SystemExit(f"{folder} holds no features; make them with benchmarks/real_features.py.")
    dim = json.loads((place / "features.json").read_text())["dim"]
    fit, held_out = (
        np.memmap(file, np.float16, "r", shape=(file.stat().st_size // (2 * dim), dim))
        for file in (place / "fit.float16", place / "held_out.float16")
    )
    return fit[:num_features], held_out


def read_float32(folder: str, num_features: int) -> np.ndarray:
    """The first features to fit, float32 `(num_features, dim)`. Read, not mapped, so that the file takes no memory."""
    fit = load_features(folder, num_features)[0]
    points = np.empty(fit.shape, np.float32)
    with open(Path(folder) / "fit.float16", "rb") as file:
        for start in range(0, len(points), BLOCK):
            part = points[start : start + BLOCK]
            part[:] = np.fromfile(file, np.float16, part.size).reshape(part.shape)
    return points


class Files:
    """The two feature files and their progress. Cuts off what a killed run left half-written."""

    def __init__(self, folder: Path, begun: dict):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "features.json"
        self.state = json.loads(self.path.read_text()) if self.path.exists() else begun | {"done": 0, "unreadable": 0}
        changed = [name for name in begun if self.state.get(name) != begun[name]]
        if changed:
            raise SystemExit(f"{folder} holds features of another {' and '.join(changed)}; choose another --features.")
        self.files = {}
        for name in ("fit.float16", "held_out.float16"):
            self.files[name] = open(folder / name, "ab")
            self.files[name].truncate(self.state.setdefault(name, 0))

    def add(self, name: str, features: np.ndarray) -> None:
        self.files[name].write(features.astype(np.float16).tobytes())

    def finish_batch(self, done: int) -> None:
        self.state["done"] = done
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            self.state[name] = file.tell()
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.state, indent=2))
        temporary.rename(self.path)


def write_features(images: list[str], encoder_path: str, folder: Path, num_patches: int, max_pixels: int) -> None:
    """Encodes images until the folder has `num_patches` features to fit, or none are left."""
    from tqdm import tqdm

    from transformers_unicode2.codebook.features import Encoder
    from transformers_unicode2.codebook.images import ImageSource

    encoder = Encoder(encoder_path, "bfloat16")
    sources = [ImageSource(path, max_pixels=max_pixels) for path in images]
    places = [(source, index) for source in sources for index in range(len(source))]
    fingerprint = [encoder.fingerprint()[:16], *(source.fingerprint()[:16] for source in sources)]
    files = Files(folder, {"dim": encoder.dim, "images": len(places), "made from": fingerprint})
    order = np.random.default_rng(0).permutation(len(places))
    num_done = files.state["fit.float16"] // 2 // encoder.dim
    with tqdm(total=num_patches, unit="patch", desc="features", initial=num_done) as bar:
        for start in range(files.state["done"], 2 * len(order), BATCH):
            if bar.n >= num_patches:
                return
            kept = {"fit.float16": [], "held_out.float16": []}
            for position in range(start, min(start + BATCH, 2 * len(order))):
                mirrored, number = divmod(position, len(order))
                name = "fit.float16" if number % HELD_OUT else "held_out.float16"
                if name == "fit.float16" or not mirrored:
                    source, index = places[order[number]]
                    kept[name] += read_image(source, index, encoder, bool(mirrored), files)
            for name, batch in kept.items():
                if batch:
                    features = encoder(batch)[0].reshape(-1, encoder.dim)
                    files.add(name, features)
                    bar.update(len(features) * (name == "fit.float16"))
            files.finish_batch(start + BATCH)
    print(f"all images are read, also mirrored: {bar.n} features, fewer than {num_patches}")


def read_image(source, index: int, encoder, mirrored: bool, files: Files) -> list:
    """A list of one preprocessed image, empty if it is unreadable, which `files` counts."""
    from PIL import ImageOps

    try:
        image = source.decode(next(source.read(index, index + 1))[1])
        return [encoder.preprocess(ImageOps.mirror(image) if mirrored else image)]
    except ValueError:
        files.state["unreadable"] += 1
        return []


class SyntheticFeatures:
    """Random features in nested clusters whose variances follow a power law, like those of encoders.

    Each block of `BLOCK` features depends on its number alone.
    """

    def __init__(self, dim: int):
        rng = np.random.default_rng(0)
        self.scales = np.float32(8) * np.arange(1, dim + 1, dtype=np.float32) ** -0.5
        coarse = rng.normal(size=(64, dim)).astype(np.float32) * self.scales
        self.centers = coarse[rng.integers(64, size=4096)]
        self.centers = self.centers + rng.normal(size=(4096, dim)).astype(np.float32) * self.scales * 0.7
        self.shares = rng.dirichlet(np.ones(4096))

    def draw(self, block: int) -> np.ndarray:
        """Float32 `(BLOCK, dim)`."""
        rng = np.random.default_rng([1, block])
        points = rng.standard_normal((BLOCK, len(self.scales)), np.float32)
        points *= self.scales * 0.5
        points += self.centers[rng.choice(4096, BLOCK, p=self.shares)]
        return points


def write_synthetic(folder: Path, num_patches: int, dim: int) -> None:
    """Writes the features of `SyntheticFeatures`, those of block 0 as held-out ones."""
    from tqdm import tqdm

    source, files = SyntheticFeatures(dim), Files(folder, {"dim": dim, "images": 0, "made from": "synthetic"})
    for block in tqdm(range(files.state["done"], -(-num_patches // BLOCK) + 1), unit="block", desc="features"):
        files.add("fit.float16" if block else "held_out.float16", source.draw(block))
        files.finish_batch(block + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", nargs="+", help="folders, files or globs of images")
    parser.add_argument("--encoder", help="SigLIP or CLIP vision encoder")
    parser.add_argument("--features", default="outputs/features", help="folder for the features")
    parser.add_argument(
        "--num-patches", type=int, default=1_000_000, help="features to fit, not counting held-out ones"
    )
    parser.add_argument("--max-pixels", type=int, default=20_000_000, help="larger images are left out")
    parser.add_argument("--synthetic", type=int, metavar="N", help="write N random features instead")
    parser.add_argument("--dim", type=int, default=768, help="width of the random features")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.synthetic:
        write_synthetic(Path(args.features), args.synthetic, args.dim)
    else:
        import torch

        torch.set_num_threads(args.threads)
        write_features(args.images, args.encoder, Path(args.features), args.num_patches, args.max_pixels)
    for name, rows in zip(("fit", "held out"), load_features(args.features)):
        print(f"{name}: {len(rows)} features of width {rows.shape[1]}")


if __name__ == "__main__":
    main()
