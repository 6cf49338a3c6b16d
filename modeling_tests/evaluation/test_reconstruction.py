"""Pictures redrawn from their codes, beside the originals."""

import numpy as np
import pytest
from PIL import Image
from tokenizing import stop_at

from transformers_unicode2.evaluation import reconstruction
from transformers_unicode2.evaluation.card_files import read_card
from transformers_unicode2.scenes.sample import sample_scene
from transformers_unicode2.scenes.scene import draw_scene

QUICK = "--steps 4 --true-cfg-scale 1"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(3):
        draw_scene(sample_scene(rng, "test"), 64).resize((96, 64 if number else 96)).save(folder / f"{number}.png")
    (folder / "3.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=4)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def run(model, pictures, output, *more):
    words = ["--model", model, "--images", pictures, "--output", output, *QUICK.split(), *more]
    return reconstruction.main(reconstruction.make_parser().parse_args(list(map(str, words))))


def test_pictures_are_redrawn_and_compared(tiny_checkpoint, pictures, clip, tmp_path, capsys, monkeypatch):
    """A run that is killed resumes; other metrics of the same pictures draw nothing anew."""
    monkeypatch.setattr(reconstruction, "save_picture", stop_at(reconstruction.save_picture, 2))
    with pytest.raises(KeyboardInterrupt):
        run(tiny_checkpoint, pictures, tmp_path)
    monkeypatch.undo()
    card = run(tiny_checkpoint, pictures, tmp_path)
    assert "1 of 4 pictures cannot be read, and are left out." in capsys.readouterr().out
    figures = {figure.name: figure for figure in card.figures}
    assert figures.keys() == {"psnr", "ssim", "pictures that cannot be read"} and figures["psnr"].count == 3
    assert figures["pictures that cannot be read"].value == 1
    original = Image.open(pictures / "0.png").convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
    redrawn = np.asarray(Image.open(tmp_path / "000000.png"), float)
    error = ((np.asarray(original, float) - redrawn) ** 2).mean() / 255**2
    assert card.items["psnr"]["0"] == pytest.approx(-10 * np.log10(error), abs=0.01)
    monkeypatch.setattr(reconstruction, "save_picture", None)
    more = run(tiny_checkpoint, pictures, tmp_path, "--clip", clip)
    figures = {figure.name: figure for figure in more.figures}
    assert more.items["psnr"] == card.items["psnr"] and more.protocol_hash != card.protocol_hash
    assert -1 <= figures["likeness"].value <= 1 and figures["frechet_clip"].value >= 0
    assert "frechet_clip is of 3 pictures, fewer than the 4 dimensions" in capsys.readouterr().out
    # A card with fewer figures does not take its place
    with pytest.raises(ValueError, match="card.json has 'likeness' of 3 items, and this run gives 0; choose another"):
        run(tiny_checkpoint, pictures, tmp_path)
    assert read_card(tmp_path / "card.json").figures == more.figures


def test_what_cannot_be_measured_is_refused(tiny_checkpoint, pictures, tmp_path):
    with pytest.raises(ValueError, match="--fid needs torch-fidelity and torchvision: "):
        run(tiny_checkpoint, pictures, tmp_path, "--fid")
    run(tiny_checkpoint, pictures, tmp_path / "out", "--num-images", "1")
    with pytest.raises(ValueError, match="begun with something else .*protocol seed was 0 and is 1"):
        run(tiny_checkpoint, pictures, tmp_path / "out", "--num-images", "1", "--seed", "1")


def test_equal_pictures_are_counted_and_have_a_psnr(tiny_checkpoint, pictures, tmp_path, monkeypatch):
    """It would be infinite, which JSON cannot say."""
    original, save = reconstruction.fit(Image.open(pictures / "0.png").convert("RGB"), 64), reconstruction.save_picture
    monkeypatch.setattr(reconstruction, "save_picture", lambda file, image: save(file, original))
    run(tiny_checkpoint, pictures, tmp_path / "out", "--num-images", "2")
    card = read_card(tmp_path / "out/card.json")
    assert card.items["psnr"]["0"] == 100.0 > card.items["psnr"]["1"]
    assert {figure.name: figure.value for figure in card.figures}["pictures redrawn exactly"] == 1


@pytest.mark.parametrize(("name", "message"), [("card.json", "is no score card"), ("card.md", "is no page of such")])
def test_files_of_others_are_refused_before_any_work(tiny_checkpoint, pictures, tmp_path, name, message):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=message):
        run(tiny_checkpoint, pictures, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"
