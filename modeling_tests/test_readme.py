"""The README's code runs, and its commands are the real ones."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", TEXT, re.S))
def test_python_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "drawing.png").stat().st_size and (tmp_path / "redrawn.png").stat().st_size


def test_first_code_starts_by_line_25_and_is_short():
    first = TEXT.splitlines().index("```python")
    block = re.search(r"```python\n(.*?)```", TEXT, re.S)[1]
    assert first < 25 and sum(bool(line.strip()) for line in block.splitlines()) <= 12


def test_commands_named_in_documents_exist():
    from transformers_unicode2.cli import COMMANDS

    for document in (TEXT, (ROOT / "training_recipes/README.md").read_text()):
        for command in re.findall(r"`unicode2 ([a-z ]+?)(?: -|`| \.)", document):
            assert command in COMMANDS, command


def test_every_path_named_in_the_readme_exists():
    for path in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / path).exists(), path
