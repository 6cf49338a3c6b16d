import pytest
from PIL import Image

from transformers_unicode2.scenes import emoji


@pytest.mark.parametrize("share", [0, 1])
def test_data_set_has_the_share_of_photos_that_was_asked_for(share, tmp_path):
    from datasets import load_dataset

    from transformers_unicode2.scenes import write

    Image.new("RGBA", (8, 8), "red").save(tmp_path / "emoji.png")
    (tmp_path / "captions.tsv").write_text("".join(f"emoji.png\t{name}\n" for name in emoji.NAMES))
    words = ["--output", tmp_path / "data", "--num-scenes", 0, "--num-emoji", 6, "--emoji-dir", tmp_path]
    write.main(write.make_parser().parse_args([str(word) for word in [*words, "--photo-share", share]]))
    rows = load_dataset("parquet", data_files=str(tmp_path / "data/train-*.parquet"), split="train")
    assert [text.endswith("on a photo") for text in rows["dense_caption"]] == [share == 1] * 6
