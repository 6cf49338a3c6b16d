"""`UniCode2FluxPipeline`: a prompt, an image or visual tokens to an image, painted by a frozen FLUX."""

import math
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.utils import BaseOutput
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

from .condition_mapper_unicode2 import UniCode2ConditionMapper

MAX_SCORES = 2**26  # of text ids, held at a time when prompts are read back: 256 MiB in float32


@dataclass
class UniCode2PipelineOutput(BaseOutput):
    r"""
    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): the images, as `output_type` says.
        visual_token_ids (`torch.LongTensor` of shape `(num_images, num_image_tokens)`): what they were painted from.
    """

    images: list | torch.Tensor
    visual_token_ids: torch.LongTensor


class UniCode2FluxPipeline(FluxPipeline):
    r"""
    FLUX conditioned on visual tokens (sections 3.4 and 3.5). The language model writes the tokens of an image, the condition
    mapper turns them into what the text encoders would give, FLUX paints. Without the text encoders, which are not needed, a
    FLUX repository loads with `text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None`.

    Args:
        vision_language_encoder (`UniCode2ForConditionalGeneration`): writes visual tokens, and reads them off images.
        processor (`UniCode2Processor`): prompts and images to its inputs.
        condition_mapper (`UniCode2ConditionMapper`): visual tokens to conditioning.
        image_size (`int`, *optional*, defaults to 512): side of the images in pixels when a call names none.
        num_candidates (`int`, *optional*, defaults to 1): images that the language model writes for a prompt when a call names no
            number; the one from which it reads the prompt back best is painted.
        true_cfg_scale (`float`, *optional*, defaults to 1.0): classifier-free guidance of FLUX when a call names none; 1 is without.
        scheduler, vae, transformer, text_encoder, tokenizer, text_encoder_2, tokenizer_2, image_encoder, feature_extractor:
            as in [`FluxPipeline`].
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
    _lora_loadable_modules = ["transformer"]

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
    ):
        super().__init__(
            scheduler,
            vae,
            text_encoder,
            tokenizer,
            text_encoder_2,
            tokenizer_2,
            transformer,
            image_encoder,
            feature_extractor,
        )
        self.register_modules(
            vision_language_encoder=vision_language_encoder, processor=processor, condition_mapper=condition_mapper
        )
        self.register_to_config(image_size=image_size, num_candidates=num_candidates, true_cfg_scale=true_cfg_scale)

    @torch.no_grad()
    def generate_visual_tokens(
        self,
        prompt: str | list[str],
        generator: torch.Generator | list[torch.Generator] | None = None,
        prior_guidance_scale: float | None = None,
        prior_generation_kwargs: dict | None = None,
        num_candidates: int | None = None,
    ) -> torch.LongTensor:
        r"""
        Lets the language model write an image for each prompt: visual token ids `(batch_size, num_image_tokens)`.

        Of `num_candidates` images (the pipeline's number by default) it keeps the one that scores best, see `score_visual_tokens`. The
        random numbers come from `generator`, the (first) one of the call; the global generator is left as it was.

        Raises:
            `ValueError`: on an empty prompt, and on less than one candidate.
        """
        num_candidates = self.config.num_candidates if num_candidates is None else num_candidates
        if not isinstance(num_candidates, int) or num_candidates < 1:
            raise ValueError(f"`num_candidates` is {num_candidates!r}; it must be a whole number of at least 1.")
        for name in ("num_return_sequences", "return_dict_in_generate"):
            if num_candidates > 1 and (prior_generation_kwargs or {}).get(name) not in (None, False, 1):
                raise ValueError(
                    f"`{name}` does not go with {num_candidates} candidates a prompt; set `num_candidates` to 1."
                )
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        empty = [i for i, text in enumerate(prompts) if not text.strip()]
        if empty or not prompts:
            raise ValueError(f"Prompt {empty[0] + 1 if empty else 0} of {len(prompts)} is empty; say what to draw.")
        prompts = [text for text in prompts for _ in range(num_candidates)]
        chats = [[{"role": "user", "content": text}] for text in prompts]
        texts = self.processor.apply_chat_template(chats, add_generation_prompt=True)
        device = self._execution_device
        inputs = self.processor(text=texts, padding=True, padding_side="left", return_tensors="pt").to(device)
        first = generator[0] if isinstance(generator, list) else generator
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(
            devices=devices, enabled=first is not None, device_type=device.type if devices else "cuda"
        ):
            if first is not None:
                torch.manual_seed(torch.randint(2**62, (), generator=first, device=first.device).item())
            written = self.vision_language_encoder.generate(
                **inputs,
                generation_mode="image",
                guidance_scale=prior_guidance_scale,
                **(prior_generation_kwargs or {}),
            )
        if num_candidates == 1:
            return written
        best = self.score_visual_tokens(prompts, written).unflatten(0, (-1, num_candidates)).argmax(-1)
        return written.unflatten(0, (-1, num_candidates))[torch.arange(len(best), device=best.device), best]

    @torch.no_grad()
    def score_visual_tokens(self, prompt: str | list[str], visual_token_ids: torch.LongTensor) -> torch.Tensor:
        r"""
        How well the language model reads each prompt back from its image: the log-likelihood of the prompt, in nats, as the answer to
        the question for a caption, float32 `(batch_size,)`. `visual_token_ids` is `(batch_size, num_image_tokens)`.

        Raises:
            `ValueError`: when there are not as many prompts as images, or an image has another number of ids.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if len(prompts) != len(visual_token_ids):
            raise ValueError(f"{len(prompts)} prompts do not fit {len(visual_token_ids)} images of visual tokens.")
        question = self.processor.image_token + self.processor.caption_prompt
        rows = []
        for text, ids in zip(prompts, visual_token_ids.tolist()):
            chat = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
            rows.append(self.processor.encode_turns(chat, ids))
        scores = []
        longest, size = max(len(ids) for ids, _ in rows), self.vision_language_encoder.config.visual_token_offset
        step = max(1, MAX_SCORES // ((longest - visual_token_ids.shape[1]) * size))
        for start in range(0, len(rows), step):
            scores.append(self.score_rows(rows[start : start + step]))
        return torch.cat(scores)

    def score_rows(self, rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        """Log-likelihood of what is marked in ids, see `UniCode2Processor.encode_turns`; float32 `(num_rows,)`."""

        def pad_left(values: list[list[int]]) -> torch.Tensor:
            turned = [torch.tensor(value[::-1]) for value in values]
            padded = torch.nn.utils.rnn.pad_sequence(turned, batch_first=True)
            return padded.flip(-1).to(self._execution_device)

        input_ids, answer = (pad_left(values) for values in zip(*rows))
        attention_mask = pad_left([[1] * len(ids) for ids, _ in rows])
        length = answer.shape[1] - answer.any(0).nonzero()[0].item()  # from the first answer to the end
        logits = self.vision_language_encoder(
            input_ids, attention_mask=attention_mask, output_modality="text", logits_to_keep=length + 1, use_cache=False
        ).logits[:, :-1]
        answer = answer[:, -length:].bool()
        targets = input_ids[:, -length:].where(answer, 0)
        log_likelihood = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]  # (num_rows, length)
        # ids that frame an image, if a prompt holds them, are no text
        return log_likelihood.where(answer & log_likelihood.isfinite(), 0.0).sum(-1)

    @torch.no_grad()
    def encode_visual_tokens(self, visual_token_ids: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Visual token ids `(batch_size, num_image_tokens)` to `prompt_embeds` and `pooled_prompt_embeds` (Eq. 6 and 9).

        Raises:
            `ValueError`: on ids outside the visual vocabulary, or that are not whole images.
        """
        config = self.vision_language_encoder.config
        length = config.num_image_tokens
        if not isinstance(visual_token_ids, torch.Tensor) or visual_token_ids.dtype not in (torch.int64, torch.int32):
            kind = getattr(visual_token_ids, "dtype", type(visual_token_ids).__name__)
            raise ValueError(f"`visual_token_ids` is {kind}; it must be a tensor of int64.")
        if visual_token_ids.ndim != 2 or visual_token_ids.shape[1] != length or not len(visual_token_ids):
            raise ValueError(
                f"`visual_token_ids` has shape {tuple(visual_token_ids.shape)}; it must be (batch_size, {length}), {length} ids an image."
            )
        low, high = config.visual_token_offset, config.visual_token_offset + config.codebook_config.codebook_size - 1
        if visual_token_ids.min() < low or visual_token_ids.max() > high:
            raise ValueError(
                f"`visual_token_ids` runs from {visual_token_ids.min().item()} to {visual_token_ids.max().item()}; "
                f"visual token ids are {low} to {high}."
            )
        codes = visual_token_ids.to(self._execution_device) - low
        embeds = self.vision_language_encoder.model.visual_embeddings(
            codes
        )  # (batch_size, num_image_tokens, visual_dim)
        condition = self.condition_mapper(embeds)
        dtype = self.transformer.dtype
        return condition.prompt_embeds.to(dtype), condition.pooled_prompt_embeds.to(dtype)

    def check_arguments(
        self,
        prompt,
        image,
        num_images_per_prompt: int,
        num_inference_steps: int,
        height,
        width,
        true_cfg_scale: float,
        kwargs: dict,
    ) -> None:
        """Raises `ValueError` before any work on what would fail after it; [`FluxPipeline`] has a `check_inputs` of its own."""
        if prompt is not None and not isinstance(prompt, str):
            wrong = (
                prompt
                if not isinstance(prompt, (list, tuple))
                else next((t for t in prompt if not isinstance(t, str)), "")
            )
            if not isinstance(wrong, str):
                raise ValueError(f"`prompt` holds {type(wrong).__name__}; it must be a string or a list of strings.")
        if isinstance(image, (list, tuple)) and not image:
            raise ValueError("`image` is an empty list; give at least one image.")
        counts = {"num_images_per_prompt": num_images_per_prompt, "height": height, "width": width}
        for name, value in (counts | {"num_inference_steps": num_inference_steps}).items():
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` is {value!r}; it must be a whole number of at least 1.")
        if not isinstance(true_cfg_scale, (int, float)) or not 1 <= true_cfg_scale < math.inf:
            raise ValueError(
                f"`true_cfg_scale` is {true_cfg_scale!r}; it must be a number of at least 1, which is without guidance."
            )
        pair = [kwargs.get(name) is None for name in ("negative_prompt_embeds", "negative_pooled_prompt_embeds")]
        if pair[0] != pair[1]:
            raise ValueError("Give `negative_prompt_embeds` and `negative_pooled_prompt_embeds`, or neither.")
        texts = [name for name in ("negative_prompt", "negative_prompt_2") if kwargs.get(name) is not None]
        if texts and (self.text_encoder is None or self.text_encoder_2 is None):
            raise ValueError(
                f"`{texts[0]}` needs FLUX's own text encoders, which this pipeline was loaded without; load them or leave it out."
            )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Image.Image | list[Image.Image] | None = None,
        visual_token_ids: torch.LongTensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prior_guidance_scale: float | None = None,
        prior_generation_kwargs: dict | None = None,
        num_candidates: int | None = None,
        true_cfg_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **kwargs,
    ) -> UniCode2PipelineOutput | tuple:
        r"""
        Args:
            prompt (`str` or `list[str]`, *optional*): what to draw.
            image (`PIL.Image.Image` or a list, *optional*): images to redraw from their own codes.
            visual_token_ids (`torch.LongTensor` of shape `(batch_size, num_image_tokens)`, *optional*): tokens to paint.
                Exactly one of these three.
            height, width (`int`, *optional*, default to `image_size`): pixels.
            num_inference_steps (`int`, defaults to 50) and guidance_scale (`float`, defaults to 3.5): of FLUX, as in the paper.
            num_images_per_prompt (`int`, defaults to 1): each with tokens of its own for a prompt.
            generator (`torch.Generator` or a list of them, *optional*): makes a call repeatable.
            prior_guidance_scale (`float`, *optional*): classifier-free guidance of the language model.
            prior_generation_kwargs (`dict`, *optional*): passed on to its `generate`.
            num_candidates (`int`, *optional*): images written for each, of which the one is painted from which the prompt is read back
                best; by default the pipeline's own number.
            true_cfg_scale (`float`, *optional*): classifier-free guidance of FLUX, twice the work above 1; by default the pipeline's own
                number. What FLUX is guided away from is a prompt of zeros, on which it must have learnt, unless `negative_prompt_embeds` or
                `negative_prompt` say something else. The paper has none.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            **kwargs: everything else that [`FluxPipeline`] takes.
        """
        given = [
            name
            for name, value in (("prompt", prompt), ("image", image), ("visual_token_ids", visual_token_ids))
            if value is not None
        ]
        if len(given) != 1:
            raise ValueError(
                f"Give exactly one of `prompt`, `image` and `visual_token_ids`; got {' and '.join(given) or 'none'}."
            )
        if true_cfg_scale is None:
            true_cfg_scale = self.config.true_cfg_scale
        self.check_arguments(
            *(prompt, image, num_images_per_prompt, num_inference_steps, height, width, true_cfg_scale, kwargs)
        )
        # 1. Tokens
        if prompt is not None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
            visual_token_ids = self.generate_visual_tokens(
                prompts, generator, prior_guidance_scale, prior_generation_kwargs, num_candidates
            )
        else:
            if image is not None:
                encoded = self.processor(images=image, return_tensors="pt").to(self._execution_device)
                visual_token_ids = encoded.get("visual_token_ids")  # by a quantizer that is attached to the processor
                if visual_token_ids is None:
                    visual_token_ids = self.vision_language_encoder.get_image_tokens(encoded["pixel_values"])
        # 2. Conditioning
        prompt_embeds, pooled_prompt_embeds = self.encode_visual_tokens(visual_token_ids)
        if prompt is None:
            visual_token_ids, prompt_embeds, pooled_prompt_embeds = (
                value.repeat_interleave(num_images_per_prompt, dim=0)
                for value in (visual_token_ids, prompt_embeds, pooled_prompt_embeds)
            )
        # 3. Painting
        negatives = ("negative_prompt", "negative_prompt_embeds")
        if true_cfg_scale > 1 and all(kwargs.get(name) is None for name in negatives):
            kwargs["negative_prompt_embeds"] = torch.zeros_like(prompt_embeds)
            kwargs["negative_pooled_prompt_embeds"] = torch.zeros_like(pooled_prompt_embeds)
        images = (
            super()
            .__call__(
                prompt_embeds=prompt_embeds,
                pooled_prompt_embeds=pooled_prompt_embeds,
                height=height or self.config.image_size,
                width=width or self.config.image_size,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                true_cfg_scale=true_cfg_scale,
                generator=generator,
                output_type=output_type,
                return_dict=True,
                **kwargs,
            )
            .images
        )
        return UniCode2PipelineOutput(images=images, visual_token_ids=visual_token_ids) if return_dict else (images,)
