"""Text, image and interleaved generation on stock `generate`."""

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList

GENERATION_MODES = ("text", "image", "interleaved")


class InterleavedLogitsProcessor(LogitsProcessor):
    r"""
    Keeps image blocks whole: after `boi_token_id` come exactly `num_image_tokens` visual ids, then `eoi_token_id`; visual ids
    occur nowhere else.

    Args:
        visual_token_offset (`int`): first visual token id.
        num_image_tokens (`int`): visual ids per image.
        boi_token_id, eoi_token_id (`int`): ids in front of and behind an image.
        image_token_id (`int`): the placeholder id, which is never generated.
        max_length (`int`, *optional*): ids in all; an image that would not fit is not begun.
    """

    def __init__(
        self,
        visual_token_offset: int,
        num_image_tokens: int,
        boi_token_id: int,
        eoi_token_id: int,
        image_token_id: int,
        max_length: int | None = None,
    ):
        self.max_length = max_length
        self.visual_token_offset, self.num_image_tokens = visual_token_offset, num_image_tokens
        self.boi_token_id, self.eoi_token_id, self.image_token_id = boi_token_id, eoi_token_id, image_token_id

    def written(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """Visual ids since the last `boi_token_id` of each row, `(batch_size,)`; -1 outside an image block."""
        length = input_ids.shape[1]
        is_boi = input_ids == self.boi_token_id
        since = length - 1 - torch.where(is_boi, torch.arange(length, device=input_ids.device), -1).amax(-1)
        return torch.where(is_boi.any(-1) & (since <= self.num_image_tokens), since, -1)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        written = self.written(input_ids)[:, None]
        ids = torch.arange(scores.shape[-1], device=scores.device)
        text = (ids < self.visual_token_offset) & (ids != self.eoi_token_id) & (ids != self.image_token_id)
        if self.max_length is not None and input_ids.shape[1] + self.num_image_tokens + 2 > self.max_length:
            text = text & (ids != self.boi_token_id)
        image = ids >= self.visual_token_offset
        allowed = torch.where((written >= 0) & (written < self.num_image_tokens), image, text)
        allowed = torch.where(written == self.num_image_tokens, ids == self.eoi_token_id, allowed)
        return torch.where(allowed, scores, -torch.inf).masked_fill(
            (written == self.num_image_tokens) & (ids == self.eoi_token_id), 0.0
        )


class UniCode2GenerationMixin(GenerationMixin):
    """`generate` with `generation_mode` and classifier-free guidance whose two halves share one forward pass."""

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_mode: str | None = None,
        guidance_scale: float | None = None,
        **kwargs,
    ):
        r"""
        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, num_tokens)`, *optional*):
                Prompts, left-padded; the same as `input_ids`.
            generation_mode (`str`, *optional*, defaults to `"text"`):
                `"text"` writes text ids only. `"image"` writes one image: the begin-of-image id is put behind the prompt if it
                is not there. `"interleaved"` writes text and, wherever it writes the begin-of-image id, a whole image.
            guidance_scale (`float`, *optional*):
                Classifier-free guidance of image mode; 1.0 is none and costs nothing. Without the prompt, the model sees the
                begin-of-image id alone.
            **kwargs: everything that [`~GenerationMixin.generate`] takes.

        Returns:
            Prompts and what was written, `(batch_size, num_tokens)`, in text and interleaved mode. In image mode the visual token
            ids alone, `(batch_size, num_image_tokens)`. What `return_dict_in_generate` asks for comes back untouched.

        Raises:
            `ValueError`: on another mode, on guidance outside image mode.
        """
        mode = generation_mode or "text"
        if mode not in GENERATION_MODES:
            raise ValueError(f"`generation_mode` is {mode!r}; it must be one of {', '.join(GENERATION_MODES)}.")
        for name in ("prompt_lookup_num_tokens", "assistant_model"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"`{name}` makes candidates from one vocabulary; it does not work with a vocabulary that is split into "
                    f"{self.config.visual_token_offset} text ids and {self.config.codebook_config.codebook_size} visual ids."
                )
        if mode == "image":
            return self._generate_image(inputs, guidance_scale, kwargs)
        if guidance_scale not in (None, 1, 1.0):
            raise ValueError(f"`guidance_scale` is {guidance_scale} in {mode} mode; guidance works in image mode only.")
        if mode == "text":
            return super().generate(inputs, output_modality="text", **kwargs)
        processors = LogitsProcessorList([self._image_block(), *(kwargs.pop("logits_processor", None) or [])])
        return super().generate(inputs, logits_processor=processors, **kwargs)

    def _image_block(self) -> InterleavedLogitsProcessor:
        return InterleavedLogitsProcessor(
            self.config.visual_token_offset,
            self.config.num_image_tokens,
            self.config.boi_token_id,
            self.config.eoi_token_id,
            self.config.image_token_id,
        )

    def _generate_image(self, inputs: torch.Tensor | None, guidance_scale: float | None, kwargs: dict):
        """Image mode. The number of new tokens is fixed, so end-of-sequence rules and lengths of the caller do not apply."""
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        mask = kwargs.pop("attention_mask", None)
        if input_ids is None:
            embeds = kwargs.pop("inputs_embeds", None)
            if embeds is None:
                raise ValueError("Image mode needs a prompt: `input_ids` or `inputs_embeds`.")
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device) if mask is None else mask
            boi = torch.full_like(mask[:, :1], self.config.boi_token_id)
            prompt = {"inputs_embeds": torch.cat([embeds, self.get_input_embeddings()(boi).to(embeds)], 1)}
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        else:
            mask = torch.ones_like(input_ids) if mask is None else mask
            if (input_ids[:, -1] != self.config.boi_token_id).any():
                input_ids = torch.nn.functional.pad(input_ids, (0, 1), value=self.config.boi_token_id)
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            prompt = {"input_ids": input_ids}
        defaults = getattr(self.generation_config, "image_generation", None) or {}
        settings = {**defaults, **kwargs}
        guidance_scale = settings.pop("guidance_scale", None) if guidance_scale is None else guidance_scale
        settings.pop("guidance_scale", None)
        if guidance_scale not in (None, 1, 1.0):
            settings.update(visual_guidance_scale=float(guidance_scale), prompt_length=mask.shape[1])
        length = self.config.num_image_tokens
        settings.update(max_new_tokens=length, min_new_tokens=None, max_length=None)
        output = super().generate(**prompt, attention_mask=mask, output_modality="image", **settings)
        return output[:, -length:] if isinstance(output, torch.Tensor) else output

    def _get_logits_processor(
        self,
        generation_config: GenerationConfig,
        *args,
        logits_processor: LogitsProcessorList | None = None,
        model_kwargs: dict | None = None,
        **kwargs,
    ) -> LogitsProcessorList:
        """Stock processors; what only the finished generation config knows goes to those who need it."""
        for processor in logits_processor or ():
            if isinstance(processor, InterleavedLogitsProcessor):
                processor.max_length = generation_config.max_length
        draws = generation_config.do_sample and generation_config.num_beams in (None, 1)
        if draws and self.config.visual_head == "two_level" and model_kwargs.get("output_modality") == "image":
            temperature = generation_config.temperature
            model_kwargs["visual_temperature"] = 1.0 if temperature is None else temperature
        return super()._get_logits_processor(
            generation_config, *args, logits_processor=logits_processor, model_kwargs=model_kwargs, **kwargs
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        visual_guidance_scale: float | None = None,
        prompt_length: int | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> dict:
        """Stock preparation; with guidance, the batch is doubled by rows that see nothing of the prompt but its last id."""
        kwargs["inputs_embeds"] = inputs_embeds
        if visual_guidance_scale is None:
            return super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)
        if attention_mask is None:
            length = input_ids.shape[1] + (0 if inputs_embeds is None else inputs_embeds.shape[1])
            attention_mask = input_ids.new_ones(len(input_ids), length)
        hidden = attention_mask.clone()
        hidden[:, : prompt_length - 1] = 0
        attention_mask = torch.cat([attention_mask, hidden])  # (2 * batch_size, num_tokens)
        kwargs.pop("position_ids", None)
        for name in ("pixel_values", "inputs_embeds"):
            if kwargs.get(name) is not None:
                kwargs[name] = torch.cat([kwargs[name]] * 2)
        if kwargs.get("mm_encoder_outputs"):
            image = kwargs["mm_encoder_outputs"]["image"]
            twice = {
                "pooler_output": tuple(image.pooler_output) * 2,
                "image_tokens": torch.cat([image.image_tokens] * 2),
            }
            kwargs["mm_encoder_outputs"] = {"image": type(image)(**twice)}
        inputs = super().prepare_inputs_for_generation(
            torch.cat([input_ids] * 2), attention_mask=attention_mask, **kwargs
        )
        seen = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -seen.shape[1] :]
        return {**inputs, "position_ids": position_ids, "visual_guidance_scale": visual_guidance_scale}


__all__ = ["UniCode2GenerationMixin"]
