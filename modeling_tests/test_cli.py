"""Bad input is one sentence on stderr and exit status 2; nothing half-written stays."""

import sys

import pytest

from transformers_unicode2 import cli


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["unicode2", *map(str, words)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "There is no image file"),
        (b"", "is empty (0 bytes)"),
        (b"no image at all", "(15 bytes) cannot be read as an image"),
        ("truncated", "cannot be read as an image"),
    ],
)
def test_demo_refuses_bad_image_files(monkeypatch, capsys, tmp_path, photo, content, sentence):
    file = tmp_path / "picture.png"
    if content == "truncated":
        photo.save(file)
        file.write_bytes(file.read_bytes()[:300])
    elif content is not None:
        file.write_bytes(content)
    code, printed = run(monkeypatch, capsys, "demo", "--image", file, "--output", tmp_path / "out")
    assert code == 2
    assert sentence in printed.err and printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_demo_refuses_an_empty_prompt(monkeypatch, capsys, tmp_path):
    code, printed = run(monkeypatch, capsys, "demo", "--prompt", " ", "--output", tmp_path / "out")
    assert (code, printed.err) == (2, "unicode2 demo: --prompt is empty; write some text.\n")


def test_unknown_command_lists_the_commands(monkeypatch, capsys):
    code, printed = run(monkeypatch, capsys, "paint")
    assert code == 2 and "codebook build" in printed.err
    assert run(monkeypatch, capsys, "--help")[0] == 0


def test_codebook_build_without_images_is_one_sentence(monkeypatch, capsys, tmp_path):
    words = ("codebook", "build", "--images", tmp_path, "--encoder", tmp_path, "--output", tmp_path / "out")
    code, printed = run(monkeypatch, capsys, *words)
    assert code == 2 and "No images in" in printed.err
    assert not (tmp_path / "out").exists()


def test_missing_checkpoint_is_one_sentence(monkeypatch, capsys, tmp_path):
    code, printed = run(monkeypatch, capsys, "demo", "--model", tmp_path / "nothing", "--output", tmp_path / "out")
    assert code == 2 and printed.err.count("\n") == 1 and "nothing" in printed.err
