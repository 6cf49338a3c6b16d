"""`UniCode2StableDiffusionXLPipeline`: a prompt, an image or visual tokens to an image, painted by a frozen SDXL."""

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    ProcessorMixin,
)

from .arguments_unicode2 import (
    NEGATIVE_TEXTS,
    ORIGINAL_SIZE,
    check_adapters,
    check_latents,
    check_negatives,
    check_pairs,
    check_sources,
    check_texts,
    read_sdxl_pooled_width,
)
from .condition_mapper_unicode2 import UniCode2ConditionMapper
from .prior_unicode2 import UniCode2PipelineOutput, UniCode2PriorMixin
from .repository_unicode2 import UniCode2RepositoryMixin

# Sizes and places that SDXL is told.
TOLD = tuple(
    f"{sign}{name}" for sign in ("", "negative_") for name in ("original_size", "target_size", "crops_coords_top_left")
)


class UniCode2StableDiffusionXLPipeline(UniCode2RepositoryMixin, UniCode2PriorMixin, StableDiffusionXLPipeline):
    r"""
    SDXL conditioned on visual tokens (sections 3.4 and 3.5), the paper's second decoder. The text encoders are not
    needed: an SDXL repository loads with `text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None`.

    Args:
        vision_language_encoder (`UniCode2ForConditionalGeneration`): writes visual tokens, and reads them off images.
        processor (`UniCode2Processor`): prompts and images to its inputs.
        condition_mapper (`UniCode2ConditionMapper`): visual tokens to conditioning.
        image_size (`int`, *optional*, defaults to 512): side of the images in pixels, unless a call names another.
        num_candidates (`int`, *optional*, defaults to 1): images that the language model writes for a prompt, unless
            a call names another number. The one from which it reads the prompt back best is painted.
        guidance_scale (`float`, *optional*, defaults to 3.5): classifier-free guidance of SDXL, as in the paper, unless
            a call names another; 1 is none.
        num_inference_steps (`int`, *optional*, defaults to 50): steps of SDXL, unless a call names another number.
        vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet, scheduler, image_encoder, feature_extractor,
            add_watermarker: as in [`StableDiffusionXLPipeline`].
        force_zeros_for_empty_prompt (`bool`): of the stock pipeline; codes are always guided away from zeros.
    """

    model_cpu_offload_seq = (
        "vision_language_encoder->condition_mapper->text_encoder->text_encoder_2->image_encoder->unet->vae"
    )

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        vision_language_encoder: PreTrainedModel,
        processor: ProcessorMixin,
        condition_mapper: UniCode2ConditionMapper,
        text_encoder: CLIPTextModel = None,
        text_encoder_2: CLIPTextModelWithProjection = None,
        tokenizer: CLIPTokenizer = None,
        tokenizer_2: CLIPTokenizer = None,
        image_encoder: CLIPVisionModelWithProjection = None,
        feature_extractor: CLIPImageProcessor = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        image_size: int = 512,
        num_candidates: int = 1,
        guidance_scale: float = 3.5,
        num_inference_steps: int = 50,
    ):
        texts = (text_encoder, text_encoder_2, tokenizer, tokenizer_2)
        adapter_parts = {"image_encoder": image_encoder, "feature_extractor": feature_extractor}
        options = {"force_zeros_for_empty_prompt": force_zeros_for_empty_prompt, "add_watermarker": add_watermarker}
        super().__init__(vae, *texts, unet, scheduler, **adapter_parts, **options)
        numbers = {"image_size": image_size, "num_candidates": num_candidates, "guidance_scale": guidance_scale}
        numbers["num_inference_steps"] = num_inference_steps
        self.register_prior(vision_language_encoder, processor, condition_mapper, **numbers)

    decoder_part = "unet"

    @property
    def size_factor(self) -> int:
        """What divides the height and the width of an image, in pixels."""
        return self.vae_scale_factor

    @staticmethod
    def read_widths(config: dict) -> dict[str, int]:
        return {"output_dim": config["cross_attention_dim"], "pooled_dim": read_sdxl_pooled_width(config)}

    def check_arguments(self, text_prompt, embeds: dict, kwargs: dict, guidance_scale: float) -> None:
        """Raises `ValueError` before any work on what would fail after it, and on arguments that nothing would read."""
        given = [name for name, value in kwargs.items() if value is not None]
        check_texts(text_prompt=text_prompt, **{name: kwargs.get(name) for name in NEGATIVE_TEXTS})
        if "prompt_2" in given:
            raise ValueError("`prompt_2` is not read: the tokens are the conditioning. Give it as `text_prompt`.")
        check_pairs(embeds, kwargs)
        check_negatives(kwargs)
        texts = [name for name in NEGATIVE_TEXTS if name in given]
        texts += ["text_prompt"] if text_prompt is not None else []
        if texts and (self.text_encoder is None or self.text_encoder_2 is None):
            raise ValueError(
                f"`{texts[0]}` needs SDXL's own text encoders, which this pipeline was loaded without; load them or "
                "leave it out."
            )
        negatives = [name for name in given if name.startswith("negative_prompt") or "negative_pooled" in name]
        if negatives and guidance_scale <= 1:
            raise ValueError(f"`{negatives[0]}` has no effect without guidance; set `guidance_scale` above 1.")
        check_adapters(given, self.unet.encoder_hid_proj, self.image_encoder)
        self.check_told_sizes(kwargs)

    @staticmethod
    def check_told_sizes(kwargs: dict) -> None:
        """Raises `ValueError` on sizes and places, as SDXL is told them, that are no pairs of numbers of pixels."""
        for name in TOLD:
            value = kwargs.get(name)
            is_pair = isinstance(value, (list, tuple)) and len(value) == 2
            if value is not None and not (is_pair and all(isinstance(one, int) and one >= 0 for one in value)):
                raise ValueError(f"`{name}` is {value!r}; it must be a pair of whole numbers of pixels.")
        if (kwargs.get("negative_original_size") is None) != (kwargs.get("negative_target_size") is None):
            raise ValueError("Give `negative_original_size` and `negative_target_size`, or neither; SDXL reads both.")

    def check_latents(self, latents, num_images: int, height: int, width: int) -> None:
        """Raises `ValueError` unless latents are those of `num_images` images."""
        factor = self.vae_scale_factor
        shape = (num_images, self.unet.config.in_channels, height // factor, width // factor)
        check_latents(latents, shape, height, width)

    def encode_texts(
        self,
        texts: list[str],
        texts_2: list[str] | None = None,
        clip_skip: int | None = None,
        lora_scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the text encoders of SDXL make of texts (the second one of `texts_2`): embeddings, pooled ones."""
        options = {"do_classifier_free_guidance": False, "clip_skip": clip_skip, "lora_scale": lora_scale}
        embeds, _, pooled, _ = self.encode_prompt(texts, texts_2, device=self._execution_device, **options)
        return embeds, pooled

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Image.Image | list[Image.Image] | None = None,
        visual_token_ids: torch.LongTensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prior_guidance_scale: float | None = None,
        prior_generation_kwargs: dict | None = None,
        num_candidates: int | None = None,
        text_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        original_size: tuple[int, int] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **kwargs,
    ) -> UniCode2PipelineOutput | tuple:
        r"""
        Args:
            prompt (`str` or `list[str]`, *optional*): what to draw.
            image (`PIL.Image.Image` or a list, *optional*): images to redraw from their own codes.
            visual_token_ids (`torch.LongTensor` of shape `(batch_size, num_image_tokens)`, *optional*):
                Tokens to paint. Exactly one of these three and of `prompt_embeds`.
            height, width (`int`, *optional*, default to `image_size`): pixels.
            num_inference_steps (`int`, *optional*): steps of SDXL; by default the pipeline's own number.
            guidance_scale (`float`, *optional*): classifier-free guidance of SDXL, twice the work above 1; by default
                the pipeline's own number. Images are guided away from conditioning of zeros, unless
                `negative_prompt_embeds` or `negative_prompt` say something else.
            num_images_per_prompt (`int`, defaults to 1): each with tokens of its own for a prompt.
            generator (`torch.Generator` or a list of them, *optional*): makes a call repeatable. A list holds one for
                each image in their order, and an image depends on its own generator alone.
            prior_guidance_scale (`float`, *optional*): classifier-free guidance of the language model.
            prior_generation_kwargs (`dict`, *optional*): passed on to its `generate`.
            num_candidates (`int`, *optional*): images written for each. The one from which the prompt is read back best
                is painted. By default the pipeline's own number.
            text_prompt (`str` or `list[str]`, *optional*): what SDXL's own text encoders read beside the tokens; one
                text, or one for each image in front of `num_images_per_prompt`. They must have been loaded. The
                pooled embedding is then that of the text.
            prompt_embeds, pooled_prompt_embeds (`torch.Tensor`, *optional*): conditioning to paint as it is,
                `(batch_size, num_tokens, 2048)` and `(batch_size, 1280)` for SDXL.
            original_size (`tuple[int, int]`, defaults to (1024, 1024)): what SDXL is told of the image; smaller ones
                look blurred.
            latents (`torch.Tensor`, *optional*): noise to start from, `(num_images, 4, height / 8, width / 8)`.
            cross_attention_kwargs (`dict`, *optional*): of the attention layers, such as `{"scale": 0.5}` for a LoRA.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            **kwargs: everything else that [`StableDiffusionXLPipeline`] takes.
        """
        sources = {"prompt": prompt, "image": image, "visual_token_ids": visual_token_ids}
        sources["prompt_embeds"] = prompt_embeds
        check_sources(**sources)
        height, width, num_inference_steps, num_images_per_prompt = self.choose_sizes(
            height, width, num_inference_steps, num_images_per_prompt
        )
        guidance_scale = self.choose_number("guidance_scale", guidance_scale)
        generator = list(generator) if isinstance(generator, tuple) else generator
        embeds = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}
        self.check_parts(sources, "unet", "scheduler", *(() if output_type == "latent" else ("vae",)))
        self.check_arguments(text_prompt, embeds, {**kwargs, "original_size": original_size}, guidance_scale)
        self.check_call(sources, embeds, kwargs, num_images_per_prompt, text_prompt)
        prior = {"prior_guidance_scale": prior_guidance_scale, "prior_generation_kwargs": prior_generation_kwargs}
        prior["num_candidates"] = num_candidates
        visual_token_ids, prompt_embeds, pooled_prompt_embeds = self.make_condition(
            sources, pooled_prompt_embeds, num_images_per_prompt, generator, prior
        )
        options = {"clip_skip": kwargs.get("clip_skip"), "lora_scale": (cross_attention_kwargs or {}).get("scale")}
        if text_prompt is not None:
            prompt_embeds, pooled_prompt_embeds = self.join_text(
                text_prompt, num_images_per_prompt, prompt_embeds, **options
            )
        self.check_latents(latents, len(prompt_embeds), height, width)
        if guidance_scale > 1:
            self.guide(kwargs, num_images_per_prompt, prompt_embeds, pooled_prompt_embeds, **options)
        images = (
            super()
            .__call__(
                prompt_embeds=prompt_embeds,
                pooled_prompt_embeds=pooled_prompt_embeds,
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=generator,
                latents=latents,
                cross_attention_kwargs=cross_attention_kwargs,
                original_size=original_size or ORIGINAL_SIZE,
                output_type=output_type,
                return_dict=True,
                **kwargs,
            )
            .images
        )
        return UniCode2PipelineOutput(images=images, visual_token_ids=visual_token_ids) if return_dict else (images,)
