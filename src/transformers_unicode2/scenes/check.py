"""What an image shows of a scene or a prompt, read from its pixels, whoever drew it.

The checker is stricter than that of GenEval: an object that nobody asked for is a failure.
"""

from functools import lru_cache

import numpy as np
from PIL import Image

from .scene import COLORS, GROUNDS, SHAPES, SIZES, Scene, SceneObject, holds, shape_mask
from .texts import ScenePrompt

# Share of the image's area; the smallest cross covers 0.028
MIN_OBJECT_AREA = 0.012


def find_objects(image: Image.Image) -> list[SceneObject]:
    """Reads a scene's objects back from pixels, whoever drew them.

    Each pixel goes to the nearest of the object and ground colors. Connected pixels of one object color make an object,
    whose shape `classify_shape` decides. What is larger than any object has the shape `"unknown"`. So do specks that
    together are as large as an object. Both count as objects that nobody asked for.
    """
    from skimage.measure import label, regionprops
    from skimage.morphology import dilation, erosion

    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)  # (height, width, 3)
    labels, found, specks = classify_pixels(pixels), [], 0
    for index, color in enumerate(COLORS):
        regions = label(labels == index, connectivity=1)
        for region in regionprops(regions):
            # Thin seams between two colors have none
            core = erosion(np.pad(region.image, 1)).sum()
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
    # The stripes of a textured object
    light = palette + 0.22 * (255 - palette)
    ground = np.array(list(GROUNDS.values()), dtype=np.float32)
    anchors = np.concatenate([palette, light, ground, ground - 26])
    nearest = ((pixels[..., None, :] - anchors) ** 2).sum(-1).argmin(-1)  # (height, width)
    return np.where(nearest < 2 * len(palette), nearest % len(palette), -1)


def compute_coverage(pixels: np.ndarray, near: np.ndarray, ground: np.ndarray, color: tuple) -> np.ndarray:
    """How much of each pixel an object covers, float `(height, width)` in [0, 1].

    A pixel is covered as far as its color lies from the ground towards the object's. Three quarters of that way count
    as all of it, since light stripes go no further.

    Args:
        pixels: float32 `(height, width, 3)`, 0 to 255.
        near: bool `(height, width)`; outside of it the coverage is 0.
        ground: bool `(height, width)`, the ground around the object.
        color: of the object, 0 to 255.
    """
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
    """The shape whose outline, drawn to fill a coverage `(height, width)`, overlaps it best.

    `"unknown"` when the overlap, intersection over union, is one half or less.
    """
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
    """Whether an image shows a scene's objects and no others, each within `tolerance` of the width from its place."""
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
