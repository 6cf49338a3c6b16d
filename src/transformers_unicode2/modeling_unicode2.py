"""The trainable half of UniCode²: C2, projector, language model and visual head (sections 3.2 to 3.4)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .adapters_unicode2 import check_trainable, guard_labels
from .configuration_unicode2 import UniCode2Config
from .generation_unicode2 import UniCode2GenerationMixin
from .loading_unicode2 import load_whole
from .planning_unicode2 import CACHE_NAME, name_cache
from .processing_unicode2 import UniCode2Processor  # noqa: F401, so that its file travels with this one
from .quantization_unicode2 import UniCode2Quantizer, equal_cells, init_codebook, prepare_to_save
from .visual_head_unicode2 import (
    VISUAL_HEAD_CLASSES,
    UniCode2MeasuredTargets,
    UniCode2Projector,
    UniCode2TwoLevelVisualHead,
    UniCode2VisualEmbeddings,
    check_target_ids,
    is_sharded,
    keep_positions,
    measure_in_chunks,
    sum_in_chunks,
)


@dataclass
class UniCode2ModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    Args:
        image_hidden_states (`torch.FloatTensor` of shape `(num_images, num_image_tokens, hidden_size)`, *optional*):
            Embeddings of the images given as pixels.
        image_tokens (`torch.LongTensor` of shape `(num_images, num_image_tokens)`, *optional*):
            Their visual token ids.
    """

    image_hidden_states: torch.FloatTensor | None = None
    image_tokens: torch.LongTensor | None = None


@dataclass
class UniCode2CausalLMOutputWithPast(CausalLMOutputWithPast):
    r"""
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned with `labels`):
            Mean negative log-likelihood over all target tokens, text and visual.
        logits (`torch.FloatTensor`, *optional*, returned without `labels`):
            Scores over the unified vocabulary, `(batch_size, num_tokens, visual_token_offset + codebook_size)`; with
            `output_modality="text"` only its text part, `(batch_size, num_tokens, visual_token_offset)`.
        text_loss (`torch.FloatTensor` of shape `()`, *optional*, returned with `labels`):
            The loss over the text targets, Eq. 7; 0 without any.
        visual_loss (`torch.FloatTensor` of shape `()`, *optional*, returned with `labels`):
            The loss over the visual targets, Eq. 8; 0 without any.
        image_hidden_states (`torch.FloatTensor` of shape `(num_images, num_image_tokens, hidden_size)`, *optional*):
            Embeddings of the images given as pixels.
        measured (`UniCode2MeasuredTargets`, *optional*, returned with `measure_targets=True`):
            How each target was foretold.
    """

    text_loss: torch.FloatTensor | None = None
    visual_loss: torch.FloatTensor | None = None
    image_hidden_states: torch.FloatTensor | None = None
    measured: UniCode2MeasuredTargets | None = None


@dataclass
class UniCode2ImageFeatures(BaseModelOutputWithPooling):
    r"""
    What the encoder returned; its `pooler_output` is a tuple with one `(num_image_tokens, hidden_size)` for each image.

    Args:
        image_tokens (`torch.LongTensor` of shape `(num_images, num_image_tokens)`):
            The images' visual token ids.
    """

    image_tokens: torch.LongTensor | None = None


class UniCode2PreTrainedModel(PreTrainedModel):
    config: UniCode2Config
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["UniCode2Codebook"]
    # While they are loaded, see `UniCode2Quantizer`. Not the codebook's integers.
    _keep_in_fp32_modules_strict = ["vision_model", "codebook.codes", "codebook.cell_centroids"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        init_codebook(module)
        if isinstance(module, UniCode2TwoLevelVisualHead):
            codebook = self.config.codebook_config
            init.copy_(module.cell_offsets, equal_cells(codebook.codebook_size, codebook.num_cells))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads a checkpoint and freezes its quantizer. Raises `ValueError` as `load_whole` does."""
        return load_whole(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory, is_main_process: bool = True, state_dict: dict | None = None, **kwargs):
        """Saves with the digests of the quantizer's parts."""
        prepare_to_save(self, state_dict)
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)


class UniCode2Model(UniCode2PreTrainedModel):
    r"""
    Images and text to hidden states. Pixels become codes through the frozen quantizer (encoder and C1, Eq. 5). Codes,
    whether from pixels or given as visual token ids, are embedded by C2 (Eq. 6) and the projector.
    """

    def __init__(self, config: UniCode2Config):
        super().__init__(config)
        codebook = config.codebook_config
        self.language_model = AutoModel.from_config(config.text_config)
        self.visual_embeddings = UniCode2VisualEmbeddings(codebook.codebook_size, codebook.codebook_dim)
        self.projector = UniCode2Projector(config)
        self.quantizer = UniCode2Quantizer(config.get_quantizer_config())
        self.quantizer.model_config = config
        self.post_init()
        self.quantizer.freeze()

    @property
    def vision_tower(self) -> PreTrainedModel:
        """The frozen encoder, under the name that it has in the library's other models."""
        return self.quantizer.vision_model

    def get_quantizer(self) -> UniCode2Quantizer:
        return self.quantizer

    def get_image_tokens(self, pixel_values: torch.Tensor) -> torch.LongTensor:
        """Images `(num_images, 3, height, width)` to visual token ids `(num_images, num_image_tokens)`."""
        return self.quantizer.encode_images(pixel_values) + self.config.visual_token_offset

    def embed_image_tokens(self, visual_token_ids: torch.LongTensor) -> torch.Tensor:
        """Visual token ids `(...)` to embeddings `(..., hidden_size)`: C2 (Eq. 6) and the projector."""
        return self.projector(self.visual_embeddings(visual_token_ids - self.config.visual_token_offset))

    def embed_input_ids(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """Ids of the unified vocabulary `(batch_size, num_tokens)` to their embeddings, `(..., hidden_size)`."""
        offset = self.config.visual_token_offset
        is_visual = input_ids >= offset
        text = self.get_input_embeddings()(input_ids.masked_fill(is_visual, 0))
        visual = self.embed_image_tokens(input_ids.masked_fill(~is_visual, offset))
        return torch.where(is_visual[..., None], visual.to(text.dtype), text)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> UniCode2ImageFeatures:
        """Images `(num_images, 3, height, width)` to their patch features, visual token ids and embeddings."""
        encoded = self.quantizer.get_image_features(pixel_values, **kwargs)
        codes = self.quantizer.encode_features(encoded.last_hidden_state)  # (num_images, num_image_tokens)
        tokens = codes + self.config.visual_token_offset
        return UniCode2ImageFeatures(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=tuple(self.embed_image_tokens(tokens)),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            image_tokens=tokens,
        )

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor, num_features: int
    ) -> torch.BoolTensor:
        """Where image placeholders are, `(batch_size, num_tokens)`. Raises `ValueError` unless `num_features` are."""
        if input_ids is None:
            image_id = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(image_id)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        if mask.sum() != num_features:
            raise ValueError(
                f"The prompt holds {mask.sum().item()} image placeholders and the images need {num_features}: "
                f"{num_features // self.config.num_image_tokens} images of {self.config.num_image_tokens} tokens."
            )
        return mask

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UniCode2ModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
                Ids of the unified vocabulary, with `num_image_tokens` times `image_token_id` for each image in
                `pixel_values`.
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, height, width)`, *optional*):
                Images, in the order of their placeholders.
            mm_encoder_outputs (`dict`, *optional*):
                `{"image": get_image_features(...)}` in place of `pixel_values`.
            cache (`Cache`, *optional*):
                What Transformers calls `past_key_values` from 5.24 on; either name will do.
        """
        # Comes with ids from a processor with a quantizer.
        self.config.check_offset(kwargs.pop("visual_token_offset", None))
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if pixel_values is not None and mm_encoder_outputs is not None:
            raise ValueError("Give at most one of `pixel_values` and `mm_encoder_outputs`.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)  # (batch_size, num_tokens, hidden_size)
        images, embeds = (mm_encoder_outputs or {}).get("image"), None
        if pixel_values is not None:
            images = self.get_image_features(pixel_values, return_dict=True)
        if images is not None:
            features = torch.cat(tuple(images.pooler_output))  # (num_images * num_image_tokens, hidden_size)
            features = features.to(inputs_embeds)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, len(features))
            inputs_embeds = inputs_embeds.masked_scatter(mask[..., None], features)
            # A chunk of a prompt may end inside an image.
            if len(features) % self.config.num_image_tokens == 0:
                embeds = features.unflatten(0, (-1, self.config.num_image_tokens))
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **name_cache(past_key_values, cache),
            **kwargs,
        )
        return UniCode2ModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=embeds,
            image_tokens=None if images is None else images.image_tokens,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )


class UniCode2ForConditionalGeneration(UniCode2PreTrainedModel, UniCode2GenerationMixin):
    r"""
    The model that reads and writes images and text: [`UniCode2Model`] with a head for text ids and one for visual ids.

    `generate(generation_mode="text")` never computes visual scores. `generate(generation_mode="image")` computes text
    scores for a plan alone.
    """

    output_modalities = ("image", "text")
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: UniCode2Config):
        super().__init__(config)
        self.model = UniCode2Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.visual_head = VISUAL_HEAD_CLASSES[config.visual_head](config)
        self.decoder = None
        self.post_init()
        if config.tie_word_embeddings:
            # Quantizers leave these modules alone: a tied head has no weight of its own to quantize.
            self._keep_in_fp32_modules.add("lm_head")
        self.get_quantizer().freeze()
        # DDP would send C1 to all ranks before each forward, though it never changes.
        self._ddp_params_and_buffers_to_ignore = [n for n, _ in self.named_buffers() if ".quantizer." in n]

    def __setattr__(self, name: str, value) -> None:
        """Trainers of TRL replace `forward` by one that knows the text head alone; it learns no images unnoticed."""
        super().__setattr__(name, guard_labels(self, value) if name == "forward" else value)

    def get_quantizer(self) -> UniCode2Quantizer:
        return self.model.quantizer

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> UniCode2ImageFeatures:
        """See [`UniCode2Model.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_image_tokens(self, pixel_values: torch.Tensor) -> torch.LongTensor:
        """Images `(num_images, 3, height, width)` to visual token ids `(num_images, num_image_tokens)`."""
        return self.model.get_image_tokens(pixel_values)

    def use_c2(self) -> Callable:
        """The call of C2 as a plain function; offloading would move a module among the arguments of another."""
        return self.model.visual_embeddings.__call__

    def embed_codes(self, codes: torch.LongTensor) -> torch.Tensor:
        """Codes `(...)` to their vectors in C2, `(..., codebook_dim)` (Eq. 6), which the condition mapper reads."""
        return self.model.visual_embeddings(codes)

    def score_text(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states `(..., hidden_size)` to scores of the text ids `(..., visual_token_offset)`, in their dtype.

        They are the language model's own, within its bound if it has one.
        """
        logits, bound = self.lm_head(hidden_states), self.config.final_logit_softcapping
        return logits if bound is None else torch.tanh(logits / bound) * bound

    def compute_logits(
        self,
        hidden_states: torch.Tensor,
        output_modality: str | None = None,
        visual_guidance_scale: float | None = None,
        visual_temperature: float | None = None,
    ) -> torch.Tensor:
        """Hidden states `(batch_size, num_tokens, hidden_size)` to scores over the unified vocabulary, or a part of it.

        `output_modality="text"` gives the text ids alone, `(..., visual_token_offset)`, with those that frame an image
        at minus infinity. `"plan"` leaves the one that begins an image among them. `"image"` gives all ids, with the
        text ids at minus infinity. `None` computes both heads.
        """
        if output_modality in ("text", "plan"):
            logits = self.score_text(hidden_states)
            for id_ in (self.config.eoi_token_id, self.config.image_token_id):
                logits[..., id_] = -torch.inf
            if output_modality == "text":
                logits[..., self.config.boi_token_id] = -torch.inf
            return logits
        options = {"guidance_scale": visual_guidance_scale, "temperature": visual_temperature}
        visual = self.visual_head(hidden_states, self.use_c2(), **options)  # (..., codebook_size)
        if output_modality == "image":
            return nn.functional.pad(visual, (self.config.visual_token_offset, 0), value=-torch.inf)
        return torch.cat([self.score_text(hidden_states), visual], dim=-1)

    def name_patches(
        self, targets: torch.LongTensor, input_ids: torch.LongTensor | None, image_tokens: torch.LongTensor | None
    ) -> torch.LongTensor:
        """Shifted targets `(batch_size, num_tokens)` with visual token ids in the place of image placeholders.

        `image_tokens`, `(num_images, num_image_tokens)`, are those of images given as pixels. Raises `ValueError` when
        a placeholder has no patch.
        """
        image_id = self.config.image_token_id
        if image_tokens is not None and input_ids is not None:
            seen = input_ids.masked_scatter(input_ids == image_id, image_tokens)
            seen = nn.functional.pad(seen[:, 1:], (0, 1), value=-100)
            targets = torch.where(targets == image_id, seen.to(targets.device), targets)
        elif image_tokens is not None and (targets == image_id).sum() == image_tokens.numel():
            targets = targets.masked_scatter(targets == image_id, image_tokens.to(targets.device))
        num_left = (targets == image_id).sum().item()
        if num_left:
            raise ValueError(
                f"{num_left} targets are image placeholders ({image_id}) with no pixels to name their patches."
            )
        return targets

    def compute_loss(
        self,
        hidden_states: torch.Tensor,
        target: torch.LongTensor,
        num_items_in_batch: int | torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss, text part (Eq. 7) and visual part (Eq. 8): text targets over the text ids, visual ones over the codes.

        Both heads always run, so that no rank waits for another.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`):
                What the heads read.
            target (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
                The id of the unified vocabulary that each position has to predict, or -100.
            num_items_in_batch (`int`, *optional*):
                Divisor of the summed loss; the number of targets by default.

        Raises:
            `ValueError`: on targets of another shape or outside the vocabulary.
        """
        offset, size = self.config.visual_token_offset, self.config.codebook_config.codebook_size
        check_target_ids(target, hidden_states.shape[:2], offset + size)
        if self.training:
            check_trainable(self)
        is_text, is_visual = (target >= 0) & (target < offset), target >= offset

        def text_nll(hidden: torch.Tensor, ids: torch.LongTensor) -> torch.Tensor:
            return nn.functional.cross_entropy(self.score_text(hidden).float(), ids, reduction="sum")

        def visual_nll(hidden: torch.Tensor, codes: torch.LongTensor) -> torch.Tensor:
            return self.visual_head(hidden, self.use_c2(), task="compute_nll", codes=codes)

        sharded = is_sharded(self)
        text = sum_in_chunks(text_nll, hidden_states[is_text], target[is_text], offset, sharded)
        num_scores = self.visual_head(hidden_states, self.use_c2(), task="count_scores").item()
        visual = sum_in_chunks(visual_nll, hidden_states[is_visual], target[is_visual] - offset, num_scores, sharded)
        num_text, num_visual = is_text.sum(), is_visual.sum()
        total = (num_text + num_visual).clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return (text + visual) / total, text / num_text.clamp(min=1), visual / num_visual.clamp(min=1)

    def measure_targets(self, hidden_states: torch.Tensor, target: torch.LongTensor) -> UniCode2MeasuredTargets:
        """How each target `(batch_size, num_tokens)` is foretold from the hidden states, as of `compute_loss`."""
        offset, size = self.config.visual_token_offset, self.config.codebook_config.codebook_size
        nll, hits = torch.zeros_like(target, dtype=torch.float32), torch.zeros_like(target, dtype=torch.bool)
        visual = partial(self.visual_head, visual_embeddings=self.use_c2())
        for chosen, score, first, count in (
            ((target >= 0) & (target < offset), self.score_text, 0, offset),
            (target >= offset, visual, offset, size),
        ):
            parts = (hidden_states[chosen], target[chosen] - first, count, is_sharded(self))
            nll[chosen], hits[chosen] = measure_in_chunks(score, *parts)
        return UniCode2MeasuredTargets(targets=target, nll=nll, hits=hits)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        output_modality: str | None = None,
        visual_guidance_scale: float | None = None,
        visual_temperature: float | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UniCode2CausalLMOutputWithPast:
        r"""
        What is not named here is as in [`UniCode2Model.forward`].

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, num_tokens)`, *optional*):
                Targets in the unified vocabulary, -100 for none. `image_token_id` stands for the visual token id of the
                patch whose place it holds. With labels, logits are returned only if `logits_to_keep` asks for some.
                `shift_labels`, in their place or beside them, stand at the positions that predict them.
            logits_to_keep (`int` or `torch.LongTensor`, *optional*, defaults to 0):
                Scores of the last N positions, or of the positions given; 0 for all.
            output_modality (`str`, *optional*):
                `"text"` or `"image"` to compute the scores of one head only; `"plan"` is text that an image may follow.
            visual_guidance_scale (`float`, *optional*):
                Classifier-free guidance of image scores: the second half of the batch is the first without its prompt.
                The scores of the first half, moved away from the second's by this factor, are returned for it.
            visual_temperature (`float`, *optional*):
                With a two-level visual head, draws a cell at this temperature and scores the codes of that cell alone.
            num_items_in_batch (`int`, *optional*):
                Divisor of the loss; the number of targets by default.
            **kwargs:
                Passed on to the language model. With a `task`, that method is run on `input_ids` or `pixel_values` in
                place of all this, see `visual_head_unicode2`: `"embed_codes"` or `"get_image_tokens"`. With labels,
                `measure_targets=True` adds how each of them was foretold.
        """
        # Neither is an argument: the Trainer hands over every column of its data that a forward names, and takes every
        # name with "label" in it for a target.
        task, shift_labels = kwargs.pop("task", None), kwargs.pop("shift_labels", None)
        measure, measured = kwargs.pop("measure_targets", False), None
        if task is not None:
            return getattr(self, task)(pixel_values if input_ids is None else input_ids)
        self.check_ids(input_ids)
        if output_modality not in (None, "text", "plan", "image"):
            raise ValueError(f"`output_modality` is {output_modality!r}; it must be 'text', 'plan', 'image' or None.")
        if "write_index" in kwargs and output_modality is None:
            # Continuous batching writes text.
            output_modality = "text"
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            cache=cache,
            **kwargs,
        )
        if shift_labels is None and labels is not None:
            # Position t predicts token t + 1.
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        hidden_states, loss, text_loss, visual_loss, logits = outputs.last_hidden_state, None, None, None, None
        if shift_labels is not None:
            targets = self.name_patches(shift_labels.to(hidden_states.device), input_ids, outputs.image_tokens)
            loss, text_loss, visual_loss = self.compute_loss(hidden_states, targets, num_items_in_batch)
            measured = self.measure_targets(hidden_states, targets) if measure else None
        if loss is None or not isinstance(logits_to_keep, int) or logits_to_keep:
            # Quantized heads need contiguous inputs.
            kept = keep_positions(hidden_states, logits_to_keep).contiguous()
            logits = self.compute_logits(kept, output_modality, visual_guidance_scale, visual_temperature)
        return UniCode2CausalLMOutputWithPast(
            loss=loss,
            text_loss=text_loss,
            visual_loss=visual_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            measured=measured,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """Stock resizing of the text vocabulary; visual token ids move along.

        Raises `ValueError` when it would cut off an id that frames images.
        """
        largest = max(self.config.image_token_id, self.config.boi_token_id, self.config.eoi_token_id)
        if new_num_tokens is not None and new_num_tokens <= largest:
            raise ValueError(f"{new_num_tokens} text ids are too few: {largest} is an id that images need.")
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def check_ids(self, input_ids: torch.LongTensor | None) -> None:
        """Raises `ValueError` on ids outside the unified vocabulary (on a CPU; a GPU is not made to wait for this)."""
        if input_ids is None or not input_ids.is_cpu or not input_ids.numel() or torch.compiler.is_compiling():
            return
        size = self.config.visual_token_offset + self.config.codebook_config.codebook_size
        low, high = input_ids.aminmax()
        if low < 0 or high >= size:
            raise ValueError(
                f"`input_ids` runs from {low.item()} to {high.item()}; the vocabulary has ids 0 to {size - 1}."
            )

    @torch.no_grad()
    def decode_image_tokens(self, visual_token_ids: torch.LongTensor) -> torch.Tensor:
        """Visual token ids `(batch_size, num_image_tokens)` to images `(batch_size, 3, height, width)` in [0, 1].

        Painted by the diffusion pipeline in `self.decoder` if there is one, else a mosaic of the codes' thumbnails.
        """
        first, size = self.config.visual_token_offset, self.config.codebook_config.codebook_size
        low, high = visual_token_ids.aminmax()
        if visual_token_ids.shape[-1] != self.config.num_image_tokens or low < first or high >= first + size:
            raise ValueError(
                f"{visual_token_ids.shape[-1]} ids from {low.item()} to {high.item()} are no image; one has "
                f"{self.config.num_image_tokens} ids from {first} to {first + size - 1}."
            )
        if self.decoder is not None:
            return self.decoder(visual_token_ids=visual_token_ids, output_type="pt").images
        side = int(self.config.num_image_tokens**0.5)
        codes = (visual_token_ids - self.config.visual_token_offset).unflatten(-1, (side, side))
        return self.get_quantizer().codebook(codes, task="preview").float() / 255


__all__ = ["UniCode2ForConditionalGeneration", "UniCode2Model", "UniCode2PreTrainedModel"]
