"""Emoji at a random place, size and turn on photographs and plain grounds, with their English names.

The emoji are Fluent Emoji 3D (Microsoft, MIT), read from a folder with `captions.tsv` (`file<TAB>name`). The
photographs are those that scikit-image ships. `split_of` keeps renderings for testing, as that of `sample.py` does.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from ..images_unicode2 import load_image, open_content
from .scene import GROUNDS
from .texts import Question, article, cell

EMOJI = """
avocado, backpack, balloon, banana, basketball, bear, bell, bell pepper, bicycle, broccoli, bus, butterfly, cactus,
camel, camera, candle, carrot, castle, cat face, cherries, chicken, coconut, cookie, cow face, crab, crocodile,
croissant, crown, cupcake, dog face, dolphin, doughnut, dove, dragon, drum, ear of corn, eggplant, elephant, evergreen
tree, fire, fire engine, flamingo, fox, french fries, frog, gem stone, ghost, giraffe, glasses, grapes, green apple,
guitar, hamburger, hammer, helicopter, honeybee, hot dog, house, jack-o-lantern, jellyfish, kangaroo, key, kiwi fruit,
koala, lady beetle, lemon, lion, mouse face, mushroom, octopus, owl, panda, parrot, peacock, pear, penguin, pig face,
pineapple, pizza, rabbit face, red apple, rocket, rose, sailboat, scissors, shark, snail, snowman, soccer ball,
spider, strawberry, sunflower, swan, taxi, teddy bear, tiger face, tomato, tractor, turtle, umbrella, watch,
watermelon, whale, zebra
"""
NAMES = tuple(name.strip() for name in EMOJI.replace("\n", " ").split(","))
PHOTOS = ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "motorcycle_left", "rocket")
# Side, from and to, as a share of the image's width
SIZES = {"medium": (0.64, 0.78), "big": (0.78, 0.96)}
# Degrees, counter-clockwise
TURNS = {"turned left": (5, 15), "upright": (-5, 5), "turned right": (-15, -5)}


@dataclass(frozen=True)
class EmojiScene:
    """One emoji. `x`, `y` (centre) and `side` are shares of the image's width; `turn` is in degrees, counter-clockwise.

    `ground` is one of `scene.GROUNDS` or of `PHOTOS`; `crop` is the left, top and side of the piece of the photograph
    that shows, as shares of its shorter side.
    """

    name: str
    size: str
    x: float
    y: float
    side: float
    turn: float
    ground: str
    crop: tuple[float, float, float] = (0.0, 0.0, 1.0)

    @property
    def turned(self) -> str:
        return next(word for word, (low, high) in TURNS.items() if low <= self.turn < high)


def split_of(scene: EmojiScene) -> str:
    """`"test"` for one rendering in ten, decided by name, size, turn, ground and cell of a 4 x 4 grid."""
    shown = (scene.name, scene.size, scene.turned, scene.ground, int(scene.x * 4), int(scene.y * 4))
    return "test" if hashlib.sha256(repr(shown).encode()).digest()[0] % 10 == 0 else "train"


def sample_emoji_scene(
    rng: np.random.Generator, split: str = "train", name: str | None = None, photo_share: float = 0.5
) -> EmojiScene:
    """Draws a rendering of `name`, by default of any of `NAMES`, with the probability `photo_share` on a photograph."""
    while True:
        size = str(rng.choice(list(SIZES)))
        side = float(rng.uniform(*SIZES[size]))
        x, y = (float(value) for value in rng.uniform(side / 2, 1 - side / 2, size=2))
        ground = str(rng.choice(PHOTOS) if rng.random() < photo_share else rng.choice(list(GROUNDS)))
        crop_side = float(rng.uniform(0.4, 1.0))
        left, top = (float(value) for value in rng.uniform(0, 1 - crop_side, size=2))
        scene = EmojiScene(
            name=name or NAMES[int(rng.integers(len(NAMES)))], size=size, x=x, y=y, side=side, ground=ground,
            turn=float(rng.uniform(-15, 15)), crop=(left, top, crop_side),
        )  # fmt: skip
        if split_of(scene) == split:
            return scene


def draw_emoji_scene(scene: EmojiScene, folder: str | Path, image_size: int = 64) -> Image.Image:
    """Draws a rendering. Returns an RGB image of `image_size` x `image_size` pixels; `folder` holds the emoji."""
    if scene.ground in GROUNDS:
        canvas = Image.new("RGB", (image_size, image_size), GROUNDS[scene.ground])
    else:
        photo = load_photo(scene.ground)
        left, top, side = (int(value * min(photo.size)) for value in scene.crop)
        box = (left, top, left + side, top + side)
        canvas = photo.resize((image_size, image_size), Image.Resampling.BOX, box=box, reducing_gap=2)
    side = round(scene.side * image_size)
    picture = load_emoji(str(folder), scene.name).rotate(scene.turn, Image.Resampling.BICUBIC)
    picture = picture.resize((side, side), Image.Resampling.LANCZOS, reducing_gap=2)
    corner = round(scene.x * image_size - side / 2), round(scene.y * image_size - side / 2)
    canvas.paste(picture, corner, picture)
    return canvas


@cache
def load_photo(name: str) -> Image.Image:
    from skimage import data

    path = Path(data.__file__).parent / f"{name}.{'jpg' if name == 'rocket' else 'png'}"
    photo = load_image(path)
    return photo.reduce(max(min(photo.size) // 192, 1))


def check_folder(folder: str | Path) -> None:
    """Loads all of `NAMES`, so that a wrong folder is noticed before any work. Raises as `load_emoji` does."""
    for name in NAMES:
        load_emoji(str(folder), name)


def hash_folder(folder: str | Path) -> str:
    """SHA-256 of all emoji as they are drawn."""
    digest = hashlib.sha256()
    for name in NAMES:
        digest.update(load_emoji(str(folder), name).tobytes())
    return digest.hexdigest()


@cache
def load_emoji(folder: str, name: str) -> Image.Image:
    """One emoji as a 128 x 128 RGBA image.

    Raises `FileNotFoundError` when the folder lacks it, and `ValueError` when a line of `captions.tsv` is malformed.
    """
    captions = Path(folder) / "captions.tsv"
    if not captions.is_file():
        raise FileNotFoundError(
            f"No emoji in {folder}: it has no captions.tsv; training_recipes/README.md says how to get them."
        )
    rows = [line.split("\t") for line in captions.read_text(encoding="utf-8").splitlines()]
    wrong = [number for number, row in enumerate(rows, 1) if len(row) != 2]
    if wrong:
        raise ValueError(
            f"Line {wrong[0]} of {captions} is not `file<TAB>name`; it has {len(rows[wrong[0] - 1])} columns."
        )
    files = {caption: file for file, caption in rows}
    if name not in files:
        raise FileNotFoundError(f"{captions} lists {len(files)} emoji, none of them named {name!r}.")
    return (
        open_content((Path(folder) / files[name]).read_bytes())
        .convert("RGBA")
        .resize((128, 128), Image.Resampling.LANCZOS)
    )


def ground_phrase(scene: EmojiScene) -> str:
    return f"on {article(scene.ground)} ground" if scene.ground in GROUNDS else "on a photo"


def caption(scene: EmojiScene, rng: np.random.Generator) -> str:
    """A short caption: the name, in one half of all cases with the size, in one half with the ground."""
    name = f"{scene.size} {scene.name}" if rng.random() < 0.5 else scene.name
    return f"{article(name)} {ground_phrase(scene)}" if rng.random() < 0.5 else article(name)


def dense_caption(scene: EmojiScene, place: Callable = cell) -> str:
    """Name, size, turn, place (see `texts.dense_caption`) and ground."""
    return f"{article(scene.size)} {scene.name} {scene.turned} at {place(scene.x, scene.y)}, {ground_phrase(scene)}"


def questions(scene: EmojiScene, rng: np.random.Generator) -> list[Question]:
    """What it is, and whether it stands on a photo."""
    other = NAMES[int(rng.integers(len(NAMES)))] if rng.random() < 0.5 else scene.name
    asked = [
        Question("name", "what is this?", article(scene.name)),
        Question("exists", f"is this {article(other)}?", "yes" if other == scene.name else "no"),
        Question("ground", "is this on a photo?", "yes" if scene.ground in PHOTOS else "no"),
    ]
    return [asked[i] for i in rng.permutation(3)]
