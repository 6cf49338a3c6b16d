"""Question answering, drawing and redrawing on drawn scenes, decided exactly from answers and pixels.

    unicode2 evaluate scenes --model hub_configs/unicode2-tiny --num-scenes 300 --seed 0 --json scores.json

All figures are shares in percent. No training stage has seen the scenes. `new scenes` are made of known (color, shape)
pairs, `unseen pairs` of pairs that never occur in training; for drawing, only prompts that name a pair are used. Short
prompts, such as "a heart", do occur as captions in training.

Two rows show what chance gives: images painted from the codes of another prompt of the same category (`other prompts`;
a prompt without one is left out) and from codes that are shuffled over all images (`shuffled codes`). With several
candidates a prompt, the candidate from which the model best reads the prompt back is painted; `one candidate` is the
same without a choice. With --emoji-dir, emoji are named, too. With --clip, their drawings are compared in the space of
a CLIP image tower that the model has never seen.
"""

import argparse
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..cli import SEED, at_least
from ..files import whole_file
from ..record import hash_files, hash_source
from ..scenes import emoji
from ..scenes.check import check_drawing, same_scene
from ..scenes.sample import sample_scene
from ..scenes.scene import SEEN_PAIRS, UNSEEN_PAIRS, Scene, draw_scene
from ..scenes.texts import CATEGORIES, ScenePrompt, article, questions, sample_prompt
from .card_files import check_card_file, check_place
from .drawing import Painter, answer, encode
from .generation import describe_decoder
from .judges import load_judge
from .score_card import ScoreCard, describe_generation, describe_run, describe_subject, hash_content

PARTS = {"new scenes": SEEN_PAIRS, "unseen pairs": tuple(sorted(UNSEEN_PAIRS))}
# The categories whose prompts name a pair
COLOR_CATEGORIES = ("counting", "colors", "color attribution")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 evaluate scenes", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add, natural = parser.add_argument, at_least(1)
    add("--model", required=True, help="checkpoint: folder or Hub name")
    add("--num-scenes", type=at_least(len(CATEGORIES)), default=300, help="per figure (default: %(default)s)")
    add("--seed", type=SEED, default=0, help="decides the scenes and the drawings (default: %(default)s)")
    add("--json", metavar="FILE", help="also write a score card to a file, and its page beside it")
    add("--steps", type=natural, help="diffusion steps (default: the pipeline's)")
    add("--guidance", type=at_least(0.0), help="guidance of the language model (default: the model's)")
    add("--true-cfg-scale", type=at_least(1.0), help="guidance of the decoder, 1 is none (default: the pipeline's)")
    add("--num-candidates", type=natural, help="images written for a prompt (default: the pipeline's)")
    add("--batch-size", type=natural, default=50, help="images at a time (default: %(default)s)")
    add(
        "--utilization-images",
        type=natural,
        default=8000,
        help="look for codes in use in at most N images (default: %(default)s)",
        metavar="N",
    )
    add("--emoji-dir", help="folder with captions.tsv and the images that it lists")
    add("--clip", help="folder of a CLIPVisionModelWithProjection that judges drawn emoji")
    add("--sheet", metavar="FILE", help="write a sheet of drawings to look at")
    return parser


def main(args: argparse.Namespace) -> dict:
    from transformers_unicode2 import UniCode2FluxPipeline
    from transformers_unicode2.checkpoints import check_checkpoint

    check_arguments(args)
    check_checkpoint(args.model, "model_index.json")
    start = time.perf_counter()
    pipe = UniCode2FluxPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    num_candidates = pipe.config.num_candidates if args.num_candidates is None else args.num_candidates
    true_cfg_scale = pipe.config.true_cfg_scale if args.true_cfg_scale is None else args.true_cfg_scale
    steps = pipe.config.num_inference_steps if args.steps is None else args.steps
    painter = Painter(pipe, args.seed, args.batch_size, steps, true_cfg_scale, args.guidance)
    report = {"model": args.model, "seed": args.seed, "num_scenes": args.num_scenes, "num_candidates": num_candidates}
    report |= {"steps": steps, "true_cfg_scale": true_cfg_scale}
    report |= {"understanding": {}, "drawing": {}, "redrawing": {}, "counts": {"understanding": {}, "drawing": {}}}
    report |= {"items": {}, "data": ""}
    for number, part in enumerate(PARTS):
        evaluate_part(painter, part, np.random.default_rng([args.seed, number]), report, args.sheet)
        if part == "new scenes":
            report["utilization"] = measure_utilization(painter, args.utilization_images, args.emoji_dir)
    if args.emoji_dir:
        report["emoji"] = name_emoji(painter, args.num_scenes, args.emoji_dir, report["items"])
        if args.clip:
            options = {"folder": args.emoji_dir, "clip": args.clip, "sheet": args.sheet}
            report["emoji"] |= judge_emoji(painter, num_candidates, items=report["items"], **options)
    print_report(report)
    if args.json:
        make_card(args, report, pipe, start).write(args.json)
    return report


def make_card(args: argparse.Namespace, report: dict, pipe, start: float) -> ScoreCard:
    """The score card of a report."""
    language = pipe.vision_language_encoder
    protocol = {"benchmark": "drawn scenes", "num_scenes": args.num_scenes, "seed": args.seed}
    # All batches of a call share a generator, so the batch size decides about the drawings
    protocol |= {"batch_size": args.batch_size, "language model": describe_generation(language, args.guidance)}
    asked = argparse.Namespace(steps=args.steps, guidance=None, true_cfg_scale=args.true_cfg_scale)
    protocol |= {"num_candidates": report["num_candidates"], "decoder": describe_decoder(asked, pipe)}
    protocol |= {"image_size": pipe.config.image_size, "dtype": str(pipe.transformer.dtype)}
    protocol |= {"threads": torch.get_num_threads()} if pipe.device.type == "cpu" else {}
    protocol |= {"scenes": report["data"], "utilization_images": args.utilization_images}
    if args.emoji_dir:
        protocol["emoji"] = hash_files(list(Path(args.emoji_dir).glob("*")), args.emoji_dir)
    if args.clip:
        protocol["judge"] = hash_source(args.clip)
    card = ScoreCard("evaluate scenes", protocol, describe_subject(args.model, deep=True))
    for name, right in report["items"].items():
        card.add_share(name, right)
    card.add_figure("codes in use", report["utilization"]["share"], report["utilization"]["num_images"], "%")
    card.run = describe_run(str(pipe.device), start)
    return card


def check_arguments(args: argparse.Namespace) -> None:
    """Raises `ValueError` before any work on what would fail after it."""
    if args.json:
        check_card_file(args.json, "evaluate scenes")
    if args.sheet:
        check_place(args.sheet, "--sheet")
    # Some formats can only be read
    formats = Image.registered_extensions()
    if args.sheet and formats.get(Path(args.sheet).suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--sheet {args.sheet} has no ending of an image file; .png is one.")
    if args.emoji_dir:
        emoji.check_folder(args.emoji_dir)
    if args.clip and not args.emoji_dir:
        raise ValueError("--clip judges drawn emoji; give --emoji-dir, too.")
    if args.clip and not (Path(args.clip) / "config.json").is_file():
        raise ValueError(f"--clip {args.clip} has no config.json; give the folder of a CLIP checkpoint.")


def evaluate_part(painter: Painter, part: str, rng: np.random.Generator, report: dict, sheet: str | None) -> None:
    """Adds the figures of one of `PARTS` to a report; of the new scenes, writes a sheet, too, if its file is given."""
    scenes = [sample_scene(rng, "test", PARTS[part]) for _ in range(report["num_scenes"])]
    report["data"] = hash_content([report["data"], *map(repr, scenes)])
    images = [draw_scene(scene, painter.image_size) for scene in scenes]
    evaluate_answers(painter, part, scenes, images, rng, report)
    drawn = evaluate_drawings(painter, part, rng, report)
    redrawn = painter.paint(encode(painter.pipe, images))
    kept = [same_scene(scene, image) for scene, image in zip(scenes, redrawn)]
    add_shares(report, "redrawing", part, ["scene"] * len(kept), kept)
    if sheet and part == "new scenes":
        write_sheet(sheet, drawn, images, redrawn)


def evaluate_answers(
    painter: Painter, part: str, scenes: list[Scene], images: list[Image.Image], rng: np.random.Generator, report: dict
) -> None:
    """Asks one question about each scene."""
    asked = [questions(scene, rng, PARTS[part])[0] for scene in scenes]
    report["data"] = hash_content([report["data"], *map(repr, asked)])
    kinds = [question.kind for question in asked]
    answers = answer(painter.pipe, images, [question.text for question in asked], painter.batch_size)
    right = [given == question.answer for given, question in zip(answers, asked)]
    report["counts"]["understanding"][part] = Counter(kinds)
    add_shares(report, "understanding", part, kinds, right)


def evaluate_drawings(painter: Painter, part: str, rng: np.random.Generator, report: dict) -> list[Image.Image]:
    """Draws prompts of all categories; for the new scenes, also what chance gives. Returns the drawn prompts."""
    categories, count = CATEGORIES if part == "new scenes" else COLOR_CATEGORIES, report["num_scenes"]
    prompts = [sample_prompt(categories[i % len(categories)], rng, PARTS[part]) for i in range(count)]
    report["data"] = hash_content([report["data"], *map(repr, prompts)])
    tokens = painter.write([prompt.text for prompt in prompts], report["num_candidates"])
    drawn = painter.paint(tokens)
    report["counts"]["drawing"][part] = Counter(prompt.category for prompt in prompts)
    score_drawings(report, part, prompts, drawn)
    if part == "new scenes":
        if report["num_candidates"] > 1:
            single = painter.paint(painter.write([prompt.text for prompt in prompts], 1))
            score_drawings(report, "one candidate", prompts, single)
        other = find_others(prompts)
        if other:
            score_drawings(report, "other prompts", prompts, [drawn[k] for k in other.values()], [*other])
        score_drawings(report, "shuffled codes", prompts, painter.paint(shuffle(tokens, rng)))
    return drawn


def find_others(prompts: list[ScenePrompt]) -> dict[int, int]:
    """For each prompt the number of the next one, around the end, that has its category and another text; a prompt
    without one is left out.
    """
    count, others = len(prompts), {}
    for i, prompt in enumerate(prompts):
        for k in ((i + step) % count for step in range(1, count)):
            if prompts[k].category == prompt.category and prompts[k].text != prompt.text:
                others[i] = k
                break
    return others


def score_drawings(
    report: dict, part: str, prompts: list[ScenePrompt], images: list[Image.Image], numbers: list[int] | None = None
) -> None:
    """Adds the percentage of the images that show what was asked for, over all and per category.

    `numbers` are those of the prompts that the images are compared with, by default all.
    """
    numbers = [*range(len(prompts))] if numbers is None else numbers
    right = [check_drawing(prompts[i], image) for i, image in zip(numbers, images)]
    add_shares(report, "drawing", part, [prompts[i].category for i in numbers], right, numbers)


def add_shares(
    report: dict, task: str, part: str, kinds: list[str], right: list[bool], numbers: list[int] | None = None
) -> None:
    """Adds percentages to a report, see `shares`, and which items are right, by seed and number: those of another seed
    are other scenes.
    """
    numbers = [*range(len(right))] if numbers is None else numbers
    report[task][part] = shares(kinds, right)
    for kind in report[task][part]:
        name = f"{task}, {part}" if kind == "all" else f"{task}, {part}, {kind}"
        chosen = {
            f"{report['seed']}-{i}": bool(flag) for i, flag, one in zip(numbers, right, kinds) if kind in ("all", one)
        }
        if kind != "scene":
            report["items"][name] = chosen


def shuffle(tokens: torch.LongTensor, rng: np.random.Generator) -> torch.LongTensor:
    """The same ids, shuffled over all images and places."""
    return tokens.flatten()[torch.from_numpy(rng.permutation(tokens.numel()))].reshape(tokens.shape)


def shares(kinds: list[str], right: list[bool]) -> dict[str, float]:
    """Percentage of `True`, over all and per kind."""
    groups = defaultdict(list)
    for kind, flag in zip(kinds, right):
        groups[kind].append(flag)
    per_kind = {kind: 100 * float(np.mean(flags)) for kind, flags in sorted(groups.items())}
    return {"all": 100 * float(np.mean(right))} | per_kind


def measure_utilization(painter: Painter, max_images: int, emoji_dir: str | None, enough: float = 98.0) -> dict:
    """Percentage of the codes that test images use at least once, and the number of images until `enough` were found.

    Every second image is an emoji when there is a folder of them, as in training.
    """
    from tqdm import tqdm

    rng, size = np.random.default_rng([painter.seed, 3]), painter.batch_size
    num_codes = painter.pipe.vision_language_encoder.config.codebook_config.codebook_size
    used, count = torch.zeros(0, dtype=torch.long), 0
    with tqdm(total=max_images, unit="image", desc="utilization") as bar:
        while count < max_images and 100 * len(used) < enough * num_codes:
            images = [draw_scene(sample_scene(rng, "test", SEEN_PAIRS), painter.image_size) for _ in range(size)]
            if emoji_dir:
                names = [emoji.NAMES[i] for i in rng.integers(len(emoji.NAMES), size=size)]
                images += render_emoji(names, rng, emoji_dir, painter.image_size)
            used = torch.cat([used, encode(painter.pipe, images).flatten()]).unique()
            count += len(images)
            bar.update(len(images))
    return {"share": 100 * len(used) / num_codes, "num_images": count}


def render_emoji(names: list[str], rng: np.random.Generator, folder: str, image_size: int) -> list[Image.Image]:
    """A held-out rendering of each emoji."""
    scenes = [emoji.sample_emoji_scene(rng, "test", name) for name in names]
    return [emoji.draw_emoji_scene(scene, folder, image_size) for scene in scenes]


def name_emoji(painter: Painter, num_renderings: int, folder: str, items: dict) -> dict:
    """Percentage of held-out renderings, at least one of each emoji, that are named right. Adds them to the items."""
    names = [emoji.NAMES[i % len(emoji.NAMES)] for i in range(max(num_renderings, len(emoji.NAMES)))]
    images = render_emoji(names, np.random.default_rng([painter.seed, 2]), folder, painter.image_size)
    answers = answer(painter.pipe, images, ["what is this?"] * len(images), painter.batch_size)
    right = [given == article(name) for given, name in zip(answers, names)]
    items["emoji named"] = {f"{painter.seed}-{number}": flag for number, flag in enumerate(right)}
    return {"named": 100 * float(np.mean(right)), "num_renderings": len(names)}


def judge_emoji(painter: Painter, num_candidates: int, items: dict, folder: str, clip: str, sheet: str | None) -> dict:
    """Percentage of drawn names, and of redrawn emoji, that are nearest to the right emoji in the space of a CLIP.

    Adds them to the items.
    """
    prompts = [f"{article(f'big {name}')} on a white ground" for name in emoji.NAMES]
    drawn = painter.paint(painter.write(prompts, num_candidates))
    scenes = [emoji.EmojiScene(name, "big", 0.5, 0.5, 0.9, 0.0, "white") for name in emoji.NAMES]
    references = [emoji.draw_emoji_scene(scene, folder, painter.image_size) for scene in scenes]
    known, result = clip_embeddings(clip, references).T, {}
    for name, painted in (("drawn", drawn), ("redrawn", painter.paint(encode(painter.pipe, references)))):
        nearest = (clip_embeddings(clip, painted) @ known).argmax(-1)  # (num_names,)
        right = (nearest == torch.arange(len(nearest))).tolist()
        items[f"emoji {name}"] = {str(number): flag for number, flag in enumerate(right)}
        result[name] = 100 * float(np.mean(right))
    if sheet:
        write_sheet(str(Path(sheet).with_suffix(".emoji.png")), drawn, references, [])
    return {**result, "num_drawings": len(drawn)}


@torch.no_grad()
def clip_embeddings(folder: str, images: list[Image.Image]) -> torch.Tensor:
    """CLIP embeddings of unit length, `(num_images, projection_dim)`."""
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    pixels = CLIPImageProcessor()(images, return_tensors="pt")["pixel_values"]
    embeds = load_judge(CLIPVisionModelWithProjection, folder, "--clip")(pixels).image_embeds
    return torch.nn.functional.normalize(embeds.float(), dim=-1)


def write_sheet(path: str, *rows: list[Image.Image]) -> None:
    """Writes images side by side, a band of at most 48 for each list."""
    sheet = Image.new("RGB", (24 * 66, sum(2 * 66 + 6 for row in rows if row)), "white")
    for band, row in enumerate(row for row in rows if row):
        for i, image in enumerate(row[:48]):
            sheet.paste(image.resize((64, 64)), (i % 24 * 66, band * 138 + i // 24 * 66))
    with whole_file(path) as file:
        sheet.save(file, Image.registered_extensions()[Path(path).suffix.lower()])


def print_report(report: dict) -> None:
    best_of = f", each drawing the best of {report['num_candidates']}" if report["num_candidates"] > 1 else ""
    print(f"\n{report['model']}: {report['num_scenes']} scenes, and prompts, seed {report['seed']}{best_of}")
    for task in ("understanding", "drawing", "redrawing"):
        for part, figures in report[task].items():
            counts = report["counts"].get(task, {}).get(part, {})
            details = [
                f"{kind} {value:.1f}" + (f" of {counts[kind]}" if counts else "")
                for kind, value in figures.items()
                if kind not in ("all", "scene")
            ]
            print(f"{task:>14} | {part:<14} | {figures['all']:5.1f} % | {', '.join(details)}")
    use = report["utilization"]
    print(f"{'utilization':>14} | {use['num_images']} images    | {use['share']:5.1f} %")
    for name, value in report.get("emoji", {}).items():
        print(f"{'emoji':>14} | {name:<14} | {value:.1f}")


if __name__ == "__main__":
    main(make_parser().parse_args())
