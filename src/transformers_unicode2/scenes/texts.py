"""Captions, questions and prompts of scenes.

The prompts follow the six categories of GenEval: single object, two objects, counting, colors, position and color
attribution.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .scene import RELATIONS, SEEN_PAIRS, SHAPES, Scene, SceneObject, holds

CATEGORIES = ("single object", "two objects", "counting", "colors", "position", "color attribution")
NUMBER_WORDS = ("zero", "one", "two", "three", "four")


@dataclass(frozen=True)
class Question:
    """A question about a scene with its one right answer; `kind` groups questions in a report."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class ScenePrompt:
    """A prompt with what an image must show to satisfy it.

    `wanted` holds one `(color or None, shape)` an object; `relation`, if any, holds from the first to the second.
    """

    category: str
    text: str
    wanted: tuple[tuple[str | None, str], ...]
    relation: str | None = None


def article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def describe(item: SceneObject, level: str) -> str:
    """A noun phrase without its article; `level` says how much it tells: `shape`, `color`, `size` or `all`."""
    words = {
        "shape": [item.shape],
        "color": [item.color, item.shape],
        "size": [item.size, item.color, item.shape],
        "all": [item.size] + ["striped"] * item.textured + [item.color, item.shape],
    }
    return " ".join(words[level])


def ground_phrase(scene: Scene) -> str:
    return f"on {article((scene.texture + ' ' if scene.texture != 'plain' else '') + scene.ground)} ground"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A short caption: all objects at one level of detail.

    Two objects mostly come with their relation, and one caption in five names the ground.
    """
    level = str(rng.choice(["shape", "color", "size"], p=[0.35, 0.55, 0.1]))
    phrases = [describe(o, level) for o in scene.objects]
    if len(scene.objects) == 2 and phrases[0] != phrases[1] and rng.random() < 0.75:
        first, second = scene.objects if rng.random() < 0.5 else scene.objects[::-1]
        relations = [r for r in RELATIONS if holds(r, first, second)]
        if relations:
            level = "shape" if first.shape != second.shape and rng.random() < 0.5 else level
            return f"{article(describe(first, level))} {rng.choice(relations)} {article(describe(second, level))}"
    text = join_phrases(phrases, rng)
    return f"{text} {ground_phrase(scene)}" if rng.random() < 0.2 else text


def join_phrases(phrases: list[str], rng: np.random.Generator) -> str:
    """`["red heart", "red heart", "blue ring"]` becomes `"two red hearts and a blue ring"`, in random order."""
    names = list(dict.fromkeys(phrases))
    parts = []
    for i in rng.permutation(len(names)):
        number = phrases.count(names[i])
        head, _, shape = names[i].rpartition(" ")
        many = f"{NUMBER_WORDS[number]} {head} {plural(shape)}".replace("  ", " ")
        parts.append(article(names[i]) if number == 1 else many)
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def cell(x: float, y: float) -> str:
    """Column letter and row number of a point on an 8 x 8 grid; `x` and `y` are shares of the width and height."""
    return "abcdefgh"[min(int(x * 8), 7)] + str(min(int(y * 8), 7) + 1)


def cell_in_cell(x: float, y: float) -> str:
    """The cell of a point, then its cell in an 8 x 8 grid inside that cell."""
    return f"{cell(x, y)} {cell(x * 8 % 1, y * 8 % 1)}"


def dense_caption(scene: Scene, place: Callable = cell) -> str:
    """Size, texture, color, shape and place of all objects, in reading order, and the ground.

    A place is a cell of an 8 x 8 grid, named as in a spreadsheet: `a1` is the top left, `h8` the bottom right. With
    `cell_in_cell` as `place` it is exact to a 64th of the width.
    """
    items = sorted(scene.objects, key=lambda o: (int(o.y * 3), o.x))
    places = [f"{article(describe(o, 'all'))} at {place(o.x, o.y)}" for o in items]
    return f"{', '.join(places)}, {ground_phrase(scene)}"


def questions(scene: Scene, rng: np.random.Generator, pairs: tuple = SEEN_PAIRS) -> list[Question]:
    """All questions that the scene answers without doubt, in random order.

    The pair that a yes/no question asks about is one of the scene or of `pairs`.
    """
    objects, shapes, colors = scene.objects, [o.shape for o in scene.objects], [o.color for o in scene.objects]
    asked = [
        Question("count", "how many objects are there?", NUMBER_WORDS[len(objects)]),
        Question("ground", "what color is the ground?", scene.ground),
    ]
    shape = str(rng.choice(shapes) if rng.random() < 0.7 else rng.choice(SHAPES))
    asked.append(Question("count", f"how many {plural(shape)} are there?", NUMBER_WORDS[shapes.count(shape)]))
    present = sorted({(o.color, o.shape) for o in objects})
    color, shape = present[rng.integers(len(present))] if rng.random() < 0.5 else pairs[rng.integers(len(pairs))]
    answer = "yes" if (color, shape) in present else "no"
    asked.append(Question("exists", f"is there {article(f'{color} {shape}')}?", answer))
    for item in objects:
        if shapes.count(item.shape) == 1:
            asked.append(Question("color", f"what color is the {item.shape}?", item.color))
            asked.append(Question("size", f"is the {item.shape} small or large?", item.size))
            if all(abs(value * 3 - edge) > 0.12 for value in (item.x, item.y) for edge in (1, 2)):
                asked.append(Question("place", f"where is the {item.shape}?", item.place))
        if colors.count(item.color) == 1:
            asked.append(Question("shape", f"what shape is the {item.color} object?", item.shape))
    if len(objects) == 2 and shapes[0] != shapes[1]:
        first, second = objects if rng.random() < 0.5 else objects[::-1]
        relation = str(rng.choice(RELATIONS))
        opposite = RELATIONS[RELATIONS.index(relation) ^ 1]
        if holds(relation, first, second) or holds(opposite, first, second):
            text = f"is the {first.shape} {relation} the {second.shape}?"
            asked.append(Question("position", text, "yes" if holds(relation, first, second) else "no"))
    return [asked[i] for i in rng.permutation(len(asked))]


def sample_prompt(category: str, rng: np.random.Generator, pairs: tuple = SEEN_PAIRS) -> ScenePrompt:
    """A prompt of one of `CATEGORIES` over `(color, shape)` pairs out of `pairs`."""
    (color, shape), (color2, shape2) = (pairs[int(i)] for i in rng.integers(len(pairs), size=2))
    while shape2 == shape or color2 == color:
        color2, shape2 = pairs[int(rng.integers(len(pairs)))]
    if category == "single object":
        return ScenePrompt(category, article(shape), ((None, shape),))
    if category == "two objects":
        return ScenePrompt(category, f"{article(shape)} and {article(shape2)}", ((None, shape), (None, shape2)))
    if category == "counting":
        number = int(rng.integers(2, 5))
        return ScenePrompt(category, f"{NUMBER_WORDS[number]} {color} {plural(shape)}", ((color, shape),) * number)
    if category == "colors":
        return ScenePrompt(category, article(f"{color} {shape}"), ((color, shape),))
    if category == "position":
        relation = str(rng.choice(RELATIONS))
        return ScenePrompt(
            category, f"{article(shape)} {relation} {article(shape2)}", ((None, shape), (None, shape2)), relation
        )
    if category == "color attribution":
        text = f"{article(f'{color} {shape}')} and {article(f'{color2} {shape2}')}"
        return ScenePrompt(category, text, ((color, shape), (color2, shape2)))
    raise ValueError(f"`category` is {category!r}; it must be one of {', '.join(CATEGORIES)}.")
