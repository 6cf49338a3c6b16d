"""Turns images into shards of patch features on disk. A shard is written whole or not at all."""

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from ..encoders_unicode2 import count_patches, encode_patches, load_encoder
from ..files import write_file
from ..images_unicode2 import UniCode2ImageProcessor, one_line
from ..loading_unicode2 import NOT_HASHED
from .images import ImageSource

# A build makes the files of these folders again when they are missing.
MADE_AGAIN = ("features", "cells", "fine")


class Encoder:
    r"""
    A frozen encoder with its image processor, see `load_encoder`.

    Args:
        path (`str`): folder or Hub name of the encoder, or of a model that contains it.
        dtype (`str`, *optional*, defaults to `"float32"`): dtype of the computation; it defines the codes.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): where it runs.

    Raises:
        `ValueError`: as `load_encoder` does.
    """

    def __init__(self, path: str, dtype: str = "float32", device="cpu"):
        self.model, image_processor = load_encoder(path, dtype)
        self.model.to(device)
        # The digests are of the stock settings.
        self.pixel_settings = image_processor.to_dict()
        self.image_processor = UniCode2ImageProcessor.adopt(image_processor)
        config = self.model.config
        self.patch_size, self.dim, self.num_patches = config.patch_size, config.hidden_size, count_patches(config)
        # An estimate for one image.
        self.activation_bytes = 4 * self.num_patches * (2 * config.intermediate_size + 8 * self.dim)

    def fingerprint(self) -> str:
        """SHA-256 of the weights in float32 and of the configurations of model and image processor."""
        digest = hashlib.sha256()
        for config in (self.model.config.to_dict(), self.pixel_settings):
            kept = {key: value for key, value in config.items() if key not in NOT_HASHED and not key.startswith("_")}
            digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def preprocess(self, image):
        """An RGB image as the encoder reads it: float32 tensor `(3, height, width)`."""
        return self.image_processor(image, return_tensors="pt")["pixel_values"][0]

    def __call__(self, pixel_values) -> tuple[np.ndarray, "torch.Tensor"]:  # noqa: F821
        """Encodes a list of preprocessed images.

        Returns float32 features `(num_images, num_patches, dim)` without CLS, and what the patches show: float32 pixels
        `(num_images, 3, side, side)` in [0, 1], cropped to whole patches.
        """
        import torch

        pixel_values = torch.stack(pixel_values)
        with torch.no_grad():
            features = encode_patches(self.model, pixel_values.to(self.model.device)).last_hidden_state
        mean = torch.tensor(self.image_processor.image_mean)[:, None, None]
        std = torch.tensor(self.image_processor.image_std)[:, None, None]
        side = round(self.num_patches**0.5) * self.patch_size
        pixels = pixel_values[..., :side, :side].float() * std + mean
        return features.float().cpu().numpy(), pixels


def read_batches(
    source: ImageSource, encoder: Encoder, start: int, stop: int, batch_size: int = 64
) -> Iterator[tuple[list[int], list, list[str]]]:
    """Reads the images from `start` to `stop` in batches. Holds one image at a time at its full size.

    Yields positions and preprocessed pixels of the readable images, and a line with name and error for each other.
    Raises `ValueError` when the source ends before `stop`.
    """
    contents = source.read(start, stop)
    for first in range(start, stop, batch_size):
        last, count = min(first + batch_size, stop), 0
        positions, pixels, skipped = [], [], []
        for position, (name, content) in enumerate(islice(contents, last - first), first):
            count += 1
            try:
                pixels.append(encoder.preprocess(source.decode(content)))
                positions.append(position)
            except ValueError as error:
                skipped.append(f"{one_line(name)}\t{one_line(str(error))}")
        if count < last - first:
            raise ValueError(f"{source.path} ends after {first + count} images; --num-images is {len(source)}.")
        yield positions, pixels, skipped


def encode_all(source: ImageSource, encoder: Encoder) -> Iterator[tuple[list[int], np.ndarray, "torch.Tensor"]]:  # noqa: F821
    """Yields positions, features and pixels of all readable images, batch by batch, with a progress bar.

    Prints the name of each unreadable image. Raises `ValueError` on features that are not finite, and when no image can
    be read.
    """
    from tqdm import tqdm

    if source.left_out:
        tqdm.write(source.left_out.sentence())
    readable = 0
    with tqdm(total=len(source), unit="image", desc="features") as bar:
        for positions, pixel_values, skipped in read_batches(source, encoder, 0, len(source)):
            for line in skipped:
                tqdm.write(f"left out: {line.expandtabs(1)}")
            if positions:
                features, pixels = encoder(pixel_values)
                if not np.isfinite(features).all():
                    count = (~np.isfinite(features).all(-1)).sum()
                    raise ValueError(
                        f"{count} of {features.shape[0] * features.shape[1]} features of images {positions[0]} to "
                        f"{positions[-1]} are not finite; check the encoder."
                    )
                yield positions, features, pixels
            readable += len(positions)
            bar.update(len(positions) + len(skipped))
    if not readable:
        raise ValueError(f"None of the {len(source)} images can be read.")


@dataclass(frozen=True)
class Extraction:
    """How images become shards of features.

    Attributes:
        images_per_shard: images of each shard but the last.
        batch_size: images that the encoder reads at a time.
        patches_per_image: size of the seeded sample of the patches of each image; `None` keeps all.
        preview_size: side of a thumbnail in pixels; 0 makes none.
        max_unreadable: share of all images that may be unreadable.
        seed: of the samples.
    """

    images_per_shard: int
    batch_size: int
    patches_per_image: int | None
    preview_size: int
    max_unreadable: float
    seed: int


def extract_features(
    source: ImageSource, encoder: Encoder, folder: Path, todo: list[int], settings: Extraction
) -> None:
    """Writes the shards numbered `todo`, `{folder}/00000.safetensors` and so on.

    A shard holds float16 `features` `(num_rows, dim)` and, with previews, uint8 `thumbnails`
    `(num_rows, side * side * 3)`. Its `00000.skipped.txt` lists the unreadable images.
    Raises `ValueError` when too many images are unreadable.
    """
    from tqdm import tqdm

    size = settings.images_per_shard
    spans = {shard: (shard * size, min((shard + 1) * size, len(source))) for shard in todo}
    finished = [file for file in folder.glob("*.skipped.txt") if int(file.name.split(".")[0]) not in spans]
    num_skipped = sum(len(read_lines(file)) for file in finished)
    with tqdm(total=sum(stop - start for start, stop in spans.values()), unit="image", desc="features") as bar:
        for shard, (start, stop) in spans.items():
            rows, skipped = {"features": [], "thumbnails": []}, []
            for positions, pixel_values, lines in read_batches(source, encoder, start, stop, settings.batch_size):
                skipped += lines
                if positions:
                    for name, array in sample_rows(encoder, positions, pixel_values, settings).items():
                        rows[name].append(array)
                bar.update(len(positions) + len(lines))
            num_skipped += len(skipped)
            check_unreadable(num_skipped, len(source), settings.max_unreadable, skipped)
            arrays = {name: np.concatenate(parts) for name, parts in rows.items() if parts}
            write_file(folder / f"{shard:05d}.skipped.txt", "".join(f"{line}\n" for line in skipped).encode())
            write_arrays(shard_path(folder, shard), arrays)


def read_lines(file: Path) -> list[str]:
    """The lines of a list of unreadable images, one per image."""
    return file.read_text("utf-8").splitlines()


def sample_rows(
    encoder: Encoder, positions: list[int], pixel_values: list, settings: Extraction
) -> dict[str, np.ndarray]:
    """Float16 `features`, and `thumbnails`, of a seeded sample of each image's patches; only finite rows are kept."""
    features, pixels = encoder(pixel_values)
    orders = [np.random.default_rng([settings.seed, index]).permutation(features.shape[1]) for index in positions]
    chosen = np.stack(orders)[:, : settings.patches_per_image]  # (num_images, num_chosen)
    with np.errstate(over="ignore"):
        features = np.take_along_axis(features, chosen[..., None], 1).astype(np.float16).reshape(-1, encoder.dim)
    finite = np.isfinite(features).all(-1)
    rows = {"features": features[finite]}
    if settings.preview_size:
        tiles = patch_thumbnails(pixels, encoder.patch_size, settings.preview_size)
        tiles = np.take_along_axis(tiles, chosen[..., None], 1).reshape(-1, tiles.shape[-1])
        rows["thumbnails"] = tiles[finite]
    return rows


def patch_thumbnails(pixels, patch_size: int, side: int) -> np.ndarray:
    """Shrinks the patches of images in [0, 1] `(n, 3, height, width)` to uint8 `(n, num_patches, side * side * 3)`."""
    import torch

    scaled = pixels
    if side != patch_size:
        height, width = (size // patch_size * side for size in pixels.shape[-2:])
        scaled = torch.nn.functional.interpolate(pixels, size=(height, width), mode="area")
    tiles = torch.nn.functional.unfold(scaled, side, stride=side)  # (n, 3 * side * side, num_patches)
    tiles = tiles.unflatten(1, (3, side, side))  # (n, 3, side, side, num_patches)
    tiles = (tiles.clamp(0, 1) * 255).round().byte()
    return tiles.permute(0, 4, 2, 3, 1).flatten(2).numpy()


def check_unreadable(num_skipped: int, num_images: int, max_unreadable: float, skipped: list[str]) -> None:
    """Raises `ValueError` when more than the share `max_unreadable` of all images is unreadable, some in `skipped`."""
    if skipped and num_skipped > max_unreadable * num_images:
        raise ValueError(
            f"{num_skipped} of {num_images} images cannot be read, more than the share of {max_unreadable:g} that "
            f"--max-unreadable allows; one of them is {skipped[-1].expandtabs(1)}"
        )


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.safetensors"


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays with a checksum for each, which `check_arrays` compares."""
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    # For a file without arrays, safetensors writes metadata that it cannot read again.
    checksums = {name: str(zlib.crc32(array)) for name, array in arrays.items()} or None
    write_file(path, save(arrays, checksums))


def check_arrays(path: Path) -> None:
    """Raises `ValueError` unless a file holds exactly what `write_arrays` wrote."""
    with open_shard(path) as file:
        for name, checksum in (file.metadata() or {}).items():
            if str(zlib.crc32(file.get_tensor(name))) != checksum:
                raise damaged(path, f"{name} does not match its checksum")


def damaged(path: Path, reason: str) -> ValueError:
    """The error for a damaged file of a build; it says what to do."""
    work = next((folder for folder in path.parents if folder.name == "work"), None)
    again = "it" if work is None or path.parent.name in MADE_AGAIN else f"the folder {work}"
    return ValueError(f"{path} is damaged ({reason}); delete {again} and run the same command again.")


def open_shard(path: Path):
    """`safetensors.safe_open` of a file. Raises `ValueError` when the file is truncated."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise damaged(path, str(error)) from error


def read_array(path: Path, name: str) -> np.ndarray:
    with open_shard(path) as file:
        return file.get_tensor(name)


def gather_codes(paths: Iterable[Path], size: int, dim: int) -> np.ndarray:
    """Reads the `codes` of all files into one float32 array `(size, dim)`, one file at a time."""
    codes, row = np.empty((size, dim), np.float32), 0
    for path in paths:
        part = read_array(path, "codes")
        codes[row : row + len(part)] = part
        row += len(part)
    return codes


def count_rows(path: Path, name: str = "features") -> int:
    """Number of rows of an array in a shard, 0 if the shard lacks it."""
    with open_shard(path) as shard:
        return shard.get_slice(name).get_shape()[0] if name in shard.keys() else 0


def count_columns(path: Path, name: str = "features") -> int:
    """Width of an array in a shard, 0 if the shard lacks it."""
    with open_shard(path) as shard:
        return shard.get_slice(name).get_shape()[1] if name in shard.keys() else 0


def read_rows(path: Path, name: str, start: int, stop: int) -> np.ndarray:
    """Rows from `start` to `stop`, or to the end of the array if it is shorter."""
    with open_shard(path) as shard:
        rows = shard.get_slice(name)
        return rows[start : min(stop, rows.get_shape()[0])]
