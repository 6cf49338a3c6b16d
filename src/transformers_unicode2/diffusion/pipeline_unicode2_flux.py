"""`UniCode2FluxPipeline`: a prompt, an image or visual tokens to an image, painted by a frozen FLUX."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    ProcessorMixin,
    T5EncoderModel,
    T5TokenizerFast,
)

from .arguments_unicode2 import (
    NEGATIVE_TEXTS,
    check_adapters,
    check_latents,
    check_negatives,
    check_pairs,
    check_sources,
    check_texts,
    to_number,
)
from .condition_mapper_unicode2 import UniCode2ConditionMapper
from .prior_unicode2 import UniCode2PipelineOutput, UniCode2PriorMixin
from .repository_unicode2 import UniCode2RepositoryMixin


class UniCode2FluxPipeline(UniCode2RepositoryMixin, UniCode2PriorMixin, FluxPipeline):
    r"""
    FLUX conditioned on visual tokens (sections 3.4 and 3.5). The language model writes the tokens of an image, the
    condition mapper turns them into what the text encoders would give, and FLUX paints. The text encoders are not
    needed: a FLUX repository loads with `text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None`.

    Args:
        vision_language_encoder (`UniCode2ForConditionalGeneration`): writes visual tokens, and reads them off images.
        processor (`UniCode2Processor`): prompts and images to its inputs.
        condition_mapper (`UniCode2ConditionMapper`): visual tokens to conditioning.
        image_size (`int`, *optional*, defaults to 512): side of the images in pixels, unless a call names another.
        num_candidates (`int`, *optional*, defaults to 1): images that the language model writes for a prompt, unless
            a call names another number. The one from which it reads the prompt back best is painted.
        true_cfg_scale (`float`, *optional*, defaults to 1.0): classifier-free guidance of FLUX, unless a call names
            another; 1 is none.
        num_inference_steps (`int`, *optional*, defaults to 50): steps of FLUX, unless a call names another number.
        scheduler, vae, transformer, text_encoder, tokenizer, text_encoder_2, tokenizer_2, image_encoder,
            feature_extractor: as in [`FluxPipeline`].
    """

    model_cpu_offload_seq = "vision_language_encoder->condition_mapper->text_encoder->text_encoder_2->transformer->vae"
    _optional_components = [
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "image_encoder",
        "feature_extractor",
    ]

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        transformer: FluxTransformer2DModel,
        vision_language_encoder: PreTrainedModel,
        processor: ProcessorMixin,
        condition_mapper: UniCode2ConditionMapper,
        text_encoder: CLIPTextModel = None,
        tokenizer: CLIPTokenizer = None,
        text_encoder_2: T5EncoderModel = None,
        tokenizer_2: T5TokenizerFast = None,
        image_encoder: CLIPVisionModelWithProjection = None,
        feature_extractor: CLIPImageProcessor = None,
        image_size: int = 512,
        num_candidates: int = 1,
        true_cfg_scale: float = 1.0,
        num_inference_steps: int = 50,
    ):
        adapter_parts = {"image_encoder": image_encoder, "feature_extractor": feature_extractor}
        super().__init__(
            scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2, transformer, **adapter_parts
        )
        numbers = {"image_size": image_size, "num_candidates": num_candidates, "true_cfg_scale": true_cfg_scale}
        numbers["num_inference_steps"] = num_inference_steps
        self.register_prior(vision_language_encoder, processor, condition_mapper, **numbers)

    decoder_part = "transformer"

    @property
    def size_factor(self) -> int:
        """What divides the height and the width of an image, in pixels: FLUX packs squares of 2 x 2 latents."""
        return 2 * self.vae_scale_factor

    @staticmethod
    def read_widths(config: dict) -> dict[str, int]:
        return {"output_dim": config["joint_attention_dim"], "pooled_dim": config["pooled_projection_dim"]}

    def check_arguments(self, text_prompt, embeds: dict, kwargs: dict, true_cfg_scale: float) -> None:
        """Raises `ValueError` before any work on what would fail after it, and on arguments that nothing would read.

        `check_inputs` is [`FluxPipeline`]'s own.
        """
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
                f"`{texts[0]}` needs FLUX's own text encoders, which this pipeline was loaded without; load them or "
                "leave it out."
            )
        negatives = [name for name in given if name.startswith("negative_")]
        if negatives and true_cfg_scale == 1:
            raise ValueError(f"`{negatives[0]}` has no effect without guidance; set `true_cfg_scale` above 1.")
        if "max_sequence_length" in given and not texts:
            raise ValueError("`max_sequence_length` is of texts that FLUX reads, and none is given; leave it out.")
        check_adapters(given, getattr(self.transformer, "encoder_hid_proj", None), self.image_encoder)

    def check_latents(self, latents, num_images: int, height: int, width: int) -> None:
        """Raises `ValueError` unless latents are those of `num_images` images, packed as FLUX has them."""
        side = self.size_factor
        shape = (num_images, (height // side) * (width // side), self.transformer.config.in_channels)
        check_latents(latents, shape, height, width)

    def encode_texts(
        self,
        texts: list[str],
        texts_2: list[str] | None = None,
        max_sequence_length: int | None = None,
        lora_scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the text encoders of FLUX make of texts (the second one of `texts_2`): embeddings, pooled ones."""
        options = {"device": self._execution_device, "max_sequence_length": max_sequence_length or 512}
        options["lora_scale"] = lora_scale
        return self.encode_prompt(texts, texts_2, **options)[:2]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Image.Image | list[Image.Image] | None = None,
        visual_token_ids: torch.LongTensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prior_guidance_scale: float | None = None,
        prior_generation_kwargs: dict | None = None,
        num_candidates: int | None = None,
        true_cfg_scale: float | None = None,
        text_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        joint_attention_kwargs: dict | None = None,
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
            num_inference_steps (`int`, *optional*): steps of FLUX; by default the pipeline's own number.
            guidance_scale (`float`, defaults to 3.5): of FLUX, as in the paper.
            num_images_per_prompt (`int`, defaults to 1): each with tokens of its own for a prompt.
            generator (`torch.Generator` or a list of them, *optional*): makes a call repeatable. A list holds one for
                each image in their order, and an image depends on its own generator alone.
            prior_guidance_scale (`float`, *optional*): classifier-free guidance of the language model.
            prior_generation_kwargs (`dict`, *optional*): passed on to its `generate`.
            num_candidates (`int`, *optional*): images written for each. The one from which the prompt is read back best
                is painted. By default the pipeline's own number.
            true_cfg_scale (`float`, *optional*): classifier-free guidance of FLUX, twice the work above 1; by default
                the pipeline's own number. Needs a FLUX trained with prompt dropout: it is guided away from a prompt of
                zeros, unless `negative_prompt_embeds` or `negative_prompt` say something else. The paper has none.
            text_prompt (`str` or `list[str]`, *optional*): what FLUX's own text encoders read beside the tokens; one
                text, or one for each image in front of `num_images_per_prompt`. They must have been loaded. The
                pooled embedding is then that of the text.
            prompt_embeds, pooled_prompt_embeds (`torch.Tensor`, *optional*): conditioning to paint as it is,
                `(batch_size, num_tokens, 4096)` and `(batch_size, 768)` for FLUX.1.
            latents (`torch.Tensor`, *optional*): noise to start from, packed as FLUX has it, `(num_images, num_patches,
                64)` for FLUX.1.
            joint_attention_kwargs (`dict`, *optional*): of the attention layers, such as `{"scale": 0.5}` for a LoRA.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            **kwargs: everything else that [`FluxPipeline`] takes.
        """
        sources = {"prompt": prompt, "image": image, "visual_token_ids": visual_token_ids}
        sources["prompt_embeds"] = prompt_embeds
        check_sources(**sources)
        height, width, num_inference_steps, num_images_per_prompt = self.choose_sizes(
            height, width, num_inference_steps, num_images_per_prompt
        )
        guidance_scale = to_number("guidance_scale", guidance_scale, float, 0)
        true_cfg_scale = self.choose_number("true_cfg_scale", true_cfg_scale)
        generator = list(generator) if isinstance(generator, tuple) else generator
        embeds = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}
        self.check_parts(sources, "transformer", "scheduler", *(() if output_type == "latent" else ("vae",)))
        self.check_arguments(text_prompt, embeds, kwargs, true_cfg_scale)
        self.check_call(sources, embeds, kwargs, num_images_per_prompt, text_prompt)
        prior = {"prior_guidance_scale": prior_guidance_scale, "prior_generation_kwargs": prior_generation_kwargs}
        prior["num_candidates"] = num_candidates
        visual_token_ids, prompt_embeds, pooled_prompt_embeds = self.make_condition(
            sources, pooled_prompt_embeds, num_images_per_prompt, generator, prior
        )
        length = {"max_sequence_length": kwargs.get("max_sequence_length")}
        length["lora_scale"] = (joint_attention_kwargs or {}).get("scale")
        if text_prompt is not None:
            prompt_embeds, pooled_prompt_embeds = self.join_text(
                text_prompt, num_images_per_prompt, prompt_embeds, **length
            )
        self.check_latents(latents, len(prompt_embeds), height, width)
        if true_cfg_scale > 1:
            self.guide(kwargs, num_images_per_prompt, prompt_embeds, pooled_prompt_embeds, **length)
        images = (
            super()
            .__call__(
                prompt_embeds=prompt_embeds,
                pooled_prompt_embeds=pooled_prompt_embeds,
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                true_cfg_scale=true_cfg_scale,
                generator=generator,
                latents=latents,
                joint_attention_kwargs=joint_attention_kwargs,
                output_type=output_type,
                return_dict=True,
                **kwargs,
            )
            .images
        )
        return UniCode2PipelineOutput(images=images, visual_token_ids=visual_token_ids) if return_dict else (images,)
