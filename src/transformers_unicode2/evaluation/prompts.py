"""The prompt files of GenEval and DPG-Bench, which users bring: their licences are their own."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from re import Pattern

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class BenchmarkPrompt:
    """What to draw, under the name that its scorer knows.

    Args:
        name: of the folder or file of its pictures.
        text: the prompt.
        metadata: the object of GenEval's file, empty for DPG-Bench.
    """

    name: str
    text: str
    metadata: dict = field(default_factory=dict)


def read_geneval(file: str | Path) -> list[BenchmarkPrompt]:
    """GenEval's `evaluation_metadata.jsonl`: one object a line. Raises `ValueError` with the line and the field."""
    prompts = []
    for number, line in enumerate(read_lines(file), 1):
        try:
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError("it is not JSON") from error
            check_metadata(content)
        except ValueError as error:
            raise ValueError(
                f"{file} line {number}: {error}; GenEval's evaluation_metadata.jsonl is needed."
            ) from error
        prompts.append(BenchmarkPrompt(f"{number - 1:05d}", content["prompt"], content))
    return prompts


def read_lines(file: str | Path) -> list[str]:
    """Lines of a text file, without empty ones at the end. Raises `ValueError` when there are none."""
    try:
        # Not `splitlines`, which also cuts at characters inside a prompt; some editors begin a file with a mark
        lines = Path(file).read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({error}).") from error
    if lines == [""]:
        raise ValueError(f"{file} is empty.")
    return lines


def check_metadata(content: dict) -> None:
    """Raises `ValueError` unless this is an object of GenEval's file."""
    if not isinstance(content, dict):
        raise ValueError(f"it is {type(content).__name__}, where an object must be")
    if not isinstance(content.get("prompt"), str) or not content["prompt"].strip():
        raise ValueError(f"`prompt` is {content.get('prompt')!r:.60}, where a text must be")
    if any("\ud800" <= letter <= "\udfff" for letter in content["prompt"]):
        raise ValueError(
            f"`prompt` is {content['prompt']!r:.60}, which has half of a letter, an escape \\ud800 to \\udfff"
        )
    if content.get("tag") not in TAGS:
        raise ValueError(f"`tag` is {content.get('tag')!r:.60}; it must be one of {', '.join(TAGS)}")
    for name in ("include", "exclude"):
        wanted = content.get(name, [])
        if not isinstance(wanted, list) or name == "include" and not wanted:
            raise ValueError(f"`{name}` is {wanted!r:.60}, where a list of objects must be")
        for place, one in enumerate(wanted):
            check_wanted(one, f"{name}[{place}]", place)


def check_wanted(one: dict, where: str, place: int) -> None:
    """Raises `ValueError` unless this is an object that a prompt includes or excludes."""
    if not isinstance(one, dict) or not isinstance(one.get("class"), str):
        raise ValueError(f"`{where}` is {one!r:.60}, which has no `class`")
    count = one.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"`{where}.count` is {count!r:.60}, where a number of at least 1 must be")
    if not isinstance(one.get("color", ""), str):
        raise ValueError(f"`{where}.color` is {one['color']!r:.60}, where a text must be")
    if "position" in one:
        position = one["position"]
        fits = isinstance(position, list) and len(position) == 2 and position[0] in RELATIONS
        if not fits or position[1] not in range(place):
            raise ValueError(
                f"`{where}.position` is {position!r:.60}; it must be one of {', '.join(RELATIONS)} and the number of "
                "an object before"
            )


def read_dpg(folder: str | Path) -> list[BenchmarkPrompt]:
    """DPG-Bench's folder of `<id>.txt`, one prompt each. Raises `ValueError` when there are none, or one is empty."""
    files = list_dpg(folder)
    if not files:
        raise ValueError(f"{folder} has no .txt files; give the folder dpg_bench/prompts of DPG-Bench.")
    return [BenchmarkPrompt(file.stem, " ".join(read_lines(file)).strip()) for file in files]


def list_dpg(folder: str | Path) -> list[Path]:
    """The files of DPG-Bench's prompts. Hidden ones, such as those that macOS writes beside others, are none."""
    return sorted(file for file in Path(folder).glob("*.txt") if not file.name.startswith(".") and file.is_file())


def check_control(prompts: list[BenchmarkPrompt], control: Pattern, file: str | Path) -> None:
    """Raises `ValueError` on a prompt with a control token, which would end the turn, or stand for an image.

    Args:
        prompts: in the order of the lines of `file`; of DPG-Bench in that of its files.
        control: finds the control tokens of the model, see `find_control_tokens`.
        file: that has the prompts, or the folder of DPG-Bench.
    """
    for number, prompt in enumerate(prompts, 1):
        found = control.search(prompt.text)
        if found:
            place = f"{file}/{prompt.name}.txt" if Path(file).is_dir() else f"{file} line {number}"
            raise ValueError(f"{place} has {found.group()}, which is a control token of the model; take it out.")


def replace_texts(prompts: list[BenchmarkPrompt], file: str | Path | None) -> list[BenchmarkPrompt]:
    """The prompts with other texts, as a language model rewrote them: one a line, in the same order.

    Raises `ValueError` on another number of lines, or an empty one.
    """
    if file is None:
        return prompts
    lines = read_lines(file)
    if len(lines) != len(prompts):
        raise ValueError(f"{file} has {len(lines)} lines, and there are {len(prompts)} prompts; give one for each.")
    empty = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if empty:
        raise ValueError(f"{file} line {empty[0]} is empty.")
    return [BenchmarkPrompt(one.name, line.strip(), one.metadata) for one, line in zip(prompts, lines)]
