"""The README's code runs, and its commands are the real ones."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from language_models import make_language_model, make_tokenizer
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from transformers_unicode2 import cli

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def make_parts(folder: Path, llm: str, vision: str, num_pictures: int = 32) -> None:
    """Random small parts under the names of large ones, and captioned pictures."""
    make_language_model("llama", pad_token_id=0).save_pretrained(folder / llm)
    make_tokenizer("chatml", "bytes").save_pretrained(folder / llm)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(patch_size=16, **sizes)).save_pretrained(folder / vision)
    CLIPImageProcessorPil().save_pretrained(folder / vision)
    (folder / "pictures").mkdir()
    rng, rows = np.random.default_rng(0), []
    for number in range(num_pictures):
        pixels = rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": f"picture {number}"}))
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", TEXT, re.S))
def test_python_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "drawing.png").stat().st_size and (tmp_path / "redrawn.png").stat().st_size


def test_six_commands_make_a_model_of_own_parts(tmp_path, monkeypatch, capsys):
    """As they are written, with small random parts in folders of the names on the Hub; all but the upload."""
    commands = re.search(r"<!-- own -->\n```bash\n(.*?)```", TEXT, re.S)[1].splitlines()
    recipe = re.search(r"<!-- own -->\n```yaml\n(.*?)```", TEXT, re.S)[1]
    make_parts(tmp_path, "HuggingFaceTB/SmolLM2-135M-Instruct", "openai/clip-vit-base-patch16")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "cat.jpg")
    (tmp_path / "sft.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    assert [command.split()[0] for command in commands] == [*["unicode2"] * 3, "accelerate", "unicode2", "hf"]
    for command in commands[:-1]:
        words = shlex.split(command)
        if words[0] == "unicode2":
            monkeypatch.setattr(sys, "argv", words)
            cli.main()
            continue
        run = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words[1:]]
        done = subprocess.run(run, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    assert capsys.readouterr().out.splitlines()[-1].strip()
    assert {"README.md", "config.json", "modeling_unicode2.py", "model.safetensors"} <= {
        file.name for file in (tmp_path / commands[-1].split()[-1]).iterdir()
    }


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
