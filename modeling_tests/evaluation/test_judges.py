"""Judges with random weights, or without a text tower, are refused before they score anything."""

import pytest
import torch
from language_models import make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from transformers_unicode2.evaluation.judges import check_clip, load_judge

TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**TOWER, "image_size": 32, "patch_size": 8}


@pytest.fixture
def clip(tmp_path):
    tokenizer = make_tokenizer("chatml", "bytes")
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)).save_pretrained(tmp_path / "clip")
    CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_a_whole_clip_is_taken(clip):
    check_clip(clip)
    assert isinstance(load_judge(CLIPModel, clip, "--clip"), torch.nn.Module)


def test_weights_that_are_missing_are_no_judge(clip):
    file = clip / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if not name.startswith("text_model.")}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"--clip .*clip lacks \d+ weights of a CLIPModel, such as text_model\."):
        load_judge(CLIPModel, clip, "--clip")


def test_a_clip_without_a_text_tower_or_a_tokenizer_is_refused(clip, tmp_path):
    CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)).save_pretrained(tmp_path / "vision")
    with pytest.raises(ValueError, match="--clip .*vision is a clip_vision_model, which has no text tower"):
        check_clip(tmp_path / "vision")
    for file in [*clip.glob("token*"), *clip.glob("vocab*"), *clip.glob("merges*"), clip / "processor_config.json"]:
        file.unlink(missing_ok=True)
    CLIPImageProcessor().save_pretrained(clip)
    with pytest.raises(ValueError, match=r"The tokenizer of --clip .* knows \d tokens, and its text tower \d+; give"):
        check_clip(clip)
