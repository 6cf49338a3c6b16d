"""Small real objects: the stock classes with tiny configurations and seeded random weights."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import numpy as np
import pytest
import torch
from commands import inputs, small_disk, stage_runs, wanted  # noqa: F401 - fixtures
from PIL import Image

from transformers_unicode2 import UniCode2Config, UniCode2ForConditionalGeneration, UniCode2Processor
from transformers_unicode2.demo import embedded_checkpoint

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tiny_checkpoint():
    """Folder of the embedded, trained unicode2-tiny."""
    return embedded_checkpoint()


@pytest.fixture(scope="session")
def processor(tiny_checkpoint):
    return UniCode2Processor.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint):
    return UniCode2ForConditionalGeneration.from_pretrained(tiny_checkpoint).eval()


@pytest.fixture(scope="session")
def make_config():
    """Makes configurations with a few thousand weights: 16 tokens per image, 768 text ids, 96 codes in 4 cells."""
    settings = dict(
        text_config={
            "model_type": "qwen2",
            "vocab_size": 768,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 16,
            "image_size": 32,
            "patch_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "vision_use_head": False,
        },
        codebook_config={"codebook_size": 96, "codebook_dim": 16, "num_cells": 4, "preview_size": 4},
        image_token_id=10,
        boi_token_id=11,
        eoi_token_id=12,
    )
    return lambda **changes: UniCode2Config(**{**settings, **changes})


@pytest.fixture
def config(make_config):
    return make_config()


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    model = UniCode2ForConditionalGeneration(config).eval()
    codebook = model.get_quantizer().codebook
    codebook.codes.copy_(torch.randn_like(codebook.codes).bfloat16())
    codebook.previews.copy_(torch.randint_like(codebook.previews, 256))
    codebook.cell_offsets.copy_(torch.tensor([0, 20, 50, 60, 96]))
    with torch.no_grad():
        model.model.visual_embeddings.weight.copy_(codebook.codes)
    return model


@pytest.fixture
def pixel_values():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def prompt(config):
    """A prompt with an image of 16 tokens, and a left-padded twin: `input_ids` and `attention_mask`, `(2, 21)`."""
    block = [config.boi_token_id] + [config.image_token_id] * config.num_image_tokens + [config.eoi_token_id]
    input_ids = torch.tensor([[20, *block, 21, 22], [0, *block, 23, 24]])
    return {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}


@pytest.fixture
def photo():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
