"""Random scenes, of which one in ten is kept for testing.

`split_of` hashes what a scene shows, coarsely. No test scene has a twin in the training data, whatever the seeds.
"""

import hashlib

import numpy as np

from .check import same_scene
from .scene import GROUNDS, SEEN_PAIRS, SIZES, TEXTURES, Scene, SceneObject, draw_scene, holds


def sample_scene(rng: np.random.Generator, split: str = "train", pairs: tuple = SEEN_PAIRS) -> Scene:
    """Draws a scene of one to four objects whose `(color, shape)` pairs come from `pairs`.

    Some scenes repeat one pair, which is what counting needs. A test scene is one that the checker reads back exactly;
    the rare one that it misreads is replaced.
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


def place_objects(
    specs: list[tuple[str, str]], rng: np.random.Generator, relation: str | None = None, attempts: int = 1000
) -> tuple[SceneObject, ...] | None:
    """Gives each `(color, shape)` a size and a place such that none overlap. `None` after too many attempts."""
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


def dress(objects: tuple[SceneObject, ...] | None, rng: np.random.Generator) -> Scene | None:
    """Puts placed objects on a random ground."""
    if objects is None:
        return None
    ground, texture = str(rng.choice(list(GROUNDS))), str(rng.choice(list(TEXTURES), p=list(TEXTURES.values())))
    return Scene(objects, ground, texture, bool(rng.random() < 0.8), int(rng.integers(2**31)))


def split_of(scene: Scene) -> str:
    """`"test"` for one scene in ten and `"train"` for the rest, decided by what the scene shows.

    Objects (shape, color, size, cell of a 6 x 6 grid), ground and texture are hashed. Two scenes that differ by a few
    pixels belong to the same part.
    """
    shown = sorted((o.shape, o.color, o.size, int(o.x * 6), int(o.y * 6)) for o in scene.objects)
    digest = hashlib.sha256(repr((shown, scene.ground, scene.texture)).encode()).digest()
    return "test" if digest[0] % 10 == 0 else "train"
