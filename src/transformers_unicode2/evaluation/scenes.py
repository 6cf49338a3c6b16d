"""Procedurally drawn scenes whose questions and drawings are checked exactly.

A scene is one to four shapes on a ground. Everything about it is known, so a caption, a question with its answer and a
prompt come with it for free, and `check_drawing` decides from the pixels of any image whether it shows what a prompt asked
for. The prompts follow the six categories of GenEval (single object, two objects, counting, colors, position, color
attribution); the checker is stricter than GenEval's, since an object that nobody asked for is a failure.

Two splits keep the test honest. `split_of` hashes what a scene shows, coarsely, so that no test scene has a twin in the
training data whatever the seeds. `UNSEEN_PAIRS` never occur in a training scene, nor in any of its texts.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

SHAPES = ("circle", "square", "triangle", "cross", "ring", "heart")
COLORS = {
    "red": (216, 32, 36),
    "orange": (255, 140, 0),
    "yellow": (248, 222, 32),
    "green": (24, 150, 62),
    "cyan": (32, 200, 220),
    "blue": (30, 64, 216),
    "purple": (142, 36, 182),
    "black": (24, 24, 24),
}
GROUNDS = {"white": (255, 255, 255), "grey": (192, 192, 192), "beige": (232, 220, 196), "pink": (246, 214, 222)}
TEXTURES = {"plain": 0.7, "striped": 0.1, "dotted": 0.1, "speckled": 0.1}  # how often each occurs
SIZES = {"small": (0.165, 0.18), "large": (0.215, 0.235)}  # radius as a share of the image's width
UNSEEN_PAIRS = frozenset(
    {
        ("cyan", "circle"),
        ("purple", "square"),
        ("orange", "triangle"),
        ("green", "cross"),
        ("blue", "ring"),
        ("red", "heart"),
    }
)
SEEN_PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in UNSEEN_PAIRS)
CATEGORIES = ("single object", "two objects", "counting", "colors", "position", "color attribution")
RELATIONS = ("left of", "right of", "above", "below")
NUMBER_WORDS = ("zero", "one", "two", "three", "four")
PLACES = tuple(
    f"{row} {column}".strip() for row in ("top", "middle", "bottom") for column in ("left", "center", "right")
)
MIN_OBJECT_AREA = 0.012  # share of the image's area; the smallest cross covers 0.028


@dataclass(frozen=True)
class SceneObject:
    """One shape. `x`, `y` (centre) and `radius` are shares of the image's width; `y` points down."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    textured: bool = False

    @property
    def place(self) -> str:
        """Cell of a 3 x 3 grid, such as `"top left"`."""
        return PLACES[3 * min(int(self.y * 3), 2) + min(int(self.x * 3), 2)]


@dataclass(frozen=True)
class Scene:
    """What an image shows: objects, left to right as drawn, on a ground."""

    objects: tuple[SceneObject, ...]
    ground: str = "white"
    texture: str = "plain"
    antialiased: bool = True
    texture_seed: int = 0


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


# ----------------------------------------------------------------------------------------------------------- composing


def split_of(scene: Scene) -> str:
    """`"test"` for one scene in ten and `"train"` for the rest, decided by what the scene shows.

    Objects (shape, color, size, cell of a 6 x 6 grid), ground and texture are hashed, so two scenes that differ by a few
    pixels fall in the same part.
    """
    shown = sorted((o.shape, o.color, o.size, int(o.x * 6), int(o.y * 6)) for o in scene.objects)
    digest = hashlib.sha256(repr((shown, scene.ground, scene.texture)).encode()).digest()
    return "test" if digest[0] % 10 == 0 else "train"


def place_objects(
    specs: list[tuple[str, str]], rng: np.random.Generator, relation: str | None = None, attempts: int = 1000
) -> tuple[SceneObject, ...] | None:
    """Gives each `(color, shape)` a size and a place such that none overlap; `None` when no place was found."""
    for _ in range(attempts):
        placed: list[SceneObject] = []
        for color, shape in specs:
            size = "small" if rng.random() < (0, 0, 0.7, 1)[len(specs) - 1] else str(rng.choice(list(SIZES)))
            radius = float(rng.uniform(*SIZES[size]))
            x, y = (float(value) for value in rng.uniform(radius + 0.02, 0.98 - radius, size=2))
            if any(max(abs(o.x - x), abs(o.y - y)) < o.radius + radius + 0.04 for o in placed):
                break
            placed.append(SceneObject(shape, color, size, x, y, radius, bool(rng.random() < 0.2)))
        if len(placed) == len(specs) and (relation is None or holds(relation, placed[0], placed[1])):
            return tuple(placed)
    return None


def sample_scene(rng: np.random.Generator, split: str = "train", pairs: tuple = SEEN_PAIRS) -> Scene:
    """Draws a scene of one to four objects whose `(color, shape)` pairs come from `pairs`.

    Some of the scenes with several objects show the same pair again and again, which is what counting needs. A test scene is
    one that the checker reads back exactly; the rare one that it does not is drawn anew.
    """
    while True:
        count = int(rng.choice([1, 2, 3, 4], p=[0.25, 0.45, 0.15, 0.15]))
        chosen = [pairs[int(i)] for i in rng.integers(len(pairs), size=count)]
        if count > 1 and rng.random() < (0.75 if count > 2 else 0.2):
            chosen = chosen[:1] * count
        scene = dress(place_objects(chosen, rng), rng)
        if scene is None or split_of(scene) != split:
            continue
        if split == "train" or same_scene(scene, draw_scene(scene), tolerance=0.03):
            return scene


def dress(objects: tuple[SceneObject, ...] | None, rng: np.random.Generator) -> Scene | None:
    """Puts placed objects on a random ground."""
    if objects is None:
        return None
    ground, texture = str(rng.choice(list(GROUNDS))), str(rng.choice(list(TEXTURES), p=list(TEXTURES.values())))
    return Scene(objects, ground, texture, bool(rng.random() < 0.8), int(rng.integers(2**31)))


# ------------------------------------------------------------------------------------------------------------- drawing


def shape_mask(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points lie inside a shape of radius 1 around the origin. `x`, `y`: float arrays of one shape; returns bool."""
    if shape == "circle":
        return x**2 + y**2 <= 1
    if shape == "ring":
        return (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.3)
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) <= 0.88
    if shape == "triangle":
        return (y <= 0.85) & (np.abs(x) <= (y + 1) * 0.54)
    if shape == "cross":
        return (np.minimum(np.abs(x), np.abs(y)) <= 0.32) & (np.maximum(np.abs(x), np.abs(y)) <= 1)
    x, y = 1.06 * x, 0.15 - 1.06 * y  # heart: a curve of the sixth degree
    return (x**2 + y**2 - 0.75) ** 3 <= 1.6 * x**2 * y**3


def draw_scene(scene: Scene, image_size: int = 64) -> Image.Image:
    """Draws a scene. Returns an RGB image of `image_size` x `image_size` pixels; the same scene gives the same bytes."""
    scale = 4 if scene.antialiased else 1
    canvas = draw_ground(scene, image_size)
    rows, columns = np.mgrid[0:image_size, 0:image_size]
    for item in scene.objects:
        low = np.floor((np.array([item.x, item.y]) - item.radius) * image_size).astype(int).clip(0)
        high = np.ceil((np.array([item.x, item.y]) + item.radius) * image_size).astype(int).clip(max=image_size)
        (left, top), (right, bottom) = low, high
        ys = (np.arange(top * scale, bottom * scale) + 0.5) / (scale * image_size)
        xs = (np.arange(left * scale, right * scale) + 0.5) / (scale * image_size)
        inside = shape_mask(item.shape, ((xs - item.x) / item.radius)[None, :], ((ys - item.y) / item.radius)[:, None])
        coverage = inside.reshape(bottom - top, scale, right - left, scale).mean((1, 3))[..., None]
        color = np.broadcast_to(np.array(COLORS[item.color], dtype=np.float64), (bottom - top, right - left, 3))
        if item.textured:
            stripes = ((rows + columns)[top:bottom, left:right] * 64 // image_size // 3) % 2
            color = color + stripes[..., None] * (np.array([255, 255, 255]) - color) * 0.22
        window = canvas[top:bottom, left:right]
        canvas[top:bottom, left:right] = window * (1 - coverage) + color * coverage
    return Image.fromarray(canvas.round().clip(0, 255).astype(np.uint8))


def draw_ground(scene: Scene, image_size: int) -> np.ndarray:
    """The ground without objects: float64 of shape `(image_size, image_size, 3)`, 0 to 255."""
    rows, columns = np.mgrid[0:image_size, 0:image_size] * 64 // image_size
    pattern = {
        "plain": lambda: np.zeros((image_size, image_size)),
        "striped": lambda: ((rows // 4) % 2).astype(float),
        "dotted": lambda: ((rows % 8 < 3) & (columns % 8 < 3)).astype(float),
        "speckled": lambda: np.random.default_rng(scene.texture_seed).uniform(0, 1.2, (image_size, image_size)),
    }[scene.texture]()
    return np.array(GROUNDS[scene.ground], dtype=np.float64) - 26 * pattern[..., None]


# ------------------------------------------------------------------------------------------------------------ captions


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
    """A short caption: the objects at one level of detail, two of them mostly with their relation, any with their ground every now and then."""
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
    """Column letter and row number of a point, shares of the image's width and height, on an 8 x 8 grid."""
    return "abcdefgh"[min(int(x * 8), 7)] + str(min(int(y * 8), 7) + 1)


def cell_in_cell(x: float, y: float) -> str:
    """The cell of a point, and which cell of the same grid inside that: a 64th of the width and height."""
    return f"{cell(x, y)} {cell(x * 8 % 1, y * 8 % 1)}"


def dense_caption(scene: Scene, place: Callable = cell) -> str:
    """Everything there is to say, in reading order: size, texture, color, shape, and the cell of an 8 x 8 grid, as in a
    spreadsheet: `a1` is the top left, `h8` the bottom right. With `cell_in_cell` as `place`, more exactly."""
    items = sorted(scene.objects, key=lambda o: (int(o.y * 3), o.x))
    places = [f"{article(describe(o, 'all'))} at {place(o.x, o.y)}" for o in items]
    return f"{', '.join(places)}, {ground_phrase(scene)}"


# ----------------------------------------------------------------------------------------------------------- questions


def questions(scene: Scene, rng: np.random.Generator, pairs: tuple = SEEN_PAIRS) -> list[Question]:
    """All questions that the scene answers without doubt, in random order. A false pair in a yes/no question is of `pairs`."""
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


def holds(relation: str, first: SceneObject, second: SceneObject, margin: float = 0.06) -> bool:
    """Whether `first` stands in `relation` to `second`, by more than `margin` of the image's width between centres."""
    dx, dy = second.x - first.x, second.y - first.y
    return {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation] > margin


# ------------------------------------------------------------------------------------------------------------- prompts


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


# ------------------------------------------------------------------------------------------------------------- checking


def find_objects(image: Image.Image) -> list[SceneObject]:
    """Reads a scene's objects back from pixels, whoever drew them.

    Each pixel goes to the nearest of the object and ground colors; connected pixels of one object color make an object; its
    shape is decided by `classify_shape`. What is larger than any object has the shape `"unknown"`, and so have specks that together
    are as large as an object: both count as objects that nobody asked for.
    """
    from skimage.measure import label, regionprops
    from skimage.morphology import dilation, erosion

    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)  # (height, width, 3)
    labels, found, specks = classify_pixels(pixels), [], 0
    for index, color in enumerate(COLORS):
        regions = label(labels == index, connectivity=1)
        for region in regionprops(regions):
            core = erosion(np.pad(region.image, 1)).sum()  # none in the thin seams between two colors
            if region.area < MIN_OBJECT_AREA * labels.size or core <= 4:
                specks += region.area if core else 0
                continue
            near = dilation(dilation(regions == region.label)) & ((labels == -1) | (labels == index))
            coverage = compute_coverage(pixels, near, near & (labels == -1), COLORS[color])
            rows, columns = np.flatnonzero((coverage > 0.4).any(1)), np.flatnonzero((coverage > 0.4).any(0))
            if not rows.size:
                continue
            top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
            x, y = (left + right) / 2 / labels.shape[1], (top + bottom) / 2 / labels.shape[0]
            radius = max((right - left) / labels.shape[1], (bottom - top) / labels.shape[0]) / 2
            size = "small" if radius < (SIZES["small"][1] + SIZES["large"][0]) / 2 else "large"
            fits = radius <= 1.3 * SIZES["large"][1]
            shape = classify_shape(coverage[top:bottom, left:right]) if fits else "unknown"
            found.append(SceneObject(shape, color, size, x, y, radius))
    if specks >= MIN_OBJECT_AREA * labels.size:
        found.append(SceneObject("unknown", "unknown", "small", 0.5, 0.5, 0.0))
    return sorted(found, key=lambda o: o.x)


def classify_pixels(pixels: np.ndarray) -> np.ndarray:
    """Index into `COLORS` for each pixel, or -1 for ground. `pixels`: float32 `(height, width, 3)`, 0 to 255."""
    palette = np.array(list(COLORS.values()), dtype=np.float32)
    light = palette + 0.22 * (255 - palette)  # the stripes of a textured object
    ground = np.array(list(GROUNDS.values()), dtype=np.float32)
    anchors = np.concatenate([palette, light, ground, ground - 26])
    nearest = ((pixels[..., None, :] - anchors) ** 2).sum(-1).argmin(-1)  # (height, width)
    return np.where(nearest < 2 * len(palette), nearest % len(palette), -1)


def compute_coverage(pixels: np.ndarray, near: np.ndarray, ground: np.ndarray, color: tuple) -> np.ndarray:
    """How much of each pixel an object covers, float `(height, width)` in [0, 1]: how far its color lies from the ground
    around the object, `ground`, towards the object's `color` or, three quarters of that way, its light stripes; 0 outside
    `near` (both bool `(height, width)`)."""
    base = np.median(pixels[ground], axis=0) if ground.any() else np.full(3, 255.0)
    towards = np.array(color) - base
    return np.where(near, ((pixels - base) @ towards / (0.75 * towards @ towards)).clip(0, 1), 0)


@lru_cache
def outline_image(shape: str) -> Image.Image:
    """A shape drawn to fill its bounding box, 1.0 inside and 0.0 outside."""
    grid = (np.arange(400) + 0.5) / 200 - 1
    outline = shape_mask(shape, grid[None, :], grid[:, None])
    rows, columns = np.flatnonzero(outline.any(1)), np.flatnonzero(outline.any(0))
    return Image.fromarray(outline[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32))


def classify_shape(coverage: np.ndarray) -> str:
    """The shape whose outline overlaps a coverage `(height, width)` best, drawn to fill it; `"unknown"` below one half."""
    height, width = coverage.shape
    if not 0.6 < height / width < 1.7:
        return "unknown"
    overlaps = {}
    for shape in SHAPES:
        template = np.asarray(outline_image(shape).resize((width, height), Image.Resampling.BOX))
        overlaps[shape] = np.minimum(template, coverage).sum() / np.maximum(template, coverage).sum()
    best = max(overlaps, key=overlaps.get)
    return best if overlaps[best] > 0.5 else "unknown"


def check_drawing(prompt: ScenePrompt, image: Image.Image) -> bool:
    """Whether an image shows exactly what a prompt asks for: these objects, no others, in this relation."""
    found = find_objects(image)
    if len(found) != len(prompt.wanted):
        return False
    orders = [found, found[::-1]] if len(found) == 2 else [sorted(found, key=lambda o: o.shape)]
    for order in orders:
        matched = all(o.shape == shape and color in (None, o.color) for o, (color, shape) in zip(order, prompt.wanted))
        if matched and (prompt.relation is None or holds(prompt.relation, order[0], order[1])):
            return True
    return False


def same_scene(scene: Scene, image: Image.Image, tolerance: float = 0.125) -> bool:
    """Whether an image shows a scene's objects: the same count, each with its shape and color within `tolerance` widths."""
    rest = find_objects(image)
    if len(rest) != len(scene.objects):
        return False
    for item in scene.objects:
        alike = [o for o in rest if (o.shape, o.color) == (item.shape, item.color)]
        near = [o for o in alike if max(abs(o.x - item.x), abs(o.y - item.y)) <= tolerance]
        if not near:
            return False
        rest.remove(min(near, key=lambda o: abs(o.x - item.x) + abs(o.y - item.y)))
    return True
