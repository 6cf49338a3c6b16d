"""Makes Diffusers find the pipelines and components of this package by their names, without remote code."""

import diffusers
from diffusers.pipelines import auto_pipeline, pipeline_loading_utils

from .condition_mapper_unicode2 import UniCode2ConditionMapper
from .pipeline_unicode2_flux import UniCode2FluxPipeline

METHODS = ["save_pretrained", "from_pretrained"]
LOADABLE = {name: METHODS for name in ("UniCode2PreTrainedModel", "UniCode2Processor", "UniCode2ConditionMapper")}


def register() -> None:
    """Enters the package among Diffusers' libraries, and its pipelines among the names that Diffusers knows."""
    pipeline_loading_utils.LOADABLE_CLASSES["transformers_unicode2"] = LOADABLE
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(LOADABLE)
    diffusers.UniCode2ConditionMapper = UniCode2ConditionMapper
    diffusers.UniCode2FluxPipeline = UniCode2FluxPipeline
    # The same call draws a prompt and redraws an image.
    for mapping in (auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING, auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING):
        mapping["unicode2-flux"] = UniCode2FluxPipeline


register()

__all__ = ["UniCode2ConditionMapper", "UniCode2FluxPipeline"]
