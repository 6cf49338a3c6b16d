"""Files of score cards: read with checks, and written to nothing else's place.

A card is replaced only by one of the same command. What stays beside it, such as notes, is never replaced.
"""

import json
from pathlib import Path

from ..record import MOST, compare, find_changed, read_record
from .score_card import FORMAT, Figure, ScoreCard

# The card of drawn pictures, which the scorers read
DRAWN = "generation.json"
PARTS = {"command": str, "protocol": dict, "subject": dict, "items": dict, "strata": dict, "run": dict}


def read_card(file: str | Path) -> ScoreCard:
    """Reads a card. Raises `ValueError` on a file that is none, or whose protocol was changed by hand."""
    if not Path(file).is_file():
        raise ValueError(f"There is no file {file}.")
    try:
        content = json.loads(Path(file).read_text(), parse_constant=refuse_constant)
        figures = [Figure(**figure) for figure in content["figures"]]
        card = ScoreCard(**{name: content[name] for name in PARTS}, figures=figures)
        check_types(card)
        found = content["protocol_hash"], content["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is no score card ({type(error).__name__}: {error}).") from error
    if found != (card.protocol_hash, FORMAT):
        raise ValueError(f"{file} was changed by hand, or is of another version: its protocol has another hash.")
    return card


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def check_types(card: ScoreCard) -> None:
    """Raises `ValueError` or `AttributeError` on parts of a card that hold something else than a card's."""
    for name, kind in PARTS.items():
        if not isinstance(getattr(card, name), kind):
            raise ValueError(f"`{name}` is {type(getattr(card, name)).__name__}, where {kind.__name__} must be")
    for figure in card.figures:
        texts, numbers = (figure.name, figure.unit, figure.interval), (figure.value, figure.count)
        if not all(isinstance(one, str) for one in texts) or not all(isinstance(one, int | float) for one in numbers):
            raise ValueError(f"the figure {figure.name!r:.60} has no name, value or count of a card")
    for name, items in card.items.items():
        if not all(isinstance(value, int | float) for value in items.values()):
            raise ValueError(f"the items of {name!r:.60} are not numbers")


def begin_card(command: str, benchmark: str, scorer: dict, images: str | Path, pictures: str) -> ScoreCard:
    """The card of drawn pictures, with how they were drawn, as `unicode2 evaluate generation` left it beside them.

    `pictures` is a SHA-256 of all of them. Where it is not known how they were drawn, it is part of the protocol.
    """
    file = Path(images, DRAWN)
    drawn = read_card(file) if file.is_file() else None
    if drawn is not None and drawn.command != "evaluate generation":
        raise ValueError(f"{file} is of `unicode2 {drawn.command}`, and does not tell how the pictures were drawn.")
    protocol = {"benchmark": benchmark, "task_type": "text-to-image", "scorer": scorer}
    protocol["generation"] = drawn.protocol if drawn else {"not known, of the pictures": pictures}
    subject = drawn.subject if drawn else {"model": "not known"}
    return ScoreCard(command, protocol, {**subject, "pictures": pictures})


def check_drawn(images: str | Path, counts: dict[str, int] | None = None) -> None:
    """Raises `ValueError` when pictures are not those that the card beside them tells of, if there is one.

    Args:
        images: folder of the pictures.
        counts: number of pictures of each prompt, by its folder, where prompts have folders.
    """
    again = "run `unicode2 evaluate generation` again until it is finished."
    known = read_record(images)
    if known is not None and not known["finished"]:
        raise ValueError(f"{images} is not finished; {again}")
    changed = find_changed(Path(images), known["files"]) if known is not None else []
    if changed:
        raise ValueError(
            f"{len(changed)} of {len(known['files'])} files in {images} are missing or not as they were written, the "
            f"first is {changed[0]}; delete them, and {again}"
        )
    if counts is None or not Path(images, DRAWN).is_file():
        return
    protocol = read_card(Path(images, DRAWN)).protocol
    found = {"num_prompts": len(counts), "images_per_prompt": max(counts.values())}
    for name, what in (("num_prompts", "prompts"), ("images_per_prompt", "pictures of each prompt")):
        if found[name] != protocol.get(name, found[name]):
            raise ValueError(f"{images} has {found[name]} {what}, and its {DRAWN} tells of {protocol[name]}; {again}")


def check_same(file: Path, card: ScoreCard) -> None:
    """Raises `ValueError` when the card in a file has other entries of the protocol, or is of another checkpoint.

    Entries that `card` does not have yet may be others, and tasks may be added.
    """
    if not file.is_file():
        return
    known = read_card(file)
    changes = []
    for name, now in (("protocol", card.protocol), ("subject", card.subject)):
        # The same checkpoint may lie in another folder
        now = {key: value for key, value in now.items() if key != "model"}
        before = {key: value for key, value in getattr(known, name).items() if key in now}
        changes += compare(before, now, ("tasks", "include_path"), f"{name} ")
    if changes:
        changes = changes[:MOST] + [f"and {len(changes) - MOST} more differ"] * (len(changes) > MOST)
        raise ValueError(
            f"{file} is of something else ({'; '.join(changes)}); choose another --output, or delete the card."
        )


def check_replaced(file: Path, card: ScoreCard) -> None:
    """Raises `ValueError` when a card would take the place of one with figures, or items of them, that it lacks."""
    counts = {figure.name: figure.count for figure in card.figures}
    for figure in read_card(file).figures if file.is_file() else ():
        if counts.get(figure.name, 0) < figure.count:
            raise ValueError(
                f"{file} has {figure.name!r} of {figure.count} items, and this run gives {counts.get(figure.name, 0)}; "
                "choose another --output, or delete the card."
            )


def check_place(file: str, option: str) -> None:
    """Raises `ValueError`, before any work, when there can be no file of this name."""
    if not Path(file).absolute().parent.is_dir():
        raise ValueError(f"{option} {file}: there is no folder {Path(file).absolute().parent}.")
    if Path(file).is_dir():
        raise ValueError(f"{option} {file} is a folder; give a file.")


def check_card_file(file: str, command: str) -> None:
    """Raises `ValueError`, before any work, when the card of a command cannot be written to the file of `--json`, or
    would take the place of something else. A card of the same command is replaced.
    """
    check_place(file, "--json")
    if Path(file).suffix != ".json":
        raise ValueError(f"--json {file} must end in .json; the page of the card is written beside it, to .md.")
    if Path(file).name == DRAWN:
        raise ValueError(f"--json {file} has the name of the card that tells how pictures were drawn; choose another.")
    check_foreign(Path(file), command)


def check_foreign(file: Path, command: str) -> None:
    """Raises `ValueError` when the file of a card, or its page, is there and not of this command."""
    page = file.with_suffix(".md")
    if file.is_file() and find_command(file) != command:
        found = find_command(file)
        what = "no score card" if found is None else f"a card of `unicode2 {found}`"
        raise ValueError(f"{file} is there, and is {what}; it is not replaced.")
    if page.is_file() and f"# Score card: `unicode2 {command}`" not in page.read_text(errors="replace"):
        raise ValueError(f"{page} is there, and is no page of such a score card; {file.name} would replace it.")


def find_command(file: Path) -> str | None:
    """The command of the card in a file, `None` if it holds something else."""
    try:
        content = json.loads(file.read_text(errors="replace"))
    except (ValueError, RecursionError):
        return None
    return content.get("command") if isinstance(content, dict) and "protocol_hash" in content else None


def read_kept(file: Path, asked: dict) -> dict | None:
    """What a scorer kept in a file, if it was asked the same before: `asked` and its answers in one object."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    same = isinstance(content, dict) and all(content.get(name) == value for name, value in asked.items())
    return content if same else None
