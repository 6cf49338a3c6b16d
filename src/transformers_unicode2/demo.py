"""Asks about an image, draws a prompt, and puts everything on one contact sheet.

unicode2 demo
unicode2 demo --image cat.jpg --question "what is this?" --prompt "two red circles" --output demo
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten, wrap

from PIL import Image, ImageDraw, ImageFont, ImageOps

from .cli import SEED, at_least
from .files import whole_folder
from .processing_unicode2 import load_image
from .record import held

# Bundled images, what the demo asks about them, and what it draws beside them.
EXAMPLES = (
    ("emoji_on_photo.jpg", "what is this?", "a red circle and a blue square"),
    ("scene.png", "how many objects are there?", "three green hearts"),
)
KNOWN = (
    "unicode2-tiny knows drawn shapes and 104 emoji. Whatever else it is asked about or asked to draw, it guesses; "
    "`unicode2 ask` is for models of your own."
)
# Pixels
TILE = 256


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--image", metavar="FILE", help="image to ask about and to redraw (default: bundled ones)")
    parser.add_argument("--question", metavar="TEXT", help="question about the image")
    parser.add_argument("--prompt", metavar="TEXT", help="what to draw")
    parser.add_argument(
        "--output", metavar="DIR", default="unicode2-demo", help="folder for the images (default: %(default)s)"
    )
    parser.add_argument("--model", help="checkpoint with a FLUX decoder (default: the embedded unicode2-tiny)")
    parser.add_argument("--steps", type=at_least(1), help="diffusion steps (default: the pipeline's)")
    parser.add_argument("--seed", type=SEED, default=0, help="of the drawings (default: %(default)s)")
    return parser


def embedded_checkpoint() -> Path:
    """Folder of unicode2-tiny: inside an installed package, or in the checkout that the package is run from."""
    package = Path(__file__).parent
    installed = package / "unicode2_tiny"
    return installed if installed.is_dir() else package.parents[1] / "hub_configs" / "unicode2-tiny"


def main(args: argparse.Namespace) -> None:
    for name in ("question", "prompt"):
        if getattr(args, name) is not None and not getattr(args, name).strip():
            raise ValueError(f"--{name} is empty; write some text.")
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; give a folder.")
    root = args.model or str(embedded_checkpoint())
    examples = [(embedded_checkpoint() / "examples" / file, question, prompt) for file, question, prompt in EXAMPLES]
    own = (args.image, args.question, args.prompt)
    if any(given is not None for given in own):
        examples = [tuple(default if given is None else given for given, default in zip(own, examples[0]))]
    images = [load_image(path) for path, _, _ in examples]

    import torch

    from transformers_unicode2 import UniCode2FluxPipeline
    from transformers_unicode2.checkpoints import check_checkpoint
    from transformers_unicode2.evaluation.drawing import answer

    check_checkpoint(root)
    if args.model is None:
        print(KNOWN)
    start = time.perf_counter()
    pipe = UniCode2FluxPipeline.from_pretrained(root)
    print(f"model loaded in {time.perf_counter() - start:.1f} s")
    generator = torch.Generator().manual_seed(args.seed)
    rows = []
    for (_, question, prompt), image in zip(examples, images):
        start = time.perf_counter()
        reply = answer(pipe, [image], [question], max_new_tokens=64)[0]
        print(f"{question} {reply} ({time.perf_counter() - start:.1f} s)")
        start = time.perf_counter()
        redrawn = pipe(image=image, num_inference_steps=args.steps, generator=generator)
        drawn = pipe(prompt, num_inference_steps=args.steps, generator=generator)
        print(f"drew {prompt!r} ({time.perf_counter() - start:.1f} s)")
        codes = mosaic(pipe, redrawn.visual_token_ids)
        rows.append(Row([image, codes, redrawn.images[0], drawn.images[0]], question, reply, prompt))
    pictures = {f"drawing-{i}.png": row.pictures[3] for i, row in enumerate(rows, 1)}
    with held(output), whole_folder(output, last=("contact-sheet.png",)) as folder:
        for name, picture in {**pictures, "contact-sheet.png": contact_sheet(rows)}.items():
            picture.save(folder / name, "PNG")
    print(f"wrote {output / 'contact-sheet.png'}")


def mosaic(pipe, visual_token_ids) -> Image.Image:
    """The thumbnails of an image's codes, side by side."""
    model = pipe.vision_language_encoder
    side = int(model.config.num_image_tokens**0.5)
    codes = (visual_token_ids[0] - model.config.visual_token_offset).unflatten(0, (side, side))
    return Image.fromarray(model.get_quantizer().codebook.preview(codes).permute(1, 2, 0).numpy())


def fit(text: str, width: int = 33) -> str:
    """A caption in at most two lines of `width` characters; each of two given lines is shortened alone."""
    lines = text.split("\n")
    if len(lines) == 1:
        return "\n".join(wrap(text, width, max_lines=2, placeholder=" …"))
    return "\n".join(shorten(line, width, placeholder=" …") for line in lines)


@dataclass(frozen=True)
class Row:
    """One example: the input, its codes, the image redrawn from them and the drawing of the prompt."""

    pictures: list[Image.Image]
    question: str
    answer: str
    prompt: str


def contact_sheet(rows: list[Row]) -> Image.Image:
    """One row for each example, with captions below."""
    margin, caption = 12, 44
    sheet = Image.new("RGB", (4 * TILE + 5 * margin, len(rows) * (TILE + caption + margin) + margin), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for i, row in enumerate(rows):
        texts = [f"{row.question}\nanswer: {row.answer}", "its codes", "redrawn from its codes", f"drawn: {row.prompt}"]
        top = margin + i * (TILE + caption + margin)
        for j, (picture, text) in enumerate(zip(row.pictures, texts)):
            left = margin + j * (TILE + margin)
            small = picture.width < TILE
            resample = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
            tile = ImageOps.pad(picture, (TILE, TILE), resample, color="white")
            sheet.paste(tile, (left, top))
            pen.rectangle((left, top, left + TILE - 1, top + TILE - 1), outline=(200, 200, 200))
            pen.multiline_text((left, top + TILE + 4), fit(text), fill="black", font=font)
    return sheet


if __name__ == "__main__":
    main(make_parser().parse_args())
