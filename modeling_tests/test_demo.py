import subprocess
import sys

import pytest
from PIL import Image

from transformers_unicode2 import demo


def test_demo_writes_a_contact_sheet_and_the_drawings(tmp_path, photo, capsys):
    photo.save(tmp_path / "photo.png")
    words = ["--image", str(tmp_path / "photo.png"), "--question", "what is this?", "--prompt", "two red circles"]
    demo.main(demo.make_parser().parse_args([*words, "--output", str(tmp_path / "out"), "--steps", "2"]))
    printed = capsys.readouterr().out
    assert "what is this? " in printed and " s)" in printed
    sheet = Image.open(tmp_path / "out" / "contact-sheet.png")
    assert sheet.width > 4 * demo.TILE and len(sheet.getcolors(2**24)) > 100
    assert Image.open(tmp_path / "out" / "drawing-1.png").size == (64, 64)


def test_bundled_examples_are_there(tiny_checkpoint):
    for file, question, prompt in demo.EXAMPLES:
        assert demo.load_image(tiny_checkpoint / "examples" / file).mode == "RGB"
        assert question and prompt


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("I;16", 0x8000, (128, 128, 128)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("LA", (0, 255), (0, 0, 0)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ],
)
def test_load_image_keeps_what_a_person_sees(tmp_path, mode, value, expected):
    image = Image.new(mode, (4, 4), value)
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    image.save(path)
    pixel = demo.load_image(path).getpixel((1, 1))
    assert max(abs(a - b) for a, b in zip(pixel, expected)) <= 2


def test_load_image_turns_as_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "image.jpg", exif=exif)
    assert demo.load_image(tmp_path / "image.jpg").size == (10, 20)


def test_import_is_light():
    names = ("diffusers", "trl", "faiss", "datasets", "peft", "skimage")
    script = f"import sys, transformers_unicode2; print([name for name in {names} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


def test_missing_library_is_one_sentence_with_the_extra(tmp_path):
    script = (
        "import sys; sys.modules['diffusers'] = None; sys.argv = ['unicode2', 'demo', '--output', sys.argv[1]]\n"
        "from transformers_unicode2 import cli; cli.main()"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].endswith("install transformers_unicode2[diffusion].")
    assert "Traceback" not in run.stderr
