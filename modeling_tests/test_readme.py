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
RECIPES = ROOT / "training_recipes"
DOCUMENTS = [ROOT / "README.md", *sorted(RECIPES.rglob("README.md"))]


def find_commands(document: Path) -> list[list[str]]:
    """The words behind `unicode2` of each command in the blocks of a document; variables stand for themselves."""
    blocks = re.findall(r"```(?:bash|text)\n(.*?)```", document.read_text(), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line.strip()) for line in lines if line.strip().startswith("unicode2 ")]
    return [words[1:] for words in commands]


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
        file.name for file in (tmp_path / commands[-1].split()[3]).iterdir()
    }


def test_first_code_starts_by_line_25_and_is_short():
    first = TEXT.splitlines().index("```python")
    block = re.search(r"```python\n(.*?)```", TEXT, re.S)[1]
    assert first < 25 and sum(bool(line.strip()) for line in block.splitlines()) <= 12


def test_commands_named_in_documents_exist():
    from transformers_unicode2.cli import COMMANDS

    for document in DOCUMENTS:
        for command in re.findall(r"`unicode2 ([a-z ]+?)(?: -|`| \.)", document.read_text()):
            assert command in COMMANDS, command


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.parent.name)
def test_commands_in_documents_have_the_options_that_they_name(document):
    from importlib import import_module

    commands = find_commands(document)
    assert commands
    for words in commands:
        name = next(name for name in cli.COMMANDS if words[: len(name.split())] == name.split())
        module, make_parser, *_ = cli.COMMANDS[name]
        parser = getattr(import_module(f"transformers_unicode2.{module}"), make_parser)()
        parser.parse_args(words[len(name.split()) :])


def test_yaml_in_the_readme_of_the_recipes_is_read(tmp_path):
    import yaml

    from transformers_unicode2.training.mapper import MapperArguments, check_arguments
    from transformers_unicode2.training.mixtures import FIELDS
    from transformers_unicode2.training.templates import read_tasks

    tasks, mixture, mapper = re.findall(r"```yaml\n(.*?)```", (RECIPES / "README.md").read_text(), re.S)
    (tmp_path / "tasks.yaml").write_text(tasks)
    assert set(read_tasks(str(tmp_path / "tasks.yaml"))) == {"questions", "planned"}
    mixture = yaml.safe_load(mixture)
    parts = mixture["datasets"] + mixture["eval_datasets"]
    assert len(parts) == 3 and all(part.keys() <= set(FIELDS) for part in parts)
    mapper = yaml.safe_load(mapper)
    assert mapper.pop("output_dir")
    check_arguments(MapperArguments(**mapper))


def test_every_path_linked_in_documents_exists():
    for document in DOCUMENTS:
        for path in re.findall(r"\]\(([^)#:]+)[)#]", document.read_text()):
            assert (document.parent / path).exists(), path
