"""Lloyd passes over all features, across cell borders, after the k-means inside the cells."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..files import make_folders
from .clustering import round_to_bfloat16
from .features import gather_codes, read_array, shard_path, write_arrays
from .phases import average_previews, average_sums, find_near_codes, pass_over_cell, settle

if TYPE_CHECKING:
    from .build import Build


class Polish:
    r"""
    Each pass finds the nearest code in the surrounding cells and moves the codes to the means of their features. The
    last pass only counts.

    All processes call `run`; each handles its share of the cells.

    Args:
        build (`Build`): a build with trained cells.
        codes (`np.ndarray` of shape `(codebook_size, dim)`): float32, the codes to start from.

    Attributes:
        codes: the polished codes, with the same shape and dtype.
        distortions: sum of the squared distances before each pass, and after the last one.
        passes: the files of the last pass, one per cell.
    """

    def __init__(self, build: "Build", codes: np.ndarray):
        self.codes, self.distortions, self.passes = codes, [], []
        self.work, self.state, self.share, self.memory = build.work, build.state, build.share, build.memory
        self.reader, self.backend = build.reader, build.backend
        self.num_steps, self.preview_size = build.args.polish, build.args.preview_size
        self.near = find_near_codes(read_array(self.work / "cells.safetensors", "centroids"), build.shares)

    def run(self) -> None:
        for step in range(self.num_steps + 1):
            last = step == self.num_steps
            self.passes = self.pass_over_cells(step, last)
            moved = [] if last else self.move_codes()
            total = self.passes[0].parent / "distortion.safetensors"
            if self.state.is_main_process and not total.exists():
                distortion = sum(float(read_array(path, "distortions").sum()) for path in self.passes)
                write_arrays(total, {"distortion": np.array([distortion])})
            self.state.wait_for_everyone()
            self.distortions.append(float(read_array(total, "distortion")[0]))
            if not last:
                self.codes = settle(self.codes, gather_codes(moved, *self.codes.shape))
                for path in self.passes if self.state.is_main_process else ():
                    path.unlink(missing_ok=True)

    def move_codes(self) -> list[Path]:
        """Writes the mean feature of each code, in files of as many codes as fit the memory; returns the files."""
        size, dim = self.codes.shape
        block = max(1, self.memory // 4 // (16 * dim))
        moved = [self.passes[0].parent / f"moved-{first:08d}.safetensors" for first in range(0, size, block)]
        for index in self.share(len(moved)):
            path, first = moved[index], index * block
            if not path.exists():
                before = self.codes[first : first + block]
                means, counts = average_sums(self.passes, first, len(before), dim)
                means = round_to_bfloat16(np.where(counts[:, None] > 0, means, before))
                write_arrays(path, {"codes": means})
        self.state.wait_for_everyone()
        return moved

    def pass_over_cells(self, step: int, last: bool) -> list[Path]:
        """Runs one Lloyd pass over this process's cells; returns the files of all cells."""
        from tqdm import tqdm

        memory = self.memory // 4 if self.preview_size else 0
        folder = self.work / f"polish-{step}"
        make_folders(folder)
        passes = [shard_path(folder, cell) for cell in range(len(self.near))]
        if not (folder / "distortion.safetensors").exists():
            for cell in tqdm(self.share(len(passes)), unit="cell", desc=f"polish {step}"):
                if not passes[cell].exists():
                    near = self.near[cell]
                    use = pass_over_cell(self.reader, cell, self.codes, near, self.backend, last, memory)
                    write_arrays(passes[cell], use)
        self.state.wait_for_everyone()
        return passes

    def count_uses(self) -> np.ndarray:
        """Number of features assigned to each code, int64 `(codebook_size,)`."""
        counts = np.zeros(len(self.codes), np.int64)
        for path in self.passes:
            counts[read_array(path, "ids")] += read_array(path, "counts")
        return counts

    def average_thumbnails(self) -> np.ndarray:
        """Mean thumbnail of each polished code, uint8 `(codebook_size, side * side * 3)`."""
        width = 3 * self.preview_size**2
        block = max(1, self.memory // 4 // (16 * width))
        means = np.zeros((len(self.codes), width), np.uint8)
        for first in range(0, len(means), block):
            averages = average_sums(self.passes, first, min(block, len(means) - first), width)[0]
            means[first : first + block] = average_previews(averages, np.ones(len(averages)))
        return means
