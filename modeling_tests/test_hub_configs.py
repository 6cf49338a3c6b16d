import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

ROOT = Path(__file__).parents[1]
TINY = ROOT / "hub_configs/unicode2-tiny"


@pytest.mark.parametrize("name", ["configuration", "generation", "modeling", "processing", "quantization"])
def test_code_that_travels_is_the_code_of_the_package(name):
    source = ROOT / f"src/transformers_unicode2/{name}_unicode2.py"
    assert (TINY / source.name).read_text() == source.read_text()


def test_tiny_checkpoint_fits_in_40_megabytes_and_is_whole():
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) <= 40e6
    with safe_open(TINY / "model.safetensors", "pt") as weights:
        assert weights.get_tensor("model.quantizer.codebook.codes").dtype == torch.float32
        assert weights.get_tensor("model.visual_embeddings.weight").dtype == torch.bfloat16


def test_auto_map_names_every_auto_class():
    auto_map = json.loads((TINY / "config.json").read_text())["auto_map"]
    wanted = {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoProcessor"}
    assert set(auto_map) == wanted


def test_codes_are_distinct_and_round_to_bfloat16_without_loss(tiny_model):
    codes = tiny_model.get_quantizer().codebook.codes
    assert len(codes.unique(dim=0)) == len(codes)
    assert torch.equal(codes, codes.bfloat16().float())
