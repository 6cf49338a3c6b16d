import numpy as np

from transformers_unicode2.scenes import sample, scene, texts


def test_training_scenes_hold_no_unseen_pair_and_no_test_scene():
    rng = np.random.default_rng(2)
    for _ in range(500):
        shown = sample.sample_scene(rng, "train")
        said = [texts.caption(shown, rng), texts.dense_caption(shown)]
        said += [text for question in texts.questions(shown, rng) for text in (question.text, question.answer)]
        assert not {(o.color, o.shape) for o in shown.objects} & scene.UNSEEN_PAIRS
        assert not [pair for pair in scene.UNSEEN_PAIRS for text in said if " ".join(pair) in text]
        assert sample.split_of(shown) == "train"
