"""What comes before generation: what a call of `generate` asks for, what its cache holds, a plan before an image."""

import copy
import numbers
from dataclasses import dataclass

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

# What Transformers calls the key-value cache of its models: `cache` from 5.24 on.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
GENERATION_MODES = ("text", "image", "interleaved")
# Options of image mode alone. A generation config may hold them too, as entries of its own or in `image_generation`.
IMAGE_OPTIONS = ("guidance_scale", "max_plan_tokens")
# Options whose code takes ids of the prompt, or of another model, for places in the scores.
TWO_VOCABULARIES = (
    "prompt_lookup_num_tokens",
    "assistant_model",
    "assistant_early_exit",
    "use_mtp",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
)
# Options that are about text; an image has a fixed number of visual ids and nothing else.
TEXT_ONLY = (
    "forced_bos_token_id",
    "forced_eos_token_id",
    "stop_strings",
    "exponential_decay_length_penalty",
    "token_healing",
    "watermarking_config",
)
# Arguments that nothing would read, and why.
UNREAD = {
    "negative_prompt_ids": "guidance compares with the begin-of-image id alone",
    "negative_prompt_attention_mask": "guidance compares with the begin-of-image id alone",
    "output_modality": "`generation_mode` sets it",
    "visual_guidance_scale": "`guidance_scale` sets it",
    "visual_temperature": "`temperature` sets it",
    "prompt_length": "the prompt has it",
}
# Arguments that hold the images of a prompt.
IMAGES = ("pixel_values", "mm_encoder_outputs")
# What a plan has in common with the image after it: the inputs, and how ids are drawn.
SHARED_WITH_PLAN = (*IMAGES, "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p")


@dataclass(frozen=True)
class GenerationRequest:
    r"""
    What one call of `generate` asks for.

    Args:
        mode (`str`): one of `GENERATION_MODES`.
        guidance_scale (`float`, *optional*): classifier-free guidance of an image.
        max_plan_tokens (`int`, *optional*): length of the longest plan.
        is_plan_asked (`bool`): whether the call itself asks for that plan, and not its checkpoint.
        options (`dict`): what stock `generate` takes, by name.
        config (`GenerationConfig`, *optional*): that of the call, a copy.
        defaults (`GenerationConfig`): that of the checkpoint.
    """

    mode: str
    guidance_scale: float | None
    max_plan_tokens: int | None
    is_plan_asked: bool
    options: dict
    config: GenerationConfig | None
    defaults: GenerationConfig

    def find(self, name: str):
        """The value of an option of stock `generate`, wherever it is given; `None` if it is not."""
        return first_given(self.options.get(name), find_option(name, self.config, self.defaults))

    def find_of_call(self, name: str):
        """The value of an option that the call itself gives, and not its checkpoint; `None` if it does not."""
        return first_given(self.options.get(name), find_asked(name, self.config, self.defaults))

    def check_lengths(self, prompt_length: int, num_image_tokens: int) -> None:
        """Raises `ValueError` on limits of the call that one image, which is as long as it is, does not keep."""
        limits = {"max_new_tokens": 0, "max_length": prompt_length, "min_new_tokens": 0, "min_length": prompt_length}
        for name, start in limits.items():
            value, length = self.find_of_call(name), start + num_image_tokens
            kept = value is None or isinstance(value, numbers.Integral)
            if not kept or value is not None and (value < length if name.startswith("max") else value > length):
                behind = f" behind {start} of the prompt" if start else ""
                raise ValueError(
                    f"`{name}` is {value!r}, and an image has {num_image_tokens} tokens{behind}, no more and no less; "
                    "leave it out."
                )

    def check(self, model_config) -> None:
        """Raises `ValueError` on what does not fit the mode, or a model of this `UniCode2Config`."""
        guidance, plan = self.guidance_scale, self.max_plan_tokens
        if guidance is not None and not (isinstance(guidance, numbers.Real) and 0 <= guidance < float("inf")):
            raise ValueError(f"`guidance_scale` is {guidance!r}; it must be a number of at least 0.")
        if self.mode != "image" and guidance not in (None, 1):
            raise ValueError(f"`guidance_scale` is {guidance} in {self.mode} mode; guidance works in image mode only.")
        if plan is not None and not (isinstance(plan, numbers.Integral) and plan >= 0):
            raise ValueError(f"`max_plan_tokens` is {plan!r}; it must be a whole number of at least 0.")
        if self.mode != "image" and plan:
            raise ValueError(f"`max_plan_tokens` is {plan} in {self.mode} mode; it works in image mode only.")
        for name, reason in UNREAD.items():
            if self.find(name) is not None:
                raise ValueError(f"`{name}` is not read by any mode: {reason}. Leave it out.")
        forced = first_given(self.find("forced_eos_token_id"), [])
        if self.mode != "image" and max([forced] if isinstance(forced, int) else forced, default=0) >= (
            model_config.visual_token_offset
        ):
            raise ValueError(
                f"`forced_eos_token_id` is {forced}; text ends with one of the {model_config.visual_token_offset} text "
                "ids."
            )
        for name in TWO_VOCABULARIES:
            if self.find(name) not in (None, False):
                raise ValueError(
                    f"`{name}` works on one vocabulary; this one is split into {model_config.visual_token_offset} text "
                    f"ids and {model_config.codebook_config.codebook_size} visual ids."
                )
        # Those of the checkpoint do not speak of images.
        for name in TEXT_ONLY if self.mode == "image" else ():
            if self.find_of_call(name) not in (None, False):
                raise ValueError(
                    f"`{name}` is about text, and image mode writes {model_config.num_image_tokens} visual ids; leave "
                    "it out."
                )


def resolve_request(
    defaults: GenerationConfig,
    config: GenerationConfig | None,
    generation_mode: str | None,
    image_options: dict,
    options: dict,
) -> GenerationRequest:
    """Gathers a request from the arguments of a call, its generation config and that of the checkpoint, in this order.

    Args:
        defaults: generation config of the checkpoint. NumPy's numbers in it become Python's.
        config: that of the call.
        generation_mode: argument of the call.
        image_options: the `IMAGE_OPTIONS` among its arguments.
        options: its other arguments.

    Raises:
        `ValueError`: on an unknown mode.
    """
    config, options, image_options = make_plain(copy.deepcopy(config)), plain(options), plain(image_options)
    make_plain(defaults)
    mode = generation_mode or find_option("generation_mode", config, defaults) or "text"
    check_mode(mode)
    asked = {name: first_given(image_options.get(name), find_asked(name, config, defaults)) for name in IMAGE_OPTIONS}
    chosen = asked
    if mode == "image":
        of_config = find_option("image_generation", defaults if config is None else config)
        image = first_given(options.get("image_generation"), of_config, {})
        options = {**image, **options}
        chosen = {n: first_given(asked[n], image.get(n), find_option(n, defaults)) for n in IMAGE_OPTIONS}
        options = {name: value for name, value in options.items() if name not in ("image_generation", *IMAGE_OPTIONS)}
    # Stock guidance is a second forward pass; it must follow neither the call's config nor the checkpoint's.
    if config is None:
        options["guidance_scale"] = None
    else:
        config.guidance_scale = 1
    return GenerationRequest(
        mode=mode,
        is_plan_asked=bool(asked["max_plan_tokens"]),
        options=options,
        config=config,
        defaults=defaults,
        **chosen,
    )


def check_mode(mode: str) -> None:
    """Raises `ValueError` on an unknown generation mode."""
    if mode not in GENERATION_MODES:
        raise ValueError(f"`generation_mode` is {mode!r}; it must be one of {', '.join(GENERATION_MODES)}.")


def plain(value):
    """NumPy's scalars as Python's numbers, also within lists and dictionaries: `generate` looks at types."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    if type(value) is dict:
        return {plain(key): plain(item) for key, item in value.items()}
    return value


def make_plain(config: GenerationConfig | None) -> GenerationConfig | None:
    """Turns the NumPy scalars in a generation config into Python's, in place, and returns it."""
    for name, value in vars(config).items() if config is not None else ():
        setattr(config, name, plain(value))
    return config


def first_given(*values):
    """The first that is not `None`; `None` without any."""
    return next((value for value in values if value is not None), None)


def find_option(name: str, *configs: GenerationConfig | None):
    """The value in the first generation config that has one; not every config has our options."""
    return first_given(*(getattr(config, name, None) for config in configs))


def find_asked(name: str, config: GenerationConfig | None, defaults: GenerationConfig):
    """The value in the generation config of a call; `None` if it is the checkpoint's, from which it was copied."""
    value = find_option(name, config)
    return None if value == find_option(name, defaults) else value


@dataclass(frozen=True)
class ImagePrompt:
    r"""
    A prompt that ends with the begin-of-image id.

    Args:
        inputs (`dict`): `input_ids` or `inputs_embeds`, and their `attention_mask` if one is given.
        length (`int`): number of its tokens.
        is_begun (`bool`): whether the caller put the begin-of-image id there.
    """

    inputs: dict
    length: int
    is_begun: bool = False


def write_plan(model: GenerationMixin, prompt: ImagePrompt, options: dict, request: GenerationRequest) -> ImagePrompt:
    """Lets the model write text until it begins the image by itself; puts it in front of the begin-of-image id.

    The prompts come back left-padded anew. Of the options of the call, a plan follows those in `SHARED_WITH_PLAN`.

    Raises:
        `ValueError`: on settings that are as long as the prompt, which a plan makes longer.
    """
    for name in ("inputs_embeds", "past_key_values", "cache", "position_ids"):
        if prompt.inputs.get(name) is not None or options.get(name) is not None:
            raise ValueError(
                f"`{name}` does not go with a plan, which makes the prompt longer; `max_plan_tokens` is "
                f"{request.max_plan_tokens}, and 0 is no plan."
            )
    input_ids, boi = prompt.inputs["input_ids"][:, :-1], model.config.boi_token_id
    ends, pad = (find_option(n, request.config, request.defaults) for n in ("eos_token_id", "pad_token_id"))
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if "attention_mask" in prompt.inputs:
        mask = prompt.inputs["attention_mask"][:, :-1]
    else:
        # As stock `generate` has it.
        mask = torch.ones_like(input_ids) if pad is None or pad in ends else (input_ids != pad).long()
    shared = {name: options[name] for name in SHARED_WITH_PLAN if options.get(name) is not None}
    if "mm_encoder_outputs" in shared:
        # Beams repeat what is in it, in place.
        shared["mm_encoder_outputs"] = {k: copy.copy(v) for k, v in shared["mm_encoder_outputs"].items()}
    output = GenerationMixin.generate(
        model,
        input_ids,
        request.config,
        attention_mask=mask,
        output_modality="plan",
        eos_token_id=[boi, *ends],
        max_new_tokens=request.max_plan_tokens,
        **dict.fromkeys(("max_length", "min_length", "min_new_tokens", "stop_strings", "guidance_scale")),
        num_return_sequences=1,
        return_dict_in_generate=False,
        **shared,
    )
    return begin_after(output, mask, [boi, *ends])


def begin_after(output: torch.LongTensor, mask: torch.Tensor, ends: list[int]) -> ImagePrompt:
    """Puts the begin-of-image id, the first of `ends`, behind each plan, and what is not seen to the left.

    Args:
        output: prompts and plans, `(batch_size, num_tokens)`, each up to one of `ends`.
        mask: 1 where a prompt is seen, `(batch_size, num_prompt_tokens)`.
        ends: ids that end a plan and are no part of it.
    """
    plan = output[:, mask.shape[1] :]
    ended = torch.isin(plan, torch.tensor(ends, device=plan.device)).cumsum(-1) > 0
    begin = torch.full_like(output[:, :1], ends[0])
    ids = torch.cat([output, begin], 1)
    seen = torch.cat([mask, (~ended).to(mask), torch.ones_like(begin).to(mask)], 1)
    order = seen.argsort(dim=-1, stable=True)
    ids, seen = ids.gather(1, order), seen.gather(1, order)
    first = (seen.sum(0) > 0).nonzero()[0].item()
    return ImagePrompt({"input_ids": ids[:, first:], "attention_mask": seen[:, first:]}, ids.shape[1] - first)


def name_cache(past_key_values: Cache | None, cache: Cache | None) -> dict[str, Cache]:
    """The key-value cache as the language model takes it. Raises `ValueError` when it is given under both names.

    The old name is passed on as it is, so that Transformers warns of it where it is going to be removed. The cache of
    continuous batching, which is not a `Cache`, has always been called `cache`.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError(
            "Give at most one of `past_key_values` and `cache`, which is its name from Transformers 5.24 on."
        )
    if cache is not None:
        return {CACHE_NAME if isinstance(cache, Cache) else "cache": cache}
    return {} if past_key_values is None else {"past_key_values": past_key_values}


def count_cached(input_ids: torch.LongTensor, options: dict, num_more: int) -> int:
    """How many ids at the start of the prompts are in the cache already; 0 where the prompts hold new ids only.

    As in stock `generate`, prompts are whole chats, or new ids alone with an attention mask over all.

    Args:
        input_ids: prompts, `(batch_size, num_tokens)`.
        options: arguments of `generate`, with the cache and the attention mask among them.
        num_more: ids that are put behind the prompts before the model reads them.

    Raises:
        `ValueError`: when everything in the prompts is in the cache.
    """
    cache, mask = first_given(options.get("past_key_values"), options.get("cache")), options.get("attention_mask")
    if not isinstance(cache, Cache) or (mask is not None and mask.shape[1] > input_ids.shape[1]):
        return 0
    num_cached = int(cache.get_seq_length())
    if num_cached >= input_ids.shape[1] + num_more:
        raise ValueError(
            f"The cache holds {num_cached} tokens and the prompt {input_ids.shape[1]}; give the whole chat, or its new "
            "tokens with an `attention_mask` over all."
        )
    return num_cached


def drop_cached_images(input_ids: torch.LongTensor, num_cached: int, model_config, options: dict) -> dict:
    """The arguments of `generate` without the images that the cache holds; the caller may name all or the new ones.

    Args:
        input_ids: prompts, `(batch_size, num_tokens)`, of which the first `num_cached` tokens are in the cache.
        model_config (`UniCode2Config`): knows the placeholders.
        options: arguments of `generate`, with some of `IMAGES` among them.

    Raises:
        `ValueError`: when there are placeholders and no images for them, or the cache ends inside an image.
    """
    size = model_config.num_image_tokens
    is_place = input_ids == model_config.image_token_id
    cached = is_place[:, :num_cached].sum(-1)  # (batch_size,)
    num_new = is_place[:, num_cached:].sum().item()
    given = [name for name in IMAGES if options.get(name) is not None]
    if not given and num_new:
        raise ValueError(f"The prompt holds {num_new} image placeholders and no images; give `pixel_values`.")
    if not given or not cached.any():
        return options
    if (cached % size).any():
        raise ValueError(f"The cache ends inside an image, after {num_cached} tokens; crop it in front of the image.")
    starts = is_place.nonzero()[::size]  # (num_images, 2): row and column where each image of the chat begins
    keep = (starts[:, 1] >= num_cached).nonzero()[:, 0].tolist()
    chosen = {name: select_images(options[name], keep, len(starts)) for name in given}
    return drop_empty({**options, **chosen})


def drop_empty(options: dict) -> dict:
    """The arguments of `generate` without images that are `None`: it encodes what is there under their names."""
    return {name: value for name, value in options.items() if value is not None or name not in IMAGES}


def select_images(images, keep: list[int], num_images: int):
    """Those images of a chat that are not in the cache; images that are as many already stay.

    Args:
        images: pixels `(num_images, 3, height, width)`, or a dictionary of what `get_image_features` returned.
        keep: places of the new images among the `num_images` of the chat.

    Returns `None` when there are none. Raises `ValueError` on another number of images.
    """
    features = None if isinstance(images, torch.Tensor) else images["image"]
    num_given = len(images) if features is None else len(features.pooler_output)
    if num_given not in (len(keep), num_images):
        raise ValueError(
            f"The chat has {num_images} images, {len(keep)} of them behind what the cache holds, and {num_given} are "
            "given."
        )
    if not keep:
        return None
    if num_given == len(keep):
        return images
    if features is None:
        return images[keep]
    chosen = copy.copy(features)
    chosen.pooler_output = tuple(features.pooler_output[i] for i in keep)
    chosen.image_tokens = features.image_tokens[keep]
    return {**images, "image": chosen}


__all__ = ["GENERATION_MODES", "GenerationRequest", "resolve_request", "write_plan"]
