"""Makes diffusers find the pipelines and components of this package, from a folder or from the Hub, without remote code."""

import diffusers
from diffusers.pipelines import pipeline_loading_utils

from .condition_mapper_unicode2 import UniCode2ConditionMapper
from .pipeline_unicode2_flux import UniCode2FluxPipeline

METHODS = ["save_pretrained", "from_pretrained"]
LOADABLE = {name: METHODS for name in ("UniCode2PreTrainedModel", "UniCode2Processor", "UniCode2ConditionMapper")}


def register() -> None:
    """Enters the package among diffusers' libraries and its pipelines among diffusers' names."""
    pipeline_loading_utils.LOADABLE_CLASSES["transformers_unicode2"] = LOADABLE
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(LOADABLE)
    diffusers.UniCode2FluxPipeline = UniCode2FluxPipeline


register()

__all__ = ["UniCode2ConditionMapper", "UniCode2FluxPipeline"]
