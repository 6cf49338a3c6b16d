"""Small random decoders: stock pipelines of many kinds without their text encoders."""

import diffusers
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

WIDTH, POOLED = 32, 24
FLUX = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": POOLED,
    "axes_dims_rope": [4, 4, 8],
}
NO_TEXT = dict.fromkeys(("text_encoder", "tokenizer"))
NO_TEXTS = NO_TEXT | dict.fromkeys(("text_encoder_2", "tokenizer_2"))


def make_vae(latent_channels: int, **changes) -> AutoencoderKL:
    settings = {"block_out_channels": (4,), "norm_num_groups": 1, "layers_per_block": 1}
    settings |= {"latent_channels": latent_channels, "scaling_factor": 1.5, "shift_factor": 0.06, "sample_size": 32}
    return AutoencoderKL(**settings, **changes)


def make_unet(**changes) -> diffusers.UNet2DConditionModel:
    """As of SDXL: text and six numbers are added to the time."""
    settings = {
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "sample_size": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 1),
        "cross_attention_dim": WIDTH,
        "norm_num_groups": 1,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + POOLED,
    }
    return diffusers.UNet2DConditionModel(**{**settings, **changes})


def make_flux_parts(guidance_embeds: bool = False) -> dict:
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": make_vae(4),
        "transformer": diffusers.FluxTransformer2DModel(**FLUX, guidance_embeds=guidance_embeds),
    }


def make_sdxl_parts() -> dict:
    return {"vae": make_vae(4), "unet": make_unet(), "scheduler": EulerDiscreteScheduler()}


def make_flux(kind: str = "FluxPipeline", **parts):
    return getattr(diffusers, kind)(**make_flux_parts(), **NO_TEXTS, **parts)


def make_sdxl():
    return diffusers.StableDiffusionXLPipeline(**make_sdxl_parts(), **NO_TEXTS)


def make_stable_diffusion():
    unet = make_unet(addition_embed_type=None, projection_class_embeddings_input_dim=None)
    more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline(
        vae=make_vae(4), unet=unet, scheduler=EulerDiscreteScheduler(), **NO_TEXT, **more
    )


def make_chroma():
    settings = {name: value for name, value in FLUX.items() if name != "pooled_projection_dim"}
    more = {"approximator_hidden_dim": 32, "approximator_layers": 1, "approximator_num_channels": 16}
    transformer = diffusers.ChromaTransformer2DModel(**settings, **more)
    return diffusers.ChromaPipeline(FlowMatchEulerDiscreteScheduler(), make_vae(4), None, None, transformer)


def make_flux2_klein():
    settings = {name: value for name, value in FLUX.items() if name != "pooled_projection_dim"}
    settings |= {"timestep_guidance_channels": 16, "axes_dims_rope": [4, 4, 4, 4], "guidance_embeds": False}
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=32,
    )
    transformer = diffusers.Flux2Transformer2DModel(**settings)
    return diffusers.Flux2KleinPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, transformer)


def make_z_image():
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():
        # Which are made without values
        transformer.x_pad_token.fill_(1)
        transformer.cap_pad_token.fill_(1)
    return diffusers.ZImagePipeline(FlowMatchEulerDiscreteScheduler(), make_vae(16), None, None, transformer)


def make_qwen_image():
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return diffusers.QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, transformer)


def make_sana():
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=WIDTH,
        sample_size=32,
    )
    blocks = ("ResBlock", "EfficientViTBlock")
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    return diffusers.SanaPipeline(None, None, vae, transformer, FlowMatchEulerDiscreteScheduler(shift=7.0))


def make_flux_controlnet():
    controlnet = diffusers.FluxControlNetModel(**FLUX)
    return make_flux("FluxControlNetPipeline", controlnet=controlnet)


# Each with the further arguments of its call, where `image` stands for a picture.
PAINTERS = {
    "FLUX": (make_flux, {}),
    "FLUX img2img": (lambda: make_flux("FluxImg2ImgPipeline"), {"image": "image", "strength": 0.9}),
    "FLUX inpaint": (lambda: make_flux("FluxInpaintPipeline"), {"image": "image", "mask_image": "image"}),
    "FLUX ControlNet": (make_flux_controlnet, {"control_image": "image"}),
    "SDXL": (make_sdxl, {}),
    "Stable Diffusion": (make_stable_diffusion, {}),
    "Chroma": (make_chroma, {}),
    "FLUX.2-klein": (make_flux2_klein, {}),
    "Z-Image": (make_z_image, {}),
    "Qwen-Image": (make_qwen_image, {}),
    "SANA": (make_sana, {"use_resolution_binning": False}),
}
