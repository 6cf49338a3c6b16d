"""Renders captioned pictures on plain grounds, in three splits: to train on, held out, and unseen.

    python training_recipes/unicode2-smol/render.py outputs/unicode2-smol/emoji outputs/unicode2-smol/pictures

SOURCE is any data of pictures with one caption each that `unicode2 tokenize` reads, such as a folder with captions.tsv
or metadata.jsonl. Of equal captions the first counts. OUTPUT gets three image folders with metadata.jsonl. `train` has
--renderings of each picture, `held` one further rendering of --num-held of them. `unseen` has one of --num-unseen other
pictures. A rendering stands anywhere on a pale ground, at 0.6 to 1.0 of its width, turned by up to 20 degrees.
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from transformers_unicode2.cli import at_least, sentences
from transformers_unicode2.files import whole_folder
from transformers_unicode2.images_unicode2 import decode_image, open_content
from transformers_unicode2.record import Record
from transformers_unicode2.training.sources import Row, open_source
from transformers_unicode2.training.templates import USUAL, Task


@dataclass(frozen=True)
class Picture:
    """A picture, `{"path": str | None, "bytes": bytes | None}`, with its caption and its number in the source."""

    number: int
    image: dict
    caption: str


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="pictures with captions")
    add("output", metavar="OUTPUT", help="folder for the three splits")
    add("--skip", metavar="REGEX", help="leave out captions that it finds something in (default: none)")
    add("--num-held", type=at_least(0), default=200, help="held-out renderings (default: %(default)s)")
    add("--num-unseen", type=at_least(0), default=200, help="pictures kept for `unseen` (default: %(default)s)")
    add("--renderings", type=at_least(1), default=2, help="of each picture in `train` (default: %(default)s)")
    add("--image-size", type=at_least(32), default=224, help="pixels (default: %(default)s)")
    add("--seed", type=at_least(0), default=0, help="default: %(default)s")
    return parser


def main(args: argparse.Namespace) -> None:
    source = open_source(args.source, task=Task(**USUAL["read"]))
    pictures = choose_pictures(source, args.skip)
    if len(pictures) <= args.num_unseen or len(pictures) < args.num_unseen + args.num_held:
        raise ValueError(
            f"{args.source} has {len(pictures)} pictures with different captions; --num-unseen {args.num_unseen} and "
            f"--num-held {args.num_held} need more."
        )
    pictures = [pictures[i] for i in np.random.default_rng(args.seed).permutation(len(pictures))]
    unseen, known = pictures[: args.num_unseen], pictures[args.num_unseen :]
    splits = {
        # First one of each picture, so that the first files are a fair sample
        "train": [(picture, number) for number in range(args.renderings) for picture in known],
        "held": [(picture, args.renderings) for picture in known[: args.num_held]],
        "unseen": [(picture, 0) for picture in unseen],
    }
    made_of = {"command": "render", "source": source.digest(), **vars(args)}
    for name in ("output", "num_held"):
        del made_of[name]
    for split, renderings in splits.items():
        folder = Path(args.output) / split
        with Record(folder, {**made_of, "split": split, "rows": len(renderings)}).making() as finished:
            if not finished:
                with whole_folder(folder) as new:
                    write_split(new, split, renderings, args.image_size, args.seed)
        print(f"{folder}: {len(renderings)} images")


def choose_pictures(source, skip: str | None) -> list[Picture]:
    """Pictures with different captions. Raises `ValueError` on a row that cannot be read."""
    pictures = {}
    for row in source.rows():
        if not isinstance(row, Row):
            raise row
        caption = row.messages[-1]["content"][0]["text"].strip()
        if not (skip and re.search(skip, caption)):
            pictures.setdefault(caption, Picture(row.number, row.images[0], caption))
    return list(pictures.values())


def write_split(folder: Path, split: str, renderings: list[tuple[Picture, int]], image_size: int, seed: int) -> None:
    """Writes the images of a split and their metadata.jsonl."""
    rows = []
    for place, (picture, number) in enumerate(tqdm(renderings, unit="image", desc=f"rendering {split}")):
        name = f"{place:06d}.jpg"
        rng = np.random.default_rng([seed, picture.number, number])
        content = picture.image["bytes"] or Path(picture.image["path"]).read_bytes()
        drawn = render(read_rgba(content), image_size, rng)
        drawn.save(folder / name, quality=95, subsampling=0)
        rows.append(json.dumps({"file_name": name, "text": picture.caption}, ensure_ascii=False))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def read_rgba(content: bytes) -> Image.Image:
    """The content of an image file in RGBA. Raises `ValueError` when it cannot be read."""
    picture, opened = decode_image(content), open_content(content)
    # The reader of the package lays what is transparent on white.
    return (ImageOps.exif_transpose(opened) if opened.has_transparency_data else picture).convert("RGBA")


def render(picture: Image.Image, image_size: int, rng: np.random.Generator) -> Image.Image:
    """One rendering of an RGBA picture, `(image_size, image_size)` pixels in RGB."""
    ground = tuple(rng.integers(225, 256, 3).tolist())
    side, turn = rng.uniform(0.6, 1.0) * image_size, rng.uniform(-20, 20)
    scale = side / max(picture.size)
    width, height = (max(1, round(scale * length)) for length in picture.size)
    left, top = (int(rng.integers(image_size - length + 1)) for length in (width, height))
    # Turned about its center, on a canvas that holds the corners
    reach = int(np.hypot(width, height)) + 1
    canvas = Image.new("RGBA", (reach, reach))
    corner = (reach - width) // 2, (reach - height) // 2
    canvas.paste(picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2), corner)
    canvas = canvas.rotate(turn, Image.Resampling.BICUBIC)
    drawn = Image.new("RGB", (image_size, image_size), ground)
    drawn.paste(canvas, (left - corner[0], top - corner[1]), canvas)
    return drawn


if __name__ == "__main__":
    with sentences("render.py"):
        main(make_parser().parse_args())
