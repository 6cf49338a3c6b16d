"""Runs of `unicode2 tokenize`, what they read, and what they wrote."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from transformers_unicode2.training import tokenize


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((64, 64))


def content(number: int) -> bytes:
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return file.getvalue()


def run(data, model, output: Path, *more) -> Path:
    words = ["--data", *(data if isinstance(data, list) else [data]), "--model", model, "--output", output, *more]
    tokenize.main(tokenize.make_parser().parse_args(list(map(str, words))))
    return output


def read(output: Path) -> dict[str, bytes]:
    """The files of an output, without the times of change of its pictures."""
    files = [file for file in output.rglob("*") if file.is_file() and file.name != "images-train.npy"]
    return {str(file.relative_to(output)): file.read_bytes() for file in files}


def stop_at(function, number: int):
    """A function that is interrupted at its call of this number, from 1."""
    calls = []

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return stopped
