import numpy as np
import pytest

from transformers_unicode2.scenes import emoji


def test_emoji_split_and_captions():
    rng = np.random.default_rng(4)
    assert len(emoji.NAMES) >= 100
    for split in ("train", "test"):
        scene = emoji.sample_emoji_scene(rng, split, "fox")
        assert emoji.split_of(scene) == split
        assert "fox" in emoji.caption(scene, rng)
        assert emoji.dense_caption(scene).startswith(f"a {scene.size} fox {scene.turned} at ")
    for share in (0.0, 0.2, 1.0):
        grounds = [emoji.sample_emoji_scene(rng, photo_share=share).ground for _ in range(300)]
        assert np.mean([ground in emoji.PHOTOS for ground in grounds]) == pytest.approx(
            share, abs=0.08 * (0 < share < 1)
        )


def test_missing_emoji_are_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no captions.tsv"):
        emoji.draw_emoji_scene(emoji.sample_emoji_scene(np.random.default_rng(0)), tmp_path)
    (tmp_path / "captions.tsv").write_text("fox.png\tfox\nbear.png bear\n")
    with pytest.raises(ValueError, match="Line 2 of .*captions.tsv is not `file<TAB>name`; it has 1 columns"):
        emoji.draw_emoji_scene(emoji.sample_emoji_scene(np.random.default_rng(0)), tmp_path)
