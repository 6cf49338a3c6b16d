"""Builds codebook C1 from images (section 3.2 and Algorithm 1 of the paper).

    unicode2 codebook build --images data --encoder siglip --codebook-size 4096 --num-cells 64 --output codebook
    accelerate launch --num_processes 8 -m transformers_unicode2.codebook.build --images data --encoder siglip --output codebook

Images are a folder of image files, parquet or arrow files with an `image` column, or WebDataset tars. The encoder is a folder or Hub
name of a SigLIP or CLIP vision model. The build can be killed at any moment: the same command goes on from there, to the same bytes.
"""

import argparse
import hashlib
import json
import shutil
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np

from .clustering import allocate, hash_rows, make_backend
from .features import Encoder, count_rows, extract_features, open_shard, shard_path, write_arrays, write_file
from .images import ImageSource
from .phases import CellReader, assign_shard, count_distinct, move_codes, settle, sort_shard, train_cell, train_cells
from .statistics import compute_statistics
from .storage import codebook_from_arrays, save_codebook

NOT_RECORDED = ("output", "keep_work")
GIB = 2**30


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 codebook build", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--images", required=True, help="folder, file or glob: images, parquet, arrow or WebDataset tars")
    add("--encoder", required=True, help="SigLIP or CLIP vision encoder with its image processor")
    add(
        "--output", required=True, help="folder for codebook.safetensors and codebook.json, and for the work in between"
    )
    add("--codebook-size", type=int, default=500_000)
    add("--num-cells", type=int, default=1000, help="coarse clusters")
    add("--allocation", choices=("uniform", "proportional"), default="uniform", help="codes per cell")
    add("--num-images", type=int, help="use the first so many images only")
    add("--streaming", action="store_true", help="--images is the name of a data set to be streamed")
    add("--patches-per-image", type=int, help="a seeded sample of so many patches per image (default: all)")
    add("--preview-size", type=int, default=8, help="side of each code's mean thumbnail in pixels, 0 for none")
    add("--polish", type=int, default=0, help="Lloyd passes over all features, across the borders of the cells")
    add("--backend", choices=("faiss", "torch"), default="faiss", help="library for k-means")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the encoder; defines the codes",
    )
    add("--max-memory-gib", type=float, default=8.0, help="resident memory of one process")
    add("--max-unreadable", type=float, default=0.01, help="share of images that may be unreadable")
    add("--keep-work", action="store_true", help="keep the sorted features, in OUTPUT/work, for another use")
    add("--seed", type=int, default=0)
    return parser


class Build:
    """The phases in order. All processes call `run`; each does its share of the shards and of the cells."""

    def __init__(self, args: argparse.Namespace, state):
        self.args, self.state = args, state
        self.output = Path(args.output)
        self.work = self.output / "work"
        self.features, self.cells, self.fine = (self.work / name for name in ("features", "cells", "fine"))
        self.memory = int(args.max_memory_gib * GIB)
        self.backend = make_backend(args.backend, str(state.device))

    def run(self) -> dict:
        """Statistics of the finished codebook; on processes but the first an empty dictionary."""
        self.prepare()
        with self.only_run() as finished:
            if finished:
                return finished
            for phase in (self.extract, self.train_cells, self.sort, self.train_codes, self.polish):
                start = time.monotonic()
                phase()
                self.state.wait_for_everyone()
                self.say(f"{phase.__name__.replace('_', ' ')}: {time.monotonic() - start:.1f} s")
            return self.save() if self.state.is_main_process else {}

    def prepare(self) -> None:
        """Opens images and encoder, and cuts the images into shards."""
        args = self.args
        self.source = ImageSource(args.images, args.num_images, args.streaming)
        self.encoder = Encoder(args.encoder, args.dtype, self.state.device)
        self.record = {
            **{name: value for name, value in vars(args).items() if name not in NOT_RECORDED},
            "images_sha256": self.source.fingerprint(),
            "encoder_sha256": hash_weights(self.encoder.model),
        }
        self.dim, self.num_images = self.encoder.dim, len(self.source)
        patches = min(args.patches_per_image or self.encoder.num_patches, self.encoder.num_patches)
        self.row_bytes = 2 * self.dim + 3 * args.preview_size**2
        self.images_per_shard = max(1, min(4096, self.memory // 16 // (patches * self.row_bytes)))
        self.num_rows = self.num_images * patches
        self.num_shards = -(-self.num_images // self.images_per_shard)

    @contextmanager
    def only_run(self):
        """Holds the folder for this run alone; yields the statistics of a build that has finished, or nothing.

        Raises `ValueError` when another run holds it, or when what lies there was begun with other options or images.
        """
        from filelock import FileLock, Timeout

        make_folders(self.features, self.cells, self.fine)
        if not self.state.is_main_process:
            self.state.wait_for_everyone()
            yield (
                json.loads((self.output / "codebook.json").read_text())["provenance"]["statistics"]
                if (self.output / "codebook.json").exists()
                else None
            )
            return
        lock = FileLock(self.work / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"Another run is building in {self.output}; wait for it or choose another --output."
            ) from None
        with lock:
            finished = self.compare_with_record()
            if not finished:
                self.announce()
            self.state.wait_for_everyone()
            yield finished
        if not self.args.keep_work:
            shutil.rmtree(self.work)

    def compare_with_record(self) -> dict | None:
        done, begun = self.output / "codebook.json", self.work / "run.json"
        provenance = json.loads(done.read_text())["provenance"] if done.exists() else None
        known = provenance.get("command") if provenance else json.loads(begun.read_text()) if begun.exists() else None
        if known is not None:
            changes = [
                f"{name} was {known.get(name)} and is {value}"
                for name, value in self.record.items()
                if known.get(name) != value
            ]
            if changes:
                raise ValueError(
                    f"{self.output} holds a build with other settings ({'; '.join(changes)}); choose another --output, or delete it."
                )
        if provenance:
            self.say(f"{self.output} is finished; nothing to do")
            return provenance["statistics"]
        write_file(begun, json.dumps(self.record, indent=2).encode())
        return None

    def announce(self) -> None:
        """Says what the build needs; raises `OSError` when the disk has less."""
        there = sum(file.stat().st_size for file in self.work.rglob("*") if file.is_file())
        code_bytes = 4 * self.dim + 3 * self.args.preview_size**2
        needed = self.num_rows * (self.row_bytes + 8) + 3 * self.args.codebook_size * code_bytes
        needed = max(0, needed + 2 * self.images_per_shard * self.row_bytes - there)
        free = shutil.disk_usage(self.work).free
        self.say(
            f"{self.num_images} images, {self.num_rows} patch features of width {self.dim}, "
            f"{self.args.codebook_size} codes in {self.args.num_cells} cells; {needed / GIB:.2f} GiB of disk, {free / GIB:.1f} GiB free"
        )
        if needed > free:
            raise OSError(
                f"The build needs {needed / GIB:.2f} GiB more in {self.work}, which has {free / GIB:.2f} GiB free; "
                "use fewer images or --patches-per-image."
            )

    def extract(self) -> None:
        if (self.work / "cells.safetensors").exists():
            return
        extract_features(
            self.source,
            self.encoder,
            self.features,
            self.images_per_shard,
            self.args.patches_per_image,
            self.args.preview_size,
            self.args.max_unreadable,
            self.args.seed,
            self.state,
        )

    def train_cells(self) -> None:
        output = self.work / "cells.safetensors"
        if output.exists() or not self.state.is_main_process:
            return
        self.check_features()
        sampled = min(512 * self.args.num_cells, self.memory // 4 // (16 * self.dim))
        train_cells(self.features, self.num_shards, self.args.num_cells, sampled, self.backend, self.args.seed, output)

    def check_features(self) -> None:
        """Puts the names of unreadable images into one file; raises `ValueError` when too many images or features were left out."""
        lists = [(self.features / f"{shard:05d}.skipped.txt").read_text() for shard in range(self.num_shards)]
        skipped = "".join(lists).splitlines()
        if skipped:
            write_file(self.output / "skipped.txt", "".join(lists).encode())
            self.say(f"{len(skipped)} images cannot be read; they are listed in {self.output / 'skipped.txt'}")
        expected = self.num_rows // self.num_images * (self.num_images - len(skipped))
        found = sum(count_rows(shard_path(self.features, shard)) for shard in range(self.num_shards))
        if expected - found > self.args.max_unreadable * expected:
            raise ValueError(
                f"{expected - found} of {expected} features are not finite in float16, more than the share of "
                f"{self.args.max_unreadable:g} that --max-unreadable allows; check the encoder."
            )
        if found < expected:
            self.say(f"{expected - found} of {expected} features are not finite; they are left out")

    def sort(self) -> None:
        from tqdm import tqdm

        with open_shard(self.work / "cells.safetensors") as file:
            centroids = file.get_tensor("centroids")
        for shard in tqdm(self.share(self.num_shards), unit="shard", desc="sorting by cell"):
            features, output = shard_path(self.features, shard), shard_path(self.cells, shard)
            if not output.exists():
                sort_shard(features, output, centroids, self.backend)
            features.unlink(missing_ok=True)

    def share(self, count: int) -> range:
        return range(self.state.process_index, count, self.state.num_processes)

    def train_codes(self) -> None:
        """Fine k-means of this process's cells; then the main process trains those again whose codes another cell has as well."""
        from tqdm import tqdm

        self.reader = CellReader(self.cells, self.num_shards)
        if self.state.is_main_process and not (self.work / "shares.safetensors").exists():
            cells = tqdm(range(self.args.num_cells), unit="cell", desc="distinct features")
            distinct = np.array([count_distinct(self.reader, cell) for cell in cells])
            shares = allocate(distinct, self.args.codebook_size, self.args.allocation)
            write_arrays(self.work / "shares.safetensors", {"shares": shares})
        self.state.wait_for_everyone()
        with open_shard(self.work / "shares.safetensors") as file:
            self.shares = file.get_tensor("shares")
        for cell in tqdm(self.share(self.args.num_cells), unit="cell", desc="k-means inside cells"):
            if not shard_path(self.fine, cell).exists():
                self.train_cell(cell, np.zeros(0, np.uint64))
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            self.part_twins()

    def train_cell(self, cell: int, forbidden: np.ndarray) -> None:
        max_points = max(1024, min(512 * int(self.shares[cell]), self.memory // 4 // (16 * self.dim)))
        write_arrays(
            shard_path(self.fine, cell),
            train_cell(
                self.reader,
                cell,
                int(self.shares[cell]),
                max_points,
                self.backend,
                self.args.seed + 1 + cell,
                forbidden,
            ),
        )

    def part_twins(self) -> None:
        """Codes of two cells that are equal once rounded: the later cell is trained again without them."""
        seen = np.zeros(0, np.uint64)
        for cell in range(self.args.num_cells):
            hashes = hash_rows(self.read_fine(cell, "codes"))
            if np.isin(hashes, seen).any():
                self.train_cell(cell, seen)
                hashes = hash_rows(self.read_fine(cell, "codes"))
            if len(hashes) < self.shares[cell]:
                raise ValueError(
                    f"Cell {cell} has distinct features for {len(hashes)} of its {self.shares[cell]} codes only; "
                    "add images or ask for fewer codes."
                )
            seen = np.concatenate([seen, hashes])

    def read_fine(self, cell: int, name: str) -> np.ndarray:
        with open_shard(shard_path(self.fine, cell)) as file:
            return file.get_tensor(name)

    def all_codes(self) -> np.ndarray:
        return np.concatenate([self.read_fine(cell, "codes") for cell in range(self.args.num_cells)])

    def polish(self) -> None:
        """Lloyd passes over all features, from the nearest of all codes to the means; the last pass only counts."""
        from tqdm import tqdm

        if not self.args.polish:
            return
        codes = self.all_codes()
        block = max(1, self.memory // 4 // (8 * self.dim))
        starts = range(0, len(codes), block)
        self.distortions = []
        for step in range(self.args.polish + 1):
            folder = self.work / f"polish-{step}"
            make_folders(folder)
            assigned = [folder / f"assigned-{shard:05d}.safetensors" for shard in range(self.num_shards)]
            for shard in tqdm(self.share(self.num_shards), unit="shard", desc=f"polish {step}: nearest codes"):
                if not assigned[shard].exists():
                    assign_shard(self.reader.paths[shard], codes, self.backend, assigned[shard])
            self.state.wait_for_everyone()
            self.distortions.append(sum(float(self.read(path, "distortion")[0]) for path in assigned))
            if step == self.args.polish:
                break
            moved = [folder / f"moved-{start:08d}.safetensors" for start in starts]
            for index in tqdm(self.share(len(starts)), unit="block", desc=f"polish {step}: means"):
                first = starts[index]
                if not moved[index].exists():
                    move_codes(self.reader.paths, assigned, codes[first : first + block], first, moved[index])
            self.state.wait_for_everyone()
            codes = settle(codes, np.concatenate([self.read(path, "codes") for path in moved]))
        self.polished, self.assigned = codes, assigned

    def read(self, path: Path, name: str) -> np.ndarray:
        with open_shard(path) as file:
            return file.get_tensor(name)

    def save(self) -> dict:
        names = range(self.args.num_cells)
        with open_shard(self.work / "cells.safetensors") as file:
            centroids = file.get_tensor("centroids")
        counts = np.concatenate([self.read_fine(cell, "counts") for cell in names])
        distortion = sum(float(self.read_fine(cell, "distortions").sum()) for cell in names)
        codes = self.all_codes()
        previews, side = None, self.args.preview_size
        if side:
            previews = np.concatenate([self.read_fine(cell, "previews") for cell in names]).reshape(-1, side, side, 3)
        provenance = {"command": self.record, "num_images": self.num_images, "backend": self.backend.describe()}
        if self.args.polish:
            codes, distortion = self.polished, self.distortions[-1]
            counts = sum(np.bincount(self.read(path, "codes"), minlength=len(codes)) for path in self.assigned)
            provenance["polish_distortions"] = [value / counts.sum() for value in self.distortions]
            self.say(
                f"polish: distortion {provenance['polish_distortions'][0]:.5g} to {provenance['polish_distortions'][-1]:.5g}"
            )
        statistics = compute_statistics(counts, distortion)
        provenance["statistics"] = statistics
        offsets = np.concatenate([[0], np.cumsum(self.shares)])
        save_codebook(codebook_from_arrays(codes, centroids, offsets, previews), self.output, provenance)
        self.say(f"{self.output}: {len(codes)} codes, " + ", ".join(f"{k} {v:.4g}" for k, v in statistics.items()))
        return statistics

    def say(self, text: str) -> None:
        if self.state.is_main_process:
            print(text, flush=True)


def make_folders(*folders: Path) -> None:
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{folder} cannot be made ({error.strerror}); choose another --output.") from error


def hash_weights(model) -> str:
    """SHA-256 of the names, shapes and float32 values of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def main(args: argparse.Namespace) -> dict:
    from accelerate import PartialState

    return Build(args, PartialState(timeout=timedelta(days=7))).run()


if __name__ == "__main__":
    from ..cli import main as run_command

    sys.argv[1:1] = ["codebook", "build"]
    run_command()
