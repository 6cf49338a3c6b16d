"""Images to shards of patch features on disk; a shard is the unit that is done or not."""

import os
from pathlib import Path

import numpy as np

from .images import ImageSource, decode_image

CLIP_TYPES = ("clip", "clip_vision_model")


class Encoder:
    r"""
    A frozen `SiglipVisionModel` or `CLIPVisionModel` with its image processor.

    Args:
        path (`str`): folder or Hub name of the encoder, or of the model that holds it.
        dtype (`str`, *optional*, defaults to `"float32"`): dtype that it computes in; it defines the codes.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): where it runs.
    """

    def __init__(self, path: str, dtype: str = "float32", device="cpu"):
        from transformers import AutoConfig, AutoImageProcessor, CLIPVisionModel, SiglipVisionModel

        model_type = AutoConfig.from_pretrained(path).model_type
        if model_type not in (*CLIP_TYPES, "siglip", "siglip_vision_model"):
            raise ValueError(f"{path} is a {model_type} model; the encoder has to be a SigLIP or CLIP vision model.")
        model_class = CLIPVisionModel if model_type in CLIP_TYPES else SiglipVisionModel
        self.model = model_class.from_pretrained(path, dtype=dtype).eval().to(device)
        self.image_processor = AutoImageProcessor.from_pretrained(path)
        config = self.model.config
        self.patch_size, self.dim = config.patch_size, config.hidden_size
        self.num_patches = (config.image_size // config.patch_size) ** 2

    def __call__(self, images: list) -> tuple[np.ndarray, "torch.Tensor"]:  # noqa: F821
        """RGB images to float32 features `(num_images, num_patches, dim)`, without CLS, and what the encoder saw of them: float32
        pixels `(num_images, 3, height, width)` in [0, 1]."""
        import torch

        pixel_values = self.image_processor(images, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            hidden = self.model(pixel_values.to(self.model.device, self.model.dtype)).last_hidden_state
        mean, std = (
            torch.tensor(values)[:, None, None]
            for values in (self.image_processor.image_mean, self.image_processor.image_std)
        )
        return hidden[:, -self.num_patches :].float().cpu().numpy(), pixel_values * std + mean


def extract_features(
    source: ImageSource,
    encoder: Encoder,
    folder: Path,
    images_per_shard: int,
    patches_per_image: int | None,
    preview_size: int,
    max_unreadable: float,
    seed: int,
    state,
    batch_size: int = 64,
) -> None:
    """Writes shard after shard of `images_per_shard` images, `{folder}/00000.safetensors`; those that are there are left alone.

    A shard holds float16 `features` `(num_rows, dim)` and, with previews, uint8 `thumbnails` `(num_rows, side * side * 3)`; its
    `00000.skipped.txt` names the images that could not be read. Raises `ValueError` when these are more than `max_unreadable` of all.
    """
    from tqdm import tqdm

    num_shards = -(-len(source) // images_per_shard)
    mine = range(state.process_index, num_shards, state.num_processes)
    todo = [shard for shard in mine if not shard_path(folder, shard).exists()]
    images = min(len(source), len(mine) * images_per_shard)
    with tqdm(
        total=images, initial=images - min(images, len(todo) * images_per_shard), unit="image", desc="features"
    ) as bar:
        for shard in todo:
            start = shard * images_per_shard
            stop = min(start + images_per_shard, len(source))
            rows, skipped = {"features": [], "thumbnails": []}, []
            for first in range(start, stop, batch_size):
                last = min(first + batch_size, stop)
                for name, array in encode_batch(
                    source, encoder, first, last, patches_per_image, preview_size, seed, skipped
                ).items():
                    rows[name].append(array)
                bar.update(last - first)
            check_unreadable(len(skipped), len(source), max_unreadable, skipped)
            arrays = {name: np.concatenate(parts) for name, parts in rows.items() if parts}
            write_file(folder / f"{shard:05d}.skipped.txt", "".join(f"{line}\n" for line in skipped).encode())
            write_arrays(shard_path(folder, shard), arrays)


def encode_batch(source, encoder, first, last, patches_per_image, preview_size, seed, skipped) -> dict:
    """Rows of the images from `first` to `last`: a seeded sample of the patches of each, without those that are not finite."""
    images, indices = [], []
    for index, (name, content) in enumerate(source.read(first, last), first):
        try:
            images.append(decode_image(content))
            indices.append(index)
        except (OSError, ValueError) as error:
            skipped.append(f"{name}\t{error}")
    if not images:
        return {}
    features, pixels = encoder(images)  # (num_images, num_patches, dim)
    chosen = np.stack(
        [np.random.default_rng([seed, index]).permutation(features.shape[1])[:patches_per_image] for index in indices]
    )
    with np.errstate(over="ignore"):
        features = np.take_along_axis(features, chosen[..., None], 1).astype(np.float16).reshape(-1, encoder.dim)
    finite = np.isfinite(features).all(-1)
    rows = {"features": features[finite]}
    if preview_size:
        tiles = patch_thumbnails(pixels, encoder.patch_size, preview_size)
        tiles = np.take_along_axis(tiles, chosen[..., None], 1).reshape(-1, tiles.shape[-1])
        rows["thumbnails"] = tiles[finite]
    return rows


def patch_thumbnails(pixels, patch_size: int, side: int) -> np.ndarray:
    """Patches of images in [0, 1] `(n, 3, height, width)` as thumbnails, uint8 `(n, num_patches, side * side * 3)`."""
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
    if num_skipped > max_unreadable * num_images:
        raise ValueError(
            f"{num_skipped} of {num_images} images cannot be read, more than the share of {max_unreadable:g} that "
            f"--max-unreadable allows; the first is {skipped[0].expandtabs(1)}"
        )


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.safetensors"


def write_file(path: Path, content: bytes) -> None:
    """All of it or nothing: under a temporary name first. What is left of a failed write is removed."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"{path} could not be written ({error.strerror}); make room and run the same command again."
        ) from error


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save

    write_file(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def open_shard(path: Path):
    """`safetensors.safe_open` of a file; raises `ValueError` when it is cut short."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run the same command again.") from error


def count_rows(path: Path, name: str = "features") -> int:
    """Rows of an array in a shard, 0 when the shard has none."""
    with open_shard(path) as shard:
        return shard.get_slice(name).get_shape()[0] if name in shard.keys() else 0


def read_rows(path: Path, name: str, start: int, stop: int) -> np.ndarray:
    """Rows from `start` to `stop`, or to the end of the array."""
    with open_shard(path) as shard:
        rows = shard.get_slice(name)
        return rows[start : min(stop, rows.get_shape()[0])]
