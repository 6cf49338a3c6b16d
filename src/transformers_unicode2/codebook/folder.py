"""The output folder of a build: the settings it was begun with, and what an earlier run left there."""

import json
import shutil
from itertools import zip_longest
from pathlib import Path

from ..files import NotWrittenError, write_file
from ..record import compare
from .features import check_arrays
from .images import ImageSource
from .storage import load_codebook, load_command, load_provenance

GIB = 2**30
# Images and encoder are compared by their hashes. A build may resume with another `--max-unreadable`.
NOT_COMPARED = ("images", "encoder", "max_unreadable")


class BuildFolder:
    r"""
    Args:
        output (`Path`): the folder. An unfinished build keeps its files in the subfolder `work`.
        record (`dict`): options and hashes of images and encoder, which identify a build.
        source (`ImageSource`): the images.
    """

    def __init__(self, output: Path, record: dict, source: ImageSource):
        self.output, self.work, self.record, self.source = output, output / "work", record, source

    def is_finished(self) -> bool:
        return all((self.output / name).exists() for name in ("codebook.json", "codebook.safetensors"))

    def compare_with_record(self) -> dict | None:
        """Returns the statistics of a finished build, or `None`.

        Raises `ValueError` when the folder holds a build with other options or images.
        """
        done = self.output / "codebook.json"
        provenance = load_provenance(self.output) if done.exists() else None
        if provenance and "grown" in provenance:
            added = sum(growth["added"] for growth in provenance["grown"])
            raise ValueError(
                f"{self.output} holds a codebook that {added} codes were added to; choose another --output."
            )
        known = load_command(self.output) if provenance else self.read_begun()
        if known is not None:
            self.check_settings(known)
        if self.is_finished():
            # Raises on a damaged codebook.
            load_codebook(self.output)
            return provenance["statistics"]
        return None

    def check_settings(self, known: dict) -> None:
        """Raises `ValueError` when the settings `known` of the build in the folder differ from the record."""
        compared = [name for name in self.record if name not in NOT_COMPARED]
        before = {name: known.get(name) for name in compared}
        changes = compare(before, {name: self.record[name] for name in compared})
        if not changes:
            return
        if known.get("images_sha256") != self.record["images_sha256"]:
            changes += self.compare_listings()
        raise ValueError(
            f"{self.output} holds a build with other settings ({'; '.join(changes)}); "
            "choose another --output, or delete it."
        )

    def read_begun(self) -> dict | None:
        """The settings of an unfinished build, or `None`. Raises `ValueError` when their file is damaged."""
        file = self.work / "run.json"
        try:
            return json.loads(file.read_text()) if file.exists() else None
        except ValueError as error:
            raise ValueError(f"{file} is damaged; delete {self.work} and run the same command again.") from error

    def begin(self) -> None:
        """Removes the temporary files of a killed run, checks its finished ones, and writes down the settings."""
        for file in (*self.output.glob(".*.tmp"), *self.work.rglob(".*.tmp")):
            file.unlink()
        self.check_work()
        write_file(self.work / "images.txt", "\n".join(self.source.listing()).encode())
        write_file(self.work / "run.json", json.dumps(self.record, indent=2).encode())

    def check_work(self) -> None:
        """Raises `ValueError` when a file of an earlier run is damaged, before it reaches the codebook."""
        from tqdm import tqdm

        files = sorted(self.work.rglob("*.safetensors"))
        for file in tqdm(files, unit="file", desc="checking earlier files", disable=not files):
            check_arrays(file)

    def compare_listings(self) -> list[str]:
        """Describes the first image file that changed, before and now; empty when the listings agree."""
        file = self.work / "images.txt"
        before = file.read_text().splitlines() if file.exists() else []
        now = self.source.listing()
        if not before or before == now:
            return []
        was, is_now = next(pair for pair in zip_longest(before, now, fillvalue="nothing") if pair[0] != pair[1])
        return [f"the first difference in the images: {was.expandtabs(1)} before, {is_now.expandtabs(1)} now"]

    def check_room(self, needed: int) -> str:
        """Says how much disk space the build needs. `needed` is in bytes and counts what is there already.

        Raises `NotWrittenError` when the disk has less.
        """
        there = sum(file.stat().st_size for file in self.work.rglob("*") if file.is_file())
        missing, free = max(0, needed - there), shutil.disk_usage(self.work).free
        if missing > free:
            raise NotWrittenError(
                f"The build needs {missing / GIB:.2f} GiB more in {self.work}, which has {free / GIB:.2f} GiB free; "
                "use fewer images or --patches-per-image, or make room: the disk is full for this build."
            )
        return f"{missing / GIB:.2f} GiB of disk needed, {free / GIB:.1f} GiB free"
