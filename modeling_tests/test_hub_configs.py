import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig

from transformers_unicode2 import UniCode2ForConditionalGeneration

ROOT = Path(__file__).parents[1]
TINY = ROOT / "hub_configs/unicode2-tiny"


def test_no_code_is_kept_twice():
    """What travels is written at every save; a copy here would be a second place to change."""
    assert not list(ROOT.glob("hub_configs/**/*.py"))


def test_tiny_checkpoint_fits_in_40_megabytes_and_is_whole():
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) <= 40e6
    with safe_open(TINY / "model.safetensors", "pt") as weights:
        assert weights.get_tensor("model.quantizer.codebook.codes").dtype == torch.bfloat16  # holds them exactly
        assert weights.get_tensor("model.visual_embeddings.weight").dtype == torch.bfloat16


def test_auto_map_names_every_auto_class():
    auto_map = json.loads((TINY / "config.json").read_text())["auto_map"]
    wanted = {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoProcessor"}
    assert set(auto_map) == wanted


def test_codes_are_distinct_and_round_to_bfloat16_without_loss(tiny_model):
    codes = tiny_model.get_quantizer().codebook.codes
    assert len(codes.unique(dim=0)) == len(codes)
    assert torch.equal(codes, codes.bfloat16().float())


@pytest.mark.parametrize("name", ["unicode2-7b", "unicode2-0.5b"])
def test_full_size_configurations_have_the_sizes_on_their_cards(name):
    config = AutoConfig.from_pretrained(ROOT / "hub_configs" / name)
    assert config.num_image_tokens == 729 and config.codebook_config.codebook_size == 500_000
    with torch.device("meta"):
        model = UniCode2ForConditionalGeneration(config)
    modules = {
        "language model": model.model.language_model,
        "text head": model.lm_head,
        "SigLIP": model.get_quantizer().vision_model,
        "C2": model.model.visual_embeddings,
        "projector": model.model.projector,
        "visual head": model.visual_head,
    }
    card = (ROOT / "hub_configs" / name / "README.md").read_text()
    for part, module in modules.items():
        if part != "text head" or not config.tie_word_embeddings:
            count = sum(parameter.numel() for parameter in module.parameters())
            assert f"| {count:,} |" in next(line for line in card.splitlines() if line.startswith(f"| {part}")), part
