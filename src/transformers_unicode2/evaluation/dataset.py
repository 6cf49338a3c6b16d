"""Writes scenes and emoji with their texts to parquet, the form in which the training stages read them.

    unicode2 scenes --output data --num-scenes 60000 --num-emoji 40000 --emoji-dir emoji

Columns: `image` (PNG), `kind` ("scene" or "emoji"), `caption`, `dense_caption`, `layout` (a dense caption with exact places),
`questions` and `answers` (lists of strings).
Row i of a split depends on the seed, the share of photographs and i alone, so a data set can be made in pieces and made again.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np

from ..files import whole_file
from ..record import Record
from . import emoji, scenes

ROWS_PER_SHARD = 10_000


def render_row(
    index: int, kind: str, split: str, seed: int, emoji_dir: str | None, image_size: int, photo_share: float = 0.5
) -> dict:
    """One row: the image and every text about it."""
    rng = np.random.default_rng([seed, ("train", "test").index(split), ("scene", "emoji").index(kind), index])
    if kind == "scene":
        module, scene = scenes, scenes.sample_scene(rng, split)
        image = scenes.draw_scene(scene, image_size)
    else:
        module, scene = emoji, emoji.sample_emoji_scene(rng, split, photo_share=photo_share)
        image = emoji.draw_emoji_scene(scene, emoji_dir, image_size)
    asked = module.questions(scene, rng)
    return {
        "image": image,
        "kind": kind,
        "caption": module.caption(scene, rng),
        "dense_caption": module.dense_caption(scene),
        "layout": module.dense_caption(scene, scenes.cell_in_cell),
        "questions": [question.text for question in asked],
        "answers": [question.answer for question in asked],
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 scenes", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", required=True, help="folder for the parquet files")
    parser.add_argument("--num-scenes", type=int, default=60_000)
    parser.add_argument("--num-emoji", type=int, default=0)
    parser.add_argument(
        "--emoji-dir", help="folder with captions.tsv and the images that it lists; needed with --num-emoji"
    )
    parser.add_argument(
        "--photo-share",
        type=float,
        default=0.5,
        help="share of the emoji on photographs, the others are on plain grounds (default: %(default)s)",
    )
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--image-size", type=int, default=64, help="pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(args: argparse.Namespace) -> None:
    from datasets import Dataset, Features, Image, List, Value
    from tqdm import tqdm

    if args.num_emoji and not args.emoji_dir:
        raise ValueError(f"--num-emoji is {args.num_emoji}, so --emoji-dir must name the folder with the emoji.")
    for name, least in (("num_scenes", 0), ("num_emoji", 0), ("seed", 0), ("image_size", 16)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {least}.")
    if not 0 <= args.photo_share <= 1:
        raise ValueError(f"--photo-share is {args.photo_share:g}; it must be in [0, 1].")
    if args.num_emoji:
        emoji.check_folder(args.emoji_dir)
    text = Value("string")
    features = Features(
        {
            "image": Image(),
            "kind": text,
            "caption": text,
            "dense_caption": text,
            "layout": text,
            "questions": List(text),
            "answers": List(text),
        }
    )
    order = ["scene"] * args.num_scenes + ["emoji"] * args.num_emoji
    order = [order[i] for i in np.random.default_rng(args.seed).permutation(len(order))]
    numbers = {name: getattr(args, name) for name in ("num_scenes", "num_emoji", "photo_share", "seed", "image_size")}
    made_of = {"command": "scenes", **numbers, "emoji": hash_emoji(args.emoji_dir) if args.num_emoji else None}
    record = Record(args.output, made_of, (f"{args.split}-*.parquet",), args.split)
    with record.making() as finished:
        if finished:
            print(f"{args.output} is finished; nothing to do")
            return
        with tqdm(total=len(order), unit="image", desc=f"rendering {args.split}") as progress:
            for start in range(0, len(order), ROWS_PER_SHARD):
                path = Path(args.output) / f"{args.split}-{start // ROWS_PER_SHARD:05d}.parquet"
                kinds = order[start : start + ROWS_PER_SHARD]
                if path.is_file():
                    progress.update(len(kinds))
                    continue
                options = (args.split, args.seed, args.emoji_dir, args.image_size, args.photo_share)
                rows = []
                for index, kind in enumerate(kinds, start):
                    rows.append(render_row(index, kind, *options))
                    progress.update()
                with whole_file(path) as file:
                    Dataset.from_list(rows, features=features).to_parquet(str(file))


def hash_emoji(folder: str) -> str:
    """SHA-256 of all emoji as they are drawn."""
    digest = hashlib.sha256()
    for name in emoji.NAMES:
        digest.update(emoji.load_emoji(folder, name).tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main(make_parser().parse_args())
