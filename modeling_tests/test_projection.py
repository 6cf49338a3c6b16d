"""A projector starts with the codes standardised, and brings them to the scale of the token embeddings."""

import pytest
import torch
from torch import nn

from transformers_unicode2 import UniCode2ForConditionalGeneration
from transformers_unicode2.projection import calibrate_projector, measure_embeddings, rescale_projector


@pytest.fixture
def projector(config):
    return UniCode2ForConditionalGeneration(config).model.projector


@pytest.fixture
def codes():
    """Codes as CLIP's features are: some dimensions far from zero, of very different spread, one constant."""
    generator = torch.Generator().manual_seed(2)
    scale, mean = torch.logspace(-0.5, 1, 16), torch.linspace(-6, 6, 16)
    codes = torch.randn(5000, 16, generator=generator) * scale + mean
    codes[:, 3] = 1.5
    return codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [2**23, 1000])
def test_projected_codes_have_the_moments_of_token_embeddings(projector, codes, dtype, block, monkeypatch):
    monkeypatch.setattr("transformers_unicode2.projection.BLOCK", block)
    embedding = nn.Embedding(700, 32)
    embedding.weight.data.mul_(0.14).add_(torch.linspace(-0.05, 0.05, 32))
    mean, spread = measure_embeddings(embedding)
    assert torch.allclose(mean, embedding.weight.mean(0), atol=1e-6)
    assert spread == pytest.approx(embedding.weight.var(0, correction=0).mean().sqrt().item(), rel=1e-5)
    projector = projector.to(dtype)
    calibrate_projector(projector, codes, mean, spread)
    with torch.no_grad():
        hidden = projector.float().linear_1(codes)
        output = projector(codes)
    # The bias is rounded to the dtype.
    assert hidden.mean(0).abs().max() < (1e-4 if dtype == torch.float32 else 0.1)
    assert hidden.std() == pytest.approx((15 / 16) ** 0.5, rel=0.1)
    assert (output.mean(0) - mean).abs().max() < 0.01 * spread
    assert output.var(0).mean().sqrt().item() == pytest.approx(spread, rel=0.01)


def test_the_same_weights_are_drawn_again(projector, codes):
    drawn = []
    for _ in range(2):
        torch.manual_seed(len(drawn))
        calibrate_projector(projector, codes, torch.zeros(32), 1.0)
        drawn.append(projector.linear_1.weight.detach().clone())
    assert torch.equal(*drawn)


def test_rescaling_keeps_all_but_scale_and_mean(projector, codes):
    calibrate_projector(projector, codes, torch.zeros(32), 1.0)
    with torch.no_grad():
        before = projector(codes)
        rescale_projector(projector, codes, torch.ones(32), 0.5)
        after = projector(codes)
    assert torch.allclose(after, 0.5 * before + 1, atol=1e-4)


def test_codes_that_are_all_the_same_are_refused(projector, codes):
    with pytest.raises(ValueError, match="All 5000 codes leave the projector the same"):
        calibrate_projector(projector, torch.ones_like(codes), torch.zeros(32), 1.0)


def test_embeddings_are_measured_as_gemma_sees_them():
    from language_models import make_language_model

    embedding = make_language_model("gemma").get_input_embeddings()
    spread = measure_embeddings(embedding)[1]
    # Of width 32, and one of the 512 rows is padding.
    assert spread == pytest.approx(32**0.5 * embedding.weight.var(0, correction=0).mean().sqrt().item(), rel=1e-4)
