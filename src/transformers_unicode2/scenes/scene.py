"""Scenes of one to four shapes on a ground, and how they are drawn.

Everything about a scene is known. Its texts follow from it (`texts.py`), and whether an image shows it can be decided
exactly (`check.py`). `UNSEEN_PAIRS` never occur in a training scene, nor in any of its texts.
"""

from dataclasses import dataclass

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
# How often each occurs
TEXTURES = {"plain": 0.7, "striped": 0.1, "dotted": 0.1, "speckled": 0.1}
# Radius, from and to, as a share of the image's width
SIZES = {"small": (0.165, 0.18), "large": (0.215, 0.235)}
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
RELATIONS = ("left of", "right of", "above", "below")
PLACES = tuple(
    f"{row} {column}".strip() for row in ("top", "middle", "bottom") for column in ("left", "center", "right")
)


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


def holds(relation: str, first: SceneObject, second: SceneObject, margin: float = 0.06) -> bool:
    """Whether `first` stands in `relation` to `second`, by more than `margin` of the image's width between centres."""
    dx, dy = second.x - first.x, second.y - first.y
    return {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation] > margin


def shape_mask(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points lie inside a shape of radius 1 around the origin, bool. `x` and `y` are floats that broadcast."""
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
    # Heart: a curve of the sixth degree
    x, y = 1.06 * x, 0.15 - 1.06 * y
    return (x**2 + y**2 - 0.75) ** 3 <= 1.6 * x**2 * y**3


def draw_scene(scene: Scene, image_size: int = 64) -> Image.Image:
    """Draws a scene as an RGB image of `image_size` x `image_size` pixels. The same scene gives the same bytes."""
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
