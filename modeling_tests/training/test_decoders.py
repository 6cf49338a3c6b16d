import shutil
from inspect import signature
from types import SimpleNamespace

import diffusers
import pytest
import torch
from decoders import make_stock_pipelines
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from painters import POOLED, WIDTH
from safetensors.torch import load_file, save_file

from transformers_unicode2.training.decoders import load_decoder, read_widths


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoders")
    make_stock_pipelines(folder)
    return folder


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


def make_decoder(kind: str, scheduler: str, **settings):
    """A `Decoder` that has a scheduler and nothing else."""
    from transformers_unicode2.training.decoders import DECODERS

    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "transformer")
    own = signature(getattr(diffusers, kind)).parameters
    parts = {name: None for name in names if name in own}
    return DECODERS[kind](getattr(diffusers, kind)(**parts, scheduler=getattr(diffusers, scheduler)(**settings)))


COSXL = {"sigma_min": 0.002, "sigma_max": 120.0, "timestep_type": "continuous", "prediction_type": "v_prediction"}


@pytest.mark.parametrize(
    ("kind", "scheduler", "settings", "message"),
    [
        ("StableDiffusionXLPipeline", "EDMEulerScheduler", {}, "EDMEulerScheduler with no `beta_schedule`; supported"),
        ("StableDiffusionXLPipeline", "FlowMatchEulerDiscreteScheduler", {}, "Scheduler with no `beta_schedule`"),
        ("StableDiffusionXLPipeline", "EulerDiscreteScheduler", COSXL, "EulerDiscreteScheduler with continuous times"),
        ("StableDiffusionXLPipeline", "DDPMScheduler", {"prediction_type": "sample"}, "with `prediction_type` sample"),
        ("StableDiffusionXLPipeline", "UniPCMultistepScheduler", {"use_flow_sigmas": True}, "with `use_flow_sigmas`"),
        ("FluxPipeline", "EulerDiscreteScheduler", {}, "EulerDiscreteScheduler, which has no `shift` of flow matching"),
    ],
)
def test_a_schedule_that_a_decoder_did_not_learn_by_is_refused(kind, scheduler, settings, message):
    with pytest.raises(ValueError, match=f"The decoder's scheduler is .*{message}"):
        make_decoder(kind, scheduler, **settings)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "LCMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("target", ["epsilon", "v_prediction"])
def test_the_noise_of_sdxl_follows_its_own_schedule(name, target):
    """Whatever scheduler paints."""
    own = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": target}
    noise = make_decoder("StableDiffusionXLPipeline", name, **own).noise
    expected = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    torch.testing.assert_close(noise.betas, expected)
    assert noise.config.prediction_type == target


def test_a_scheduler_without_dynamic_shifts_has_the_one_that_it_has():
    assert make_decoder("FluxPipeline", "FlowMatchHeunDiscreteScheduler", shift=2.0).choose_shift(64) == 2.0


@pytest.mark.parametrize("vae", [False, True])
def test_sdxl_is_told_the_sizes_that_it_is_told_when_it_paints(folder, vae):
    """Of a VAE whose latents are 1 pixel, and also where it is not loaded."""
    told, decoder = [], load_decoder(str(folder / "sdxl"), vae=vae, texts=False)
    decoder.painter.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs["added_cond_kwargs"]["time_ids"][0].tolist()), with_kwargs=True
    )
    condition = {"prompt_embeds": torch.zeros(1, 4, WIDTH), "pooled_prompt_embeds": torch.zeros(1, POOLED)}
    decoder.compute_loss(torch.zeros(1, 4, 16, 32), **condition)
    if vae:
        decoder.paint(condition, (16, 32), 1, 0)
    assert told and all(sizes == [1024, 1024, 0, 0, 16, 32] for sizes in told)


@pytest.mark.parametrize("kind, part", [("flux", "transformer"), ("sdxl", "unet")])
def test_a_decoder_without_a_part_is_refused(folder, tmp_path, kind, part):
    for lost, advice in ((part, ""), ("vae", ""), ("scheduler", ""), ("tokenizer", ", which the captions need")):
        shutil.copytree(folder / kind, tmp_path / lost)
        shutil.rmtree(tmp_path / lost / lost)
        with pytest.raises(ValueError, match=f"The decoder .* has no {lost}{advice}; "):
            load_decoder(str(tmp_path / lost))
    with pytest.raises(ValueError, match=f"The decoder .* has no {part}/config.json that can be read; copy it again"):
        read_widths(str(tmp_path / part))


@pytest.mark.parametrize(
    ("file", "weight", "message"),
    [
        (
            "vae/diffusion_pytorch_model",
            "encoder.conv_in.weight",
            "decoder's vae made 4096 of 4096 values that are",
        ),
        ("text_encoder/model", "final_layer_norm.weight", "The decoder's text_encoder made .* values that are not"),
        ("text_encoder_2/model", "final_layer_norm.weight", "The decoder's text encoders made .* values that are not"),
        ("transformer/diffusion_pytorch_model", "proj_out.bias", "transformer of .* has 1 weights that are not finite"),
    ],
)
def test_a_part_of_a_decoder_that_is_not_finite_is_named(folder, tmp_path, file, weight, message):
    """Before anything of it is kept."""
    shutil.copytree(folder / "flux", tmp_path / "flux")
    path = tmp_path / f"flux/{file}.safetensors"
    state = load_file(path)
    state[next(name for name in state if name.endswith(weight))][:] = torch.nan
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        decoder = load_decoder(str(tmp_path / "flux"))
        decoder.encode_latents(torch.zeros(1, 3, 32, 32))
        decoder.encode_captions(["a"])
        decoder.measure_scales(["a"])
