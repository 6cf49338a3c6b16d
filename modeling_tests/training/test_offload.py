"""A decoder whose blocks stay in CPU memory gives the same losses and gradients, and keeps no copies of its weights."""

import pytest
import torch
from decoders import make_stock_pipelines
from torch.autograd.graph import saved_tensors_hooks

from transformers_unicode2.training.decoders import load_decoder
from transformers_unicode2.training.offload import OffloadedBlock, offload_blocks


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    make_stock_pipelines(folder)
    return folder


def learn(decoder, latents: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], set[int]]:
    """Loss, gradients of the conditioning, and the storages that wait for the backward pass."""
    torch.manual_seed(0)
    embeds, pooled = (value.float().requires_grad_() for value in decoder.encode_prompts(["a", "b"]))
    kept = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = decoder.compute_loss(latents, embeds, pooled)
    loss.backward()
    return loss.detach(), [embeds.grad, pooled.grad], kept


@pytest.mark.parametrize("kind", ["flux", "sdxl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_the_same(kind, checkpointing, pipelines):
    decoders = [load_decoder(pipelines / kind, offload=offload) for offload in (False, True)]
    channels = decoders[0].pipeline.vae.config.latent_channels
    latents = torch.randn(2, channels, 16, 16, generator=torch.Generator().manual_seed(0))
    if checkpointing:
        decoders[1].painter.enable_gradient_checkpointing()
    (loss, gradients, _), (other, others, kept) = (learn(decoder, latents) for decoder in decoders)
    torch.testing.assert_close(other, loss)
    torch.testing.assert_close(others, gradients)
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    blocks = [module.held[0] for module in decoders[1].painter.modules() if isinstance(module, OffloadedBlock)]
    weights = {weight.untyped_storage().data_ptr() for block in blocks for weight in block.parameters()}
    assert weights and not weights & kept
    # None of the blocks is moved along with the rest
    registered = {weight.untyped_storage().data_ptr() for weight in decoders[1].painter.parameters()}
    assert registered and not weights & registered


@pytest.mark.parametrize("kind", ["flux", "sdxl"])
def test_paintings_are_the_same(kind, pipelines):
    images = []
    for offload in (False, True):
        decoder = load_decoder(pipelines / kind, offload=offload)
        names = ("prompt_embeds", "pooled_prompt_embeds")
        condition = dict(zip(names, decoder.encode_prompts(["a"])))
        images += decoder.paint(condition, (64, 64), 2, seed=0)
    assert images[0].tobytes() == images[1].tobytes()


def test_a_model_without_repeated_blocks_is_refused():
    with pytest.raises(ValueError, match="Linear names no repeated blocks that could be offloaded"):
        offload_blocks(torch.nn.Linear(2, 2), "cpu")
