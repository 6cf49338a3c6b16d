"""Model cards of what the commands write: true figures, settings and data, and a snippet that runs."""

import json
import os
import re
from dataclasses import dataclass
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import ModelCardData

from .files import write_file

# Libraries whose versions a card names.
LIBRARIES = ("transformers_unicode2", "transformers", "torch", "trl", "peft", "accelerate", "datasets")

CHECKPOINT = """import transformers_unicode2
from transformers import pipeline

pipe = pipeline("image-text-to-text", model="{name}")
question = [{{"type": "image", "image": "picture.png"}}, {{"type": "text", "text": "{question}"}}]
chat = [{{"role": "user", "content": question}}]
print(pipe(text=chat, max_new_tokens=64, return_full_text=False)[0]["generated_text"])
"""

ADAPTER = """from transformers_unicode2.checkpoints import load_model

model, processor = load_model("{name}")
question = [{{"type": "image", "image": "picture.png"}}, {{"type": "text", "text": "{question}"}}]
chat = [{{"role": "user", "content": question}}]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device)
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]))
"""

PIPELINE = """import torch
import transformers_unicode2
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}", dtype=torch.bfloat16)
pipe("a red circle").images[0].save("drawing.png")
pipe(image="picture.png").images[0].save("redrawn.png")
"""

MAPPER = """import torch
from transformers_unicode2 import {pipeline}

pipe = {pipeline}.from_unicode2("{model}"{decoder}, mapper="{name}", dtype=torch.bfloat16)
{learnt}{draw}
"""


@dataclass(frozen=True)
class Kind:
    """What a card describes: how it is loaded, and how the Hub calls it."""

    snippet: str
    library: str
    pipeline: str
    tags: tuple[str, ...] = ()


KINDS = {
    "checkpoint": Kind(CHECKPOINT, "transformers", "image-text-to-text"),
    "adapter": Kind(ADAPTER, "peft", "image-text-to-text", ("lora",)),
    "pipeline": Kind(PIPELINE, "diffusers", "text-to-image"),
    "mapper": Kind(MAPPER, "diffusers", "text-to-image"),
}


def write_card(
    folder: str | Path,
    name: str,
    summary: str,
    base_models: list[str],
    tables: dict[str, list[dict]] | None = None,
    settings: dict | None = None,
    question: str = "What is this?",
    kind: str = "checkpoint",
    names: dict[str, str] | None = None,
    license: str | None = None,
) -> None:
    """Writes `README.md` of a checkpoint or adapter, whole or not at all.

    It is for readers elsewhere, so it names folders of this machine by their last names, see `name_places`.

    Args:
        folder (`str` or `Path`): what the card describes.
        name (`str`): the folder in the end. The snippet loads it from the folder beside it, by its last name.
        summary (`str`): sentences that say what it is and how it was made.
        base_models (`list[str]`): folders or Hub names of what it was made of. Only Hub names become metadata.
        tables (`dict[str, list[dict]]`, *optional*): rows of equal keys under each heading.
        settings (`dict`, *optional*): options that it was made with, written as JSON.
        question (`str`, *optional*, defaults to `"What is this?"`): what the snippet asks.
        kind (`str`, *optional*, defaults to `"checkpoint"`): one of `KINDS`, what the folder holds.
        names (`dict[str, str]`, *optional*): what the snippet of this kind names beside it.
        license (`str`, *optional*): left out of the card unless it is known.
    """
    on_hub = [base for base in base_models if not Path(base).exists() and base.count("/") == 1]
    of_kind = KINDS[kind]
    data = ModelCardData(
        license=license,
        base_model=on_hub or None,
        library_name=of_kind.library,
        pipeline_tag=of_kind.pipeline,
        tags=["unicode2", "image-text-to-text", "text-to-image", *of_kind.tags],
    )
    name = Path(os.path.abspath(name)).name
    snippet = of_kind.snippet.format(name=name, question=question, **(names or {}))
    parts = [f"---\n{data.to_yaml()}\n---\n", f"# {name}\n", f"{name_places(summary)}\n", f"```python\n{snippet}```\n"]
    parts += [f"## {heading}\n\n{write_table(name_places(rows))}" for heading, rows in (tables or {}).items() if rows]
    if settings:
        written = json.dumps(name_places(settings), indent=2, default=str, sort_keys=True)
        parts.append(f"## Settings\n\n```json\n{written}\n```\n")
    parts.append(f"## Versions\n\n{write_table(find_versions())}")
    write_file(Path(folder) / "README.md", "\n".join(parts).encode())


def name_places(value):
    """A text, list or dictionary whose paths of this machine, alone or in backticks, have become their last names.

    A path is what begins at the root, see `is_place`, or has a slash and is there. Other texts, such as Hub names and
    prompts, stay.
    """
    if isinstance(value, dict):
        return {name: name_places(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [name_places(part) for part in value]
    if not isinstance(value, str | Path):
        return value
    text = re.sub("`([^`]+)`", lambda found: f"`{name_places(found[1])}`", str(value))
    return Path(os.path.abspath(text)).name if is_place(text) else text


def is_place(text: str) -> bool:
    """Whether a text is a path. Some commands of language models, such as `/no_think`, begin with a slash, too."""
    if not os.path.isabs(text):
        return "/" in text and os.path.exists(text)
    top, *below = Path(text).parts[1:] or [""]
    return bool(below) and len(text.split()) == 1 or os.path.exists(Path("/", top))


def write_table(rows: list[dict]) -> str:
    """Rows of equal keys as Markdown."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([write_cell(row[name]) for name in names] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_cell(value) -> str:
    """A value in one line of a table. HTML is shown as it is written; code in backticks shows it anyway."""
    text = f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    parts = re.split("(`[^`]+`)", text.replace("|", "\\|"))
    parts = [part if part.startswith("`") else escape(part, quote=False) for part in parts]
    return "<br>".join("".join(parts).splitlines())


def find_versions() -> list[dict]:
    """Installed versions of `LIBRARIES`."""
    found = []
    for library in LIBRARIES:
        try:
            found.append({"library": library, "version": version(library)})
        except PackageNotFoundError:
            continue
    return found


__all__ = ["write_card"]
