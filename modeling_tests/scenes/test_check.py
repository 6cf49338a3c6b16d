import numpy as np
import pytest
from PIL import Image, ImageDraw

from transformers_unicode2.scenes import check, sample, scene, texts


@pytest.mark.parametrize("pairs", [scene.SEEN_PAIRS, tuple(sorted(scene.UNSEEN_PAIRS))])
def test_checker_reads_drawn_scenes_back(pairs):
    rng = np.random.default_rng(0)
    drawn = [sample.sample_scene(rng, "train", pairs) for _ in range(500)]
    wrong = [shown for shown in drawn if not check.same_scene(shown, scene.draw_scene(shown), tolerance=0.03)]
    # And sample_scene lets none of these into the test split
    assert len(wrong) <= 1, wrong


@pytest.mark.parametrize("category", texts.CATEGORIES)
def test_checker_accepts_what_was_asked_for_and_nothing_else(category):
    rng = np.random.default_rng(1)
    accepted, accepted_others = 0, 0
    for _ in range(60):
        prompt, other = (texts.sample_prompt(category, rng) for _ in range(2))
        specs = [(color or str(rng.choice(list(scene.COLORS))), shape) for color, shape in prompt.wanted]
        # Four barely fit
        objects = sample.place_objects(specs, rng, prompt.relation, attempts=100_000)
        image = scene.draw_scene(sample.dress(objects, rng))
        accepted += check.check_drawing(prompt, image)
        if sorted(other.wanted, key=str) != sorted(prompt.wanted, key=str):
            accepted_others += check.check_drawing(other, image)
    # It misreads fewer than one in a hundred, which sample_scene keeps out of the test split
    assert accepted >= 59
    assert accepted_others == 0


@pytest.mark.parametrize("color", ["red", "yellow", (90, 60, 40)])
def test_checker_takes_no_ground_for_an_object(color):
    ground = Image.new("RGB", (64, 64), scene.COLORS.get(color, color))
    disc = ground.copy()
    ImageDraw.Draw(disc).ellipse((20, 20, 40, 40), fill="white")
    for image in (ground, disc):
        assert not any(
            check.check_drawing(texts.ScenePrompt("", "", ((None, shape),)), image) for shape in scene.SHAPES
        )


def test_checker_counts_specks_and_wants_a_distance():
    circle = scene.SceneObject("circle", "red", "large", 0.3, 0.3, 0.2)
    image = scene.draw_scene(scene.Scene((circle,)))
    prompt = texts.ScenePrompt("colors", "a red circle", (("red", "circle"),))
    assert check.check_drawing(prompt, image)
    for i in range(12):
        ImageDraw.Draw(image).rectangle(
            (2 + i % 6 * 10, 44 + i // 6 * 10, 7 + i % 6 * 10, 50 + i // 6 * 10), fill="blue"
        )
    assert not check.check_drawing(prompt, image)
    beside = scene.SceneObject("square", "blue", "small", 0.31, 0.8, 0.15)
    prompt = texts.ScenePrompt("position", "", ((None, "circle"), (None, "square")), "left of")
    assert not check.check_drawing(prompt, scene.draw_scene(scene.Scene((circle, beside))))


@pytest.mark.parametrize("flaw", ["blank", "noise", "extra object", "other side"])
def test_checker_rejects_flawed_drawings(flaw):
    prompt = texts.ScenePrompt("position", "a circle left of a ring", ((None, "circle"), (None, "ring")), "left of")
    left = scene.SceneObject("circle", "red", "small", 0.2, 0.5, 0.12)
    right = scene.SceneObject("ring", "blue", "small", 0.8, 0.5, 0.12)
    assert check.check_drawing(prompt, scene.draw_scene(scene.Scene((left, right))))
    image = {
        "blank": Image.new("RGB", (64, 64), "white"),
        "noise": Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)),
        "extra object": scene.draw_scene(
            scene.Scene((left, right, scene.SceneObject("heart", "green", "small", 0.5, 0.2, 0.12)))
        ),
        "other side": scene.draw_scene(scene.Scene((left, right))).transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    }[flaw]
    assert not check.check_drawing(prompt, image)
