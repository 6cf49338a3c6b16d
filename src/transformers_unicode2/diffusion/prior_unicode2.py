"""Everything up to the conditioning: prompts and images to visual tokens, and those to what a decoder reads."""

from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput, logging

from .arguments_unicode2 import (
    NUMBERS,
    check_embeds,
    check_generator,
    check_length,
    check_sizes,
    check_weights,
    count_prompts,
    gather_options,
    repeat_rows,
    repeat_texts,
    to_number,
)

logger = logging.get_logger(__name__)

# Scores of text ids held at a time when prompts are read back: 256 MiB in float32.
MAX_SCORES = 2**26


@dataclass
class UniCode2PipelineOutput(BaseOutput):
    r"""
    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): the images, as `output_type` says.
        visual_token_ids (`torch.LongTensor` of shape `(num_images, num_image_tokens)`): what they were painted from;
            `None` when `prompt_embeds` were given.
    """

    images: list | torch.Tensor
    visual_token_ids: torch.LongTensor | None


class UniCode2PriorMixin:
    """The part of a pipeline that knows the language model.

    Its components are `vision_language_encoder`, `processor` and `condition_mapper`.
    """

    def register_prior(self, vision_language_encoder, processor, condition_mapper, **numbers) -> None:
        """Enters its components and numbers. Raises `ValueError` on weights that are missing, and on wrong numbers."""
        self.register_modules(
            vision_language_encoder=vision_language_encoder, processor=processor, condition_mapper=condition_mapper
        )
        for name, component in self.components.items():
            check_weights(name, component)
        self.check_widths()
        self.register_to_config(**{name: to_number(name, value, *NUMBERS[name]) for name, value in numbers.items()})

    decoder_part: str | None = None

    @classmethod
    def load_lora_into_text_encoder(cls, state_dict: dict, network_alphas, text_encoder, **kwargs) -> None:
        """Stock; the part of a LoRA for a text encoder that the pipeline does without is left out, with a word."""
        prefix = kwargs.get("prefix") or cls.text_encoder_name
        if text_encoder is not None:
            super().load_lora_into_text_encoder(state_dict, network_alphas, text_encoder, **kwargs)
        elif any(name.startswith(f"{prefix}.") for name in state_dict):
            logger.warning(f"The LoRA's part for `{prefix}` is left out: this pipeline has none, and paints without.")

    @staticmethod
    def read_widths(config: dict) -> dict[str, int]:
        """What a decoder of this configuration reads: widths, by the fields of the mapper's configuration."""
        return {}

    def check_widths(self) -> None:
        """Raises `ValueError` when language model, mapper and decoder do not fit each other."""
        encoder, mapper = self.vision_language_encoder, self.condition_mapper
        if mapper is None:
            return
        decoder = getattr(self, self.decoder_part, None) if self.decoder_part else None
        widths = {} if decoder is None else self.read_widths(decoder.config)
        expected = {name: (width, "the decoder reads") for name, width in widths.items()}
        if encoder is not None:
            expected["visual_dim"] = encoder.config.codebook_config.codebook_dim, "the codes have"
            expected["num_visual_tokens"] = encoder.config.num_image_tokens, "an image has"
        for name, (width, owner) in expected.items():
            if mapper.config[name] != width:
                raise ValueError(
                    f"`{name}` of the condition mapper is {mapper.config[name]}, and {owner} {width}; take the mapper "
                    "that was trained with these parts."
                )

    def check_parts(self, sources: dict, *painting: str) -> None:
        """Raises `ValueError` when the pipeline was loaded without a component that a call needs.

        Args:
            sources: of the call, see `check_sources`.
            painting: components that paint.
        """
        source = next(name for name, value in sources.items() if value is not None)
        needed = [] if source == "prompt_embeds" else ["vision_language_encoder", "condition_mapper"]
        needed += ["processor"] if source in ("prompt", "image") else []
        missing = [name for name in (*needed, *painting) if getattr(self, name, None) is None]
        if missing:
            raise ValueError(f"`{source}` cannot be painted: this pipeline was loaded without `{missing[0]}`.")

    def check_call(
        self, sources: dict, embeds: dict, kwargs: dict, num_images_per_prompt: int, text_prompt: str | list[str] | None
    ) -> None:
        """Raises `ValueError` before any work on embeddings of other shapes, and on other numbers of rows and texts."""
        check_embeds(embeds, kwargs, self.read_widths(getattr(self, self.decoder_part).config))
        count = count_prompts(sources)
        if count is None:
            return
        count *= num_images_per_prompt
        for name in ("negative_prompt_embeds", "negative_pooled_prompt_embeds"):
            if kwargs.get(name) is not None:
                repeat_rows(name, kwargs[name], num_images_per_prompt, count)
        texts = {name: kwargs.get(name) for name in ("negative_prompt", "negative_prompt_2")}
        for name, text in {**texts, "text_prompt": text_prompt}.items():
            if text is not None:
                repeat_texts(name, text, num_images_per_prompt, count)

    def choose_number(self, name: str, value: float | None, default: str | None = None) -> float:
        """A number of a call, or the pipeline's own under the name `default`. Raises `ValueError` on a wrong one."""
        default = default or name
        return to_number(name, getattr(self.config, default) if value is None else value, *NUMBERS[default])

    def choose_sizes(
        self, height: int | None, width: int | None, num_inference_steps: int | None, num_images_per_prompt: int
    ) -> tuple[int, int, int, int]:
        """These numbers of a call, or the pipeline's own. Raises `ValueError` on wrong ones.

        A height and width must be multiples of `size_factor`, which a pipeline with a decoder has.
        """
        height, width = (
            self.choose_number(name, value, "image_size") for name, value in (("height", height), ("width", width))
        )
        check_sizes(height, width, self.size_factor)
        num_inference_steps = self.choose_number("num_inference_steps", num_inference_steps)
        return height, width, num_inference_steps, to_number("num_images_per_prompt", num_images_per_prompt, int, 1)

    def make_condition(
        self, sources: dict, pooled_prompt_embeds, num_images_per_prompt: int, generator, prior: dict
    ) -> tuple[torch.LongTensor | None, torch.Tensor, torch.Tensor | None]:
        """Visual token ids, `prompt_embeds` and `pooled_prompt_embeds`, one row for each image, prompt by prompt.

        `sources` are those of `check_sources`; `prior` are options of `generate_visual_tokens`. Raises `ValueError` as
        its steps do, and on such options when nothing is written.
        """
        prompt, prompt_embeds = sources["prompt"], sources["prompt_embeds"]
        if prompt is not None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
            ids = self.generate_visual_tokens(prompts, generator, **prior)
            return ids, *self.encode_visual_tokens(ids)
        unread = [name for name, value in prior.items() if value is not None]
        if unread:
            raise ValueError(f"`{unread[0]}` is about writing the image of a prompt, and none is given; leave it out.")
        ids = sources["visual_token_ids"]
        if sources["image"] is not None:
            ids = self.read_visual_tokens(sources["image"])
        if prompt_embeds is None:
            prompt_embeds, pooled_prompt_embeds = self.encode_visual_tokens(ids)
        else:
            like = {"device": self._execution_device, "dtype": self.find_condition_dtype()}
            prompt_embeds, pooled_prompt_embeds = prompt_embeds.to(**like), pooled_prompt_embeds.to(**like)
        made = [
            value if value is None else value.repeat_interleave(num_images_per_prompt, dim=0)
            for value in (ids, prompt_embeds, pooled_prompt_embeds)
        ]
        check_generator(generator, len(made[1]))
        return tuple(made)

    def join_text(
        self, text: str | list[str], num_images_per_prompt: int, prompt_embeds: torch.Tensor, **options
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Conditioning of both kinds: embeddings of texts in front of those of the tokens, pooled ones of the texts.

        `options` are those of `encode_texts`. Raises `ValueError` when there are not as many texts as images.
        """
        texts = repeat_texts("text_prompt", text, num_images_per_prompt, len(prompt_embeds))
        embeds, pooled = (value.to(prompt_embeds.dtype) for value in self.encode_texts(texts, **options))
        return torch.cat([embeds, prompt_embeds], dim=1), pooled

    def guide(
        self,
        kwargs: dict,
        num_images_per_prompt: int,
        prompt_embeds: torch.Tensor,
        pooled_prompt_embeds: torch.Tensor,
        **options,
    ) -> None:
        """Enters the negative conditioning of a call; what its arguments have as embeddings is repeated for each image.

        That of `negative_prompt` is what the decoder's own text encoders make of it, with zeros behind it to the length
        of `prompt_embeds`; without such a text it is zeros. `options` are those of `encode_texts`. Raises `ValueError`
        when there are not as many texts as images, or they are longer than the tokens.
        """
        names = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
        if kwargs.get(names[0]) is not None:
            for name in names:
                rows = repeat_rows(name, kwargs[name], num_images_per_prompt, len(prompt_embeds))
                kwargs[name] = rows.to(prompt_embeds.device, prompt_embeds.dtype)
            return
        negative, pooled = torch.zeros_like(prompt_embeds), torch.zeros_like(pooled_prompt_embeds)
        texts = [kwargs.pop(name, None) for name in ("negative_prompt", "negative_prompt_2")]
        if texts[0] is not None:
            count = len(prompt_embeds)
            first = repeat_texts("negative_prompt", texts[0], num_images_per_prompt, count)
            second = texts[1] and repeat_texts("negative_prompt_2", texts[1], num_images_per_prompt, count)
            embeds, pooled = self.encode_texts(first, second, **options)
            if embeds.shape[1] > negative.shape[1]:
                most = negative.shape[1]
                raise ValueError(
                    f"`negative_prompt` makes {embeds.shape[1]} embeddings, and the tokens of an image make {most}; "
                    f"set `max_sequence_length` to {most} or less, which FLUX has, or give `negative_prompt_embeds`."
                )
            negative[:, : embeds.shape[1]] = embeds
        kwargs["negative_prompt_embeds"] = negative
        kwargs["negative_pooled_prompt_embeds"] = pooled.to(negative.dtype)

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

        Of `num_candidates` images (the pipeline's number by default) it keeps the one that scores best, see
        `score_visual_tokens`. The random numbers come from `generator`; the global generator is left as it was. With a
        list, each image is written alone: in a batch, its tokens would depend on the others by rounding.

        Raises:
            `ValueError`: on an empty prompt or one that leaves no room for an image, on less than one candidate, on
                options that ask for no image, and when there are not as many generators as prompts.
        """
        num_candidates = self.config.num_candidates if num_candidates is None else num_candidates
        num_candidates = to_number("num_candidates", num_candidates, int, 1)
        kwargs = gather_options(prior_guidance_scale, prior_generation_kwargs)
        for name in ("num_return_sequences", "return_dict_in_generate"):
            if (num_candidates > 1 or isinstance(generator, (list, tuple))) and kwargs.get(name) not in (
                None,
                False,
                1,
            ):
                raise ValueError(
                    f"`{name}` does not go with {num_candidates} candidates a prompt; set `num_candidates` to 1."
                    if num_candidates > 1
                    else f"`{name}` does not go with a list of generators; give one generator."
                )
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        empty = [i for i, text in enumerate(prompts) if not text.strip()]
        if empty or not prompts:
            raise ValueError(f"Prompt {empty[0] + 1 if empty else 0} of {len(prompts)} is empty; say what to draw.")
        check_generator(generator, len(prompts))
        if not isinstance(generator, (list, tuple)):
            return self.write_best(prompts, generator, num_candidates, kwargs)
        return torch.cat(
            [self.write_best([text], own, num_candidates, kwargs) for text, own in zip(prompts, generator)]
        )

    def write_best(
        self, prompts: list[str], generator: torch.Generator | None, num_candidates: int, kwargs: dict
    ) -> torch.LongTensor:
        """Of `num_candidates` images for each prompt the one that scores best, `(num_prompts, num_image_tokens)`."""
        prompts = [text for text in prompts for _ in range(num_candidates)]
        chats = [[{"role": "user", "content": text}] for text in prompts]
        texts = self.processor.apply_chat_template(chats, add_generation_prompt=True)
        device = self._execution_device
        inputs = self.processor(
            text=texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
        ).to(device)
        config = self.vision_language_encoder.config
        # With the begin-of-image id; not every kind of language model has a limit
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        check_length(inputs["input_ids"].shape[1], 1 + config.num_image_tokens, limit)
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(
            devices=devices, enabled=generator is not None, device_type=device.type if devices else "cuda"
        ):
            if generator is not None:
                seed = torch.randint(2**62, (), generator=generator, device=generator.device)
                torch.manual_seed(seed.item())
            written = self.vision_language_encoder.generate(**inputs, **kwargs)
        if num_candidates == 1:
            return written
        best = self.score_visual_tokens(prompts, written).unflatten(0, (-1, num_candidates)).argmax(-1)
        return written.unflatten(0, (-1, num_candidates))[torch.arange(len(best), device=best.device), best]

    @torch.no_grad()
    def score_visual_tokens(self, prompt: str | list[str], visual_token_ids: torch.LongTensor) -> torch.Tensor:
        r"""
        How well the language model reads each prompt back from its image, float32 `(batch_size,)`: the log-likelihood
        of the prompt, in nats, as the answer to `caption_prompt`. `visual_token_ids` is `(batch_size,
        num_image_tokens)`.

        Raises:
            `ValueError`: when there are not as many prompts as images, an image has another number of ids, or the
            checkpoint has no `caption_prompt`.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if len(prompts) != len(visual_token_ids):
            raise ValueError(f"{len(prompts)} prompts do not fit {len(visual_token_ids)} images of visual tokens.")
        caption_prompt = self.vision_language_encoder.config.caption_prompt
        if caption_prompt is None:
            raise ValueError(
                "The checkpoint names no question for a caption; set `caption_prompt` in its configuration, or "
                "`num_candidates` to 1."
            )
        question = self.processor.image_token + caption_prompt
        rows = []
        for text, ids in zip(prompts, visual_token_ids.tolist()):
            chat = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
            rows.append(self.processor.encode_chat(chat, [ids]))
        scores = []
        longest, size = max(len(ids) for ids, _ in rows), self.vision_language_encoder.config.visual_token_offset
        step = max(1, MAX_SCORES // ((longest - visual_token_ids.shape[1]) * size))
        for start in range(0, len(rows), step):
            scores.append(self.score_rows(rows[start : start + step]))
        return torch.cat(scores)

    def score_rows(self, rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        """Log-likelihood of what is marked in ids, see `UniCode2Processor.encode_chat`; float32 `(num_rows,)`."""

        def pad_left(values: list[list[int]]) -> torch.Tensor:
            turned = [torch.tensor(value[::-1]) for value in values]
            padded = torch.nn.utils.rnn.pad_sequence(turned, batch_first=True)
            return padded.flip(-1).to(self._execution_device)

        input_ids, answer = (pad_left(values) for values in zip(*rows))
        attention_mask = pad_left([[1] * len(ids) for ids, _ in rows])
        # From the first answer to the end.
        length = answer.shape[1] - answer.any(0).nonzero()[0].item()
        logits = self.vision_language_encoder(
            input_ids, attention_mask=attention_mask, output_modality="text", logits_to_keep=length + 1, use_cache=False
        ).logits[:, :-1]
        answer = answer[:, -length:].bool()
        targets = input_ids[:, -length:].where(answer, 0)
        log_likelihood = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]  # (num_rows, length)
        # Ids that frame an image, if a prompt holds them, are no text
        return log_likelihood.where(answer & log_likelihood.isfinite(), 0.0).sum(-1)

    @torch.no_grad()
    def read_visual_tokens(self, image) -> torch.LongTensor:
        """Images, as the processor takes them, to their visual token ids, `(num_images, num_image_tokens)`."""
        encoded = self.processor(images=image, return_tensors="pt").to(self._execution_device)
        if "visual_token_ids" in encoded:
            # By a quantizer that is attached to the processor.
            self.vision_language_encoder.config.check_offset(self.processor.visual_token_offset)
            return encoded["visual_token_ids"]
        return self.vision_language_encoder(pixel_values=encoded["pixel_values"], task="get_image_tokens")

    @torch.no_grad()
    def encode_visual_tokens(self, visual_token_ids: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        r"""
        Visual token ids `(batch_size, num_image_tokens)` to `prompt_embeds` and `pooled_prompt_embeds` (Eq. 6 and 9).

        Raises:
            `ValueError`: on ids outside the visual vocabulary, or that are not whole images.
        """
        self.check_visual_tokens(visual_token_ids)
        codes = visual_token_ids.to(self._execution_device) - self.vision_language_encoder.config.visual_token_offset
        embeds = self.vision_language_encoder(codes, task="embed_codes")  # (batch_size, num_image_tokens, visual_dim)
        condition = self.condition_mapper(embeds, return_dict=False)
        dtype = self.find_condition_dtype()
        return tuple(value if value is None else value.to(dtype) for value in condition)

    def find_condition_dtype(self) -> torch.dtype:
        """That of the decoder, if the pipeline has one."""
        parts = (getattr(self, name, None) for name in ("transformer", "unet", "condition_mapper"))
        return next(part.dtype for part in parts if part is not None)

    def check_visual_tokens(self, visual_token_ids: torch.LongTensor) -> None:
        config = self.vision_language_encoder.config
        length = config.num_image_tokens
        if not isinstance(visual_token_ids, torch.Tensor) or visual_token_ids.dtype not in (torch.int64, torch.int32):
            kind = getattr(visual_token_ids, "dtype", type(visual_token_ids).__name__)
            raise ValueError(f"`visual_token_ids` is {kind}; it must be a tensor of int64.")
        if visual_token_ids.ndim != 2 or visual_token_ids.shape[1] != length or not len(visual_token_ids):
            raise ValueError(
                f"`visual_token_ids` has shape {tuple(visual_token_ids.shape)}; it must be (batch_size, {length}), "
                f"{length} ids an image."
            )
        low, high = config.visual_token_offset, config.visual_token_offset + config.codebook_config.codebook_size - 1
        if visual_token_ids.min() < low or visual_token_ids.max() > high:
            raise ValueError(
                f"`visual_token_ids` runs from {visual_token_ids.min().item()} to {visual_token_ids.max().item()}; "
                f"visual token ids are {low} to {high}."
            )
