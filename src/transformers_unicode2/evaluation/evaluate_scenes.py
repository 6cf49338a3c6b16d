"""Question answering, drawing and redrawing on drawn scenes, decided exactly from answers and pixels.

    unicode2 evaluate scenes --model hub_configs/unicode2-tiny --num-scenes 300 --seed 0 --json scores.json

All figures are shares in percent. No training stage has seen the scenes: `new scenes` are put together from known (color, shape)
pairs, `unseen pairs` from pairs that never occur in training (of the prompts, only those that name a pair). Short prompts, such as
"a heart", do occur as captions in training. What chance gives is shown by drawing from the codes of another prompt (`other prompts`) and
from codes that are dealt out singly (`shuffled codes`). A model that writes several images for a prompt and paints the one from which it
reads the prompt back best is judged so; `one candidate` is the same without a choice. With --emoji-dir, emoji are named, too, and with
--clip their drawings are compared in the space of a CLIP image tower that the model never met.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..files import whole_file, write_file
from . import emoji
from .scenes import (
    CATEGORIES,
    SEEN_PAIRS,
    UNSEEN_PAIRS,
    article,
    check_drawing,
    draw_scene,
    questions,
    same_scene,
    sample_prompt,
    sample_scene,
)

PARTS = {"new scenes": SEEN_PAIRS, "unseen pairs": tuple(sorted(UNSEEN_PAIRS))}
COLOR_CATEGORIES = ("counting", "colors", "color attribution")  # the categories whose prompts name a pair


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 evaluate scenes", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint: folder or Hub name")
    parser.add_argument(
        "--num-scenes", type=int, default=300, help="scenes, and prompts, per figure (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to a file")
    parser.add_argument(
        "--steps", type=int, default=8, help="diffusion steps (default: %(default)s, which suit unicode2-tiny)"
    )
    parser.add_argument(
        "--guidance", type=float, help="classifier-free guidance of the language model (default: the model's)"
    )
    parser.add_argument(
        "--true-cfg-scale", type=float, help="classifier-free guidance of the decoder (default: the pipeline's)"
    )
    parser.add_argument(
        "--num-candidates",
        type=int,
        help="images written for a prompt, of which the one is painted that reads best (default: the model's)",
    )
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument(
        "--utilization-images",
        type=int,
        default=8000,
        help="look for codes in use in so many images at most (default: %(default)s)",
    )
    parser.add_argument("--emoji-dir", help="folder with captions.tsv and the images that it lists")
    parser.add_argument("--clip", help="folder of a CLIPVisionModelWithProjection that judges drawn emoji")
    parser.add_argument("--sheet", metavar="FILE", help="write a sheet of drawings to look at")
    return parser


def main(args: argparse.Namespace) -> dict:
    from transformers_unicode2 import UniCode2FluxPipeline
    from transformers_unicode2.hub import check_checkpoint

    check_arguments(args)
    check_checkpoint(args.model, "model_index.json")
    pipe = UniCode2FluxPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    num_candidates = pipe.config.num_candidates if args.num_candidates is None else args.num_candidates
    report = {"model": args.model, "seed": args.seed, "num_scenes": args.num_scenes, "num_candidates": num_candidates}
    report["steps"] = args.steps
    report["true_cfg_scale"] = pipe.config.true_cfg_scale if args.true_cfg_scale is None else args.true_cfg_scale
    report |= {"understanding": {}, "drawing": {}, "redrawing": {}, "counts": {"understanding": {}, "drawing": {}}}
    for number, (part, pairs) in enumerate(PARTS.items()):
        rng = np.random.default_rng([args.seed, number])
        scenes = [sample_scene(rng, "test", pairs) for _ in range(args.num_scenes)]
        images = [draw_scene(scene, 64) for scene in scenes]
        asked = [questions(scene, rng, pairs)[0] for scene in scenes]
        answers = answer(pipe, images, [question.text for question in asked], args.batch_size)
        right = [given == question.answer for given, question in zip(answers, asked)]
        report["counts"]["understanding"][part] = Counter(question.kind for question in asked)
        report["understanding"][part] = shares([question.kind for question in asked], right)
        categories = CATEGORIES if part == "new scenes" else COLOR_CATEGORIES
        prompts = [sample_prompt(categories[i % len(categories)], rng, pairs) for i in range(args.num_scenes)]
        drawn, tokens = draw(pipe, [prompt.text for prompt in prompts], args, num_candidates)
        kinds = [prompt.category for prompt in prompts]
        report["counts"]["drawing"][part] = Counter(kinds)
        report["drawing"][part] = shares(kinds, [check_drawing(*pair) for pair in zip(prompts, drawn)])
        if part == "new scenes":
            if num_candidates > 1:
                single = draw(pipe, [prompt.text for prompt in prompts], args, 1)[0]
                report["drawing"]["one candidate"] = shares(
                    kinds, [check_drawing(*pair) for pair in zip(prompts, single)]
                )
            if args.sheet:
                write_sheet(args.sheet, drawn, images, paint(pipe, encode(pipe, images[:48]), args))
            other = drawn[len(CATEGORIES) :] + drawn[: len(CATEGORIES)]  # of the same categories
            report["drawing"]["other prompts"] = shares(kinds, [check_drawing(*pair) for pair in zip(prompts, other)])
            shuffled = paint(pipe, shuffle(tokens, rng), args)
            report["drawing"]["shuffled codes"] = shares(
                kinds, [check_drawing(*pair) for pair in zip(prompts, shuffled)]
            )
            report["utilization"] = measure_utilization(pipe, args)
        redrawn = paint(pipe, encode(pipe, images), args)
        kept = [same_scene(*pair) for pair in zip(scenes, redrawn)]
        report["redrawing"][part] = shares(["scene"] * len(kept), kept)
    if args.emoji_dir:
        report["emoji"] = evaluate_emoji(pipe, args)
    print_report(report)
    if args.json:
        write_file(args.json, (json.dumps(report, indent=2) + "\n").encode())
    return report


def check_arguments(args: argparse.Namespace) -> None:
    """Raises `ValueError` before any work on what would fail after it."""
    for name, least in (
        ("num_scenes", len(CATEGORIES)),
        ("steps", 1),
        ("batch_size", 1),
        ("seed", 0),
        ("utilization_images", 1),
        ("num_candidates", 1),
    ):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {least}.")
    if args.true_cfg_scale is not None and not 1 <= args.true_cfg_scale < float("inf"):
        raise ValueError(
            f"--true-cfg-scale is {args.true_cfg_scale:g}; it must be at least 1, which is without guidance."
        )
    for name in ("json", "sheet"):
        path = getattr(args, name)
        if path and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"--{name} {path}: there is no folder {Path(path).absolute().parent}.")
        if path and Path(path).is_dir():
            raise ValueError(f"--{name} {path} is a folder; give a file.")
    formats = Image.registered_extensions()  # some of which can only be read
    if args.sheet and formats.get(Path(args.sheet).suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--sheet {args.sheet} has no ending of an image file; .png is one.")
    if args.guidance is not None and not 0 <= args.guidance < float("inf"):
        raise ValueError(f"--guidance is {args.guidance:g}; it must be a number of at least 0.")
    if args.emoji_dir:
        emoji.check_folder(args.emoji_dir)
    if args.clip and not args.emoji_dir:
        raise ValueError("--clip judges drawn emoji; give --emoji-dir, too.")
    if args.clip and not (Path(args.clip) / "config.json").is_file():
        raise ValueError(f"--clip {args.clip} has no config.json; give the folder of a CLIP checkpoint.")


def batches(items: list, size: int, description: str) -> Iterator[list]:
    from tqdm import tqdm

    yield from tqdm([items[i : i + size] for i in range(0, len(items), size)], unit="batch", desc=description)


@torch.no_grad()
def answer(pipe, images: list[Image.Image], texts: list[str], batch_size: int) -> list[str]:
    """The model's greedy answers to one question an image."""
    processor, model, answers = pipe.processor, pipe.vision_language_encoder, []
    for batch in batches(list(zip(images, texts)), batch_size, "answering"):
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for _, text in batch
        ]
        prompts = processor.apply_chat_template(chats, add_generation_prompt=True)
        inputs = processor(images=[image for image, _ in batch], text=prompts, padding=True, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in answers]


def encode(pipe, images: list[Image.Image]) -> torch.LongTensor:
    """Visual token ids of images, `(num_images, num_image_tokens)`."""
    return pipe.vision_language_encoder.get_image_tokens(
        pipe.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    )


def draw(
    pipe, prompts: list[str], args: argparse.Namespace, num_candidates: int | None = None
) -> tuple[list[Image.Image], torch.LongTensor]:
    """Drawings of prompts, and the visual token ids that they were painted from."""
    generator = torch.Generator().manual_seed(args.seed)
    tokens = [
        pipe.generate_visual_tokens(batch, generator, args.guidance, num_candidates=num_candidates)
        for batch in batches(prompts, args.batch_size, "writing tokens")
    ]
    tokens = torch.cat(tokens)
    return paint(pipe, tokens, args), tokens


def paint(pipe, tokens: torch.LongTensor, args: argparse.Namespace) -> list[Image.Image]:
    """Visual token ids to images."""
    generator, images = torch.Generator().manual_seed(args.seed), []
    for batch in batches(list(tokens), args.batch_size, "painting"):
        options = {"num_inference_steps": args.steps, "true_cfg_scale": args.true_cfg_scale}
        images += pipe(visual_token_ids=torch.stack(batch), generator=generator, **options).images
    return images


def shuffle(tokens: torch.LongTensor, rng: np.random.Generator) -> torch.LongTensor:
    """The same ids, dealt out anew over all images and places."""
    return tokens.flatten()[torch.from_numpy(rng.permutation(tokens.numel()))].reshape(tokens.shape)


def shares(kinds: list[str], right: list[bool]) -> dict[str, float]:
    """Percentage of `True`, over all and per kind."""
    groups = defaultdict(list)
    for kind, flag in zip(kinds, right):
        groups[kind].append(flag)
    return {"all": 100 * float(np.mean(right))} | {
        kind: 100 * float(np.mean(flags)) for kind, flags in sorted(groups.items())
    }


def evaluate_emoji(pipe, args: argparse.Namespace) -> dict:
    """Names held-out renderings; with a CLIP, draws each name and redraws each emoji once and looks which it is nearest to."""
    rng = np.random.default_rng([args.seed, 2])
    names = [emoji.NAMES[i % len(emoji.NAMES)] for i in range(max(args.num_scenes, len(emoji.NAMES)))]
    images = [emoji.draw_emoji_scene(emoji.sample_emoji_scene(rng, "test", name), args.emoji_dir, 64) for name in names]
    answers = answer(pipe, images, ["what is this?"] * len(images), args.batch_size)
    named = shares(["name"] * len(names), [given == article(name) for given, name in zip(answers, names)])
    result = {"named": named["all"], "num_renderings": len(names)}
    if args.clip:
        prompts = [f"{article(f'big {name}')} on a white ground" for name in emoji.NAMES]
        drawn = draw(pipe, prompts, args, args.num_candidates)[0]
        references = [
            emoji.draw_emoji_scene(emoji.EmojiScene(name, "big", 0.5, 0.5, 0.9, 0.0, "white"), args.emoji_dir, 64)
            for name in emoji.NAMES
        ]
        known = clip_embeddings(args.clip, references).T
        for name, painted in (("drawn", drawn), ("redrawn", paint(pipe, encode(pipe, references), args))):
            nearest = (clip_embeddings(args.clip, painted) @ known).argmax(-1)  # (num_names,)
            result[name] = 100 * (nearest == torch.arange(len(nearest))).float().mean().item()
        result["num_drawings"] = len(drawn)
        if args.sheet:
            write_sheet(str(Path(args.sheet).with_suffix(".emoji.png")), drawn, references, [])
    return result


def measure_utilization(pipe, args: argparse.Namespace, enough: float = 98.0) -> dict:
    """Share of the codes that test images use at least once, in percent, and how many images it took to have `enough`.

    Every second image is an emoji on a ground or photograph when there is a folder of them, as in training.
    """
    from tqdm import tqdm

    rng = np.random.default_rng([args.seed, 3])
    size = pipe.vision_language_encoder.config.codebook_config.codebook_size
    used, count = torch.zeros(0, dtype=torch.long), 0
    with tqdm(total=args.utilization_images, unit="image", desc="utilization") as bar:
        while count < args.utilization_images and 100 * len(used) < enough * size:
            images = [draw_scene(sample_scene(rng, "test", SEEN_PAIRS), 64) for _ in range(args.batch_size)]
            if args.emoji_dir:
                names = [emoji.NAMES[i] for i in rng.integers(len(emoji.NAMES), size=args.batch_size)]
                scenes = [emoji.sample_emoji_scene(rng, "test", name) for name in names]
                images += [emoji.draw_emoji_scene(scene, args.emoji_dir, 64) for scene in scenes]
            used = torch.cat([used, encode(pipe, images).flatten()]).unique()
            count += len(images)
            bar.update(len(images))
    return {"share": 100 * len(used) / size, "num_images": count}


@torch.no_grad()
def clip_embeddings(folder: str, images: list[Image.Image]) -> torch.Tensor:
    """Unit-length CLIP embeddings, `(num_images, projection_dim)`."""
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    pixels = CLIPImageProcessor()(images, return_tensors="pt")["pixel_values"]
    embeds = CLIPVisionModelWithProjection.from_pretrained(folder)(pixels).image_embeds
    return torch.nn.functional.normalize(embeds.float(), dim=-1)


def write_sheet(path: str, *rows: list[Image.Image]) -> None:
    """Writes images side by side, a band of at most 48 for each list."""
    sheet = Image.new("RGB", (24 * 66, sum(2 * 66 + 6 for row in rows if row)), "white")
    for band, row in enumerate(row for row in rows if row):
        for i, image in enumerate(row[:48]):
            sheet.paste(image, (i % 24 * 66, band * 138 + i // 24 * 66))
    with whole_file(path) as file:
        sheet.save(file, Image.registered_extensions()[Path(path).suffix.lower()])


def print_report(report: dict) -> None:
    best_of = f", each drawing the best of {report['num_candidates']}" if report["num_candidates"] > 1 else ""
    print(f"\n{report['model']}: {report['num_scenes']} scenes, and prompts, seed {report['seed']}{best_of}")
    for task in ("understanding", "drawing", "redrawing"):
        for part, figures in report[task].items():
            counts = report["counts"].get(task, {}).get(part, {})
            details = ", ".join(
                f"{kind} {value:.1f}" + (f" of {counts[kind]}" if counts else "")
                for kind, value in figures.items()
                if kind not in ("all", "scene")
            )
            print(f"{task:>14} | {part:<14} | {figures['all']:5.1f} % | {details}")
    print(
        f"{'utilization':>14} | {report['utilization']['num_images']} images    | {report['utilization']['share']:5.1f} %"
    )
    for name, value in report.get("emoji", {}).items():
        print(f"{'emoji':>14} | {name:<14} | {value:.1f}")


if __name__ == "__main__":
    main(make_parser().parse_args())
