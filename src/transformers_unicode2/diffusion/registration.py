"""Makes Diffusers find the pipelines and components of this package by their names, without remote code."""

from pathlib import Path

import diffusers
from diffusers.pipelines import auto_pipeline, pipeline_loading_utils

from .condition_mapper_unicode2 import UniCode2ConditionMapper
from .pipeline_unicode2_flux import UniCode2FluxPipeline
from .pipeline_unicode2_prior import UniCode2PriorPipeline
from .pipeline_unicode2_stable_diffusion_xl import UniCode2StableDiffusionXLPipeline

METHODS = ["save_pretrained", "from_pretrained"]
LOADABLE = {name: METHODS for name in ("UniCode2PreTrainedModel", "UniCode2Processor", "UniCode2ConditionMapper")}
# Under the names that Diffusers' automatic classes give them.
PAINTERS = {
    "unicode2-flux": UniCode2FluxPipeline,
    "unicode2-stable-diffusion-xl": UniCode2StableDiffusionXLPipeline,
}


def register() -> None:
    """Enters the package among Diffusers' libraries, and its pipelines among the names that Diffusers knows."""
    pipeline_loading_utils.LOADABLE_CLASSES["transformers_unicode2"] = LOADABLE
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(LOADABLE)
    for own in (UniCode2ConditionMapper, UniCode2PriorPipeline, *PAINTERS.values()):
        setattr(diffusers, own.__name__, own)
    # The same call draws a prompt and redraws an image.
    for mapping in (auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING, auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING):
        mapping.update(PAINTERS)


def find_stock_class(decoder: str) -> str:
    """The name of the stock pipeline in a folder or Hub repository whose decoder we paint with.

    Raises `ValueError` on any other one.
    """
    try:
        name = diffusers.DiffusionPipeline.load_config(decoder).get("_class_name")
    except OSError as error:
        if Path(decoder).is_dir():
            what = f"The folder {decoder} has no model_index.json that can be read; give that of a whole pipeline."
        else:
            what = f"There is no folder {decoder}, and the Hub gives no pipeline of this name. Correct it, or log in."
        raise ValueError(what) from error
    name = name[-1] if isinstance(name, list) else name
    stock = {own.__name__: own.__name__.removeprefix("UniCode2") for own in PAINTERS.values()}
    # One that has been assembled holds a decoder, too
    if stock.get(name, name) not in stock.values():
        raise ValueError(
            f"{decoder} is a {name}; supported are {' and '.join(stock.values())}. Other decoders take the "
            "conditioning of `UniCode2PriorPipeline`."
        )
    return stock.get(name, name)


register()

__all__ = [
    "UniCode2ConditionMapper",
    "UniCode2FluxPipeline",
    "UniCode2PriorPipeline",
    "UniCode2StableDiffusionXLPipeline",
]
