"""Text, image and interleaved generation on stock `generate`."""

import copy

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, TemperatureLogitsWarper
from transformers.cache_utils import Cache

from .continuing_unicode2 import count_cached, drop_cached_images
from .logits_unicode2 import InterleavedLogitsProcessor, TextLogitsProcessorList
from .planning_unicode2 import write_plan
from .settings_unicode2 import (
    TEXT_ONLY,
    check_guidance,
    check_mode,
    check_options,
    check_plan,
    find_asked,
    find_option,
    first_given,
    make_plain,
    plain,
)

IMAGES = ("pixel_values", "mm_encoder_outputs")


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
                Takes the place of the checkpoint's, in image mode of its `image_generation` as well. Either may hold the three
                options below, and under `image_generation` a dictionary of options for image mode.
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
            **kwargs: everything that [`~GenerationMixin.generate`] takes. A chat that goes on from a cache (`past_key_values`) may come
                with all of its images, or with those that the cache does not hold.

        Returns:
            Prompts and what was written, `(batch_size, num_tokens)`, in text and interleaved mode. In image mode the visual token
            ids alone, `(batch_size, num_image_tokens)`. What `return_dict_in_generate` asks for comes back untouched: its sequences
            begin with the prompt, and the plan if there is one, left-padded anew.

        Raises:
            `ValueError`: on another mode, on guidance or a plan outside image mode or that is no number from 0 on, on a prompt
            without ids, with image placeholders but no images, on a strategy that cannot work with two vocabularies, and in
            image mode on options of the call that are about text, see `settings_unicode2.TEXT_ONLY`.
        """
        generation_config = copy.deepcopy(generation_config)
        # stock `generate` encodes images under a name that is there, be it `None`
        kwargs = plain({name: value for name, value in kwargs.items() if value is not None or name not in IMAGES})
        for config in (generation_config, self.generation_config):
            if config is not None:
                make_plain(config)
        mode = generation_mode or find_option("generation_mode", generation_config, self.generation_config) or "text"
        check_mode(mode)
        asked = (generation_config, self.generation_config)
        guidance_scale = first_given(plain(guidance_scale), find_asked("guidance_scale", *asked))
        max_plan_tokens = first_given(plain(max_plan_tokens), find_asked("max_plan_tokens", *asked))
        self._check_prompt(inputs if inputs is not None else kwargs.get("input_ids"), mode, kwargs)
        if generation_config is None:
            kwargs["guidance_scale"] = None  # stock guidance, a second forward pass, would follow the checkpoint's
        else:
            generation_config.guidance_scale = 1
        if mode == "image":
            return self._generate_image(inputs, generation_config, guidance_scale, max_plan_tokens, kwargs)
        check_guidance(mode, guidance_scale)
        check_plan(mode, max_plan_tokens)
        check_options(self.config, mode, kwargs, generation_config, self.generation_config)
        if mode == "text":
            return super().generate(inputs, generation_config, output_modality="text", **kwargs)
        processors = LogitsProcessorList([self._image_block(), *(kwargs.pop("logits_processor", None) or [])])
        return super().generate(inputs, generation_config, logits_processor=processors, **kwargs)

    def generate_batch(
        self, inputs, generation_config: GenerationConfig | None = None, *, generation_mode=None, **kwargs
    ):
        """Continuous batching, see [`~ContinuousMixin.generate_batch`]. Raises `ValueError` for any mode but `"text"`."""
        mode = generation_mode or find_option("generation_mode", generation_config, self.generation_config) or "text"
        if mode != "text":
            raise ValueError(f"`generate_batch` writes text only; `generation_mode` is {mode!r}. Use `generate`.")
        if generation_config is not None:
            generation_config = copy.deepcopy(generation_config)
            make_plain(generation_config)
        return super().generate_batch(inputs, generation_config, **kwargs)

    def _check_prompt(self, input_ids: torch.Tensor | None, mode: str, kwargs: dict) -> None:
        """Raises `ValueError` on a prompt without ids, or without its images; those that a cache holds are taken out of `kwargs`."""
        if input_ids is None:
            return
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise ValueError(
                f"The prompt has the shape {tuple(input_ids.shape)}; it must be (batch_size, num_tokens), with a token at least."
            )
        begins = mode == "image" and (input_ids[:, -1] != self.config.boi_token_id).all()
        num_cached = count_cached(input_ids, kwargs, num_more=int(begins))
        if kwargs.get("inputs_embeds") is None:
            drop_cached_images(input_ids, num_cached, self.config.image_token_id, self.config.num_image_tokens, kwargs)

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
        kwargs: dict,
    ):
        """Image mode. The number of new tokens is fixed, so lengths of the caller do not apply."""
        configs = (generation_config, self.generation_config)
        defaults = find_option(
            "image_generation", self.generation_config if generation_config is None else generation_config
        )
        image = dict(first_given(kwargs.pop("image_generation", None), defaults, {}))
        guidance_scale = first_given(
            guidance_scale, image.pop("guidance_scale", None), find_option("guidance_scale", self.generation_config)
        )
        planned = first_given(
            max_plan_tokens, image.pop("max_plan_tokens", None), find_option("max_plan_tokens", self.generation_config)
        )
        settings = {**image, **kwargs}
        check_guidance("image", guidance_scale)
        check_plan("image", planned)
        check_options(self.config, "image", settings, *configs)
        prompt, prompt_length, begun = self._begin_image(inputs, settings)
        if planned and not begun and ("input_ids" in prompt or max_plan_tokens):
            prompt = write_plan(self, prompt, planned, generation_config, settings)
            prompt_length = prompt["input_ids"].shape[1]
        if guidance_scale not in (None, 1):
            for name in ("past_key_values", "cache", "prefill_chunk_size"):
                if first_given(settings.get(name), find_option(name, *configs)) is not None:
                    raise ValueError(f"`{name}` does not go with guidance, whose cache has two rows a prompt.")
            settings.update(visual_guidance_scale=float(guidance_scale), prompt_length=prompt_length)
        length = self.config.num_image_tokens
        settings.update(prompt, max_new_tokens=length, min_new_tokens=None, max_length=None, **dict.fromkeys(TEXT_ONLY))
        output = super().generate(generation_config=generation_config, output_modality="image", **settings)
        if not isinstance(output, torch.Tensor):
            return output
        written = output[:, 0 if "inputs_embeds" in prompt else prompt_length :]
        if written.shape[1] < length:
            raise ValueError(f"A stopping criterion ended the image after {written.shape[1]} of its {length} tokens.")
        return written

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
                # the last id may be an end that is forced
                processor.max_length = generation_config.max_length - (
                    generation_config.forced_eos_token_id is not None
                )
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
