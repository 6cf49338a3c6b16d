"""Images a second that `unicode2 tokenize` brings to an encoder that costs nothing.

    python benchmarks/tokenize_images.py --num-images 2000 --workers 0 1 2

Made JPEG files of 640 x 480 pixels are read, decoded and resized in worker processes, and their codes are written. The
peer is a `DataLoader` over the same files with Pillow and the stock `SiglipImageProcessorPil` of the same settings. It
has no check of a whole file, no rule for transparency and 16 bits, no shards, no list of broken images, and writes
nothing. Both run in turn for each number of workers. The CPU time of an image is that of all processes together. It
depends less on what else a machine does.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from rows import describe_run
from torch.utils.data import DataLoader
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from transformers_unicode2 import UniCode2ImageProcessor
from transformers_unicode2.training.image_codes import encode_images
from transformers_unicode2.training.row_index import Job, RowIndex, index_rows
from transformers_unicode2.training.sources import open_source


class FreeQuantizer:
    """In the place of a quantizer: codes that cost nothing."""

    device = torch.device("cpu")
    config = SimpleNamespace(codebook_config=SimpleNamespace(codebook_size=500_000), num_image_tokens=729)

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(pixel_values), 729, dtype=torch.long)


class StockImages(torch.utils.data.Dataset):
    """The peer: files to pixels by Pillow and the stock image processor."""

    def __init__(self, files: list[str], image_processor):
        self.files, self.image_processor = files, image_processor

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> torch.Tensor:
        image = Image.open(self.files[number]).convert("RGB")
        return self.image_processor(image, return_tensors="pt")["pixel_values"][0]


def make_files(folder: Path, count: int) -> list[str]:
    """Writes JPEG files with smooth contents, and a table that names them."""
    rng, lines = np.random.default_rng(0), []
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        small.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg", quality=90)
        lines.append(f"{number:06d}.jpg\ta picture")
    (folder / "captions.tsv").write_text("\n".join(lines) + "\n")
    return [str(folder / line.split("\t")[0]) for line in lines]


def time_ours(folder: Path, work: Path, image_processor, batch_size: int, workers: int) -> tuple[float, float]:
    """Seconds, and seconds of CPU, of the second pass over the index in `work`."""
    for file in work.glob("codes-*"):
        file.unlink()
    index = RowIndex([Job("", 1, open_source(str(folder)))], work)
    start = read_clocks()
    encode_images(index, FreeQuantizer(), image_processor, batch_size, workers, PartialState())
    return read_clocks() - start


def time_peer(files: list[str], image_processor, batch_size: int, workers: int) -> tuple[float, float]:
    start = read_clocks()
    loader = DataLoader(StockImages(files, image_processor), batch_size, num_workers=workers)
    assert sum(map(len, loader)) == len(files)
    return read_clocks() - start


def read_clocks() -> np.ndarray:
    """Seconds now, and seconds of CPU of this process and of its workers that have ended."""
    return np.array([time.perf_counter(), sum(os.times()[:4])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--side", type=int, default=384, help="of the images that the encoder reads, in pixels")
    args = parser.parse_args()
    settings = {"size": {"height": args.side, "width": args.side}}
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder, work = Path(place, "images"), Path(place, "work")
        folder.mkdir()
        work.mkdir()
        files = make_files(folder, args.num_images)
        start = time.perf_counter()
        index_rows([Job("", 1, open_source(str(folder)))], work, 10_000)
        first_pass = time.perf_counter() - start
        for workers in args.workers:
            ours = time_ours(folder, work, UniCode2ImageProcessor(**settings), args.batch_size, workers)
            peer = time_peer(files, SiglipImageProcessorPil(**settings), args.batch_size, workers)
            rows.append((workers, ours / args.num_images, peer / args.num_images))
    print(describe_run(torch.get_num_threads(), "pillow", "transformers"), end="\n\n")
    print(f"{args.num_images} images, {os.cpu_count()} cores; reading the table took {first_pass:.2f} s.\n")
    print("| workers | tokenize, images/s | stock, images/s | of stock | tokenize, CPU ms | stock, CPU ms |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for workers, (ours, our_cpu), (peer, peer_cpu) in rows:
        line = f"{1 / ours:.0f} | {1 / peer:.0f} | {peer / ours:.2f} | {1e3 * our_cpu:.1f} | {1e3 * peer_cpu:.1f}"
        print(f"| {workers} | {line} |")


if __name__ == "__main__":
    main()
