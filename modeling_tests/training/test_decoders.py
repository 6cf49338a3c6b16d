from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionXLPipeline


def test_shift_moves_times_towards_noise():
    """`x_t` of an image of zeros is `t noise`. A transformer that gives it back is off by `(1 - t) noise`."""
    from transformers_unicode2.training.decoders import flow_matching_loss

    def echo(hidden_states, timestep, **_):
        times.append(timestep)
        return SimpleNamespace(sample=hidden_states)

    losses, times = [], []
    for shift in (1.0, 3.0):
        torch.manual_seed(0)
        inputs = torch.zeros(64, 4, 4, 4), torch.zeros(64, 2, 8), torch.zeros(64, 8)
        losses.append(flow_matching_loss(echo, *inputs, shift=shift).item())
    torch.testing.assert_close(times[1], 3 * times[0] / (1 + 2 * times[0]))
    assert losses[1] < losses[0]


def test_a_dynamic_shift_is_that_of_painting():
    """Of a scheduler with `use_dynamic_shifting`, painting takes exp(mu) of the number of patches, and no `shift`."""
    from transformers_unicode2.training.decoders import FluxDecoder

    config = {"shift": 3.0, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    for dynamic, shifts in ((True, {256: 0.5, 1024: 0.63, 4096: 1.15}), (False, {256: 1.0986, 4096: 1.0986})):
        scheduler = FlowMatchEulerDiscreteScheduler(**config, use_dynamic_shifting=dynamic)
        decoder = SimpleNamespace(pipeline=SimpleNamespace(scheduler=scheduler))
        for num_patches, mu in shifts.items():
            assert FluxDecoder.choose_shift(decoder, num_patches) == pytest.approx(torch.tensor(mu).exp().item(), 1e-3)


def make_vae(**fields) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(32,), latent_channels=4, sample_size=16, scaling_factor=0.5, **fields)


def test_latents_are_scaled_as_painting_unscales_them():
    """By mean and spread of each channel, where a VAE has them."""
    from transformers_unicode2.training.decoders import encode_latents

    means, stds = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 4.0, 0.5]
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    plain = encode_latents(make_vae(), pixels) / 0.5
    scaled = encode_latents(make_vae(latents_mean=means, latents_std=stds), pixels)
    mean, std = (torch.tensor(values)[:, None, None] for values in (means, stds))
    torch.testing.assert_close(scaled * std / 0.5 + mean, plain)


def test_a_schedule_that_sdxl_did_not_learn_by_is_refused():
    from transformers_unicode2.training.decoders import StableDiffusionXLDecoder

    pipeline = StableDiffusionXLPipeline(None, None, None, None, None, None, EDMEulerScheduler())
    with pytest.raises(ValueError, match="The decoder's scheduler is EDMEulerScheduler; SDXL that learnt by DDPM's"):
        StableDiffusionXLDecoder(pipeline)
