"""The folder that a build writes to: what it was begun with, and what of an earlier run is there."""

import json
import shutil
from pathlib import Path

from ..files import NotWrittenError, write_file
from ..record import compare
from .features import check_arrays
from .images import ImageSource
from .storage import load_codebook, load_command, load_provenance

GIB = 2**30
# Their hashes are compared, and a build may go on with another share of unreadable images.
NOT_COMPARED = ("images", "encoder", "max_unreadable")


class BuildFolder:
    r"""
    Args:
        output (`Path`): the folder; the work of a build that is not finished lies in its folder `work`.
        record (`dict`): options and hashes of images and encoder, which tell builds apart.
        source (`ImageSource`): the images.
    """

    def __init__(self, output: Path, record: dict, source: ImageSource):
        self.output, self.work, self.record, self.source = output, output / "work", record, source

    def is_finished(self) -> bool:
        return all((self.output / name).exists() for name in ("codebook.json", "codebook.safetensors"))

    def compare_with_record(self) -> dict | None:
        """Statistics of a finished build. Raises `ValueError` when what lies there was begun with other options or images."""
        done = self.output / "codebook.json"
        provenance = load_provenance(self.output) if done.exists() else None
        if provenance and "grown" in provenance:
            added = sum(growth["added"] for growth in provenance["grown"])
            raise ValueError(
                f"{self.output} holds a codebook that {added} codes were added to; choose another --output."
            )
        known = load_command(self.output) if provenance else self.read_begun()
        if known is not None:
            compared = [name for name in self.record if name not in NOT_COMPARED]
            changes = compare(*({name: made_of.get(name) for name in compared} for made_of in (known, self.record)))
            if changes:
                changes += self.compare_listings() if known.get("images_sha256") != self.record["images_sha256"] else []
                raise ValueError(
                    f"{self.output} holds a build with other settings ({'; '.join(changes)}); choose another --output, or delete it."
                )
        if self.is_finished():
            load_codebook(self.output)  # which refuses a damaged one
            return provenance["statistics"]
        return None

    def read_begun(self) -> dict | None:
        """What a build that is not finished was begun with, if there is one. Raises `ValueError` when that is damaged."""
        file = self.work / "run.json"
        try:
            return json.loads(file.read_text()) if file.exists() else None
        except ValueError as error:
            raise ValueError(f"{file} is damaged; delete {self.work} and run the same command again.") from error

    def begin(self) -> None:
        """Notes what is built; nothing of a run that was killed is in the way."""
        for file in (*self.output.glob(".*.tmp"), *self.work.rglob(".*.tmp")):
            file.unlink()
        self.check_work()
        write_file(self.work / "images.txt", "\n".join(self.source.listing()).encode())
        write_file(self.work / "run.json", json.dumps(self.record, indent=2).encode())

    def check_work(self) -> None:
        """Raises `ValueError` when a file that an earlier run wrote is not as it was: a codebook would be made of it."""
        from tqdm import tqdm

        files = sorted(self.work.rglob("*.safetensors"))
        for file in tqdm(files, unit="file", desc="checking what is there", disable=not files):
            check_arrays(file)

    def compare_listings(self) -> list[str]:
        """What the first of the image files that are not as they were was, and is."""
        file = self.work / "images.txt"
        before = file.read_text().splitlines() if file.exists() else []
        now = self.source.listing()
        if not before or before == now:
            return []
        changed = next((i for i, pair in enumerate(zip(before, now)) if pair[0] != pair[1]), min(len(before), len(now)))
        was, is_now = ((lines[changed : changed + 1] or ["nothing"])[0].expandtabs(1) for lines in (before, now))
        return [f"the first difference among the images: {was} before, {is_now} now"]

    def check_room(self, needed: int) -> str:
        """A sentence about the bytes of disk that the build needs in all. Raises `NotWrittenError` when there are fewer."""
        there = sum(file.stat().st_size for file in self.work.rglob("*") if file.is_file())
        missing, free = max(0, needed - there), shutil.disk_usage(self.work).free
        if missing > free:
            raise NotWrittenError(
                f"The build needs {missing / GIB:.2f} GiB more in {self.work}, which has {free / GIB:.2f} GiB free; "
                "use fewer images or --patches-per-image, or make room: for this build the disk is full."
            )
        return f"{missing / GIB:.2f} GiB of disk needed, {free / GIB:.1f} GiB free"
