"""`UniCode2PriorPipeline`: a prompt, an image or visual tokens to the conditioning of any pipeline that takes one."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from .arguments_unicode2 import ORIGINAL_SIZE, check_sources, read_sdxl_pooled_width, to_number
from .condition_mapper_unicode2 import UniCode2ConditionMapper
from .prior_unicode2 import UniCode2PriorMixin
from .repository_unicode2 import UniCode2RepositoryMixin

# Where the configuration of a decoder says how wide its conditioning is.
WIDTHS = (
    "joint_attention_dim",
    "caption_channels",
    "cap_feat_dim",
    "text_embed_dim",
    "text_dim",
    "text_in_dim",
    "in_text_dim",
    "context_in_dim",
    "c_cond",
    "cross_attention_dim",
)
# Where a pipeline has its decoder: of two, the second may paint alone.
DECODERS = ("transformer", "unet", "transformer_2", "prior")
MASKS = ("prompt_attention_mask", "prompt_embeds_mask")
# Pipelines that take a list of embeddings, one `(num_tokens, width)` for each image.
LISTS = ("ZImage",)
# What further conditioning of a prompt is called in the signature of a call.
FURTHER = re.compile(r"prompt_(embeds|attention_mask)|^(encoder_)?attention_mask$|^encoder_hidden_states$")
# Pipelines that take `prompt_embeds` of forms that their signature does not tell.
OTHER_FORMS = {
    "Krea2Pipeline": "embeddings of several layers of its text encoder",
    "ZImageOmniPipeline": "several embeddings for each prompt",
}


@dataclass
class UniCode2PriorOutput(BaseOutput):
    r"""
    Args:
        prompt_embeds (`torch.Tensor` of shape `(num_images, num_tokens, width)`): what a decoder is conditioned on.
        pooled_prompt_embeds (`torch.Tensor` of shape `(num_images, pooled_width)`): the same for all of an image;
            `None` when the mapper makes none.
        visual_token_ids (`torch.LongTensor` of shape `(num_images, num_image_tokens)`): what they were made from.
    """

    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor | None
    visual_token_ids: torch.LongTensor

    def check_widths(self, pipeline: DiffusionPipeline, decoder, accepted: Mapping) -> None:
        """Raises `ValueError` when a decoder reads conditioning of another width."""
        widths = {"prompt_embeds": find_width(decoder.config)} if decoder else {}
        if decoder and "pooled_prompt_embeds" in accepted:
            is_refiner = pipeline.config.get("requires_aesthetics_score", False)
            widths["pooled_prompt_embeds"] = find_pooled_width(decoder.config, 5 if is_refiner else 6)
        for key, width in widths.items():
            if width not in (None, getattr(self, key).shape[-1]):
                raise ValueError(
                    f"{type(pipeline).__name__} takes `{key}` {width} wide, and the mapper makes "
                    f"{getattr(self, key).shape[-1]}; take a mapper for this decoder."
                )

    def for_pipeline(self, pipeline: DiffusionPipeline) -> dict:
        r"""
        The arguments of a pipeline's call, under the names and in the forms that it has them, and on its device.

        These are `prompt_embeds`, the pooled ones, a mask of ones where it takes a mask, and the same of zeros as the
        negative prompt where it takes one.

        Raises:
            `ValueError`: on a pipeline that takes no conditioning of these forms, or of another width.
        """
        accepted = inspect.signature(type(pipeline).__call__).parameters
        name = type(pipeline).__name__
        check_form(name, accepted)
        parts = (getattr(pipeline, part, None) for part in DECODERS)
        decoder = next((part for part in parts if part is not None), None)
        if "pooled_prompt_embeds" in accepted and self.pooled_prompt_embeds is None:
            raise ValueError(f"{name} takes `pooled_prompt_embeds`, which this mapper does not make (`pooled_dim`).")
        self.check_widths(pipeline, decoder, accepted)
        place = {} if decoder is None else {"device": pipeline._execution_device, "dtype": decoder.dtype}
        made = {"prompt_embeds": self.prompt_embeds, "pooled_prompt_embeds": self.pooled_prompt_embeds}
        made = {key: value.to(**place) for key, value in made.items() if key in accepted}
        mask = torch.ones(self.prompt_embeds.shape[:2], dtype=torch.bool, device=made["prompt_embeds"].device)
        negatives = {f"negative_{key}": torch.zeros_like(value) for key, value in made.items()}
        masks = {key: mask for key in MASKS} | {f"negative_{key}": mask for key in MASKS}
        made |= {key: value for key, value in {**negatives, **masks}.items() if key in accepted}
        if "negative_prompt" in accepted and accepted["negative_prompt"].default is not None:
            # An empty text would be another one beside the negative conditioning
            made["negative_prompt"] = None
        if "original_size" in accepted:
            # What the mapper was trained with; stock SDXL would say the size of the painting
            made["original_size"] = ORIGINAL_SIZE
        if name.startswith(LISTS):
            made = {key: list(value) for key, value in made.items()}
        return made


def check_form(name: str, accepted: Mapping) -> None:
    """Raises `ValueError` when a pipeline with these parameters of its call takes no conditioning of the three forms.

    Args:
        name: its class.
        accepted: by their names.
    """
    known = ("prompt_embeds", "pooled_prompt_embeds", *MASKS)
    further = [key for key in accepted if key.removeprefix("negative_") not in known and FURTHER.search(key)]
    if "prompt_embeds" not in accepted:
        what = "takes no `prompt_embeds`"
    elif further or name in OTHER_FORMS:
        what = f"needs {OTHER_FORMS.get(name) or f'`{further[0]}` beside `prompt_embeds`'}, which nothing here makes"
    else:
        return
    raise ValueError(
        f"{name} {what}. Supported are pipelines that take embeddings alone, with a mask or with pooled ones: those of "
        "FLUX, SDXL, Chroma, Z-Image, Qwen-Image, SANA, Stable Diffusion and others."
    )


def find_width(config: dict) -> int | None:
    """How wide the conditioning of a decoder is, if its configuration says so."""
    # Kandinsky 3 projects its texts without a type that says so
    if config.get("encoder_hid_dim") and config.get("encoder_hid_dim_type", "text_proj") == "text_proj":
        return config["encoder_hid_dim"]
    width = next((config[key] for key in WIDTHS if config.get(key)), None)
    return width if isinstance(width, int) else None


def find_pooled_width(config: dict, num_told: int = 6) -> int | None:
    """How wide its pooled conditioning is, if its configuration says so. See `read_sdxl_pooled_width`."""
    if config.get("addition_embed_type") == "text_time":
        return read_sdxl_pooled_width(config, num_told)
    return config.get("pooled_projection_dim")


class UniCode2PriorPipeline(UniCode2RepositoryMixin, UniCode2PriorMixin, DiffusionPipeline):
    r"""
    Everything in front of a decoder (sections 3.4 and 3.5): the language model writes the tokens of an image, and the
    condition mapper turns them into what a text encoder would give.

    ```python
    condition = prior("a red cat").for_pipeline(pipe)
    pipe(**condition, height=512, width=512).images[0]
    ```

    Args:
        vision_language_encoder (`UniCode2ForConditionalGeneration`): writes visual tokens, and reads them off images.
        processor (`UniCode2Processor`): prompts and images to its inputs.
        condition_mapper (`UniCode2ConditionMapper`): visual tokens to the conditioning of the decoder it was made for.
        num_candidates (`int`, *optional*, defaults to 1): images that the language model writes for a prompt, unless
            a call names another number. The one from which it reads the prompt back best is taken.
    """

    model_cpu_offload_seq = "vision_language_encoder->condition_mapper"

    def __init__(
        self,
        vision_language_encoder: PreTrainedModel,
        processor: ProcessorMixin,
        condition_mapper: UniCode2ConditionMapper,
        num_candidates: int = 1,
    ):
        super().__init__()
        self.register_prior(vision_language_encoder, processor, condition_mapper, num_candidates=num_candidates)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Image.Image | list[Image.Image] | None = None,
        visual_token_ids: torch.LongTensor | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prior_guidance_scale: float | None = None,
        prior_generation_kwargs: dict | None = None,
        num_candidates: int | None = None,
        return_dict: bool = True,
    ) -> UniCode2PriorOutput | tuple:
        r"""
        Args:
            prompt (`str` or `list[str]`, *optional*): what to draw.
            image (`PIL.Image.Image` or a list, *optional*): images to redraw from their own codes.
            visual_token_ids (`torch.LongTensor` of shape `(batch_size, num_image_tokens)`, *optional*):
                Tokens to paint. Exactly one of these three.
            num_images_per_prompt (`int`, defaults to 1): each with tokens of its own for a prompt.
            generator (`torch.Generator` or a list of them, *optional*): makes a call repeatable, see
                [`UniCode2FluxPipeline`].
            prior_guidance_scale (`float`, *optional*): classifier-free guidance of the language model.
            prior_generation_kwargs (`dict`, *optional*): passed on to its `generate`.
            num_candidates (`int`, *optional*): images written for each, of which one is kept; by default the
                pipeline's own number.

        Returns:
            [`UniCode2PriorOutput`], or with `return_dict=False` its values as a tuple.
        """
        sources = {"prompt": prompt, "image": image, "visual_token_ids": visual_token_ids}
        check_sources(**sources)
        self.check_parts(sources)
        num_images_per_prompt = to_number("num_images_per_prompt", num_images_per_prompt, int, 1)
        generator = list(generator) if isinstance(generator, tuple) else generator
        prior = {"prior_guidance_scale": prior_guidance_scale, "prior_generation_kwargs": prior_generation_kwargs}
        prior["num_candidates"] = num_candidates
        sources["prompt_embeds"] = None
        ids, prompt_embeds, pooled = self.make_condition(sources, None, num_images_per_prompt, generator, prior)
        if not return_dict:
            return prompt_embeds, pooled, ids
        return UniCode2PriorOutput(prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled, visual_token_ids=ids)
