"""Pictures that a number can be read back from, and what reads them."""

import io
from pathlib import Path

from PIL import Image

from transformers_unicode2.codebook.images import ImageSource


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 200 * (number % 2))).save(file, "PNG")
    return file.getvalue()


def numbers(source: ImageSource) -> list[int]:
    """The numbers of the pictures that a source has, in its order."""
    return [source.decode(content).getpixel((0, 0))[0] for _, content in source.read(0, len(source))]


def fill(folder: Path, *names: str, start: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names, start):
        (folder / name).write_bytes(picture(number))
