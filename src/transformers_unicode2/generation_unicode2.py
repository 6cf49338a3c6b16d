"""Text, image and interleaved generation on stock `generate`."""

import copy
import numbers

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
)
from transformers.cache_utils import Cache

GENERATION_MODES = ("text", "image", "interleaved")
# What a plan has in common with the image after it: the inputs, and how ids are drawn.
SHARED_WITH_PLAN = (
    *("pixel_values", "mm_encoder_outputs"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"),
)
# Options whose code takes ids of the prompt, or of another model, for places in the scores.
TWO_VOCABULARIES = (
    "prompt_lookup_num_tokens",
    "assistant_model",
    "assistant_early_exit",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
)


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
        self.max_length, self.checked = max_length, False
        self.visual_token_offset, self.num_image_tokens = visual_token_offset, num_image_tokens
        self.boi_token_id, self.eoi_token_id, self.image_token_id = boi_token_id, eoi_token_id, image_token_id

    def written(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """Visual ids since the last `boi_token_id` of each row, `(batch_size,)`; -1 outside an image block."""
        length = input_ids.shape[1]
        if length == 0:  # a prompt of embeddings
            return input_ids.new_full(input_ids.shape[:1], -1)
        is_boi = input_ids == self.boi_token_id
        since = length - 1 - torch.where(is_boi, torch.arange(length, device=input_ids.device), -1).amax(-1)
        return torch.where(is_boi.any(-1) & (since <= self.num_image_tokens), since, -1)

    def check_room(self, input_ids: torch.LongTensor, written: torch.LongTensor) -> None:
        """Raises `ValueError` when a prompt ends inside an image that `max_length` ids cannot finish."""
        self.checked = True
        missing = torch.where(written >= 0, self.num_image_tokens - written + 1, 0).amax().item()
        if self.max_length is not None and input_ids.shape[1] + missing > self.max_length:
            raise ValueError(
                f"The prompt ends inside an image that needs {missing} more tokens; `max_new_tokens` leaves "
                f"{self.max_length - input_ids.shape[1]}."
            )

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        written = self.written(input_ids)[:, None]
        if not self.checked:
            self.check_room(input_ids, written)
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


class TextLogitsProcessorList(LogitsProcessorList):
    """Processors of scores over the text ids alone: visual ids of the prompt look like one that is never written."""

    def __init__(self, processors: list, visual_token_offset: int, unwritten_id: int):
        super().__init__(processors)
        self.visual_token_offset, self.unwritten_id = visual_token_offset, unwritten_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.FloatTensor:
        text_ids = input_ids.masked_fill(input_ids >= self.visual_token_offset, self.unwritten_id)
        return super().__call__(text_ids, scores, **kwargs)


class UniCode2GenerationMixin(GenerationMixin):
    """`generate` with `generation_mode` and classifier-free guidance whose two halves share one forward pass."""

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        generation_mode: str | None = None,
        guidance_scale: float | None = None,
        max_plan_tokens: int | None = None,
        **kwargs,
    ):
        r"""
        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, num_tokens)`, *optional*):
                Prompts, left-padded; the same as `input_ids`.
            generation_config (`GenerationConfig`, *optional*):
                Takes the place of the checkpoint's, in image mode of its `image_generation` as well.
            generation_mode (`str`, *optional*, defaults to `"text"`):
                `"text"` writes text ids only. `"image"` writes one image: the begin-of-image id is put behind the prompt if it
                is not there. `"interleaved"` writes text and, wherever it writes the begin-of-image id, a whole image.
            guidance_scale (`float`, *optional*):
                Classifier-free guidance of image mode; 1.0 is none and costs nothing. Without the prompt, the model sees the
                begin-of-image id alone.
            max_plan_tokens (`int`, *optional*):
                In image mode, lets the model write a plan first: text of so many ids at most, until it begins the image
                by itself. The image sees prompt and plan. 0 is no plan, and so is a prompt that ends with the begin-of-image id.
                Images of one prompt (`num_return_sequences`) share a plan. Of the settings, a plan follows those of sampling and
                the generation config. Interleaved mode returns plan and image alike.
            **kwargs: everything that [`~GenerationMixin.generate`] takes.

        Returns:
            Prompts and what was written, `(batch_size, num_tokens)`, in text and interleaved mode. In image mode the visual token
            ids alone, `(batch_size, num_image_tokens)`. What `return_dict_in_generate` asks for comes back untouched: its sequences
            begin with the prompt, and the plan if there is one, left-padded anew.

        Raises:
            `ValueError`: on another mode, on guidance or a plan outside image mode or that is no number from 0 on, on a prompt
            without ids, with image placeholders but no images, and on a strategy that cannot work with two vocabularies.
        """
        mode = generation_mode or "text"
        if mode not in GENERATION_MODES:
            raise ValueError(f"`generation_mode` is {mode!r}; it must be one of {', '.join(GENERATION_MODES)}.")
        if generation_config is not None:
            generation_config = copy.deepcopy(generation_config)
            guidance_scale = generation_config.guidance_scale if guidance_scale is None else guidance_scale
            generation_config.guidance_scale = None
            if max_plan_tokens is None and mode == "image":
                max_plan_tokens = getattr(generation_config, "max_plan_tokens", None)
        self._check_request(generation_config, mode, guidance_scale, max_plan_tokens, kwargs)
        self._check_prompt(inputs if inputs is not None else kwargs.get("input_ids"), kwargs)
        if mode == "image":
            return self._generate_image(inputs, generation_config, guidance_scale, max_plan_tokens, kwargs)
        if mode == "text":
            return super().generate(inputs, generation_config, output_modality="text", **kwargs)
        processors = LogitsProcessorList([self._image_block(), *(kwargs.pop("logits_processor", None) or [])])
        return super().generate(inputs, generation_config, logits_processor=processors, **kwargs)

    def generate_batch(self, *args, generation_mode: str | None = None, **kwargs):
        """Continuous batching, see [`~ContinuousMixin.generate_batch`]. Raises `ValueError` for any mode but `"text"`."""
        if generation_mode not in (None, "text"):
            raise ValueError(
                f"`generate_batch` writes text only; `generation_mode` is {generation_mode!r}. Use `generate`."
            )
        return super().generate_batch(*args, **kwargs)

    def _check_request(
        self,
        config: GenerationConfig | None,
        mode: str,
        guidance_scale: float | None,
        max_plan_tokens: int | None,
        kwargs: dict,
    ) -> None:
        def asked(name: str):
            return kwargs[name] if kwargs.get(name) is not None else getattr(config, name, None)

        for name in TWO_VOCABULARIES:
            if asked(name) is not None:
                raise ValueError(
                    f"`{name}` works on one vocabulary; this one is split into {self.config.visual_token_offset} text ids "
                    f"and {self.config.codebook_config.codebook_size} visual ids."
                )
        if guidance_scale is not None and not (
            isinstance(guidance_scale, numbers.Real) and 0 <= guidance_scale < float("inf")
        ):
            raise ValueError(f"`guidance_scale` is {guidance_scale!r}; it must be a number from 0 on.")
        if mode != "image" and guidance_scale not in (None, 1):
            raise ValueError(f"`guidance_scale` is {guidance_scale} in {mode} mode; guidance works in image mode only.")
        if max_plan_tokens is not None and not (isinstance(max_plan_tokens, numbers.Integral) and max_plan_tokens >= 0):
            raise ValueError(f"`max_plan_tokens` is {max_plan_tokens!r}; it must be a whole number from 0 on.")
        if mode != "image" and max_plan_tokens:
            raise ValueError(f"`max_plan_tokens` is {max_plan_tokens} in {mode} mode; it works in image mode only.")

    def _check_prompt(self, input_ids: torch.Tensor | None, kwargs: dict) -> None:
        if input_ids is None:
            return
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise ValueError(
                f"The prompt has the shape {tuple(input_ids.shape)}; it must be (batch_size, num_tokens), with a token at least."
            )
        given = [
            name for name in ("pixel_values", "mm_encoder_outputs", "inputs_embeds") if kwargs.get(name) is not None
        ]
        if not given and (input_ids == self.config.image_token_id).any():
            raise ValueError(
                f"The prompt holds {(input_ids == self.config.image_token_id).sum().item()} image placeholders and no images; "
                "give `pixel_values`."
            )

    def _image_block(self) -> InterleavedLogitsProcessor:
        return InterleavedLogitsProcessor(
            self.config.visual_token_offset,
            self.config.num_image_tokens,
            self.config.boi_token_id,
            self.config.eoi_token_id,
            self.config.image_token_id,
        )

    def _generate_image(
        self,
        inputs: torch.Tensor | None,
        generation_config: GenerationConfig | None,
        guidance_scale: float | None,
        max_plan_tokens: int | None,
        kwargs,
    ):
        """Image mode. The number of new tokens is fixed, so end-of-sequence rules and lengths of the caller do not apply."""
        defaults = getattr(self.generation_config, "image_generation", None) if generation_config is None else None
        settings = {**(defaults or {}), **kwargs}
        default_scale, default_plan = settings.pop("guidance_scale", None), settings.pop("max_plan_tokens", None)
        guidance_scale = default_scale if guidance_scale is None else guidance_scale
        planned = default_plan if max_plan_tokens is None else max_plan_tokens
        prompt, prompt_length, begun = self._begin_image(inputs, settings)
        if planned and not begun and ("input_ids" in prompt or max_plan_tokens):
            prompt = self._write_plan(prompt, planned, generation_config, settings)
            prompt_length = prompt["input_ids"].shape[1]
        if guidance_scale not in (None, 1):
            config = generation_config or self.generation_config
            for name in ("past_key_values", "cache", "prefill_chunk_size"):
                if settings.get(name) is not None or getattr(config, name, None) is not None:
                    raise ValueError(f"`{name}` does not go with guidance, whose cache has two rows a prompt.")
            settings.update(visual_guidance_scale=float(guidance_scale), prompt_length=prompt_length)
        length = self.config.num_image_tokens
        settings.update(prompt, max_new_tokens=length, min_new_tokens=None, max_length=None)
        output = super().generate(generation_config=generation_config, output_modality="image", **settings)
        if not isinstance(output, torch.Tensor):
            return output
        written = output[:, 0 if "inputs_embeds" in prompt else prompt_length :]
        if written.shape[1] < length:
            raise ValueError(f"A stopping criterion ended the image after {written.shape[1]} of its {length} tokens.")
        return written

    def _write_plan(
        self, prompt: dict, max_plan_tokens: int, generation_config: GenerationConfig | None, settings: dict
    ) -> dict:
        """Prompts that end with the begin-of-image id, with a text in front of that id which the model writes; left-padded anew."""
        for name in ("inputs_embeds", "past_key_values", "cache", "position_ids"):
            if prompt.get(name) is not None or settings.get(name) is not None:
                raise ValueError(
                    f"`{name}` does not go with a plan, which makes the prompt longer; `max_plan_tokens` is {max_plan_tokens}, "
                    "and 0 is no plan."
                )
        input_ids, boi = prompt["input_ids"][:, :-1], self.config.boi_token_id
        ends, pad = (
            getattr(self.generation_config, name, None)
            if getattr(generation_config, name, None) is None
            else getattr(generation_config, name)
            for name in ("eos_token_id", "pad_token_id")
        )
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        mask = prompt.get("attention_mask")
        if mask is not None:
            mask = mask[:, :-1]
        else:  # as stock `generate` has it
            mask = torch.ones_like(input_ids) if pad is None or pad in ends else (input_ids != pad).long()
        shared = {name: settings[name] for name in SHARED_WITH_PLAN if settings.get(name) is not None}
        if "mm_encoder_outputs" in shared:  # beams repeat what is in it, in place
            shared["mm_encoder_outputs"] = {k: copy.copy(v) for k, v in shared["mm_encoder_outputs"].items()}
        output = super().generate(
            input_ids,
            generation_config,
            attention_mask=mask,
            output_modality="plan",
            eos_token_id=[boi, *ends],
            max_new_tokens=max_plan_tokens,
            **dict.fromkeys(("max_length", "min_length", "min_new_tokens", "stop_strings")),
            num_return_sequences=1,
            return_dict_in_generate=False,
            **shared,
        )
        plan = output[:, input_ids.shape[1] :]
        ended = torch.isin(plan, torch.tensor([boi, *ends], device=plan.device)).cumsum(-1) > 0
        begin = torch.full_like(plan[:, :1], boi)
        ids = torch.cat([input_ids, plan, begin], 1)
        seen = torch.cat([mask, (~ended).to(mask), torch.ones_like(begin).to(mask)], 1)
        order = seen.argsort(dim=-1, stable=True)  # what is not seen, to the left
        ids, seen = ids.gather(1, order), seen.gather(1, order)
        first = (seen.sum(0) > 0).nonzero()[0].item()
        return {"input_ids": ids[:, first:], "attention_mask": seen[:, first:]}

    def _begin_image(self, inputs: torch.Tensor | None, settings: dict) -> tuple[dict, int, bool]:
        """The prompt with a begin-of-image id at its end, taken out of the settings, its length, and whether it had that id."""
        input_ids = inputs if inputs is not None else settings.pop("input_ids", None)
        mask = settings.pop("attention_mask", None)
        boi = self.config.boi_token_id
        if input_ids is None:
            embeds = settings.pop("inputs_embeds", None)
            if embeds is None:
                raise ValueError("Image mode needs a prompt: `input_ids` or `inputs_embeds`.")
            begin = self.get_input_embeddings()(torch.full_like(embeds[:, :1, 0], boi, dtype=torch.long)).to(embeds)
            prompt, length, add = {"inputs_embeds": torch.cat([embeds, begin], 1)}, embeds.shape[1] + 1, True
        else:
            begun = input_ids[:, -1] == boi
            if begun.any() and not begun.all():
                raise ValueError(
                    f"{begun.sum().item()} of {len(begun)} prompts end with the begin-of-image id {boi}; all of them must, or none."
                )
            add = not begun.any()
            input_ids = torch.nn.functional.pad(input_ids, (0, 1), value=boi) if add else input_ids
            prompt, length = {"input_ids": input_ids}, input_ids.shape[1]
        if mask is not None:
            prompt["attention_mask"] = torch.nn.functional.pad(mask, (0, 1), value=1) if add else mask
        return prompt, length, not add

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
        processors = super()._get_logits_processor(
            generation_config, *args, logits_processor=logits_processor, model_kwargs=model_kwargs, **kwargs
        )
        modality = (model_kwargs or {}).get("output_modality")  # none with continuous batching
        if modality in ("text", "plan"):
            return TextLogitsProcessorList(processors, self.config.visual_token_offset, self.config.image_token_id)
        draws = generation_config.do_sample and generation_config.num_beams in (None, 1)
        plain = all(
            isinstance(processor, TemperatureLogitsWarper) for processor in processors
        )  # nothing to cut or to change
        if (
            draws
            and plain
            and self.config.visual_head == "two_level"
            and model_kwargs.get("output_modality") == "image"
        ):
            temperature = generation_config.temperature
            model_kwargs["visual_temperature"] = 1.0 if temperature is None else temperature
        return processors

    def _reorder_cache(self, past_key_values: Cache, beam_idx: torch.LongTensor) -> Cache:
        """Beams; with guidance the cache has a second half, which follows the first."""
        if past_key_values.layers[0].keys.shape[0] == 2 * len(beam_idx):
            beam_idx = torch.cat([beam_idx, beam_idx + len(beam_idx)])
        past_key_values.reorder_cache(beam_idx)
        return past_key_values

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
