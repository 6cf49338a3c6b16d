"""Configurations of UniCode²."""

import re
import shutil
from pathlib import Path

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from .encoders_unicode2 import ENCODER_DTYPES, check_kind, count_patches

# What a Hub repo needs so that every Auto class finds the code that travels with it.
AUTO_MAP = {
    "AutoConfig": "configuration_unicode2.UniCode2Config",
    "AutoModel": "modeling_unicode2.UniCode2Model",
    "AutoModelForImageTextToText": "modeling_unicode2.UniCode2ForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_unicode2.UniCode2ForConditionalGeneration",
    "AutoProcessor": "processing_unicode2.UniCode2Processor",
}
QUANTIZER_AUTO_MAP = {
    "AutoConfig": "configuration_unicode2.UniCode2QuantizerConfig",
    "AutoModel": "quantization_unicode2.UniCode2Quantizer",
}

VISUAL_HEADS = ("flat", "two_level")
# The least of each.
CODEBOOK_COUNTS = {"codebook_size": 1, "codebook_dim": 1, "num_cells": 1, "preview_size": 0}

# The parts of the paper's 7B model (section 4.1), as their own checkpoints describe them.
QWEN2_5_7B = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "rms_norm_eps": 1e-6,
}
SIGLIP_SO400M_384 = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}


@strict
class UniCode2CodebookConfig(PreTrainedConfig):
    r"""
    Configuration of a [`UniCode2Codebook`] (section 3.2, Algorithm 1 of the paper). The defaults are the paper's.

    Args:
        codebook_size (`int`, *optional*, defaults to 500000):
            Number of codes, K.
        codebook_dim (`int`, *optional*, defaults to 1152):
            Width of a code, d; the hidden size of the vision encoder.
        num_cells (`int`, *optional*, defaults to 1000):
            Number of coarse clusters, K1, by which the codes are sorted.
        preview_size (`int`, *optional*, defaults to 0):
            Side in pixels of the mean thumbnail that each code carries; 0 for none.
        probe_recall (`dict[str, float]`, *optional*):
            For a number of nearest cells, the share of features whose nearest code lies in them, as measured when the
            codebook was built.
        codes_sha256 (`str`, *optional*):
            SHA-256 of the codes, see `hash_tensors`. Every save writes it, and every load compares it.
        cells_sha256 (`str`, *optional*):
            The same of the cells: their centroids and offsets.
        vision_sha256 (`str`, *optional*):
            The same of the weights of the encoder that a checkpoint holds.
        vision_config_sha256 (`str`, *optional*):
            SHA-256 of what the encoder computes by its configuration, see `hash_settings`.
        previews_sha256 (`str`, *optional*):
            SHA-256 of the thumbnails.
        encoder_sha256 (`str`, *optional*):
            SHA-256 of the encoder and image processor that `unicode2 codebook build` used.
        encoder_dtype (`str`, *optional*, defaults to `"float32"`):
            What the encoder in front of the codebook computes in: `"float32"`, `"bfloat16"` or `"float16"`. It is part
            of what defines the codes. bfloat16 is several times faster on processors that multiply it. One id in ten
            is then another than in float32 (CLIP ViT-B/16, 1,024 codes), and a few percent may differ between devices
            and libraries.
    """

    model_type = "unicode2_codebook"
    base_config_key = "codebook_config"

    codebook_size: int = 500_000
    codebook_dim: int = 1152
    num_cells: int = 1000
    preview_size: int = 0
    probe_recall: dict[str, float | int] | None = None
    codes_sha256: str | None = None
    cells_sha256: str | None = None
    vision_sha256: str | None = None
    vision_config_sha256: str | None = None
    previews_sha256: str | None = None
    encoder_sha256: str | None = None
    encoder_dtype: str = "float32"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_codebook_config(vars(self))


def save_code(folder: str | Path, beside: str = __file__) -> None:
    """Copies all code that travels from beside a file into a folder: the files with `_unicode2` in their names."""
    for file in Path(beside).parent.glob("*_unicode2*.py"):
        target = Path(folder) / file.name
        if not (target.exists() and target.samefile(file)):
            shutil.copyfile(file, target)


class UniCode2ConfigMixin:
    """What the configurations of a quantizer and of a whole model have in common."""

    save_code = staticmethod(save_code)

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Stock, with the code that `auto_map` names."""
        super().save_pretrained(save_directory, **kwargs)
        save_code(save_directory)

    @property
    def num_image_tokens(self) -> int:
        """Patches, and so codes, per image, T."""
        return count_patches(self.vision_config)


@strict
class UniCode2QuantizerConfig(UniCode2ConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a [`UniCode2Quantizer`]: a frozen vision encoder and the codebook over its patch features.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            The encoder, a `siglip_vision_model` or a `clip_vision_model`; SigLIP so400m-patch14-384 by default.
        codebook_config (`dict` or `UniCode2CodebookConfig`, *optional*):
            The codebook; its `codebook_dim` must be the encoder's `hidden_size`.
    """

    model_type = "unicode2_quantizer"
    base_config_key = "quantizer_config"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="siglip_vision_model"),
        "codebook_config": SubConfigSpec(config_class=UniCode2CodebookConfig),
    }

    vision_config: dict | PreTrainedConfig | None = None
    codebook_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs):
        kwargs["auto_map"] = QUANTIZER_AUTO_MAP
        if isinstance(self.codebook_config, dict):
            check_codebook_config(self.codebook_config)
        self.vision_config = SIGLIP_SO400M_384 if self.vision_config is None else self.vision_config
        super().__post_init__(**kwargs)
        check_widths(self.vision_config, self.codebook_config)

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        """The dictionary of a quantizer, or of the quantizer in a whole checkpoint."""
        config, rest = super().get_config_dict(*args, **kwargs)
        if isinstance(config, dict) and config.get("model_type") == UniCode2Config.model_type:
            parts = ("vision_config", "codebook_config")
            absent = [name for name in parts if name not in config]
            if absent:
                raise ValueError(f"The config.json of {args[0] if args else 'a checkpoint'} lacks `{absent[0]}`.")
            config = {name: config[name] for name in parts}
        return config, rest


@strict
class UniCode2Config(UniCode2ConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a UniCode² model. Text ids are `[0, visual_token_offset)`, the visual token id of a code is
    `visual_token_offset + code`; the offset is the number of rows of the text embedding.

    Args:
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            The language model, Qwen2.5-7B by default.
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            The frozen encoder, a `siglip_vision_model` or a `clip_vision_model`; SigLIP so400m-patch14-384 by default.
        codebook_config (`dict` or `UniCode2CodebookConfig`, *optional*):
            The codebook; its `codebook_dim` must be the encoder's `hidden_size`.
        image_token_id (`int`, *optional*, defaults to 151655):
            Text id that holds the place of one patch of an image given as pixels (`<|image_pad|>` of Qwen2.5).
        boi_token_id (`int`, *optional*, defaults to 151652):
            Text id in front of an image (`<|vision_start|>` of Qwen2.5).
        eoi_token_id (`int`, *optional*, defaults to 151653):
            Text id behind an image (`<|vision_end|>` of Qwen2.5).
        projector_hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation between the two linear layers of the projector (section 3.3).
        visual_head (`str`, *optional*, defaults to `"flat"`):
            How the next code is scored: `"flat"` over all codes at once, or `"two_level"`, the cell first and then the
            codes within it. That needs about `num_cells + codebook_size / num_cells` scores to draw a code.
        caption_prompt (`str`, *optional*):
            The question that the model learnt to answer with a caption. Pipelines read drawings back with it.
        final_logit_softcapping (`float`, *optional*):
            Bound c of the text scores s, which become c tanh(s / c), as those of Gemma 2 do; by default the language
            model's own, if it has one. The scores of codes have no bound.

    Example:

    ```python
    >>> from transformers_unicode2 import UniCode2Config, UniCode2ForConditionalGeneration

    >>> config = UniCode2Config(
    ...     text_config={"model_type": "qwen2", "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1,
    ...                  "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2},
    ...     vision_config={"hidden_size": 16, "image_size": 32, "patch_size": 8, "num_hidden_layers": 1,
    ...                    "num_attention_heads": 2, "intermediate_size": 16},
    ...     codebook_config={"codebook_size": 64, "codebook_dim": 16, "num_cells": 4},
    ...     image_token_id=10, boi_token_id=11, eoi_token_id=12,
    ... )
    >>> model = UniCode2ForConditionalGeneration(config)
    >>> config.num_image_tokens, config.visual_token_offset
    (16, 300)

    ```"""

    model_type = "unicode2"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="siglip_vision_model"),
        "codebook_config": SubConfigSpec(config_class=UniCode2CodebookConfig),
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    codebook_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 151655
    boi_token_id: int = 151652
    eoi_token_id: int = 151653
    projector_hidden_act: str = "gelu"
    visual_head: str = "flat"
    caption_prompt: str | None = None
    final_logit_softcapping: float | int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        kwargs["auto_map"] = {**AUTO_MAP, **(kwargs.get("auto_map") or {})}
        if isinstance(self.codebook_config, dict):
            check_codebook_config(self.codebook_config)
        self.text_config = QWEN2_5_7B if self.text_config is None else self.text_config
        self.vision_config = SIGLIP_SO400M_384 if self.vision_config is None else self.vision_config
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings
        if self.final_logit_softcapping is None:
            self.final_logit_softcapping = vars(self.text_config).get("final_logit_softcapping")
        check_widths(self.vision_config, self.codebook_config)
        if self.visual_head not in VISUAL_HEADS:
            raise ValueError(f"`visual_head` is {self.visual_head!r}; it must be one of {', '.join(VISUAL_HEADS)}.")
        ids = {name: getattr(self, name) for name in ("image_token_id", "boi_token_id", "eoi_token_id")}
        if len(set(ids.values())) < 3:
            raise ValueError(f"The three ids must differ: {', '.join(f'`{name}` {id_}' for name, id_ in ids.items())}.")
        size = self.text_config.vocab_size
        for name, id_ in ids.items():
            if not 0 <= id_ < size:
                raise ValueError(f"`{name}` is {id_}, outside the text vocabulary of {size} ids.")

    @property
    def visual_token_offset(self) -> int:
        """First visual token id; the visual token id of a code is this plus the code."""
        return self.text_config.vocab_size

    def check_offset(self, offset) -> None:
        """Raises `ValueError` when visual token ids were made from another `offset`, or one for each prompt."""
        given = offset if isinstance(offset, (int, list, tuple, type(None))) else offset.tolist()
        for one in given if isinstance(given, (list, tuple)) else [given]:
            if one not in (None, self.visual_token_offset):
                raise ValueError(
                    f"The processor made visual token ids from {one} on, and those of this model begin at "
                    f"{self.visual_token_offset}; attach its quantizer again with the model's "
                    "`config.visual_token_offset`."
                )

    def get_quantizer_config(self) -> UniCode2QuantizerConfig:
        """The part of the configuration that turns images into codes."""
        return UniCode2QuantizerConfig(
            vision_config=self.vision_config,
            codebook_config=self.codebook_config,
            attn_implementation=self.vision_config._attn_implementation,
        )


def check_codebook_config(settings: dict) -> None:
    """Raises `ValueError` on settings of a codebook that are not the numbers, shares or digests that they should be."""
    for name, least in CODEBOOK_COUNTS.items():
        value = settings.get(name, least)
        if type(value) is not int or not least <= value < 2**31:
            raise ValueError(
                f"`{name}` of the codebook is {value!r}; it must be a whole number from {least} to {2**31 - 1}."
            )
    recall = settings.get("probe_recall") or {}
    if not isinstance(recall, dict):
        raise ValueError(f"`probe_recall` of the codebook is {recall!r}; it must map numbers of cells to shares.")
    for count, share in recall.items():
        if not (str(count).isdecimal() and int(count) and type(share) in (int, float) and 0 <= share <= 1):
            raise ValueError(
                f"`probe_recall` of the codebook has {share!r} for {count!r} cells; it must map numbers of cells to "
                "shares in [0, 1]."
            )
    for name in (name for name in UniCode2CodebookConfig.__annotations__ if name.endswith("_sha256")):
        value = settings.get(name)
        if not (value is None or isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)):
            raise ValueError(f"`{name}` of the codebook is {value!r}; it must be 64 hexadecimal digits.")
    dtype = settings.get("encoder_dtype", "float32")
    if dtype not in ENCODER_DTYPES:
        raise ValueError(f"`encoder_dtype` of the codebook is {dtype!r}; it must be in {', '.join(ENCODER_DTYPES)}.")


def check_widths(vision_config: PreTrainedConfig, codebook_config: UniCode2CodebookConfig) -> None:
    """Raises `ValueError` on an encoder of another kind or width than the codebook's, and on more cells than codes."""
    check_kind(vision_config, "`vision_config`")
    if vision_config.hidden_size != codebook_config.codebook_dim:
        raise ValueError(
            f"The vision encoder's `hidden_size` is {vision_config.hidden_size} and the codebook's `codebook_dim` is "
            f"{codebook_config.codebook_dim}; they must be equal."
        )
    check_num_cells(codebook_config.num_cells, codebook_config.codebook_size)


def check_num_cells(num_cells: int, codebook_size: int) -> None:
    """Raises `ValueError` when there are more cells than codes."""
    if num_cells > codebook_size:
        raise ValueError(f"`num_cells` is {num_cells}, more than the `codebook_size` of {codebook_size}.")


__all__ = ["UniCode2CodebookConfig", "UniCode2Config", "UniCode2QuantizerConfig"]
