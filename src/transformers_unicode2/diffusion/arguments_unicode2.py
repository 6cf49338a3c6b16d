"""The arguments of a pipeline's call, checked before any work."""

import math
import numbers

import torch
from PIL import Image

# The numbers that a pipeline keeps, their types and least values.
NUMBERS = {
    "image_size": (int, 1),
    "num_candidates": (int, 1),
    "num_inference_steps": (int, 1),
    "guidance_scale": (float, 0),
    "true_cfg_scale": (float, 1),
}


# What SDXL is told of an image, height and width in pixels: smaller ones look blurred.
ORIGINAL_SIZE = (1024, 1024)


def to_number(name: str, value, kind: type, low: float) -> float | int:
    """A number of Python or NumPy as `int` or `float`. Raises `ValueError` when it is none, or below `low`."""
    abstract = numbers.Integral if kind is int else numbers.Real
    # Python counts truth values among the whole numbers
    if isinstance(value, bool) or not isinstance(value, abstract) or not low <= value < math.inf:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"`{name}` is {value!r}; it must be {what} of at least {low}.")
    return kind(value)


def check_sizes(height: int, width: int, factor: int) -> None:
    """Raises `ValueError` on a height or width, in pixels, that is no multiple of what the decoder paints."""
    if height % factor or width % factor:
        raise ValueError(f"`height` is {height} and `width` {width}; both must be multiples of {factor}.")


def check_length(num_prompt_tokens: int, num_written: int, limit: int | None) -> None:
    """Raises `ValueError` when a prompt and what is written behind it are longer than the `limit` of a model."""
    if limit is not None and num_prompt_tokens + num_written > limit:
        raise ValueError(
            f"The prompt has {num_prompt_tokens} tokens, and {num_written} are written behind it; the language model "
            f"reads {limit} at most, so shorten the prompt."
        )


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


def check_weights(name: str, component) -> None:
    """Raises `ValueError` when a component has weights that loading did not find; those that are offloaded have a
    hook."""
    if not isinstance(component, torch.nn.Module):
        return
    modules = {path: module for path, module in component.named_modules() if "_hf_hook" not in vars(module)}
    absent = [f"{path}.{n}" for path, m in modules.items() for n, w in m.named_parameters(recurse=False) if w.is_meta]
    if absent:
        raise ValueError(
            f"`{name}` lacks {len(absent)} weights, which its files do not hold; the first is {absent[0]}. Copy it "
            "again."
        )


def check_finite_weights(what: str, module: torch.nn.Module) -> None:
    """Raises `ValueError` when a weight or buffer is not finite; `what` begins the sentence.

    What is on the meta device or quantized is not looked at.
    """
    state = {key: value for key, value in module.state_dict().items() if type(value) is torch.Tensor}
    bad = [key for key, value in state.items() if not value.is_meta and not value.isfinite().all()]
    if bad:
        raise ValueError(
            f"{what} has {len(bad)} weights that are not finite, the first is {bad[0]}; copy or train it again."
        )


def check_sources(**sources) -> None:
    """Raises `ValueError` unless exactly one thing to paint is given, and a prompt is text."""
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        names = [f"`{name}`" for name in sources]
        raise ValueError(
            f"Give exactly one of {', '.join(names[:-1])} and {names[-1]}; got {' and '.join(given) or 'none'}."
        )
    image = sources["image"]
    check_texts(prompt=sources["prompt"])
    if isinstance(image, (list, tuple)) and not image:
        raise ValueError("`image` is an empty list; give at least one image.")


def check_pairs(embeds: dict, kwargs: dict) -> None:
    """Raises `ValueError` when of embeddings, or of negative ones in `kwargs`, the pooled or the others are missing."""
    for negative, pair in (("", embeds), ("negative_", {name: kwargs.get(f"negative_{name}") for name in embeds})):
        if len([value for value in pair.values() if value is not None]) == 1:
            raise ValueError(f"Give {' and '.join(f'`{negative}{name}`' for name in pair)}, or neither.")


def check_embeds(embeds: dict, kwargs: dict, widths: dict[str, int]) -> None:
    """Raises `ValueError` on embeddings, or negative ones in `kwargs`, that a decoder does not read.

    They must be finite and have the shapes that it reads.

    Args:
        embeds: `prompt_embeds` and `pooled_prompt_embeds`.
        kwargs: with the negative ones under the same names behind `negative_`.
        widths: of the decoder, `output_dim` and `pooled_dim`.
    """
    for negative in ("", "negative_"):
        given = {
            f"{negative}{name}": (kwargs.get(f"negative_{name}") if negative else value)
            for name, value in embeds.items()
        }
        for (name, value), shape in zip(given.items(), ((None, widths["output_dim"]), (widths["pooled_dim"],))):
            found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            fits = isinstance(value, torch.Tensor) and value.ndim == 1 + len(shape) and value.shape[-1] == shape[-1]
            if value is None:
                continue
            if not (fits and value.is_floating_point() and len(value)):
                expected = f"(batch_size, {'num_tokens, ' if len(shape) > 1 else ''}{shape[-1]})"
                raise ValueError(f"`{name}` is {found}; it must be a floating-point tensor of shape {expected}.")
            bad = (~value.isfinite()).sum().item()
            if bad:
                raise ValueError(f"`{name}` has {bad} values that are not finite; look at what made it.")
        counts = {name: len(value) for name, value in given.items() if value is not None}
        if len({*counts.values()}) > 1:
            said = " and ".join(f"`{name}` has {count}" for name, count in counts.items())
            raise ValueError(f"{said} rows; give one row of each for an image.")


def check_latents(latents, shape: tuple[int, ...], height: int, width: int) -> None:
    """Raises `ValueError` unless latents, if there are any, have the shape that images of a size need."""
    if latents is None or isinstance(latents, torch.Tensor) and tuple(latents.shape) == shape:
        return
    found = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
    raise ValueError(f"`latents` is {found}; {shape[0]} images of {height} x {width} pixels need {shape}.")


def read_sdxl_pooled_width(config: dict, num_told: int = 6) -> int:
    """Of a U-Net: in front of the pooled embeddings stand those of six numbers, which are sizes and a place; of a
    refiner of five."""
    return config["projection_class_embeddings_input_dim"] - num_told * config["addition_time_embed_dim"]


def count_prompts(sources: dict) -> int | None:
    """How many prompts, images, rows of tokens or of embeddings are given; `None` when only reading them tells."""
    ((name, value),) = ((name, value) for name, value in sources.items() if value is not None)
    if isinstance(value, (list, tuple)):
        return len(value)
    if name == "prompt" or isinstance(value, Image.Image):
        return 1
    return len(value) if name != "image" and isinstance(value, torch.Tensor) and value.ndim else None


def repeat_rows(name: str, value: torch.Tensor, num_images_per_prompt: int, num_images: int) -> torch.Tensor:
    """One row for each of `num_images`, of one row, one for each prompt or one for each image.

    Raises `ValueError` when there is another number of them.
    """
    if len(value) == 1:
        return value.expand(num_images, *value.shape[1:])
    if len(value) * num_images_per_prompt == num_images:
        return value.repeat_interleave(num_images_per_prompt, dim=0)
    if len(value) != num_images:
        raise ValueError(
            f"`{name}` has {len(value)} rows, and {num_images} images are drawn; give one, or one for each."
        )
    return value


NEGATIVE_TEXTS = ("negative_prompt", "negative_prompt_2")


def check_negatives(kwargs: dict) -> None:
    """Raises `ValueError` on a text for the second text encoder alone, or beside embeddings of what it would say."""
    if kwargs.get("negative_prompt_2") is not None and kwargs.get("negative_prompt") is None:
        raise ValueError("`negative_prompt_2` is given without `negative_prompt`; give that too.")
    if kwargs.get("negative_prompt") is not None and kwargs.get("negative_prompt_embeds") is not None:
        raise ValueError("Give `negative_prompt` or `negative_prompt_embeds`, not both.")


def check_texts(**texts) -> None:
    """Raises `ValueError` unless each text that is given is a string, or a list of them."""
    for name, text in texts.items():
        listed = text if isinstance(text, (list, tuple)) else [text]
        wrong = [type(one).__name__ for one in listed if not isinstance(one, str)]
        if text is not None and wrong:
            raise ValueError(f"`{name}` holds {wrong[0]}; it must be a string or a list of strings.")


def check_adapters(given: list[str], adapted, image_encoder) -> None:
    """Raises `ValueError` on images or embeddings for an IP adapter that is not loaded, or not whole.

    Args:
        given: names of the arguments that are given.
        adapted: what the decoder projects them by, `None` without an adapter.
        image_encoder: that reads images.
    """
    adapters = [name for name in given if "ip_adapter_image" in name]
    if adapters and adapted is None:
        raise ValueError(f"`{adapters[0]}` needs an IP adapter; load one with `load_ip_adapter`, or leave it out.")
    if any(not name.endswith("embeds") for name in adapters) and image_encoder is None:
        raise ValueError(f"`{adapters[0]}` needs the `image_encoder` of an IP adapter; load it with the pipeline.")


def repeat_texts(name: str, text: str | list[str], num_images_per_prompt: int, num_images: int) -> list[str]:
    """One text for each of `num_images`. Raises `ValueError` when `text` does not make as many."""
    texts = [text] * (num_images // num_images_per_prompt) if isinstance(text, str) else list(text)
    texts = [one for one in texts for _ in range(num_images_per_prompt)]
    if len(texts) != num_images:
        raise ValueError(
            f"`{name}` makes {len(texts)} texts, and {num_images} images are drawn; give one, or one for each."
        )
    return texts
