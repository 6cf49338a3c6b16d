"""Asks a model about images, or about nothing but the text.

    unicode2 ask outputs/sft --image cat.jpg "what is this?"
    unicode2 ask outputs/sft --image before.jpg --image after.jpg "what has changed?"
    unicode2 ask org/unicode2-flux --draw circle.png "a red circle"

Takes any checkpoint or adapter. At a terminal the chat goes on: type the next question, or an empty line to end. It is
about the same images.
"""

import argparse
import sys
from pathlib import Path

from .cli import SEED, at_least, first_line
from .files import whole_file
from .images_unicode2 import load_image


class Parser(argparse.ArgumentParser):
    """Takes the question behind options, too, as in `MODEL --image FILE "question"`."""

    def parse_args(self, args: list[str] | None = None, namespace: argparse.Namespace | None = None):
        return self.parse_intermixed_args(args, namespace)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="unicode2 ask", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="checkpoint or adapter: folder or Hub name")
    parser.add_argument("question", nargs="?", help="question, or with --draw what to draw")
    parser.add_argument(
        "--image", metavar="FILE", action="append", default=[], help="image to ask about; may be given several times"
    )
    parser.add_argument("--base", help="checkpoint of an adapter, if it is not where it says: folder or Hub name")
    parser.add_argument("--system", metavar="TEXT", help="system message (default: none)")
    parser.add_argument(
        "--max-new-tokens", type=at_least(1), help="ids of an answer at most (default: what the checkpoint says)"
    )
    parser.add_argument(
        "--draw", metavar="FILE", help="draw what the text says, with the decoder of an assembled repository"
    )
    parser.add_argument("--steps", type=at_least(1), help="diffusion steps of --draw (default: the pipeline's)")
    parser.add_argument(
        "--seed", type=SEED, default=0, help="of what is sampled; most answers are not (default: %(default)s)"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    check_arguments(args)
    images = [load_image(file) for file in args.image]
    import torch

    from transformers_unicode2.checkpoints import load_model

    torch.manual_seed(args.seed)
    if args.draw:
        draw(args)
        return
    try:
        chat(*load_model(args.model, args.base), args, images)
    except KeyboardInterrupt:
        print()
        sys.exit(130)


def chat(model, processor, args: argparse.Namespace, images: list) -> None:
    """Answers questions until there are no more."""
    messages = [{"role": "system", "content": args.system}] if args.system else []
    question, places = args.question, [{"type": "image", "image": image} for image in images]
    while question:
        asked = {"role": "user", "content": [*places, {"type": "text", "text": question}]}
        try:
            answer = write_answer(model, processor, [*messages, asked], args.max_new_tokens)
        except ValueError as error:
            if not sys.stdin.isatty():
                raise
            # The chat goes on as if this had not been asked.
            print(f"unicode2 ask: {first_line(error)}", file=sys.stderr)
        else:
            messages += [asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
            # The images stay in the chat.
            places = []
        question = read_question()


def check_arguments(args: argparse.Namespace) -> None:
    """Raises `ValueError` before anything is loaded; asks for a question at a terminal."""
    if args.question is None:
        args.question = read_question()
    if not args.question or not args.question.strip():
        raise ValueError("There is no question; write one behind the model's name.")
    if args.draw is None:
        return
    if args.image:
        raise ValueError("--draw takes a text; leave --image out.")
    from PIL import Image

    # Some formats can only be read
    if Image.registered_extensions().get(Path(args.draw).suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--draw {args.draw} has no ending of an image file; .png is one.")
    if not Path(args.draw).absolute().parent.is_dir():
        raise ValueError(f"--draw {args.draw}: there is no folder {Path(args.draw).absolute().parent}.")


def read_question() -> str:
    """The next question, typed at a terminal; none where there is no terminal, or at the end of the input."""
    if not sys.stdin.isatty():
        return ""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def write_answer(model, processor, messages: list[dict], max_new_tokens: int | None) -> str:
    """The answer to a chat, printed as it is written. Raises `ValueError` when the chat template refuses the chat."""
    from jinja2 import TemplateError
    from transformers import TextStreamer

    try:
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
    except TemplateError as error:
        raise ValueError(f"The chat template of the model refuses this chat: {first_line(error)}") from error
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    written = model.generate(**inputs, streamer=streamer, **options)
    return processor.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def draw(args: argparse.Namespace) -> None:
    """Draws with the decoder of an assembled repository. Raises `ValueError` when there is none."""
    import torch
    from PIL import Image

    from transformers_unicode2 import UniCode2FluxPipeline
    from transformers_unicode2.checkpoints import check_checkpoint, check_model

    check_model(args.model)
    try:
        UniCode2FluxPipeline.load_config(args.model)
    except OSError as error:
        raise ValueError(f"{args.model} has no decoder to draw with; `unicode2 assemble` adds one.") from error
    check_checkpoint(args.model, "model_index.json")
    pipe = UniCode2FluxPipeline.from_pretrained(args.model)
    generator = torch.Generator().manual_seed(args.seed)
    picture = pipe(args.question, generator=generator, num_inference_steps=args.steps).images[0]
    with whole_file(args.draw) as file:
        picture.save(file, Image.registered_extensions()[Path(args.draw).suffix.lower()])
    print(f"wrote {args.draw}")


if __name__ == "__main__":
    main(make_parser().parse_args())
