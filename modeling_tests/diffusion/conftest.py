"""What the tests of several pipelines share."""

import pytest
import torch
from decoders import make_stock_pipelines
from painters import POOLED, WIDTH

from transformers_unicode2 import UniCode2ConditionMapper


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A mapper, and an SDXL and a FLUX with text encoders, saved as stock pipelines."""
    folder = tmp_path_factory.mktemp("decoders")
    torch.manual_seed(0)
    sizes = {"visual_dim": 192, "hidden_dim": 32, "output_dim": WIDTH, "pooled_dim": POOLED, "num_visual_tokens": 64}
    UniCode2ConditionMapper(**sizes).save_pretrained(folder / "mapper")
    make_stock_pipelines(folder)
    return folder
