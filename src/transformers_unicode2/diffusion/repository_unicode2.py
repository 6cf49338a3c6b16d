"""One repository for a pipeline and its language model: how it is written, and how Diffusers loads it.

Its root is a checkpoint of Transformers, code and all. `model_index.json` names the code of the pipeline, so that
Diffusers can run it on trust; where this package is imported, its own classes take that place. The components that are
ours stand there under the library of their base classes, since Diffusers refuses others; what loads them is below.
"""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.utils.torch_utils import is_compiled_module
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from .condition_mapper_unicode2 import UniCode2ConditionMapper

if TYPE_CHECKING:
    # Never run, and there is no such file in this folder. Diffusers reads the imports of a file and downloads what they
    # name from beside it, so this line brings the code of the language model along.
    from .modeling_unicode2 import UniCode2ForConditionalGeneration  # noqa: F401

# Remote code was run on trust, and so may be the code beside it.
IS_REMOTE = not __name__.startswith("transformers_unicode2.")
IN_ROOT = ("vision_language_encoder", "processor")
ENTRIES = {
    "vision_language_encoder": ["transformers", "UniCode2ForConditionalGeneration"],
    "processor": ["transformers", "UniCode2Processor"],
    "condition_mapper": ["diffusers", "UniCode2ConditionMapper"],
}


class VisionLanguageEncoderConfig:
    """Finds the configuration of the language model as diffusers asks for it, to plan a `device_map`."""

    @staticmethod
    def from_pretrained(folder: str, subfolder: str, **kwargs):
        own = os.path.join(folder, subfolder)
        return AutoConfig.from_pretrained(own if os.path.isdir(own) else folder, trust_remote_code=IS_REMOTE)


class VisionLanguageEncoder(PreTrainedModel):
    """Stands for the class of the language model, which is this package's or travels with the repository."""

    config_class = VisionLanguageEncoderConfig

    def __new__(cls, config):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=IS_REMOTE)

    @classmethod
    def from_pretrained(cls, folder: str, **kwargs) -> PreTrainedModel:
        return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=IS_REMOTE, **kwargs)


class Processor(ProcessorMixin):
    """Stands for the class of the processor, as [`VisionLanguageEncoder`] for the model's."""

    @classmethod
    def from_pretrained(cls, folder: str, **kwargs) -> ProcessorMixin:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=IS_REMOTE, **kwargs)


# Diffusers looks for these, and for their base classes, in the namespace of this module.
LOADERS = {
    "vision_language_encoder": VisionLanguageEncoder,
    "processor": Processor,
    "condition_mapper": UniCode2ConditionMapper,
}
BASES = (ModelMixin, PreTrainedModel, ProcessorMixin)
# Options of loading that are for the parts of all repositories.
OF_ALL_PARTS = ("token", "cache_dir", "local_files_only", "force_download", "proxies")


def has_adapter(part) -> bool:
    """Whether a component of Diffusers carries the layers of an adapter of PEFT."""
    return bool(getattr(part, "peft_config", None))


def choose_dtype(dtype, name: str) -> dict:
    """The option `dtype` for one component, of the option for all: a dtype, its name, or a dictionary by components."""
    if isinstance(dtype, dict):
        dtype = dtype.get(name, dtype.get("default"))
    if isinstance(dtype, str):
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"`dtype` is {dtype!r}; it must be a dtype of torch, or the name of one.")
        dtype = found
    return {} if dtype is None else {"dtype": dtype}


def split_quantization(config) -> tuple[dict, dict, dict]:
    """The options of a `PipelineQuantizationConfig`, or `None`, for language model, mapper and decoder.

    What is loaded by itself would otherwise be left as it is, and Diffusers would warn that a decoder has no such part.
    """
    if config is None:
        return {}, {}, {}
    resolve, ours = config._resolve_quant_config, ("vision_language_encoder", "condition_mapper")
    named = [*(config.quant_mapping or {}), *(config.components_to_quantize or [])]
    of_model = resolve(is_diffusers=False, module_name=ours[0])
    of_mapper = resolve(is_diffusers=True, module_name=ours[1]) if ours[1] in named else None
    rest = copy.copy(config)
    if config.quant_mapping:
        rest.quant_mapping = {name: value for name, value in config.quant_mapping.items() if name not in ours}
    if config.components_to_quantize:
        rest.components_to_quantize = [name for name in config.components_to_quantize if name not in ours]
    has_rest = not named or any(name not in ours for name in named)
    return tuple(
        {} if value is None else {"quantization_config": value}
        for value in (of_model, of_mapper, rest if has_rest else None)
    )


class UniCode2RepositoryMixin:
    """Saving and loading of a pipeline around a language model in the root of its repository."""

    @classmethod
    def from_unicode2(
        cls, unicode2: str | os.PathLike, decoder: str | os.PathLike | None = None, mapper=None, **kwargs
    ):
        r"""
        A pipeline of parts in several repositories. Only those that are used are read: of a decoder, no text encoder.

        Args:
            unicode2 (`str`): folder or Hub name of a UniCode² checkpoint.
            decoder (`str`, *optional*): the same of a stock pipeline, such as `"black-forest-labs/FLUX.1-dev"`. Leave
                it out for a pipeline without a decoder.
            mapper (`str` or `UniCode2ConditionMapper`, *optional*): the mapper for this decoder, or its folder or Hub
                name. By default it is in `condition_mapper` of `unicode2`.
            **kwargs: of the stock `from_pretrained`. Text encoders and other components that are given here are used.
                `dtype`, `token`, `cache_dir`, `local_files_only`, `force_download` and `proxies` are for all parts,
                `revision` and `variant` for the decoder. A `quantization_config` is for the language model, too; for
                the mapper if it names `condition_mapper`.

        Raises:
            `ValueError`: on a decoder of another kind.
        """
        hub = {name: kwargs[name] for name in OF_ALL_PARTS if name in kwargs}
        if cls.decoder_part is None or cls.decoder_part not in kwargs:
            cls.check_decoder(decoder, **hub)
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        if dtype is not None:
            kwargs["dtype"] = choose_dtype(dtype, "").get("dtype") if isinstance(dtype, str) else dtype
        quantization = kwargs.pop("quantization_config", None)
        of_model, of_mapper, of_decoder = split_quantization(quantization)
        if mapper is None or isinstance(mapper, (str, os.PathLike)):
            place = {"subfolder": "condition_mapper"} if mapper is None else {}
            place |= hub | choose_dtype(dtype, "condition_mapper")
            mapper = UniCode2ConditionMapper.from_pretrained(mapper or unicode2, **place, **of_mapper)
        of_model |= hub | choose_dtype(dtype, "vision_language_encoder")
        ours = {
            "vision_language_encoder": VisionLanguageEncoder.from_pretrained(unicode2, **of_model),
            "processor": Processor.from_pretrained(unicode2, **hub),
            "condition_mapper": mapper,
        }
        if decoder is None:
            others = {name: value for name, value in kwargs.items() if name not in (*hub, "dtype")}
            return cls(**ours, **others)
        absent = dict.fromkeys(cls._optional_components)
        return cls.from_pretrained(decoder, **{**absent, **ours, **kwargs, **of_decoder})

    @classmethod
    def check_decoder(cls, decoder: str | os.PathLike | None, **hub) -> None:
        """Raises `ValueError` unless a repository holds the decoder of this pipeline, or it has and needs none."""
        stock = cls.__name__.removeprefix("UniCode2")
        if cls.decoder_part is None:
            if decoder is not None:
                raise ValueError(f"{cls.__name__} has no decoder; leave {decoder} out.")
            return
        if decoder is None:
            raise ValueError(f"{cls.__name__} needs the decoder of a {stock}; give its folder or Hub name.")
        found = cls.load_config(decoder, **hub).get("_class_name")
        found = found[-1] if isinstance(found, (list, tuple)) else found
        if found not in (stock, cls.__name__):
            raise ValueError(
                f"{decoder} is a {found}, and {cls.__name__} paints with the decoder of a {stock}. Other decoders take "
                "the conditioning of `UniCode2PriorPipeline`."
            )

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple[dict, dict, dict]:
        """Stock; our components come from the loaders of this module, whatever library the index names for them."""
        init_dict, unused, hidden = super().extract_init_dict(config_dict, **kwargs)
        for name, loader in LOADERS.items():
            entry = init_dict.get(name)
            if isinstance(entry, (list, tuple)) and entry[0] is not None:
                init_dict[name] = [__name__, loader.__name__]
        return init_dict, unused, hidden

    def to_json_string(self) -> str:
        """The index, in the form that every way of loading understands."""
        index = json.loads(super().to_json_string())
        # A path of this machine.
        index.pop("_name_or_path", None)
        index |= {"_class_name": [type(self).__module__.split(".")[-1], type(self).__name__], **ENTRIES}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes the index, and the code that travels of the pipeline and of its language model."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.vision_language_encoder.config
        config.save_code(folder)
        config.save_code(folder, beside=__file__)
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def check_savable(self) -> None:
        """Raises `ValueError` when a part is missing, or when one of Diffusers carries an adapter."""
        absent = [name for name in IN_ROOT if getattr(self, name) is None]
        if absent:
            raise ValueError(f"`{absent[0]}` is None; a pipeline without it cannot be saved.")
        adapted = [name for name, part in self.components.items() if name not in IN_ROOT and has_adapter(part)]
        if adapted:
            raise ValueError(
                f"`{adapted[0]}` carries an adapter, and saved so it could not be loaded; call `fuse_lora` and "
                "`unload_lora_weights` to save with it, or `unload_lora_weights` to save without."
            )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """Stock, but language model and processor are saved to the root, where Transformers looks for them.

        `variant` names the files of the decoder and the mapper; those in the root have none.

        Raises:
            `ValueError`: when a part carries an adapter, which is no checkpoint on its own, or is missing.
        """
        self.check_savable()
        encoder = self.vision_language_encoder
        encoder = encoder._orig_mod if is_compiled_module(encoder) else encoder
        if not isinstance(encoder, PreTrainedModel):
            raise ValueError(
                f"`vision_language_encoder` is a {type(encoder).__name__}; merge its adapter (`merge_and_unload`) to "
                "save the pipeline."
            )
        encoder.save_pretrained(
            save_directory, **({} if max_shard_size is None else {"max_shard_size": max_shard_size})
        )
        self.processor.save_pretrained(save_directory)
        for name in IN_ROOT:
            # As other versions saved them; Diffusers would prefer them to the root.
            shutil.rmtree(Path(save_directory, name), ignore_errors=True)
        rest = copy.copy(self)
        rest._internal_dict = FrozenDict({name: value for name, value in self.config.items() if name not in IN_ROOT})
        super(UniCode2RepositoryMixin, rest).save_pretrained(
            save_directory, safe_serialization, variant, max_shard_size, push_to_hub, **kwargs
        )
