"""Text, image and interleaved generation on stock `generate`."""

import copy

import torch
from torch.nn.functional import pad
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
)
from transformers.cache_utils import Cache

from .planning_unicode2 import (
    TEXT_ONLY,
    GenerationRequest,
    ImagePrompt,
    count_cached,
    drop_cached_images,
    drop_empty,
    find_option,
    make_plain,
    resolve_request,
    write_plan,
)


class UniCode2GenerationMixin(GenerationMixin):
    """`generate` with `generation_mode`, and with classifier-free guidance whose halves share one forward pass."""

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
                Takes the place of the checkpoint's, in image mode of its `image_generation` as well. Either may hold
                the three options below, and under `image_generation` a dictionary of options for image mode.
            generation_mode (`str`, *optional*, defaults to `"text"`):
                `"text"` writes text ids only. `"image"` writes one image: the begin-of-image id is put behind the
                prompt if it is not there. `"interleaved"` writes text and, wherever it writes the begin-of-image id, a
                whole image.
            guidance_scale (`float`, *optional*):
                Classifier-free guidance of image mode; 1.0 is none and costs nothing. Without the prompt, the model
                sees the begin-of-image id alone.
            max_plan_tokens (`int`, *optional*):
                In image mode, lets the model write a plan first: text of at most N ids, until it begins the image by
                itself. The image sees prompt and plan. 0 is no plan; nor does a prompt that ends with the
                begin-of-image id get one. Images of one prompt (`num_return_sequences`) share a plan. A plan follows
                the sampling options and the generation config. Interleaved mode returns plan and image alike.
            **kwargs: everything that [`~GenerationMixin.generate`] takes. A chat that continues from a cache
                (`past_key_values`) may come with all of its images, or with those that the cache does not hold.

        Returns:
            Prompts and what was written, `(batch_size, num_tokens)`, in text and interleaved mode. In image mode the
            visual token ids alone, `(batch_size, num_image_tokens)`. What `return_dict_in_generate` asks for comes back
            untouched: its sequences begin with the prompt, and the plan if there is one, left-padded anew.

        Raises:
            `ValueError`: on another mode; on guidance or a plan outside image mode, or below 0;
            on a prompt without ids, or with image placeholders but no images; on a strategy that cannot work with two
            vocabularies; and in image mode on options of the call that are about text, see `TEXT_ONLY`.
        """
        self.config.check_offset(kwargs.pop("visual_token_offset", None))
        request = resolve_request(
            defaults=self.generation_config,
            config=generation_config,
            generation_mode=generation_mode,
            image_options={"guidance_scale": guidance_scale, "max_plan_tokens": max_plan_tokens},
            options=kwargs,
        )
        request.check(self.config)
        options = self._check_prompt(inputs, request)
        if request.mode == "image":
            return self._generate_image(self._begin_image(inputs, options), options, request)
        if request.mode == "text":
            return super().generate(inputs, request.config, output_modality="text", **options)
        processors = [InterleavedLogitsProcessor(self.config), *(options.get("logits_processor") or [])]
        options = {**options, "logits_processor": LogitsProcessorList(processors)}
        return super().generate(inputs, request.config, **options)

    def generate_batch(
        self, inputs, generation_config: GenerationConfig | None = None, *, generation_mode=None, **kwargs
    ):
        """See [`~ContinuousMixin.generate_batch`]. Raises `ValueError` for any mode but `"text"`."""
        mode = generation_mode or find_option("generation_mode", generation_config, self.generation_config) or "text"
        if mode != "text":
            raise ValueError(f"`generate_batch` writes text only; `generation_mode` is {mode!r}. Use `generate`.")
        return super().generate_batch(inputs, make_plain(copy.deepcopy(generation_config)), **kwargs)

    def _check_prompt(self, inputs: torch.Tensor | None, request: GenerationRequest) -> dict:
        """The options without images that a cache holds. Raises `ValueError` on a prompt without ids or its images."""
        options = drop_empty(request.options)
        input_ids = options.get("input_ids") if inputs is None else inputs
        if input_ids is None:
            return options
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise ValueError(
                f"The prompt has the shape {tuple(input_ids.shape)}; it must be (batch_size, num_tokens), with a token "
                "at least."
            )
        begins = request.mode == "image" and (input_ids[:, -1] != self.config.boi_token_id).all()
        num_cached = count_cached(input_ids, options, num_more=int(begins))
        if options.get("inputs_embeds") is not None:
            return options
        return drop_cached_images(input_ids, num_cached, self.config, options)

    def _begin_image(self, inputs: torch.Tensor | None, options: dict) -> ImagePrompt:
        """The prompt of a call with a begin-of-image id at its end."""
        boi, mask = self.config.boi_token_id, options.get("attention_mask")
        input_ids = options.get("input_ids") if inputs is None else inputs
        if input_ids is not None:
            begun = input_ids[:, -1] == boi
            if begun.any() and not begun.all():
                raise ValueError(
                    f"{begun.sum().item()} of {len(begun)} prompts end with the begin-of-image id {boi}; all of them "
                    "must, or none."
                )
            num_new = 0 if begun.any() else 1
            prompt = {"input_ids": pad(input_ids, (0, num_new), value=boi)}
        else:
            embeds, num_new = options.get("inputs_embeds"), 1
            if embeds is None:
                raise ValueError("Image mode needs a prompt: `input_ids` or `inputs_embeds`.")
            begin = self.get_input_embeddings()(torch.full_like(embeds[:, :1, 0], boi, dtype=torch.long)).to(embeds)
            prompt = {"inputs_embeds": torch.cat([embeds, begin], 1)}
        length = next(iter(prompt.values())).shape[1]
        if mask is not None:
            prompt["attention_mask"] = pad(mask, (0, num_new), value=1)
        return ImagePrompt(prompt, length, is_begun=num_new == 0)

    def _generate_image(self, prompt: ImagePrompt, options: dict, request: GenerationRequest):
        """Image mode. The number of new tokens is fixed, whatever length the checkpoint has for text."""
        request.check_lengths(prompt.length, self.config.num_image_tokens)
        if request.max_plan_tokens and not prompt.is_begun and ("input_ids" in prompt.inputs or request.is_plan_asked):
            prompt = write_plan(self, prompt, options, request)
        guidance = {}
        if request.guidance_scale not in (None, 1):
            for name in ("past_key_values", "cache", "prefill_chunk_size"):
                if request.find(name) is not None:
                    raise ValueError(f"`{name}` does not go with guidance, whose cache has two rows a prompt.")
            guidance = {"visual_guidance_scale": float(request.guidance_scale), "prompt_length": prompt.length}
        length = self.config.num_image_tokens
        fixed = {"max_new_tokens": length, "min_new_tokens": None, "max_length": None, **dict.fromkeys(TEXT_ONLY)}
        options = {**options, **guidance, **prompt.inputs, **fixed}
        output = super().generate(generation_config=request.config, output_modality="image", **options)
        if not isinstance(output, torch.Tensor):
            return output
        written = output[:, 0 if "inputs_embeds" in prompt.inputs else prompt.length :]
        if written.shape[1] < length:
            raise ValueError(f"A stopping criterion ended the image after {written.shape[1]} of its {length} tokens.")
        return written

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
                # The last id may be an end that is forced.
                num_forced = int(generation_config.forced_eos_token_id is not None)
                processor.max_length = generation_config.max_length - num_forced
        processors = super()._get_logits_processor(
            generation_config, *args, logits_processor=logits_processor, model_kwargs=model_kwargs, **kwargs
        )
        # What came from the caller, beside what this class puts there.
        own = [p for p in logits_processor or () if not isinstance(p, InterleavedLogitsProcessor)]
        checks = bool(own) or kwargs.get("prefix_allowed_tokens_fn") is not None
        # Continuous batching has none.
        modality = (model_kwargs or {}).get("output_modality")
        if modality in ("text", "plan"):
            offset, unwritten_id = self.config.visual_token_offset, self.config.image_token_id
            return TextLogitsProcessorList(processors, checks, offset, unwritten_id)
        draws = generation_config.do_sample and generation_config.num_beams in (None, 1)
        # With nothing to cut or to change, the two-level head draws the cell by itself.
        is_plain = all(isinstance(processor, TemperatureLogitsWarper) for processor in processors)
        if draws and is_plain and self.config.visual_head == "two_level" and modality == "image":
            temperature = generation_config.temperature
            model_kwargs["visual_temperature"] = 1.0 if temperature is None else temperature
        return CheckedLogitsProcessorList(processors, checks) if checks else processors

    def _reorder_cache(self, past_key_values: Cache, beam_idx: torch.LongTensor) -> Cache:
        """Stock beams; with guidance the cache has a second half, which follows the first."""
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
        """Stock preparation; with guidance, second rows are added that see of the prompt its last id alone."""
        kwargs |= {"inputs_embeds": inputs_embeds, **drop_short_cache(self.config.text_config, input_ids, kwargs)}
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


def drop_short_cache(text_config, input_ids: torch.LongTensor, options: dict) -> dict:
    """Options of a step of Phi-3 that begins anew, as its own class does, where longer texts get other rotations.

    All that was cached by then was rotated for short texts.
    """
    name = next((name for name in ("past_key_values", "cache") if options.get(name) is not None), None)
    rope = getattr(text_config, "rope_parameters", None) or {}
    if name is None or not text_config.model_type.startswith("phi") or rope.get("rope_type") != "longrope":
        return {}
    limit = text_config.original_max_position_embeddings
    if not 0 < options[name].get_seq_length() <= limit < input_ids.shape[1]:
        return {}
    # With the images of the prompt, as in the first step
    return {name: None, "next_sequence_length": None, "is_first_iteration": options.get("inputs_embeds") is None}


class InterleavedLogitsProcessor(LogitsProcessor):
    r"""
    Keeps image blocks whole: after the begin-of-image id come exactly `num_image_tokens` visual ids, then the
    end-of-image id; visual ids occur nowhere else. A begin-of-image id with text behind it, as in a question about that
    token, has begun no image. The placeholder id is never generated.

    Args:
        config (`UniCode2Config`): knows the ids.
        max_length (`int`, *optional*): ids in all; an image that would not fit is not begun.
    """

    def __init__(self, config, max_length: int | None = None):
        self.max_length, self.checked = max_length, False
        self.visual_token_offset, self.num_image_tokens = config.visual_token_offset, config.num_image_tokens
        self.boi_token_id, self.eoi_token_id = config.boi_token_id, config.eoi_token_id
        self.image_token_id = config.image_token_id

    def written(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """Patches since the last begin-of-image id at the end of each row, `(batch_size,)`; -1 outside of an image."""
        if input_ids.shape[1] == 0:
            # A prompt of embeddings.
            return input_ids.new_full(input_ids.shape[:1], -1)
        tail = input_ids[:, -self.num_image_tokens - 1 :]  # (batch_size, at most num_image_tokens + 1)
        is_patch = (tail >= self.visual_token_offset) | (tail == self.image_token_id)
        # Patches at the end of each row, and what stands in front of them.
        run = is_patch.flip(-1).long().cumprod(-1).sum(-1, keepdim=True)  # (batch_size, 1)
        begin = tail.gather(-1, (tail.shape[1] - 1 - run).clamp(min=0))  # (batch_size, 1)
        return torch.where(begin == self.boi_token_id, run, -1)[:, 0]

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
        ends = (written == self.num_image_tokens) & (ids == self.eoi_token_id)
        return torch.where(allowed, scores, -torch.inf).masked_fill(ends, 0.0)


class CheckedLogitsProcessorList(LogitsProcessorList):
    """Processors that name ids of the scores alone; with `checks` they leave some of those that the mode writes."""

    def __init__(self, processors: list, checks: bool):
        super().__init__(processors)
        self.checks = checks

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.FloatTensor:
        lowest = torch.finfo(scores.dtype).min
        possible = scores > lowest
        try:
            scores = super().__call__(input_ids, scores, **kwargs)
        except IndexError as error:
            raise ValueError(
                f"A logits processor or `prefix_allowed_tokens_fn` names an id beyond the {scores.shape[-1]} that this "
                f"mode writes ({error})."
            ) from error
        if not self.checks:
            return scores
        left = scores > lowest
        if not left.any(-1).all() or (left & ~possible).any():
            raise ValueError(
                "A logits processor or `prefix_allowed_tokens_fn` leaves no id that this mode writes there, or brings "
                "back others."
            )
        return scores


class TextLogitsProcessorList(CheckedLogitsProcessorList):
    """Processors of scores over the text ids alone: visual ids of the prompt look like one that is never written."""

    def __init__(self, processors: list, checks: bool, visual_token_offset: int, unwritten_id: int):
        super().__init__(processors, checks)
        self.visual_token_offset, self.unwritten_id = visual_token_offset, unwritten_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.FloatTensor:
        text_ids = input_ids.masked_fill(input_ids >= self.visual_token_offset, self.unwritten_id)
        return super().__call__(text_ids, scores, **kwargs)


__all__ = ["UniCode2GenerationMixin"]
