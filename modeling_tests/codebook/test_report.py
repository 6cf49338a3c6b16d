import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browser import open_page
from PIL import Image
from transformers import SiglipImageProcessor, SiglipVisionModel

from transformers_unicode2.codebook.features import Encoder, encode_all
from transformers_unicode2.codebook.images import ImageSource
from transformers_unicode2.codebook.report import NUM_NEIGHBOURS, compute_report, encode_thumbnail, make_page
from transformers_unicode2.codebook.storage import codebook_from_arrays, load_codebook, save_codebook
from transformers_unicode2.search.neighbours import find_neighbours


def test_report_is_one_page_that_asks_nothing_of_the_network(drawn, run, tmp_path):
    run("codebook", "report", drawn / "codebook", "--images", drawn / "dark", "--output", tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|url\(|@import|https?://""", page)
    assert sorted(file.name for file in tmp_path.glob("*.png")) == [
        "rate_distortion.png",
        "usage.png",
        "utilization.png",
    ]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["statistics"]["num_features"] == 40 * 16
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])
    assert len(data["images"]) == 40 and data["codebookSize"] == 96
    quantizer_codes = load_codebook(drawn / "codebook").codes
    objective = report["objective"]
    spread = (quantizer_codes - quantizer_codes.mean(0)).square().sum().item()
    assert objective["spread"] == pytest.approx(spread, rel=1e-5)
    expected = report["statistics"]["distortion"] - report["statistics"]["entropy"]
    assert objective["regularised"] == pytest.approx(expected)


def test_report_shows_the_patches_of_any_code_in_a_browser(drawn, run, tmp_path):
    run("codebook", "report", drawn / "codebook", "--images", drawn / "dark", "--output", tmp_path)
    encoder = SiglipVisionModel.from_pretrained(drawn / "encoder").eval()
    processor = SiglipImageProcessor.from_pretrained(drawn / "encoder")
    files = sorted((drawn / "dark").iterdir())
    with torch.no_grad():
        features = encoder(**processor([Image.open(file) for file in files], return_tensors="pt")).last_hidden_state
    codes = load_codebook(drawn / "codebook").encode(features).flatten()
    code = int(codes.bincount().argmax())
    positions = (codes == code).nonzero().flatten().tolist()
    with open_page(tmp_path / "report.html") as (page, errors, asked):
        page.wait_for_selector("#patches canvas[data-drawn]")
        # The page begins with the most used code.
        assert page.input_value("#code") == str(code)
        shown = page.eval_on_selector_all("#patches canvas", "all => all.map(canvas => canvas.title)")
        assert shown == [f"image {p // 16}, patch {p % 16}" for p in positions[:48]]
        page.click("#next")
        after = int(page.input_value("#code"))
        used = set(codes.tolist())
        assert after == next(c % 96 for c in range(code + 1, code + 97) if c % 96 in used)
        page.fill("#code", "96")
        page.dispatch_event("#code", "change")
        assert page.inner_text("#message") == "There are codes 0 to 95."
        page.click("#neighbours button >> nth=0")
        assert page.inner_text("#message") == "" and int(page.input_value("#code")) != after
        assert errors == [] and [url for url in asked if not url.startswith(("data:", "file:"))] == []


@pytest.mark.slow
def test_page_of_500_000_codes_is_usable(tmp_path):
    rng = np.random.default_rng(0)
    size, cells = 500_000, 1000
    offsets = np.arange(cells + 1) * (size // cells)
    previews = rng.integers(0, 256, (size, 8, 8, 3), dtype=np.uint8)
    arrays = rng.normal(size=(size, 2)).astype(np.float32), rng.normal(size=(cells, 2)).astype(np.float32)
    codebook = codebook_from_arrays(*arrays, offsets, previews)
    codes, images = rng.integers(0, size, 200 * 729), np.repeat(np.arange(200), 729)
    report = compute_report(codebook, codes, images, 1.0, arrays[0][:2000], 1.0, 0)
    encoder = SimpleNamespace(num_patches=729)
    gallery = [encode_thumbnail(torch.rand(3, 1, 1).expand(3, 64, 64)) for _ in range(200)]
    neighbours = find_neighbours(codebook.codes, codebook.cell_offsets, NUM_NEIGHBOURS).numpy()
    page = make_page(report, {}, codebook, codes, images, gallery, encoder, neighbours)
    assert len(page) < 80e6
    (tmp_path / "report.html").write_text(page)
    with open_page(tmp_path / "report.html") as (page, errors, _):
        page.wait_for_selector("#patches canvas[data-drawn]")
        for button in ("#next", "#previous", "#random"):
            page.click(button)
            page.wait_for_selector("#patches canvas[data-drawn]")
        assert errors == []


def test_a_codebook_that_names_no_encoder_asks_for_one(drawn, run, tmp_path, capsys):
    save_codebook(load_codebook(drawn / "codebook"), tmp_path / "codebook", {})
    words = ["codebook", "report", tmp_path / "codebook", "--images", drawn / "dark"]
    with pytest.raises(SystemExit):
        run(*words)
    assert "does not name the encoder of the codebook; give --encoder." in capsys.readouterr().err


def test_an_encoder_that_is_another_or_that_gives_nan_is_refused(drawn, run, tmp_path, capsys):
    model = SiglipVisionModel.from_pretrained(drawn / "encoder")
    model.embeddings.position_embedding.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    SiglipImageProcessor.from_pretrained(drawn / "encoder").save_pretrained(tmp_path / "broken")
    for command in ("report", "preview"):
        words = ["codebook", command, drawn / "codebook", "--images", drawn / "images", "--output", tmp_path / command]
        with pytest.raises(SystemExit):
            run(*words, "--encoder", tmp_path / "broken")
        assert "is not the one that" in capsys.readouterr().err
    source, encoder = ImageSource(str(drawn / "images")), Encoder(str(tmp_path / "broken"))
    with pytest.raises(ValueError, match="40 of 640 features of images 0 to 39 are not finite"):
        next(encode_all(source, encoder))
