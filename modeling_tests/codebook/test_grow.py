import json
import re
import shutil

import numpy as np
import pytest
import torch

from transformers_unicode2 import UniCode2ForConditionalGeneration
from transformers_unicode2.codebook.clustering import make_backend
from transformers_unicode2.codebook.grow import split_codes
from transformers_unicode2.codebook.storage import load_codebook


@pytest.mark.parametrize("visual_head", ["flat", "two_level"])
def test_grow_keeps_all_that_there_was_and_serves_new_images_better(drawn, run, tmp_path, visual_head, make_config):
    before = load_codebook(drawn / "codebook")
    cells = {"codebook_size": 96, "codebook_dim": 16, "num_cells": 5, "preview_size": 8}
    config = make_config(visual_head=visual_head, codebook_config=cells)
    model = UniCode2ForConditionalGeneration(config)
    model.get_quantizer().codebook.load_state_dict(before.state_dict())
    if visual_head == "two_level":
        model.visual_head.cell_offsets.copy_(before.cell_offsets)
    model.save_pretrained(tmp_path / "model")
    words = ["--add", 24, "--images", drawn / "dark", "--output", tmp_path / "larger"]
    words += ["--model", tmp_path / "model", "--model-output", tmp_path / "grown"]
    run("codebook", "grow", drawn / "codebook", *words)
    after = load_codebook(tmp_path / "larger")
    assert len(after.codes) == 120 and len(after.codes.unique(dim=0)) == 120
    assert torch.equal(after.codes[:96], before.codes) and torch.equal(after.previews[:96], before.previews)
    assert torch.equal(after.cell_offsets[:6], before.cell_offsets) and after.cell_offsets[-1] == 120
    report = json.loads((tmp_path / "larger" / "codebook.json").read_text())["provenance"]["grown"][0]
    assert report["after"]["distortion"] < 0.95 * report["before"]["distortion"]
    card = (tmp_path / "larger" / "README.md").read_text()
    assert "24 of the codes were added by `unicode2 codebook grow`" in card
    assert re.search(r"    unicode2 codebook build .*\n    unicode2 codebook grow --add 24\n", card)
    distortions = [report[when]["distortion"] for when in ("before", "after")]
    assert "| distortion | {:.5g} | {:.5g} |".format(*distortions) in card and "was built from (" not in card
    content = (tmp_path / "grown" / "model.safetensors").read_bytes()
    for place_of_model in ("grown", "elsewhere"):
        shutil.rmtree(tmp_path / "grown", ignore_errors=True)
        run("codebook", "grow", drawn / "codebook", *words[:-1], tmp_path / place_of_model)
        assert (tmp_path / place_of_model / "model.safetensors").read_bytes() == content
    grown = UniCode2ForConditionalGeneration.from_pretrained(tmp_path / "elsewhere")
    c2, old = grown.model.visual_embeddings.weight, model.model.visual_embeddings.weight
    assert torch.equal(c2[:96], old)
    parents = (after.codes[96:, None] - before.codes).square().sum(-1).argmin(1)
    # The parent of a code is mostly the old code nearest to it.
    assert (c2[96:] == old[parents]).all(-1).float().mean() > 0.7
    assert grown.config.visual_token_offset == model.config.visual_token_offset
    assert torch.equal(grown.get_quantizer().codebook.codes, after.codes)
    ids = torch.tensor([[1, 2, 3, config.boi_token_id]])
    drawn = grown.generate(ids, generation_mode="image", do_sample=True, top_k=0)
    assert drawn[0, -grown.config.num_image_tokens :].min() >= grown.config.visual_token_offset


def test_grow_refuses_another_checkpoint_and_too_many_codes(drawn, run, tmp_path, capsys, make_config):
    UniCode2ForConditionalGeneration(make_config()).save_pretrained(tmp_path / "model")
    words = ["codebook", "grow", drawn / "codebook", "--images", drawn / "dark", "--output", tmp_path / "larger"]
    with pytest.raises(SystemExit):
        run(*words, "--add", 8, "--model", tmp_path / "model", "--model-output", tmp_path / "grown")
    assert "does not hold the codebook" in capsys.readouterr().err and not (tmp_path / "grown").exists()
    with pytest.raises(SystemExit):
        run(*words[:-1], "/proc/larger", "--add", 8)
    assert "/proc/larger cannot be made" in capsys.readouterr().err
    assert not (tmp_path / "larger").exists()
    for place_of_output in ("model", "grown"):
        (tmp_path / "grown").mkdir(exist_ok=True)
        (tmp_path / "grown" / "thesis.txt").write_text("mine")
        with pytest.raises(SystemExit):
            models = ["--model", tmp_path / "model", "--model-output", tmp_path / place_of_output]
            run(*words, "--add", 8, *models)
        assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "grown" / "thesis.txt").read_text() == "mine"
    assert (tmp_path / "model" / "model.safetensors").exists()
    cells = {"codebook_size": 96, "codebook_dim": 16, "num_cells": 5, "preview_size": 4}
    model = UniCode2ForConditionalGeneration(make_config(codebook_config=cells))
    model.get_quantizer().codebook.codes.copy_(load_codebook(drawn / "codebook").codes)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit):
        run(*words, "--add", 8, "--model", tmp_path / "other", "--model-output", tmp_path / "new")
    assert "4 pixels wide and those of" in capsys.readouterr().err and not (tmp_path / "new").exists()
    with pytest.raises(SystemExit):
        run(*words, "--add", 10_000)
    assert "distinct features are too few for 10000 more codes" in capsys.readouterr().err


def test_split_codes_of_two_regions_that_round_to_the_same_are_told_apart():
    points = np.array([[0.9999], [1.0001], [0.9], [1.1]], np.float32)
    codes = np.array([[0.0], [2.0]], np.float32)
    nearest = make_backend("torch").assign(torch.from_numpy(points), codes)
    for seed in range(5):
        assert len(np.unique(split_codes(points, codes, nearest, 3, seed)[0])) == 3
    with pytest.raises(ValueError, match="distinct features for only 1 of 2 new codes"):
        split_codes(points, codes, nearest, 4, seed=0)


def test_split_codes_puts_new_codes_where_the_distortion_is():
    rng = np.random.default_rng(0)
    codes = np.array([[0.0, 0.0], [10.0, 0.0]], np.float32)
    points = np.concatenate([rng.normal(0, 0.1, (500, 2)), rng.normal([10, 0], 2, (500, 2))]).astype(np.float32)
    new, parents = split_codes(points, codes, make_backend("torch").assign(torch.from_numpy(points), codes), 6, seed=0)
    assert len(new) == 6 and (parents == 1).all() and (new[:, 0] > 4).all()


def test_grown_codebook_finds_every_code_again(drawn, run, tmp_path):
    words = ["--add", 10, "--images", drawn / "dark", "--output", tmp_path / "larger"]
    run("codebook", "grow", drawn / "codebook", *words)
    grown = load_codebook(tmp_path / "larger")
    assert torch.equal(grown.encode(grown.codes), torch.arange(106))
