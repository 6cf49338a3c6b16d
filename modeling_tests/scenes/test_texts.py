import numpy as np

from transformers_unicode2.scenes import scene, texts


def test_answers_follow_from_the_scene():
    big = scene.SceneObject("circle", "red", "large", 0.2, 0.2, 0.18)
    small = scene.SceneObject("heart", "blue", "small", 0.8, 0.8, 0.11)
    shown = scene.Scene((big, small), ground="beige")
    asked = {}
    for seed in range(40):
        asked |= {q.text: q.answer for q in texts.questions(shown, np.random.default_rng(seed))}
    assert asked["how many objects are there?"] == "two"
    assert asked["what color is the ground?"] == "beige"
    assert asked["where is the heart?"] == "bottom right"
    assert asked["is the circle small or large?"] == "large"
    assert asked["is the circle above the heart?"] == "yes"
    assert asked["is the heart left of the circle?"] == "no"
    assert asked["how many rings are there?"] == "zero"
