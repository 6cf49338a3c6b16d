"""Builds codebook C1 from images (section 3.2 and Algorithm 1 of the paper).

    unicode2 codebook build --images data --encoder siglip --codebook-size 4096 --num-cells 64 --output codebook
    accelerate launch --multi_gpu --num_processes 8 -m transformers_unicode2.codebook.build ...
    torchrun --nproc_per_node 8 -m transformers_unicode2.codebook.build ...

On CPUs use `torchrun`, since `accelerate launch --cpu` starts one process only.

Images are a folder of image files, parquet or arrow files with an `image` column, or WebDataset tars.
The encoder is the folder or Hub name of a SigLIP, of a SigLIP 2 of a fixed size or of a CLIP.
A build can be killed at any moment. The same command resumes it and writes the same bytes.
"""

import argparse
import shutil
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from ..cli import SEED, SHARE, at_least
from ..encoders_unicode2 import ENCODER_DTYPES
from ..files import make_folders, write_file
from ..processes import agree, follow_launcher, join
from ..record import held
from .clustering import allocate, contains, hash_rows, make_backend
from .features import (
    Encoder,
    Extraction,
    check_unreadable,
    count_rows,
    extract_features,
    gather_codes,
    read_array,
    read_lines,
    shard_path,
    write_arrays,
)
from .folder import GIB, BuildFolder
from .images import ImageSource, fitting_pixels
from .phases import (
    NEAR_CELLS,
    CellReader,
    assign_rows,
    average_thumbnails,
    count_distinct,
    sample_features,
    sort_shard,
    train_cell,
    train_cells,
    use_codes,
)
from .polish import Polish
from .statistics import compute_probe_recall, compute_statistics
from .storage import codebook_from_arrays, save_codebook

NOT_RECORDED = ("output", "keep_work")
# Features that the recall of the approximate search is measured on.
NUM_MEASURED = 4096
BACKEND = "library for k-means; torch where the BLAS of FAISS does not know the processor"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 codebook build", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add, default = parser.add_argument, " (default: %(default)s)"
    add("--images", required=True, help="folder, file or glob: images, parquet, arrow or WebDataset tars")
    add("--encoder", required=True, help="SigLIP, SigLIP 2 or CLIP with its image processor")
    add("--output", required=True, help="folder for the codebook and for the files of an unfinished build")
    add("--codebook-size", type=at_least(1), default=500_000, help="number of codes" + default)
    add("--num-cells", type=at_least(1), default=1000, help="coarse clusters" + default)
    add("--allocation", choices=("uniform", "proportional"), default="uniform", help="codes per cell" + default)
    add("--num-images", type=at_least(1), help="use only the first N images")
    add("--streaming", action="store_true", help="--images is the name of a data set to stream")
    add("--patches-per-image", type=at_least(1), help="seeded sample of N patches of each image (default: all)")
    add("--preview-size", type=at_least(0), default=8, help="pixels of a code's thumbnail, 0 for none" + default)
    add("--iterations", type=at_least(1), default=20, help="of k-means, in both of its stages" + default)
    add("--polish", type=at_least(0), default=0, help="Lloyd passes across cell borders" + default)
    add("--backend", choices=("faiss", "torch"), default="faiss", help=BACKEND + default)
    add(
        "--dtype",
        choices=ENCODER_DTYPES,
        default="float32",
        help="dtype of the encoder, which defines the codes and which checkpoints keep" + default,
    )
    add("--max-memory-gib", type=at_least(0.0), default=8.0, help="memory of one process" + default)
    add(
        "--images-per-shard",
        type=at_least(1),
        help="a killed build repeats its unfinished shard (default: 4096, fewer if memory is short)",
    )
    add("--max-unreadable", type=SHARE, default=0.01, help="share of images that may be unreadable" + default)
    add("--keep-work", action="store_true", help="keep the sorted features in OUTPUT/work")
    add("--seed", type=SEED, default=0, help="of the samples and of k-means" + default)
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
        """Returns the statistics of the finished codebook, or an empty dictionary on all processes but the main one."""
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
        self.source = ImageSource(args.images, args.num_images, args.streaming, fitting_pixels(self.memory))
        self.encoder = Encoder(args.encoder, args.dtype, self.state.device)
        self.record = {
            **{name: value for name, value in vars(args).items() if name not in NOT_RECORDED},
            "images_sha256": self.source.fingerprint(),
            "encoder_sha256": self.encoder.fingerprint(),
            # The processor decides in which dtype the backend multiplies.
            "products": str(getattr(self.backend, "fast_dtype", "float32")),
        }
        self.dim, self.num_images = self.encoder.dim, len(self.source)
        patches = min(args.patches_per_image or self.encoder.num_patches, self.encoder.num_patches)
        self.num_rows = self.num_images * patches
        if self.num_rows < args.codebook_size:
            raise ValueError(
                f"{self.num_images} images have {self.num_rows} features, too few for {args.codebook_size} codes; "
                "add images or ask for fewer codes."
            )
        self.check_memory(sum(weight.nbytes for weight in self.encoder.model.state_dict().values()))
        # Of one image.
        self.shard_bytes = patches * (2 * self.dim + 3 * args.preview_size**2)
        fitting = max(1, min(4096, self.memory // 16 // self.shard_bytes))
        self.images_per_shard = min(args.images_per_shard or fitting, self.num_images)
        shard = self.images_per_shard * self.shard_bytes
        # Memory holds several copies of a shard.
        if shard > self.memory // 8:
            raise ValueError(
                f"--images-per-shard is {self.images_per_shard}; a shard of {shard / GIB:.2f} GiB needs "
                f"--max-memory-gib of at least {8 * shard / GIB:.1f}, and it is {args.max_memory_gib:g}."
            )
        self.batch_size = max(1, min(64, self.memory // 4 // self.encoder.activation_bytes))
        self.num_shards = -(-self.num_images // self.images_per_shard)

    def check_memory(self, encoder_bytes: int) -> None:
        """Raises `ValueError` unless the budget holds Python with torch, and the encoder or two codebooks."""
        size, width = self.args.codebook_size, 3 * self.args.preview_size**2
        # The last pass of polishing holds float32 sums of the thumbnails of near cells, twice.
        near = size * min(NEAR_CELLS, self.args.num_cells) // self.args.num_cells if self.args.polish else 0
        held = 2 * size * (4 * self.dim + width) + 8 * near * width
        least = (3 * GIB // 4 + max(encoder_bytes, held)) / GIB
        if self.args.max_memory_gib < least:
            raise ValueError(
                f"--max-memory-gib is {self.args.max_memory_gib:g}; {self.args.codebook_size} codes of width "
                f"{self.dim} and this encoder need at least {least:.2f}."
            )

    @contextmanager
    def only_run(self):
        """Locks the folder for this run and yields the statistics of a finished build, or `None`.

        Raises `ValueError` when another run holds the lock, or the folder holds a build with other options or images.
        """
        with ExitStack() as stack:
            finished = agree(lambda: self.enter(stack))
            yield finished
            if self.state.is_main_process and not self.args.keep_work:
                shutil.rmtree(self.work, ignore_errors=finished is not None)

    def enter(self, stack: ExitStack) -> dict | None:
        folder = BuildFolder(self.output, self.record, self.source)
        # A finished build needs neither a lock nor room to write.
        if not folder.is_finished():
            make_folders(self.features, self.cells, self.fine)
            stack.enter_context(held(self.output, work=self.work.name, doing="building in"))
        finished = folder.compare_with_record()
        if finished:
            self.say(f"{self.output} is finished; nothing to do")
            return finished
        folder.begin()
        self.announce(folder)
        return None

    def announce(self, folder: BuildFolder) -> None:
        """Prints what the build needs. Raises `NotWrittenError` when the disk has too little room."""
        code_bytes = 4 * self.dim + 3 * self.args.preview_size**2
        needed = self.num_images * self.shard_bytes + 8 * self.num_rows + 3 * self.args.codebook_size * code_bytes
        needed += 2 * self.state.num_processes * self.images_per_shard * self.shard_bytes
        if self.args.polish:
            needed += 4 * (self.args.polish + min(NEAR_CELLS, self.args.num_cells)) * self.args.codebook_size * self.dim
        self.say(
            f"{self.num_images} images, {self.num_rows} patch features of width {self.dim}, "
            f"{self.args.codebook_size} codes in {self.args.num_cells} cells, {self.state.num_processes} processes"
        )
        if self.source.left_out:
            self.say(self.source.left_out.sentence())
        self.say(folder.check_room(needed))

    def extract(self) -> None:
        missing = [
            shard
            for shard in self.share(self.num_shards)
            if not shard_path(self.features, shard).exists() and not shard_path(self.cells, shard).exists()
        ]
        settings = Extraction(
            images_per_shard=self.images_per_shard,
            batch_size=self.batch_size,
            patches_per_image=self.args.patches_per_image,
            preview_size=self.args.preview_size,
            max_unreadable=self.args.max_unreadable,
            seed=self.args.seed,
        )
        extract_features(self.source, self.encoder, self.features, missing, settings)
        # The later phases need its memory.
        self.encoder = None

    def train_cells(self) -> None:
        output = self.work / "cells.safetensors"
        if output.exists() or not self.state.is_main_process:
            return
        self.check_features()
        num_cells, seed, iterations = self.args.num_cells, self.args.seed, self.args.iterations
        shards = [shard_path(self.features, shard) for shard in range(self.num_shards)]
        num_sampled = min(512 * num_cells, self.memory // 4 // (16 * self.dim))
        train_cells(shards, num_cells, num_sampled, self.backend, seed, output, iterations)

    def check_features(self) -> None:
        """Lists the unreadable images in one file. Raises `ValueError` when too many images or features are missing."""
        lists = [read_lines(self.features / f"{shard:05d}.skipped.txt") for shard in range(self.num_shards)]
        skipped = [line for lines in lists for line in lines]
        check_unreadable(len(skipped), self.num_images, self.args.max_unreadable, skipped)
        if skipped:
            write_file(self.output / "skipped.txt", "".join(f"{line}\n" for line in skipped).encode())
            self.say(f"{len(skipped)} images cannot be read; {self.output / 'skipped.txt'} lists them")
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

        centroids = read_array(self.work / "cells.safetensors", "centroids")
        for shard in tqdm(self.share(self.num_shards), unit="shard", desc="sorting by cell"):
            features, output = shard_path(self.features, shard), shard_path(self.cells, shard)
            if not output.exists():
                sort_shard(features, output, centroids, self.backend)
            features.unlink(missing_ok=True)

    def share(self, count: int) -> range:
        return range(self.state.process_index, count, self.state.num_processes)

    def train_codes(self) -> None:
        """Fine k-means in this process's cells. The main process then retrains cells that share a code with another."""
        from tqdm import tqdm

        self.reader = CellReader(self.cells, self.num_shards)
        if self.state.is_main_process and not (self.work / "shares.safetensors").exists():
            cells = tqdm(range(self.args.num_cells), unit="cell", desc="counting distinct features")
            distinct = np.array([count_distinct(self.reader, cell) for cell in cells])
            shares = allocate(distinct, self.args.codebook_size, self.args.allocation)
            write_arrays(self.work / "shares.safetensors", {"shares": shares})
        self.state.wait_for_everyone()
        self.shares = read_array(self.work / "shares.safetensors", "shares")
        for cell in tqdm(self.share(self.args.num_cells), unit="cell", desc="k-means inside cells"):
            if not shard_path(self.fine, cell).exists():
                self.train_cell(cell, np.zeros(0, np.uint64))
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            self.separate_twins()

    def train_cell(self, cell: int, forbidden: np.ndarray) -> None:
        share = int(self.shares[cell])
        max_points = max(1024, share, min(512 * share, self.memory // 4 // (16 * self.dim)))
        seed, iterations = self.args.seed + 1 + cell, self.args.iterations
        codes, assigned = train_cell(self.reader, cell, share, max_points, self.backend, seed, forbidden, iterations)
        if len(codes) < share:
            raise ValueError(
                f"Cell {cell} has distinct features for only {len(codes)} of its {share} codes; "
                "add images or ask for fewer codes."
            )
        arrays = {"codes": codes}
        # Polishing computes these for its own codes.
        if not self.args.polish:
            indices, distances = assigned or assign_rows(self.reader, cell, codes, self.backend)
            arrays |= use_codes(indices, distances, len(codes))
            if self.args.preview_size:
                arrays["previews"] = average_thumbnails(self.reader, cell, indices, arrays["counts"], self.memory // 4)
        write_arrays(shard_path(self.fine, cell), arrays)

    def separate_twins(self) -> None:
        """Retrains each cell that shares a rounded code with earlier cells, whose codes are then forbidden."""
        from tqdm import tqdm

        seen = np.zeros(0, np.uint64)
        for cell in tqdm(range(self.args.num_cells), unit="cell", desc="comparing cells"):
            hashes = hash_rows(self.read_fine(cell, "codes"))
            if contains(seen, hashes).any():
                self.train_cell(cell, seen)
                hashes = hash_rows(self.read_fine(cell, "codes"))
            seen = np.sort(np.concatenate([seen, hashes]), kind="stable")

    def read_fine(self, cell: int, name: str) -> np.ndarray:
        return read_array(shard_path(self.fine, cell), name)

    def all_codes(self) -> np.ndarray:
        paths = (shard_path(self.fine, cell) for cell in range(self.args.num_cells))
        return gather_codes(paths, self.args.codebook_size, self.dim)

    def polish(self) -> None:
        if self.args.polish:
            self.polished = Polish(self, self.all_codes())
            self.polished.run()

    def save(self) -> dict:
        names, side = range(self.args.num_cells), self.args.preview_size
        centroids = read_array(self.work / "cells.safetensors", "centroids")
        provenance = {"command": self.record, "num_images": self.num_images, "backend": self.backend.describe()}
        previews = None
        if self.args.polish:
            codes, distortion = self.polished.codes, self.polished.distortions[-1]
            counts = self.polished.count_uses()
            provenance["polish_distortions"] = [value / counts.sum() for value in self.polished.distortions]
            before, after = provenance["polish_distortions"][0], provenance["polish_distortions"][-1]
            self.say(f"polish: distortion {before:.5g} to {after:.5g}")
            if side:
                previews = self.polished.average_thumbnails()
        else:
            codes = self.all_codes()
            counts = np.concatenate([self.read_fine(cell, "counts") for cell in names])
            distortion = sum(float(self.read_fine(cell, "distortions").sum()) for cell in names)
            if side:
                previews = np.concatenate([self.read_fine(cell, "previews") for cell in names])
        previews = previews.reshape(-1, side, side, 3) if side else None
        statistics = compute_statistics(counts, distortion)
        provenance["statistics"] = statistics
        cells = min(NEAR_CELLS, self.args.num_cells)
        scope = f"nearest code of {cells} cells" if self.args.polish else "nearest code of the feature's cell"
        provenance["statistics_of"] = scope
        offsets = np.concatenate([[0], np.cumsum(self.shares)])
        codebook = codebook_from_arrays(codes, centroids, offsets, previews, self.args.dtype)
        sample = sample_features(self.reader.paths, NUM_MEASURED, self.args.seed + 1)
        codebook.probe_recall = compute_probe_recall(codebook, sample)
        provenance["probe_recall_of"] = f"{len(sample)} of the features that it was built from"
        save_codebook(codebook, self.output, provenance)
        figures = ", ".join(f"{name} {value:.4g}" for name, value in statistics.items())
        self.say(f"{self.output}: {len(codes)} codes; with the {scope}: {figures}")
        return statistics

    def say(self, text: str) -> None:
        if self.state.is_main_process:
            print(text, flush=True)


def check_arguments(args: argparse.Namespace) -> None:
    """Raises `ValueError` on options that cannot make a codebook."""
    if args.num_cells > args.codebook_size:
        raise ValueError(
            f"--num-cells is {args.num_cells}, more than the {args.codebook_size} codes of --codebook-size."
        )


def main(args: argparse.Namespace) -> dict:
    import torch

    check_arguments(args)
    follow_launcher()
    state = join(cpu=not torch.cuda.is_available())
    try:
        return Build(args, state).run()
    finally:
        # Gloo's threads can abort the process if they live until the interpreter ends.
        state.destroy_process_group()


if __name__ == "__main__":
    from ..cli import main as run_command

    sys.argv[1:1] = ["codebook", "build"]
    run_command()
