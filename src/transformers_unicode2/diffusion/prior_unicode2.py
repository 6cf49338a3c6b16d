"""Everything up to the conditioning: prompts and images to visual tokens, and those to what a decoder reads."""

import math
import numbers

import torch

# Scores of text ids held at a time when prompts are read back: 256 MiB in float32.
MAX_SCORES = 2**26


def to_number(name: str, value, kind: type, low: float) -> float | int:
    """A number of Python or NumPy as `int` or `float`. Raises `ValueError` when it is none, or below `low`."""
    abstract = numbers.Integral if kind is int else numbers.Real
    if not isinstance(value, abstract) or not low <= value < math.inf:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"`{name}` is {value!r}; it must be {what} of at least {low}.")
    return kind(value)


def check_generator(generator, num_images: int) -> None:
    """Raises `ValueError` unless `generator` is `None`, one generator, or a list of one for each image."""
    listed = generator if isinstance(generator, (list, tuple)) else [] if generator is None else [generator]
    wrong = [type(one).__name__ for one in listed if not isinstance(one, torch.Generator)]
    if wrong:
        raise ValueError(
            f"`generator` holds {wrong[0]}; it must be a `torch.Generator`, or a list of one for each image."
        )
    if isinstance(generator, (list, tuple)) and len(generator) != num_images:
        raise ValueError(
            f"`generator` is a list of {len(generator)}, and {num_images} images are drawn; give one for each image."
        )


# What a pipeline makes of the prompts by itself.
MADE_OF_PROMPT = ("input_ids", "inputs", "inputs_embeds", "attention_mask", "pixel_values", "mm_encoder_outputs")


def gather_options(prior_guidance_scale: float | None, prior_generation_kwargs: dict | None) -> dict:
    """Arguments of `generate`. Raises `ValueError` on those that are given twice, or that ask for no image."""
    options = {} if prior_generation_kwargs is None else prior_generation_kwargs
    if not isinstance(options, dict):
        raise ValueError(f"`prior_generation_kwargs` is {options!r}; it must be a dictionary.")
    of_config = getattr(options.get("generation_config"), "generation_mode", None)
    for mode in (options.get("generation_mode"), of_config):
        if mode not in (None, "image"):
            raise ValueError(f"`generation_mode` is {mode!r}; a pipeline draws, in image mode.")
    made = [name for name in MADE_OF_PROMPT if name in options]
    if made:
        raise ValueError(f"`prior_generation_kwargs` has `{made[0]}`, which is made of the prompt; leave it out.")
    if prior_guidance_scale is not None and options.get("guidance_scale") is not None:
        raise ValueError("Give `prior_guidance_scale`, or `guidance_scale` in `prior_generation_kwargs`, not both.")
    return {"guidance_scale": prior_guidance_scale, **options, "generation_mode": "image"}


class UniCode2PriorMixin:
    """The part of a pipeline that knows the language model.

    Its components are `vision_language_encoder`, `processor` and `condition_mapper`.
    """

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
            `ValueError`: on an empty prompt, on less than one candidate, on options that ask for no image, and when
                there are not as many generators as prompts.
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
    def encode_visual_tokens(self, visual_token_ids: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Visual token ids `(batch_size, num_image_tokens)` to `prompt_embeds` and `pooled_prompt_embeds` (Eq. 6 and 9).

        Raises:
            `ValueError`: on ids outside the visual vocabulary, or that are not whole images.
        """
        self.check_visual_tokens(visual_token_ids)
        codes = visual_token_ids.to(self._execution_device) - self.vision_language_encoder.config.visual_token_offset
        embeds = self.vision_language_encoder(codes, task="embed_codes")  # (batch_size, num_image_tokens, visual_dim)
        condition = self.condition_mapper(embeds, return_dict=False)
        return tuple(value.to(self.transformer.dtype) for value in condition)

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
