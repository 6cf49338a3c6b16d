import numpy as np

from transformers_unicode2.scenes import sample, scene


def test_same_scene_gives_the_same_bytes_and_any_size():
    shown = sample.sample_scene(np.random.default_rng(3))
    assert scene.draw_scene(shown).tobytes() == scene.draw_scene(shown).tobytes()
    assert scene.draw_scene(shown, 128).size == (128, 128)
