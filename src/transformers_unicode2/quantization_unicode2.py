"""The frozen half of UniCode²: codebook C1 with nearest-code search, and the encoder in front of it (section 3.2)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.pipelines.image_feature_extraction import ImageFeatureExtractionPipeline
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .configuration_unicode2 import UniCode2CodebookConfig, UniCode2QuantizerConfig
from .encoders_unicode2 import encode_patches
from .images_unicode2 import read_pixels_of
from .loading_unicode2 import HUB_OPTIONS, check_precision, find_digests, hash_settings, load_whole, read_quantizer
from .search_unicode2 import WORKSPACE, check_features, check_num_probes, find_nearest

logger = logging.get_logger(__name__)


@dataclass
class UniCode2QuantizerOutput(ModelOutput):
    r"""
    Args:
        codes (`torch.LongTensor` of shape `(batch_size, num_image_tokens)`):
            The images' codes.
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, num_image_tokens, codebook_dim)`):
            The patch features that they stand for.
    """

    codes: torch.LongTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor] | None = None
    attentions: tuple[torch.FloatTensor] | None = None


class UniCode2Codebook(nn.Module):
    r"""
    Codebook C1: frozen codes, sorted by coarse cell, which only index (Eq. 5 of the paper).

    All state is in buffers, so nothing here is ever trained. The codes are rounded to bfloat16 when they are built
    and kept in float32, so that the dtype of a model does not change its codes.

    `encode` finds the codes with `search`, which takes `(features, num_probes)` and returns ids. It is a plain search
    here, and the package puts a faster one with the same ids in its place. `codebook.search = FaissSearch(codebook)`
    searches with FAISS; a search that is assigned has the codebook that it searches as its `codebook`.

    `tables` is what a search derives from the codes at the first `encode`. They are dropped when weights are loaded,
    moved or assigned, and never saved or copied. The codes are frozen, and nothing watches their memory. After writing
    into them, set `tables` to `None` and assign an index anew. Do so within `torch.func.functional_call`, too, which
    exchanges codes unseen, as offloading does.

    Buffers:
        codes (`torch.FloatTensor` of shape `(codebook_size, codebook_dim)`): the codes, sorted by cell.
        cell_centroids (`torch.FloatTensor` of shape `(num_cells, codebook_dim)`): the coarse centroids.
        cell_offsets (`torch.LongTensor` of shape `(num_cells + 1,)`): cell i holds codes `cell_offsets[i]` to
            `cell_offsets[i + 1]`.
        previews (`torch.ByteTensor` of shape `(codebook_size, preview_size, preview_size, 3)`): mean RGB thumbnail of
            a code.
    """

    def __init__(self, config: UniCode2CodebookConfig):
        super().__init__()
        size, side = config.codebook_size, config.preview_size
        self.codes = nn.Buffer(torch.zeros(size, config.codebook_dim, dtype=torch.float32))
        self.cell_centroids = nn.Buffer(torch.zeros(config.num_cells, config.codebook_dim, dtype=torch.float32))
        self.cell_offsets = nn.Buffer(equal_cells(size, config.num_cells))
        self.previews = nn.Buffer(torch.zeros(size, side, side, 3, dtype=torch.uint8)) if side else None
        self.probe_recall, self.tables = config.probe_recall, None
        self.encoder_sha256, self.encoder_dtype = config.encoder_sha256, config.encoder_dtype

    def forward(self, inputs: torch.Tensor, task: str = "encode", **options) -> torch.Tensor:
        """`encode`, `decode` or `preview`: by way of a forward, so that a codebook that was offloaded is brought
        back."""
        return getattr(self, task)(inputs, **options)

    def describe(self) -> dict:
        """The settings of a `UniCode2CodebookConfig` of this codebook, with the digests of its codes and cells."""
        return {
            "codebook_size": len(self.codes),
            "codebook_dim": self.codes.shape[1],
            "num_cells": len(self.cell_centroids),
            "preview_size": 0 if self.previews is None else self.previews.shape[1],
            "probe_recall": self.probe_recall,
            "encoder_sha256": self.encoder_sha256,
            "encoder_dtype": self.encoder_dtype,
            **find_digests({f"codebook.{name}": buffer for name, buffer in self.named_buffers()}),
        }

    def __setattr__(self, name: str, value):
        """Raises `ValueError` on a search of another codebook. Other codes or cells end what was made of the old."""
        if name == "search" and value.codebook is not self:
            raise ValueError("The search is of another codebook; assign `FaissSearch(codebook)` of this one.")
        super().__setattr__(name, value)
        if name in ("codes", "cell_centroids", "cell_offsets"):
            self.drop_tables()

    def drop_tables(self) -> None:
        """Drops what a search derived from the codes, and an index that was made of them."""
        self.tables = None
        if vars(self).pop("search", None):
            logger.warning("The codebook has other codes now; the search assigned to it is of the old, and dropped.")

    def __getstate__(self) -> dict:
        """Copies and pickles are without the tables of the search."""
        return {**super().__getstate__(), "tables": None}

    def _apply(self, function, recurse: bool = True):
        before = self.codes
        super()._apply(keep_dtype(function), recurse)
        if self.codes is not before:
            self.tables = None
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.drop_tables()

    @torch.compiler.disable
    @torch.no_grad()
    def encode(self, features: torch.Tensor, num_probes: int | None = None) -> torch.LongTensor:
        r"""
        Nearest code of each feature in Euclidean distance, Eq. 5: the smallest distance in float64 on the values as
        given, ties to the lowest code. The codes are the same on every device, for every split of a batch, and for a
        feature in bfloat16 or in float32. With `num_probes` they may differ where two cells are equally near but for
        rounding.

        Args:
            features (`torch.Tensor` of shape `(..., codebook_dim)`): float32, bfloat16 or float16; float64 is rounded
                to float32.
            num_probes (`int`, *optional*): looks only into this many cells, the nearest ones. That is faster, and it
                finds the nearest code in the share of the cases that `num_probes_for` knows. All cells by default.

        Returns:
            `torch.LongTensor` of shape `(...)`.

        Raises:
            `ValueError`: on another width or dtype, on features that are not finite, or when `num_probes` is no
                whole number of at least 1.
        """
        check_features(features, self.codes.shape[1])
        query = features.reshape(-1, features.shape[-1]).to(torch.float32)  # (num_features, codebook_dim)
        found = self.search(query, check_num_probes(num_probes))
        return found.reshape(features.shape[:-1]).to(features.device)

    def search(
        self, features: torch.Tensor, num_probes: int | None = None, workspace: int = WORKSPACE
    ) -> torch.LongTensor:
        """The codes of finite float32 features `(num_features, codebook_dim)`, `(num_features,)`, compared with all
        codes, or with those of `num_probes` cells, in `workspace` bytes."""
        buffers = self.buffers_to_search()
        return find_nearest(features.to(buffers[0].device), *buffers, num_probes, workspace)

    def buffers_to_search(self) -> tuple[torch.Tensor, torch.Tensor, torch.LongTensor]:
        """The codes, the centroids and the offsets of the cells where they can be compared in float64, which MPS does
        not have."""
        place = torch.device("cpu") if self.codes.device.type == "mps" else self.codes.device
        return self.codes.to(place), self.cell_centroids.to(place), self.cell_offsets.to(place)

    def num_probes_for(self, recall: float) -> int:
        """Cells that `encode` has to look into to find the nearest code of a share of `recall` features, as measured
        by the build.

        Raises `ValueError` when nothing was measured, or no number of cells reached it.
        """
        if not self.probe_recall:
            raise ValueError("The recall of this codebook was not measured; `unicode2 codebook build` does.")
        enough = [int(count) for count, share in self.probe_recall.items() if share >= recall]
        if not enough:
            raise ValueError(
                f"A recall of {recall:g} was not reached, {max(self.probe_recall.values()):.5f} was; search all codes."
            )
        return min(enough)

    def decode(self, codes: torch.LongTensor) -> torch.Tensor:
        """Codes of shape `(...)` to their vectors, `(..., codebook_dim)`, Eq. 4. On a CPU, raises `ValueError` on
        unknown codes."""
        if codes.device.type == "cpu" and codes.numel():
            low, high = codes.aminmax()
            if low < 0 or high >= len(self.codes):
                raise ValueError(
                    f"The codes run from {low.item()} to {high.item()}; there are 0 to {len(self.codes) - 1}."
                )
        return self.codes[codes]

    def locate(self, codes: torch.LongTensor) -> torch.LongTensor:
        """The cell of each code, `(...)` to `(...)`."""
        return torch.searchsorted(self.cell_offsets, codes, right=True) - 1

    def decode_cells(self, cells: torch.LongTensor) -> torch.Tensor:
        """Cells of shape `(...)` to their centroids, `(..., codebook_dim)`."""
        return self.cell_centroids[cells]

    def preview(self, codes: torch.LongTensor) -> torch.Tensor:
        """Codes of shape `(..., rows, columns)` to a mosaic of thumbnails, uint8 `(..., 3, rows * side, columns *
        side)`.

        Raises `ValueError` when the codebook was built without thumbnails.
        """
        if self.previews is None:
            raise ValueError(
                "This codebook has no thumbnails (`preview_size` is 0); attach a decoder to see its codes."
            )
        tiles = self.previews[codes]  # (..., rows, columns, side, side, 3)
        tiles = tiles.movedim(-1, -5).transpose(-2, -3)  # (..., 3, rows, side, columns, side)
        return tiles.flatten(-2).flatten(-3, -2)


class UniCode2Quantizer(PreTrainedModel):
    r"""
    Frozen vision encoder and codebook C1: images in, codes out. Loads alone, without a language model.

    The encoder is a SigLIP, a SigLIP 2 of a fixed size or a CLIP, whose CLS token is dropped. It computes in
    the codebook's `encoder_dtype`, with which that was built; the codes are searched in float32. Both stay so whatever
    dtype is asked for, since a code must not depend on it, and are always frozen and in eval mode.

    A code is the nearest to the features at hand. Where two codes are about equally near, rounding decides. Ids of an
    encoder in bfloat16 may differ by a few percent between devices and libraries. One in ten differs from float32.
    """

    config: UniCode2QuantizerConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["UniCode2Codebook"]
    # While they are loaded, from where `freeze` brings the encoder to its dtype. Not the integers of the codebook.
    _keep_in_fp32_modules_strict = ["vision_model", "codebook.codes", "codebook.cell_centroids"]
    # Transformers' quantizers leave these alone, beside what the caller names; a model around this one takes the list
    # over.
    _keep_in_fp32_modules = [r"(?:.+\.)?vision_model"]
    _keys_to_ignore_on_load_unexpected = [
        r"^(model\.)?(language_model|visual_embeddings|projector)\.",
        r"^(lm_head|visual_head)\.",
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    # Of the model that it is a part of, which knows where visual token ids begin.
    model_config = None

    def __init__(self, config: UniCode2QuantizerConfig):
        super().__init__(config)
        self.vision_model = AutoModel.from_config(config.vision_config)
        self.codebook = UniCode2Codebook(config.codebook_config)
        self.post_init()
        self.freeze()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        init_codebook(module)

    @property
    def encoder_dtype(self) -> torch.dtype:
        """What the encoder computes in."""
        return getattr(torch, self.config.codebook_config.encoder_dtype)

    def freeze(self) -> "UniCode2Quantizer":
        """The encoder in its dtype, no gradients, eval mode. Needed after every load: `from_pretrained` gives all
        parameters one dtype and makes them trainable."""
        self.vision_model.to(self.encoder_dtype)
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> "UniCode2Quantizer":
        """Stays in eval mode: the quantizer is frozen."""
        return super().train(False)

    def _apply(self, function, recurse: bool = True):
        """Moves between devices; a conversion to another dtype, as of the model around it, leaves the weights alone."""
        return super()._apply(keep_dtype(function), recurse)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads a quantizer that was saved alone, or the quantizer of a whole UniCode² checkpoint, and freezes it.

        Of a whole checkpoint in several files, only those that hold a part of the quantizer are fetched and read.

        Raises `ValueError` when something in it is missing, damaged or of another size, see `load_whole`.
        """
        kwargs.setdefault("key_mapping", {r"^(model\.)?quantizer\.": ""})
        stock = super().from_pretrained

        def load(source, *args, **kwargs):
            state = read_quantizer(source, kwargs)
            if state:
                if "config" not in kwargs:
                    hub = {name: value for name, value in kwargs.items() if name in HUB_OPTIONS}
                    kwargs["config"] = cls.config_class.from_pretrained(source, **hub)
                kwargs["state_dict"], source = state, None
            return stock(source, *args, **kwargs)

        return load_whole(load, pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory, is_main_process: bool = True, state_dict: dict | None = None, **kwargs):
        """Saves under its own names, wherever the weights came from, with the digests of its parts."""
        prepare_to_save(self, state_dict)
        super().save_pretrained(
            save_directory, is_main_process, state_dict, **{"save_original_format": False, **kwargs}
        )

    def get_quantizer(self) -> "UniCode2Quantizer":
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's patch embedding."""
        return self.vision_model.get_input_embeddings()

    @can_return_tuple
    @torch.no_grad()
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """The encoder's output for images `(batch_size, 3, height, width)`, in its own dtype outside of any autocast;
        its `last_hidden_state` holds the patch features, `(batch_size, num_image_tokens, codebook_dim)`, see
        `encode_patches`. Pixels that are rounded further than the encoder does, as some trainers make them, are warned
        of: they have other codes."""
        side = self.config.vision_config.image_size
        if pixel_values.shape[1:] != (3, side, side):
            raise ValueError(
                f"The images are {tuple(pixel_values.shape)}; the encoder reads (batch_size, 3, {side}, {side})."
            )
        if pixel_values.dtype in (torch.bfloat16, torch.float16) and pixel_values.dtype != self.encoder_dtype:
            logger.warning_once(
                f"`pixel_values` are {pixel_values.dtype}; rounded pixels get other codes. Give them in float32, as "
                "the processor does, or give visual token ids."
            )
        check_precision(self.vision_model, (self.encoder_dtype,))
        with torch.autocast(pixel_values.device.type, enabled=False):
            return encode_patches(self.vision_model, pixel_values, **kwargs)

    def encode_images(self, pixel_values: torch.Tensor, num_probes: int | None = None) -> torch.LongTensor:
        """Images to codes, `(batch_size, 3, height, width)` to `(batch_size, num_image_tokens)`."""
        return self.encode_features(self.get_image_features(pixel_values).last_hidden_state, num_probes)

    def encode_features(self, features: torch.Tensor, num_probes: int | None = None) -> torch.LongTensor:
        """Features `(..., codebook_dim)` to codes `(...)`, Eq. 5, as `UniCode2Codebook.encode`."""
        return self.codebook(features, num_probes=num_probes)

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> UniCode2QuantizerOutput:
        """Images `(batch_size, 3, height, width)` to codes and the features behind them."""
        encoded = self.get_image_features(pixel_values, **kwargs)
        return UniCode2QuantizerOutput(
            codes=self.encode_features(encoded.last_hidden_state),
            last_hidden_state=encoded.last_hidden_state,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )


def keep_dtype(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """What `Module._apply` does to tensors, but without converting them to another dtype."""

    def apply(tensor: torch.Tensor) -> torch.Tensor:
        output = function(tensor)
        return output if output.dtype == tensor.dtype else tensor.to(output.device)

    return apply


def prepare_to_save(model: PreTrainedModel, state_dict: dict[str, torch.Tensor] | None) -> None:
    """Writes the digests of what will be saved, the state dict or the model's own weights, to a model's
    configuration, which also brings the code."""
    if type(model).__name__.startswith("FSDP"):
        # A class that FSDP made, whose file is no code of ours. Transformers would save it.
        type(model)._auto_class = None
    weights = model.get_quantizer().state_dict() if state_dict is None else state_dict
    codebook = model.config.codebook_config
    codebook.vision_config_sha256 = hash_settings(model.config.vision_config, codebook.encoder_dtype)
    for name, digest in find_digests(weights).items():
        setattr(codebook, name, digest)


@torch.no_grad()
def init_codebook(module: nn.Module) -> None:
    """Brings a fresh codebook to its starting values: no codes yet, in cells of equal size; it holds no random
    state."""
    if isinstance(module, UniCode2Codebook):
        for buffer in module.buffers():
            init.zeros_(buffer)
        init.copy_(module.cell_offsets, equal_cells(len(module.codes), len(module.cell_centroids)))


def equal_cells(codebook_size: int, num_cells: int) -> torch.LongTensor:
    """Offsets, `(num_cells + 1,)`, of cells that share the codes as evenly as can be."""
    return torch.arange(num_cells + 1) * codebook_size // num_cells


read_pixels_of(ImageFeatureExtractionPipeline)

__all__ = ["UniCode2Codebook", "UniCode2Quantizer"]
