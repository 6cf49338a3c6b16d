"""Bad input is one sentence on stderr and exit status 2; nothing half-written stays."""

import argparse
import os
import shutil
import sys
from importlib import import_module

import diffusers  # noqa: F401 - says on stderr what it lacks when it is first imported, which is no part of a message
import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize("allocate", [torch.empty, np.empty])
def test_an_array_beyond_memory_is_one_sentence(capsys, allocate):
    # More than a processor can address
    with pytest.raises(SystemExit) as stop, cli.sentences("unicode2 init"):
        allocate(2**48)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.startswith("unicode2 init: there is not enough memory: ")
    assert printed.count("\n") == 1


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
    assert code == 2 and "nothing" in printed.err.splitlines()[-1] and "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("demo --steps 0", "argument --steps: 0 is not allowed; it must be at least 1."),
        ("demo --image {}", "is a folder; give an image file."),
        ("demo --seed 99999999999999999999", "it must be from 0 to 4294967295."),
        ("demo --model {} --output {}/out", "is no whole checkpoint: it has no config.json"),
        ("evaluate scenes --model m --steps 0", "argument --steps: 0 is not"),
        ("evaluate scenes --model m --batch-size -1", "argument --batch-size: -1 is not"),
        ("evaluate scenes --model m --num-scenes 2", "argument --num-scenes: 2 is not allowed; it must be at least 6."),
        ("evaluate scenes --model m --true-cfg-scale 0.5", "0.5 is not allowed; it must be at least 1."),
        (
            "assemble --model m --mapper m --decoder m --output o --true-cfg-scale inf",
            "inf is not allowed; it must be at least 1.",
        ),
        (
            "assemble --model m --mapper m --decoder m --output o --num-candidates 0",
            "--num-candidates: 0 is not allowed; it must be at least 1.",
        ),
        (
            "assemble --model m --mapper m --decoder m --output o --image-size 0",
            "--image-size: 0 is not allowed; it must be at least 1.",
        ),
        ("assemble --model {} --mapper m --decoder m --output o", "is no whole checkpoint: it has no config.json"),
        ("evaluate scenes --model {} --num-scenes 6", "is no whole checkpoint: it has no config.json"),
        ("evaluate scenes --model m --guidance nan", "nan is not allowed; it must be at least 0."),
        ("evaluate scenes --model m --json {}", "is a folder; give a file."),
        ("evaluate scenes --model m --sheet x.psd", "has no ending of an image file"),
        ("scenes --output {}/out --photo-share 2", "argument --photo-share: 2 is not allowed; it must be from 0 to 1."),
        ("evaluate scenes --model m --json {}/no/x.json", "there is no folder"),
        ("evaluate scenes --model m --sheet x.txt", "has no ending of an image file"),
        ("evaluate scenes --model m --emoji-dir {}", "has no captions.tsv"),
        ("evaluate scenes --model m --clip {}", "give --emoji-dir, too"),
        ("scenes --output {}/out --num-scenes -5", "argument --num-scenes: -5 is not"),
        ("scenes --output {}/out --num-emoji 1 --emoji-dir {}", "has no captions.tsv"),
        ("tokenize --data {} --model m --output o", "There is no folder m; give the folder of a checkpoint"),
    ],
)
def test_bad_options_are_refused_before_any_work(monkeypatch, capsys, tmp_path, words, sentence):
    code, printed = run(monkeypatch, capsys, *words.replace("{}", str(tmp_path)).split())
    # Argparse says the usage before what is wrong with a value
    lines = [line for line in printed.err.splitlines() if not line.startswith(("usage: ", " "))]
    assert code == 2 and len(lines) == 1 and sentence in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_options_say_what_they_do_and_take_finite_numbers(command):
    module, make_parser, *_ = cli.COMMANDS[command]
    parser = getattr(import_module(f"transformers_unicode2.{module}"), make_parser)()
    assert not [action.dest for action in parser._actions if not action.help]
    for action in (action for action in parser._actions if action.type and action.dest != "image_generation"):
        for text in ("nan", "inf", "-inf", "-1", "1e400"):
            with pytest.raises((ValueError, argparse.ArgumentTypeError)):
                action.type(text)


def test_emoji_that_a_folder_lacks_are_named_before_any_work(monkeypatch, capsys, tmp_path):
    (tmp_path / "captions.tsv").write_text("x.png\tno such emoji\n")
    for command in ("scenes --num-emoji 1 --output", "evaluate scenes --model"):
        code, printed = run(monkeypatch, capsys, *command.split(), tmp_path / "out", "--emoji-dir", tmp_path)
        assert code == 2 and "lists 1 emoji, none of them named 'avocado'" in printed.err
    assert not (tmp_path / "out").exists()


def test_assemble_refuses_a_size_that_the_decoder_cannot_paint(monkeypatch, capsys, tmp_path, tiny_checkpoint):
    parts = (
        "--model",
        tiny_checkpoint,
        "--mapper",
        f"{tiny_checkpoint}/condition_mapper",
        "--decoder",
        tiny_checkpoint,
    )
    code, printed = run(monkeypatch, capsys, "assemble", *parts, "--image-size", 65, "--output", tmp_path / "out")
    assert code == 2 and "--image-size is 65; this decoder paints multiples of 8 pixels." in printed.err
    assert not (tmp_path / "out").exists()


def test_scenes_of_other_options_are_refused(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, capsys, "scenes", "--output", tmp_path, "--num-scenes", 2)[0] == 0
    code, printed = run(monkeypatch, capsys, "scenes", "--output", tmp_path, "--num-scenes", 2, "--seed", 7)
    assert code == 2 and "seed was 0 and is 7" in printed.err
    code, printed = run(monkeypatch, capsys, "scenes", "--output", tmp_path, "--num-scenes", 2, "--photo-share", 0)
    assert code == 2 and "photo_share was 0.5 and is 0.0" in printed.err
    shutil.rmtree(tmp_path / ".unicode2")
    code, printed = run(monkeypatch, capsys, "scenes", "--output", tmp_path, "--num-scenes", 2)
    assert code == 2 and "holds train-00000.parquet, and nothing tells what it was made of" in printed.err


@pytest.mark.parametrize(
    "damage, message",
    [
        ("truncated", "model.safetensors is damaged"),
        ("sizes", "codebook.codes, (8192, 192) there and (4000, 192) in the configuration."),
    ],
)
def test_damaged_checkpoint_is_one_sentence(monkeypatch, capsys, tmp_path, tiny_checkpoint, damage, message):
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    if damage == "truncated":
        os.truncate(tmp_path / "model" / "model.safetensors", 100_000)
    else:
        path = tmp_path / "model" / "config.json"
        path.write_text(path.read_text().replace('"codebook_size": 8192', '"codebook_size": 4000'))
    code, printed = run(monkeypatch, capsys, "demo", "--model", tmp_path / "model", "--output", tmp_path / "out")
    assert code == 2 and message in printed.err
    assert not (tmp_path / "out").exists()
