import shutil

import pytest
from PIL import Image

from transformers_unicode2.codebook.storage import load_codebook


def test_preview_makes_thumbnails_and_a_picture(drawn, run, tmp_path, capsys):
    words = ["--images", drawn / "images", "--encoder", drawn / "encoder", "--output", tmp_path / "plain"]
    run("codebook", "build", *words, "--codebook-size", 96, "--num-cells", 5, "--preview-size", 0)
    assert load_codebook(tmp_path / "plain").previews is None
    with pytest.raises(SystemExit):
        run("codebook", "preview", tmp_path / "plain")
    assert "has no thumbnails; give --images" in capsys.readouterr().err
    run("codebook", "preview", tmp_path / "plain", "--images", drawn / "images")
    made, built = load_codebook(tmp_path / "plain").previews, load_codebook(drawn / "codebook").previews
    # The build takes the nearest code of the cell, the preview the nearest of all codes.
    assert (made.int() - built.int()).abs().float().mean() < 4
    assert Image.open(tmp_path / "plain" / "preview.png").size == (160, 160)
    (tmp_path / "few").mkdir()
    shutil.copy(sorted((drawn / "images").iterdir())[0], tmp_path / "few")
    run("codebook", "preview", tmp_path / "plain", "--images", tmp_path / "few")
    assert "the others are not in the images and keep theirs" in capsys.readouterr().out
    kept = (load_codebook(tmp_path / "plain").previews == made).flatten(1).all(1)
    # The image has 16 patches.
    assert 80 <= kept.sum() < 96
