"""UniCode²: cascaded large-scale codebooks for unified multimodal understanding and generation."""

# First: it looks who started this process, who may be killed while the libraries are imported
from . import processes  # noqa: F401

# isort: split
from importlib import import_module
from types import ModuleType

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    Qwen2Tokenizer,
)

from .adapters_unicode2 import when_imported
from .configuration_unicode2 import UniCode2CodebookConfig, UniCode2Config, UniCode2QuantizerConfig
from .images_unicode2 import UniCode2ImageProcessor
from .modeling_unicode2 import UniCode2ForConditionalGeneration, UniCode2Model, UniCode2PreTrainedModel
from .processing_unicode2 import UniCode2Processor
from .quantization_unicode2 import UniCode2Codebook, UniCode2Quantizer
from .search.nearest import search_codebook

__version__ = "0.1.0"

# The fast search, with the ids of the plain one that travels.
UniCode2Codebook.search = search_codebook

LAZY = {
    "FaissSearch": ".search.faiss_index",
    "UniCode2AnyToAnyPipeline": ".any_to_any",
    "UniCode2ConditionMapper": ".diffusion.condition_mapper_unicode2",
    "UniCode2FluxPipeline": ".diffusion.pipeline_unicode2_flux",
    "UniCode2PriorPipeline": ".diffusion.pipeline_unicode2_prior",
    "UniCode2StableDiffusionXLPipeline": ".diffusion.pipeline_unicode2_stable_diffusion_xl",
}

for config_class, model_class in ((UniCode2Config, UniCode2Model), (UniCode2QuantizerConfig, UniCode2Quantizer)):
    AutoConfig.register(config_class.model_type, config_class)
    AutoModel.register(config_class, model_class)
    config_class.register_for_auto_class()
AutoModelForImageTextToText.register(UniCode2Config, UniCode2ForConditionalGeneration)
AutoModelForMultimodalLM.register(UniCode2Config, UniCode2ForConditionalGeneration)
AutoProcessor.register(UniCode2Config, UniCode2Processor)
AutoTokenizer.register(UniCode2Config, tokenizer_class=Qwen2Tokenizer)
# Of either kind, since the class resizes with Pillow always.
image_processors = {"pil": UniCode2ImageProcessor, "torchvision": UniCode2ImageProcessor}
AutoImageProcessor.register(UniCode2Config, image_processor_classes=image_processors)
UniCode2Model.register_for_auto_class("AutoModel")
UniCode2Quantizer.register_for_auto_class("AutoModel")
UniCode2ForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
UniCode2Processor.register_for_auto_class()


def teach_diffusers(module: ModuleType) -> None:
    """Lets diffusers take this package's class wherever a configuration names it, with code beside it or without."""
    read = module.ConfigMixin._dict_from_json_file.__func__

    def read_known(cls, json_file) -> dict:
        config = read(cls, json_file)
        name = config.get("_class_name")
        name = name[-1] if isinstance(name, list) and name else name
        if isinstance(name, str) and ".diffusion." in LAZY.get(name, ""):
            import_module(".diffusion.registration", __name__)
            config["_class_name"] = name
        return config

    module.ConfigMixin._dict_from_json_file = classmethod(read_known)


when_imported("diffusers.configuration_utils", teach_diffusers)


def __getattr__(name: str):
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        if ".diffusion." in LAZY[name]:
            import_module(".diffusion.registration", __name__)
        return getattr(import_module(LAZY[name], __name__), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} needs {error.name}; install transformers_unicode2[diffusion].") from error


__all__ = [
    "FaissSearch",
    "UniCode2AnyToAnyPipeline",
    "UniCode2Codebook",
    "UniCode2CodebookConfig",
    "UniCode2ConditionMapper",
    "UniCode2Config",
    "UniCode2FluxPipeline",
    "UniCode2ForConditionalGeneration",
    "UniCode2ImageProcessor",
    "UniCode2Model",
    "UniCode2PreTrainedModel",
    "UniCode2PriorPipeline",
    "UniCode2Processor",
    "UniCode2Quantizer",
    "UniCode2QuantizerConfig",
    "UniCode2StableDiffusionXLPipeline",
]
