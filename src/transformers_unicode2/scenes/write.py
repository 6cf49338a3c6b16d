"""Writes scenes and emoji with their texts to parquet, the form that the training stages read.

    unicode2 scenes --output data --num-scenes 60000 --num-emoji 40000 --emoji-dir emoji

Columns: `image` (PNG), `kind` ("scene" or "emoji"), `caption`, `dense_caption`, `layout` (a dense caption with exact
places), `questions` and `answers` (lists of strings). Row i of a split depends on the seed, the share of photographs
and i alone. So a data set can be made in pieces and made again.
"""

import argparse
from pathlib import Path

import numpy as np

from ..cli import SEED, SHARE, at_least
from ..files import whole_file
from ..record import Record
from . import emoji, sample, scene, texts

ROWS_PER_SHARD = 10_000
# Options that the rows depend on
RECORDED = ("num_scenes", "num_emoji", "photo_share", "seed", "image_size")


def render_row(
    index: int, kind: str, split: str, seed: int, emoji_dir: str | None, image_size: int, photo_share: float = 0.5
) -> dict:
    """One row: the image and every text about it."""
    rng = np.random.default_rng([seed, ("train", "test").index(split), ("scene", "emoji").index(kind), index])
    if kind == "scene":
        about, shown = texts, sample.sample_scene(rng, split)
        image = scene.draw_scene(shown, image_size)
    else:
        about, shown = emoji, emoji.sample_emoji_scene(rng, split, photo_share=photo_share)
        image = emoji.draw_emoji_scene(shown, emoji_dir, image_size)
    asked = about.questions(shown, rng)
    return {
        "image": image,
        "kind": kind,
        "caption": about.caption(shown, rng),
        "dense_caption": about.dense_caption(shown),
        "layout": about.dense_caption(shown, texts.cell_in_cell),
        "questions": [question.text for question in asked],
        "answers": [question.answer for question in asked],
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 scenes", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--output", required=True, help="folder for the parquet files")
    add("--num-scenes", type=at_least(0), default=60_000, help="drawn scenes (default: %(default)s)")
    add("--num-emoji", type=at_least(0), default=0, help="pictures with emoji (default: %(default)s)")
    add("--emoji-dir", help="folder with captions.tsv and the images that it lists; needed with --num-emoji")
    add(
        "--photo-share",
        type=SHARE,
        default=0.5,
        help="share of the emoji on photographs; the others are on plain grounds (default: %(default)s)",
    )
    add("--split", choices=("train", "test"), default="train", help="no scene is in both (default: %(default)s)")
    add("--image-size", type=at_least(16), default=64, help="pixels (default: %(default)s)")
    add("--seed", type=SEED, default=0, help="decides what is drawn (default: %(default)s)")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises `ValueError` on options that do not go together, and as `emoji.check_folder` does."""
    if args.num_emoji and not args.emoji_dir:
        raise ValueError(f"--num-emoji is {args.num_emoji}, so --emoji-dir must name the folder with the emoji.")
    if args.num_emoji:
        emoji.check_folder(args.emoji_dir)


def main(args: argparse.Namespace) -> None:
    check_arguments(args)
    made_of = {"command": "scenes", **{name: getattr(args, name) for name in RECORDED}}
    made_of["emoji"] = emoji.hash_folder(args.emoji_dir) if args.num_emoji else None
    with Record(args.output, made_of, (f"{args.split}-*.parquet",), args.split).making() as finished:
        if finished:
            print(f"{args.output} is finished; nothing to do")
        else:
            write_rows(args)


def write_rows(args: argparse.Namespace) -> None:
    """Writes all parquet files that are not there yet."""
    from tqdm import tqdm

    kinds = ["scene"] * args.num_scenes + ["emoji"] * args.num_emoji
    kinds = [kinds[i] for i in np.random.default_rng(args.seed).permutation(len(kinds))]
    with tqdm(total=len(kinds), unit="image", desc=f"rendering {args.split}") as progress:
        for start in range(0, len(kinds), ROWS_PER_SHARD):
            path = Path(args.output) / f"{args.split}-{start // ROWS_PER_SHARD:05d}.parquet"
            shard = kinds[start : start + ROWS_PER_SHARD]
            if path.is_file():
                progress.update(len(shard))
                continue
            rows = []
            for index, kind in enumerate(shard, start):
                rows.append(
                    render_row(index, kind, args.split, args.seed, args.emoji_dir, args.image_size, args.photo_share)
                )
                progress.update()
            write_table(rows, path)


def write_table(rows: list[dict], path: Path) -> None:
    """Writes rows of `render_row` to a parquet file."""
    from datasets import Dataset, Features, Image, List, Value

    text = Value("string")
    kinds = {"image": Image(), "questions": List(text), "answers": List(text)}
    features = Features({name: kinds.get(name, text) for name in rows[0]})
    with whole_file(path) as file:
        Dataset.from_list(rows, features=features).to_parquet(str(file))


if __name__ == "__main__":
    main(make_parser().parse_args())
