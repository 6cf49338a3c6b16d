"""The encoders that a codebook can stand behind: SigLIP, SigLIP 2 of a fixed size, and CLIP (section 3.2).

All commands and models read this one list, load an encoder here and take the same features of it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

# The encoders, and the models that hold one beside a text model. A SigLIP 2 of a fixed size says that it is a SigLIP.
ENCODERS = ("siglip_vision_model", "clip_vision_model")
HOLDERS = ("siglip", "clip")
# Their image processors; ours has the settings of either.
IMAGE_PROCESSORS = ("SiglipImageProcessor", "CLIPImageProcessor", "UniCode2ImageProcessor")
# What an encoder can compute in; it is part of what defines the codes.
ENCODER_DTYPES = ("float32", "bfloat16", "float16")


def check_kind(config: PreTrainedConfig, what: str, taken: tuple[str, ...] = ENCODERS) -> None:
    """Raises `ValueError` with the name of a model, called `what`, that is none of the kinds `taken`."""
    if config.model_type in taken:
        return
    naflex = ", whose number of patches depends on the image (NaFlex)" if "siglip2" in config.model_type else ""
    raise ValueError(
        f"{what} is a {config.model_type} model{naflex}; the encoder must be a SigLIP, a SigLIP 2 of a fixed size or a "
        f"CLIP: one of {', '.join(taken)}."
    )


def check_side(config: PreTrainedConfig, what: str) -> None:
    """Raises `ValueError` on an encoder, called `what`, of images that are no squares in three colours, or in bits."""
    if type(config.image_size) is not int or config.num_channels != 3:
        raise ValueError(
            f"{what} reads images of `image_size` {config.image_size} with {config.num_channels} channels; it must be "
            "one number of pixels, and 3 channels."
        )
    if config.to_dict().get("quantization_config"):
        raise ValueError(f"{what} has quantized weights; give the encoder that they were made of.")


def count_patches(config: PreTrainedConfig) -> int:
    """Patches of an image, T, of an encoder with this configuration. A CLS token is none."""
    return (config.image_size // config.patch_size) ** 2


def encode_patches(encoder: PreTrainedModel, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
    """The output of an encoder whose `last_hidden_state` holds the patch features alone.

    They are what its class calls `last_hidden_state`: of a SigLIP behind its last norm, of a CLIP before it and without
    the CLS token. Pooling and projection take no part.

    Args:
        encoder (`SiglipVisionModel` or `CLIPVisionModel`): computes in its own dtype.
        pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): preprocessed images.

    Returns:
        `last_hidden_state` of shape `(batch_size, num_patches, hidden_size)`, in the dtype of the encoder. With
        `output_hidden_states` and `output_attentions` what the encoder gives, a CLS token included.
    """
    output = encoder(pixel_values.to(encoder.dtype), **{**kwargs, "return_dict": True})
    output.last_hidden_state = output.last_hidden_state[:, -count_patches(encoder.config) :]
    return output


def load_encoder(path: str, dtype: str = "float32") -> tuple[PreTrainedModel, object]:
    """An encoder with the stock image processor, which resizes with Pillow, as checkpoints do.

    Args:
        path (`str`): folder or Hub name of the encoder, or of a model that holds it, with or without projection.
        dtype (`str`, *optional*, defaults to `"float32"`): of its weights.

    Returns:
        A `SiglipVisionModel` or `CLIPVisionModel` in eval mode, and its image processor.

    Raises:
        `ValueError`: on a model of another kind, on weights that are missing or damaged, and on an image processor for
            another size of images.
    """
    try:
        config = AutoConfig.from_pretrained(path)
        check_kind(config, "it", (*HOLDERS, *ENCODERS))
        config = config.vision_config if config.model_type in HOLDERS else config
        check_side(config, "it")
        with errors_alone():
            model, info = AutoModel.from_pretrained(
                path, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
        check_encoder_keys(info, path)
        image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")
        check_image_processor(image_processor, config)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be used as an encoder: {str(error).strip().splitlines()[0]}") from error
    return model.eval(), image_processor


@contextmanager
def errors_alone() -> Iterator[None]:
    """Without what Transformers reports of weights that an encoder has no place for; `check_encoder_keys` judges."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def check_encoder_keys(info: dict, source: str) -> None:
    """Raises `ValueError` when loading an encoder left weights at random, or ignored layers that the file holds.

    Likewise on weights of another size than the configuration gives them.

    Args:
        info (`dict`): what `from_pretrained(output_loading_info=True)` reports.
        source (`str`): where the encoder comes from, for the message.
    """
    # Old files of CLIP hold the numbers of the positions, too.
    layers = r"(vision_model\.)?(encoder|embeddings)\.(?!position_ids$)"
    missing = sorted(info["missing_keys"])
    surplus = sorted(key for key in info["unexpected_keys"] if re.match(layers, key))
    if info["mismatched_keys"]:
        name, stored, expected = sorted(info["mismatched_keys"])[0]
        raise ValueError(
            f"The encoder {source} has {len(info['mismatched_keys'])} weights of another size than its configuration "
            f"says; the first is {name}, {tuple(stored)} there and {tuple(expected)} in the configuration."
        )
    if missing:
        raise ValueError(
            f"The encoder {source} lacks {len(missing)} weights, which would be random; the first is {missing[0]}."
        )
    if surplus:
        raise ValueError(
            f"The encoder {source} holds {len(surplus)} weights that its configuration has no place for; the first is "
            f"{surplus[0]}."
        )


def find_image_size(image_processor) -> tuple[int, int]:
    """Height and width in pixels of the images that an image processor makes. Raises `ValueError` when they differ."""
    size = image_processor.crop_size if image_processor.do_center_crop else image_processor.size
    if not (size.get("height") and size.get("width")):
        raise ValueError(
            f"The image processor makes images whose size depends on the image ({dict(size)}); set `do_center_crop` "
            "and `crop_size` to what the encoder reads."
        )
    return size["height"], size["width"]


def check_image_processor(image_processor, config: PreTrainedConfig) -> None:
    """Raises `ValueError` on an image processor of another kind, or of another image size than the encoder reads."""
    kind = type(image_processor).__name__.removesuffix("Pil")
    if kind not in IMAGE_PROCESSORS:
        raise ValueError(f"its image processor is a {kind}; it must be one of {', '.join(IMAGE_PROCESSORS)}.")
    for name, is_needed in (("do_rescale", True), ("do_resize", not image_processor.do_center_crop)):
        if is_needed and getattr(image_processor, name, True) is False:
            raise ValueError(f"its image processor has `{name}` false, so it would not read most pictures; set it.")
    height, width = find_image_size(image_processor)
    side = config.image_size
    if (height, width) != (side, side):
        raise ValueError(
            f"its image processor makes images of {height} x {width} pixels, and the encoder reads {side} x {side}."
        )
