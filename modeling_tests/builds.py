"""Builds of small codebooks: whole, refused, or broken off at a write."""

import pytest

from transformers_unicode2 import cli
from transformers_unicode2.codebook.features import write_arrays

SIZE = ["--codebook-size", "96", "--num-cells", "5", "--polish", "1", "--images-per-shard", "1"]


def words(place, output, *more, images="images", encoder="encoder"):
    return ["--images", str(place / images), "--encoder", str(place / encoder), "--output", str(output), *SIZE, *more]


def build(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["unicode2", "codebook", "build", *arguments])
    cli.main()


def refusal(monkeypatch, capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as error:
        build(monkeypatch, *arguments)
    assert error.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def break_off(place, folder, monkeypatch, count: int) -> None:
    """A build that dies silently at write number `count`."""
    written = []

    class Killed(BaseException):
        pass

    def write(path, arrays):
        if len(written) == count:
            path.with_name(f".{path.name}.tmp").write_bytes(b"half")
            raise Killed
        written.append(path)
        write_arrays(path, arrays)

    with pytest.MonkeyPatch.context() as patch:
        for module in ("features", "phases", "build", "polish"):
            patch.setattr(f"transformers_unicode2.codebook.{module}.write_arrays", write)
        with pytest.raises(Killed):
            build(patch, *words(place, folder))
