"""Checkpoints that a command is given: a file that cannot be read is named before any work."""

import shutil

import pytest

from transformers_unicode2.checkpoints import check_checkpoint
from transformers_unicode2.record import hash_source


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", b""),
        ("config.json", b"[]"),
        ("generation_config.json", b"{"),
        ("model.safetensors", b""),
        ("model.safetensors.index.json", b"{}"),
        ("condition_mapper/config.json", b""),
        ("transformer/diffusion_pytorch_model.safetensors", b"x" * 100),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tiny_checkpoint, tmp_path, name, content):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    check_checkpoint(str(folder))
    hash_source(str(folder), deep=True)
    (folder / name).write_bytes(content)
    for check in (check_checkpoint, lambda source: hash_source(source, deep=True)):
        with pytest.raises(ValueError, match=f"{folder / name} is damaged .*Copy or build it again.$"):
            check(str(folder))
