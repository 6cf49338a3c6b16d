"""FLUX and SDXL as the losses of training see them: frozen, with the parts that a loss needs."""

import math
from pathlib import Path

import torch

from ..diffusion.arguments_unicode2 import check_finite_weights
from ..images_unicode2 import one_line
from .decoder_losses import denoising_loss, flow_matching_loss
from .offload import offload_blocks

# Of FLUX and SDXL, the matrices that a LoRA changes unless it is told others.
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
# Text encoder of a decoder's pooled embedding, its tokenizer, and where it stands in the output.
FLUX_POOLED = ("text_encoder", "tokenizer", "pooler_output")
SDXL_POOLED = ("text_encoder_2", "tokenizer_2", "text_embeds")
TEXT_PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
# What the configuration of a scheduler says of DDPM's schedule
DDPM_FIELDS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")


class Decoder:
    """A stock pipeline with a frozen decoder.

    Attributes:
        pipeline (`DiffusionPipeline`): with those of its parts that were asked for, and `None` for the others.
        painter (`torch.nn.Module`): its transformer or U-Net.
    """

    pooled = FLUX_POOLED
    part = "transformer"

    def __init__(self, pipeline, guidance_scale: float = 3.5):
        self.pipeline, self.guidance_scale = pipeline, guidance_scale
        pipeline.set_progress_bar_config(disable=True)
        self.painter = getattr(pipeline, self.part)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> torch.Tensor:
        """Pooled embeddings of captions by the decoder's own text encoder, float32 `(num_captions, pooled_dim)`.

        Raises `ValueError` on values that are not finite, as `encode_latents` and `measure_scales` do.
        """
        part, tokenizer, name = self.pooled
        encoder, tokenizer = getattr(self.pipeline, part), getattr(self.pipeline, tokenizer)
        options = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
        ids = tokenizer(captions, return_tensors="pt", **options)["input_ids"]
        return check_finite(encoder(ids.to(encoder.device))[name].float(), part)

    @torch.no_grad()
    def encode_latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See `encode_latents`. Raises `ValueError` on a size that the decoder does not paint."""
        width, height = pixel_values.shape[-1], pixel_values.shape[-2]
        if width % self.size_factor or height % self.size_factor:
            raise ValueError(
                f"Pictures are {width} pixels wide and {height} high; the decoder paints multiples of "
                f"{self.size_factor}. Set `image_size` to one."
            )
        return check_finite(encode_latents(self.pipeline.vae, pixel_values.to(self.pipeline.vae.device)), "vae")

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> list:
        """The `PIL.Image.Image`s of latents of `encode_latents`."""
        vae = self.pipeline.vae
        shift, scale = read_scaling(vae)
        latents = latents.to(vae.device) / scale + shift
        with torch.autocast(vae.device.type, torch.bfloat16):
            pixels = vae.decode(latents.to(vae.device, vae.dtype)).sample
        return self.pipeline.image_processor.postprocess(pixels.float())

    @property
    def size_factor(self) -> int:
        """What divides the width and the height of its pictures, in pixels."""
        return self.pipeline.vae_scale_factor

    def paint(self, condition, size: tuple[int, int], num_inference_steps: int, seed: int) -> list:
        """`PIL.Image.Image`s of the conditioning of a mapper, `size` (height, width) in pixels; the same for the same
        seed."""
        conditioning = {name: value.to(self.painter.dtype) for name, value in condition.items()}
        return self.pipeline(
            **conditioning,
            **self.list_options(conditioning),
            height=size[0],
            width=size[1],
            num_inference_steps=num_inference_steps,
            guidance_scale=self.guidance_scale,
            generator=torch.Generator().manual_seed(seed),
        ).images

    def list_options(self, conditioning: dict) -> dict:
        """Further arguments of the pipeline."""
        return {}

    def add_lora(self, settings: dict) -> None:
        """Adds low-rank weights to the painter, which learn. `settings` are those of PEFT's `LoraConfig`.

        Raises `ValueError` on settings that it does not have.
        """
        from peft import LoraConfig

        # A strength of 1, unless `lora_alpha` says otherwise
        defaults = {"target_modules": ATTENTION, "init_lora_weights": "gaussian", "lora_alpha": settings.get("r", 8)}
        try:
            config = LoraConfig(**{**defaults, **settings})
            self.painter.add_adapter(config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`decoder_lora` is {settings}: {one_line(str(error))}.") from error
        for parameter in self.painter.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def save_learnt(self, folder: Path, lora: bool) -> None:
        """Writes what the painter has learnt: a folder of its own, or the file of a LoRA as Diffusers loads it."""
        from peft import get_peft_model_state_dict

        if lora:
            layers = {f"{self.part}_lora_layers": get_peft_model_state_dict(self.painter)}
            # Without them, Diffusers takes its strength to be 1
            layers[f"{self.part}_lora_adapter_metadata"] = self.painter.peft_config["default"].to_dict()
            type(self.pipeline).save_lora_weights(folder, **layers)
        else:
            self.painter.save_pretrained(folder / self.part)

    @torch.no_grad()
    def measure_scales(self, captions: list[str]) -> dict[str, float]:
        """Root mean squares of text embeddings and pooled ones, as which a `UniCode2ConditionMapper` starts."""
        embeds, pooled = (check_finite(value, "text encoders") for value in self.encode_prompts(captions))
        return {name: e.float().square().mean().sqrt().item() for name, e in
                (("output_scale", embeds), ("pooled_scale", pooled))}  # fmt: skip


class FluxDecoder(Decoder):
    """FLUX.1, which learns by flow matching."""

    def __init__(self, pipeline, guidance_scale: float = 3.5):
        super().__init__(pipeline, guidance_scale)
        scheduler = pipeline.scheduler
        if "shift" not in scheduler.config:
            raise ValueError(
                f"The decoder's scheduler is {type(scheduler).__name__}, which has no `shift` of flow matching; FLUX "
                "that learnt by flow matching is supported."
            )

    @property
    def size_factor(self) -> int:
        # A patch of the transformer is 2 x 2 latents
        return 2 * self.pipeline.vae_scale_factor

    def choose_shift(self, num_patches: int) -> float:
        """The shift of times that painting has: one of its own for each size of image, or the scheduler's."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        config = self.pipeline.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return config.shift
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        return math.exp(calculate_shift(num_patches, *(config[name] for name in names)))

    def encode_prompts(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        length = self.pipeline.tokenizer_max_length
        return self.pipeline.encode_prompt(captions, None, max_sequence_length=length)[:2]

    def compute_loss(
        self, latents: torch.Tensor, prompt_embeds: torch.Tensor, pooled_prompt_embeds: torch.Tensor
    ) -> torch.Tensor:
        """See `flow_matching_loss`."""
        shift, guidance = self.choose_shift(latents.shape[-2] * latents.shape[-1] // 4), self.guidance_scale
        dtype = self.painter.dtype
        conditioning = (value.to(dtype) for value in (prompt_embeds, pooled_prompt_embeds))
        return flow_matching_loss(self.painter, latents.to(dtype), *conditioning, shift=shift, guidance_scale=guidance)


class StableDiffusionXLDecoder(Decoder):
    """SDXL, which learns to tell the noise in an image, or its velocity."""

    pooled = SDXL_POOLED
    part = "unet"

    def __init__(self, pipeline, guidance_scale: float = 3.5):
        from diffusers import DDPMScheduler

        super().__init__(pipeline, guidance_scale)
        check_schedule(pipeline.scheduler)
        self.noise = DDPMScheduler.from_config(pipeline.scheduler.config)

    def encode_prompts(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
        return embeds, pooled

    def list_options(self, conditioning: dict) -> dict:
        zeros = {f"negative_{name}": torch.zeros_like(value) for name, value in conditioning.items()}
        return {**zeros, "original_size": (1024, 1024)}

    def compute_loss(
        self, latents: torch.Tensor, prompt_embeds: torch.Tensor, pooled_prompt_embeds: torch.Tensor
    ) -> torch.Tensor:
        """See `denoising_loss`."""
        dtype = self.painter.dtype
        conditioning = (value.to(dtype) for value in (prompt_embeds, pooled_prompt_embeds))
        return denoising_loss(self.painter, self.noise, latents.to(dtype), *conditioning, factor=self.size_factor)


def check_schedule(scheduler) -> None:
    """Raises `ValueError` unless the noise of SDXL follows DDPM's schedule, and it tells the noise or its velocity."""
    config = scheduler.config
    absent = [name for name in DDPM_FIELDS if name not in config]
    target = config.get("prediction_type", "epsilon")
    found = [f"no `{absent[0]}`"] if absent else []
    found += [] if target in ("epsilon", "v_prediction") else [f"`prediction_type` {target}"]
    found += ["continuous timesteps"] if config.get("timestep_type") == "continuous" else []
    found += ["`use_flow_sigmas`"] if config.get("use_flow_sigmas") else []
    if found:
        raise ValueError(
            f"The decoder's scheduler is {type(scheduler).__name__} with {found[0]}; supported is SDXL that learnt "
            "epsilon or v_prediction by DDPM's schedule."
        )


def check_finite(values: torch.Tensor, part: str) -> torch.Tensor:
    """What a part of a decoder made, as it is. Raises `ValueError` when some of it is not finite."""
    bad = (~values.isfinite()).sum().item()
    if bad:
        raise ValueError(
            f"The decoder's {part} made {bad} of {values.numel()} values that are not finite; copy its weights again, "
            "or set `decoder_dtype: float32`."
        )
    return values


# By the class that a pipeline's index names.
DECODERS = {"FluxPipeline": FluxDecoder, "StableDiffusionXLPipeline": StableDiffusionXLDecoder}


def load_decoder(
    name: str,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    quantization: dict | None = None,
    texts: bool = True,
    vae: bool = True,
    painter: bool = True,
    guidance_scale: float = 3.5,
    offload: bool = False,
) -> Decoder:
    """
    Loads a decoder, frozen.

    Args:
        name: folder or Hub name of a stock FLUX or SDXL pipeline.
        device: for all of its parts.
        dtype: of its weights, `"float32"`, `"bfloat16"` or `"float16"`.
        quantization: arguments of diffusers' `PipelineQuantizationConfig`, such as `{quant_backend: bitsandbytes_4bit,
            quant_kwargs: {load_in_4bit: true}, components_to_quantize: transformer}`.
        texts: whether its text encoders are loaded.
        vae: whether its VAE is loaded.
        painter: whether its transformer or U-Net is loaded.
        guidance_scale: what a guidance-distilled FLUX is told while it learns.
        offload: whether the blocks of its transformer or U-Net stay in CPU memory, see `offload_blocks`.

    Raises:
        `ValueError`: on a pipeline of another kind, or one that lacks a part; on weights of what paints that are not
            finite; and on float16 without an accelerator.
    """
    import diffusers

    from ..diffusion.registration import find_stock_class

    kind, device = find_stock_class(name), torch.device(device)
    if device.type == "cpu" and dtype == "float16":
        raise ValueError("`decoder_dtype` is float16, which needs a GPU; set bfloat16 or float32.")
    absent = () if texts else TEXT_PARTS
    absent += () if vae else ("vae",)
    absent += () if painter else (DECODERS[kind].part,)
    options = {"dtype": getattr(torch, dtype), **dict.fromkeys(absent)}
    if quantization and painter:
        options["quantization_config"] = diffusers.PipelineQuantizationConfig(**quantization)
    index = getattr(diffusers, kind).load_config(name)
    parts = (DECODERS[kind].part, "vae", "scheduler", *TEXT_PARTS)
    check_whole(name, index, [part for part in parts if part not in absent])
    of_vae = read_config(name, "vae") if vae or painter else {}
    pipeline = getattr(diffusers, kind).from_pretrained(name, **options)
    if painter:
        # Without its VAE, a pipeline would take the factor to be 8
        pipeline.vae_scale_factor = 2 ** (len(of_vae["block_out_channels"]) - 1)
        check_finite_weights(f"The {DECODERS[kind].part} of {name}", getattr(pipeline, DECODERS[kind].part))
    if offload and painter:
        offload_blocks(getattr(pipeline, DECODERS[kind].part).requires_grad_(False), device)
    return DECODERS[kind](pipeline.to(device), guidance_scale)


def check_whole(name: str, index: dict, parts: list[str]) -> None:
    """Raises `ValueError` when a pipeline with this index has not all of these parts."""
    # A pipeline of ours, or one that was saved without text encoders, has an empty place in the index
    lost = [part for part in parts if index.get(part, [None])[0] is None]
    lost += [part for part in parts if Path(name).is_dir() and not Path(name, part).is_dir()]
    if lost and lost[0] in TEXT_PARTS:
        raise ValueError(
            f"The decoder {name} has no {lost[0]}, which the captions need; name the stock pipeline, or set "
            "`contrastive_weight: 0` and `start`."
        )
    if lost:
        raise ValueError(f"The decoder {name} has no {lost[0]}; copy it again.")


def read_config(name: str, part: str) -> dict:
    """The configuration of a part of a decoder. Raises `ValueError` when there is none."""
    from diffusers import AutoencoderKL

    # As every model of Diffusers does
    try:
        return AutoencoderKL.load_config(name, subfolder=part)
    except OSError as error:
        raise ValueError(f"The decoder {name} has no {part}/config.json that can be read; copy it again.") from error


def read_widths(name: str) -> dict[str, int]:
    """What the decoder of a stock pipeline reads: widths, by the fields of the mapper's configuration."""
    import transformers_unicode2

    from ..diffusion.registration import find_stock_class

    kind = find_stock_class(name)
    config = read_config(name, DECODERS[kind].part)
    return getattr(transformers_unicode2, f"UniCode2{kind}").read_widths(config)


@torch.no_grad()
def encode_latents(vae, pixel_values: torch.Tensor) -> torch.Tensor:
    """Pixels `(batch_size, 3, height, width)` in [-1, 1] to normalised VAE latents `(batch_size, channels, h, w)`."""
    with torch.autocast(pixel_values.device.type, torch.bfloat16):
        latents = vae.encode(pixel_values.to(vae.dtype)).latent_dist.mode().to(vae.dtype)
    shift, scale = read_scaling(vae)
    return (latents - shift) * scale


def read_scaling(vae) -> tuple:
    """What is taken from the latents of a VAE, and what the rest is multiplied by: numbers, or one for each channel."""
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or std is None:
        return vae.config.get("shift_factor") or 0.0, vae.config.scaling_factor
    mean, std = (torch.tensor(value, device=vae.device, dtype=vae.dtype).view(1, -1, 1, 1) for value in (mean, std))
    return mean, vae.config.scaling_factor / std
