"""FLUX as the losses of training see it."""

import torch


@torch.no_grad()
def encode_latents(vae, pixel_values: torch.Tensor) -> torch.Tensor:
    """Pixels `(batch_size, 3, height, width)` in [-1, 1] to normalised VAE latents `(batch_size, channels, h, w)`."""
    with torch.autocast(pixel_values.device.type, torch.bfloat16):
        latents = vae.encode(pixel_values.to(vae.dtype)).latent_dist.mode().to(vae.dtype)
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def flow_matching_loss(
    transformer,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    shift: float = 1.0,
) -> torch.Tensor:
    """The flow-matching loss of a FLUX transformer, a scalar.

    `x_t = (1 - t) x_0 + t noise` with `t` logit-normal in (0, 1), as FLUX was trained; the target is `noise - x_0`.

    `latents` are x_0, `(batch_size, channels, height, width)`. The prompts are
    `(batch_size, num_tokens, joint_attention_dim)` and `(batch_size, pooled_projection_dim)`. A `shift` above 1 moves
    the times towards 1, where there is more noise.
    """
    from diffusers import FluxPipeline
    from diffusers.training_utils import compute_density_for_timestep_sampling

    batch_size, channels, height, width = latents.shape
    packed = FluxPipeline._pack_latents(latents, batch_size, channels, height, width)  # (batch_size, h*w/4, 4*channels)
    like = {"device": latents.device, "dtype": latents.dtype}
    image_ids = FluxPipeline._prepare_latent_image_ids(batch_size, height // 2, width // 2, **like)
    times = compute_density_for_timestep_sampling("logit_normal", batch_size, 0.0, 1.0).to(latents.device)
    times = shift * times / (1 + (shift - 1) * times)
    noise = torch.randn_like(packed)
    mix = times[:, None, None]
    prediction = transformer(
        hidden_states=(1 - mix) * packed + mix * noise,
        encoder_hidden_states=prompt_embeds,
        pooled_projections=pooled_prompt_embeds,
        timestep=times,
        img_ids=image_ids,
        txt_ids=torch.zeros(prompt_embeds.shape[1], 3, **like),
    ).sample
    return torch.nn.functional.mse_loss(prediction.float(), (noise - packed).float())
