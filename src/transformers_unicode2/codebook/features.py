"""Images to patch features."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


class ImageSource:
    """The images of a folder, or of the `image` column of parquet files (a file, a glob or a folder of them).

    Raises `FileNotFoundError` when there are none.
    """

    def __init__(self, path: str, limit: int | None = None):
        folder = Path(path)
        tables = sorted(folder.glob("*.parquet")) if folder.is_dir() else sorted(folder.parent.glob(folder.name))
        if tables and tables[0].suffix == ".parquet":
            from datasets import Image as ImageFeature
            from datasets import load_dataset

            rows = load_dataset("parquet", data_files=[str(table) for table in tables], split="train")
            self.items = rows.select_columns("image").cast_column("image", ImageFeature(decode=False))
        else:
            self.items = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        self.length = len(self.items) if limit is None else min(limit, len(self.items))
        if self.length == 0:
            raise FileNotFoundError(
                f"No images in {path}: it holds neither parquet files nor {', '.join(sorted(IMAGE_SUFFIXES))} files."
            )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Image.Image:
        import io

        item = self.items[index]
        return Image.open(item if isinstance(item, Path) else io.BytesIO(item["image"]["bytes"])).convert("RGB")


def iterate_features(
    source: ImageSource, vision_model, image_processor, batch_size: int = 64, description: str = "features"
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Yields `(features, pixel_values)` batch by batch: float32 `(batch_size, num_patches, hidden_size)` and what went in."""
    from tqdm import tqdm

    for start in tqdm(range(0, len(source), batch_size), unit="batch", desc=description):
        images = [source[i] for i in range(start, min(start + batch_size, len(source)))]
        pixel_values = image_processor(images, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            yield vision_model(pixel_values).last_hidden_state.float().numpy(), pixel_values
