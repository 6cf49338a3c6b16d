"""The losses that FLUX and SDXL were trained by."""

import torch


def flow_matching_loss(
    transformer,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    shift: float = 1.0,
    guidance_scale: float = 3.5,
) -> torch.Tensor:
    """The flow-matching loss of a FLUX transformer, a scalar.

    `x_t = (1 - t) x_0 + t noise` with `t` logit-normal in (0, 1), as FLUX was trained; the target is `noise - x_0`.

    `latents` are x_0, `(batch_size, channels, height, width)`. The prompts are
    `(batch_size, num_tokens, joint_attention_dim)` and `(batch_size, pooled_projection_dim)`. A `shift` above 1 moves
    the times towards 1, where there is more noise. A transformer with `guidance_embeds` is told `guidance_scale`.
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
    mix = times[:, None, None].to(latents.dtype)
    told = {}
    if getattr(getattr(transformer, "config", None), "guidance_embeds", False):
        told["guidance"] = torch.full((batch_size,), guidance_scale, device=latents.device)
    prediction = transformer(
        hidden_states=(1 - mix) * packed + mix * noise,
        encoder_hidden_states=prompt_embeds,
        pooled_projections=pooled_prompt_embeds,
        timestep=times,
        img_ids=image_ids,
        txt_ids=torch.zeros(prompt_embeds.shape[1], 3, **like),
        **told,
    ).sample
    return torch.nn.functional.mse_loss(prediction.float(), (noise - packed).float())


def denoising_loss(
    unet,
    scheduler,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    factor: int = 8,
) -> torch.Tensor:
    """The loss that SDXL was trained by, a scalar: the squared error of the noise, or of the velocity.

    Args:
        unet: of SDXL.
        scheduler (`DDPMScheduler`): its schedule of noise, whose `prediction_type` names the target, see
            `decoders.check_schedule`.
        latents: x_0, `(batch_size, channels, height, width)`.
        prompt_embeds: `(batch_size, num_tokens, cross_attention_dim)`.
        pooled_prompt_embeds: `(batch_size, pooled_dim)`.
        factor: pixels of a side of a latent.
    """
    batch_size, _, height, width = latents.shape
    count, kind = scheduler.config.num_train_timesteps, scheduler.config.prediction_type
    times = torch.randint(count, (batch_size,), device=latents.device)
    noise = torch.randn_like(latents)
    target = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, times)
    # Sizes and place of the crop, in pixels: of an image that is as large as what is painted, as inference says
    size = [factor * height, factor * width]
    time_ids = torch.tensor([1024, 1024, 0, 0, *size], device=latents.device, dtype=latents.dtype)
    prediction = unet(
        scheduler.add_noise(latents, noise, times),
        times,
        encoder_hidden_states=prompt_embeds,
        added_cond_kwargs={"text_embeds": pooled_prompt_embeds, "time_ids": time_ids.expand(batch_size, 6)},
    ).sample
    return torch.nn.functional.mse_loss(prediction.float(), target.float())
