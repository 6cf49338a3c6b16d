"""The trainable half of UniCode²: C2, projector, language model and visual head (sections 3.2 to 3.4)."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .adapters_unicode2 import check_trainable, leave_out_quantizers
from .configuration_unicode2 import UniCode2Config
from .generation_unicode2 import UniCode2GenerationMixin
from .loading_unicode2 import check_loaded
from .outputs_unicode2 import (
    CACHE_NAME,
    UniCode2CausalLMOutputWithPast,
    UniCode2ImageFeatures,
    UniCode2ModelOutputWithPast,
    keep_positions,
    name_cache,
)
from .processing_unicode2 import UniCode2Processor  # noqa: F401, so that its file travels with this one
from .quantization_unicode2 import UniCode2Quantizer, equal_cells, init_codebook, note_digests

MAX_SCORES = 2**26  # held at a time by the loss: 256 MiB in float32


class UniCode2Projector(nn.Module):
    """MLP from codes to the width of the language model (section 3.3)."""

    def __init__(self, config: UniCode2Config):
        super().__init__()
        self.linear_1 = nn.Linear(config.codebook_config.codebook_dim, config.text_config.hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size)

    def forward(self, visual_embeds: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(visual_embeds)))


class UniCode2VisualEmbeddings(nn.Embedding):
    """C2: the trainable vectors of the codes, which only embed (Eq. 6) and score (Eq. 8)."""

    def forward(
        self, codes: torch.LongTensor | None = None, use: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Codes `(...)` to their vectors `(..., codebook_dim)`; or what `use` makes of the whole matrix.

        Offloading, ZeRO-3 and FSDP bring a weight to its module only while that runs, so nobody else may read it.
        """
        return super().forward(codes) if use is None else use(self.weight)


class UniCode2VisualHead(nn.Module):
    """Scores of the next code: hidden state, linear to the width of a code, inner product with C2 (Eq. 8)."""

    def __init__(self, config: UniCode2Config):
        super().__init__()
        self.linear = nn.Linear(config.text_config.hidden_size, config.codebook_config.codebook_dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        visual_embeddings: Callable,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        target: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """Hidden states `(batch_size, num_tokens, hidden_size)` to scores `(batch_size, num_tokens, codebook_size)`.

        With `guidance_scale`, see `guide`, the batch is halved. `temperature` is of use to the two-level head alone. With codes
        as `target`, see `compute_nll`; by way of a forward, so that a head that was offloaded is brought back.
        """
        if target is not None:
            return self.compute_nll(hidden_states, visual_embeddings, target)
        query = guide(self.linear(hidden_states), guidance_scale)
        return visual_embeddings(None, lambda weight: query @ weight.T.to(query.dtype))

    def compute_nll(
        self, hidden_states: torch.Tensor, visual_embeddings: Callable, codes: torch.LongTensor
    ) -> torch.Tensor:
        """Summed negative log-likelihood, float32, of `codes` `(num_targets,)` after `hidden_states` `(num_targets, hidden_size)`."""
        return nn.functional.cross_entropy(self(hidden_states, visual_embeddings).float(), codes, reduction="sum")


class UniCode2TwoLevelVisualHead(nn.Module):
    """Scores of the next code in two steps, P(code) = P(cell) P(code | cell): one score a cell, then those of one cell's codes.

    The cells are the codebook's. To draw a code takes `num_cells` scores and those of one cell, in place of `codebook_size`.
    """

    def __init__(self, config: UniCode2Config):
        super().__init__()
        codebook = config.codebook_config
        self.codebook_dim, self.codebook_size = codebook.codebook_dim, codebook.codebook_size
        self.linear = nn.Linear(config.text_config.hidden_size, codebook.codebook_dim + codebook.num_cells)
        self.cell_offsets = nn.Buffer(equal_cells(codebook.codebook_size, codebook.num_cells))
        self.largest_cell = None

    def measure_cells(self) -> None:
        """Notes how many codes the largest cell has, once, so that drawing a code need not wait for the answer."""
        self.largest_cell = int(self.cell_offsets.diff().max())

    def project(self, hidden_states: torch.Tensor, guidance_scale: float | None = None):
        """Queries `(..., codebook_dim)` for the codes and float32 scores of the cells `(..., num_cells)`."""
        output = guide(self.linear(hidden_states), guidance_scale)
        return output[..., : self.codebook_dim], output[..., self.codebook_dim :].float()

    def forward(
        self,
        hidden_states: torch.Tensor,
        visual_embeddings: Callable,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        target: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """Hidden states `(batch_size, num_tokens, hidden_size)` to float32 log-probabilities `(batch_size, num_tokens, codebook_size)`.

        With `guidance_scale`, see `guide`, the batch is halved. With `temperature` a cell is drawn for each row, and the
        log-probabilities are those of its codes given the cell, minus infinity elsewhere: what is drawn from them at the same
        temperature is a draw from the product. With codes as `target`, see `compute_nll`.
        """
        if target is not None:
            return self.compute_nll(hidden_states, visual_embeddings, target)
        query, cell_scores = self.project(hidden_states, guidance_scale)
        sizes = self.cell_offsets.diff()  # (num_cells,)
        cell_scores = cell_scores.masked_fill(sizes == 0, -torch.inf)
        if temperature is not None:
            return self.score_drawn_cell(query, cell_scores / temperature, visual_embeddings)
        scores = visual_embeddings(None, lambda weight: query @ weight.T.to(query.dtype)).float()
        cells = torch.repeat_interleave(sizes, output_size=scores.shape[-1])  # (codebook_size,), the cell of each code
        top = torch.full_like(cell_scores, -torch.inf).scatter_reduce(
            -1, cells.expand_as(scores), scores, "amax"
        )  # for a stable log-sum-exp over each cell
        mass = torch.zeros_like(cell_scores).scatter_add(
            -1, cells.expand_as(scores), (scores - top.gather(-1, cells.expand_as(scores))).exp()
        )
        shift = cell_scores.log_softmax(-1) - mass.log() - top  # (..., num_cells)
        return scores + shift.gather(-1, cells.expand_as(scores))

    def score_drawn_cell(
        self, query: torch.Tensor, cell_scores: torch.Tensor, visual_embeddings: Callable
    ) -> torch.Tensor:
        """Log-probabilities `(..., codebook_size)` given a drawn cell, from queries `(..., codebook_dim)` and scores of the cells."""
        cells = torch.multinomial(cell_scores.flatten(0, -2).softmax(-1), 1)[:, 0]  # (num_rows,)
        start, end = self.cell_offsets[cells], self.cell_offsets[cells + 1]
        if self.largest_cell is None:
            self.measure_cells()
        codes = start[:, None] + torch.arange(self.largest_cell, device=start.device)
        inside = codes < end[:, None]  # (num_rows, largest cell)
        codes = codes.clamp(max=self.codebook_size - 1)
        rows = query.flatten(0, -2)[:, :, None]  # (num_rows, codebook_dim, 1)
        scores = (visual_embeddings(codes).to(rows.dtype) @ rows)[..., 0].float().masked_fill(~inside, -torch.inf)
        output = scores.new_full((len(cells), self.codebook_size), -torch.inf)
        output.scatter_reduce_(-1, codes, scores.log_softmax(-1), "amax")
        return output.unflatten(0, query.shape[:-1])

    def compute_nll(
        self, hidden_states: torch.Tensor, visual_embeddings: Callable, codes: torch.LongTensor
    ) -> torch.Tensor:
        """Summed negative log-likelihood, float32, of `codes` `(num_targets,)` after `hidden_states` `(num_targets, hidden_size)`."""
        query, cell_scores = self.project(hidden_states)
        cells = torch.searchsorted(self.cell_offsets, codes, right=True) - 1
        cell_scores = cell_scores.masked_fill(self.cell_offsets.diff() == 0, -torch.inf)
        sizes, inside = self.cell_offsets.diff().tolist(), codes - self.cell_offsets[cells]

        def within_cells(weight: torch.Tensor) -> torch.Tensor:
            total = query.sum() * 0.0 + weight[:1].sum() * 0.0  # both get a gradient even where there are no targets
            blocks = weight.split(sizes)  # at once: the gradient of a slice would be as large as C2, for every cell
            for cell in cells.unique().tolist():
                mine = cells == cell
                scores = query[mine] @ blocks[cell].T.to(query.dtype)  # (targets of this cell, its codes)
                total = total + nn.functional.cross_entropy(scores.float(), inside[mine], reduction="sum")
            return total

        return nn.functional.cross_entropy(cell_scores, cells, reduction="sum") + visual_embeddings(None, within_cells)


leave_out_quantizers(UniCode2VisualEmbeddings)
VISUAL_HEAD_CLASSES = {"flat": UniCode2VisualHead, "two_level": UniCode2TwoLevelVisualHead}


def guide(output: torch.Tensor, guidance_scale: float | None) -> torch.Tensor:
    """Classifier-free guidance before the scores, which are linear in what a head projects to, so that they are computed once.

    The first half of `output` `(2 * batch_size, ...)` saw the prompt, the second did not; the first is moved away from the
    second by `guidance_scale`. Without a scale, `output` comes back.
    """
    if guidance_scale is None:
        return output
    conditional, unconditional = output.chunk(2)
    return torch.lerp(unconditional.float(), conditional.float(), guidance_scale).to(output.dtype)


def sum_in_chunks(
    function: Callable, hidden_states: torch.Tensor, target: torch.LongTensor, num_scores: int
) -> torch.Tensor:
    """Sum of `function(hidden_states, target)` over parts of at most `MAX_SCORES` scores, each recomputed in the backward pass.

    So a loss over `num_scores` classes never holds the scores of all targets; a single part is not recomputed.
    """
    size = max(MAX_SCORES // num_scores, 1)
    if len(target) <= size:
        return function(hidden_states, target)
    parts = zip(hidden_states.split(size), target.split(size))
    return sum(checkpoint(function, *part, use_reentrant=False) for part in parts)


class UniCode2PreTrainedModel(PreTrainedModel):
    config: UniCode2Config
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["UniCode2Codebook"]
    _keep_in_fp32_modules_strict = ["vision_model", "codebook.codes", "codebook.cell_centroids"]  # not its integers
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
        """Loads a checkpoint and freezes its quantizer.

        Raises `ValueError` when something in it is missing, or its quantizer damaged or of another size, see `check_loaded`.
        """
        want_info, source = kwargs.pop("output_loading_info", False), pretrained_model_name_or_path
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        check_loaded(model, info, source, want_info)
        model.get_quantizer().freeze()
        return (model, info) if want_info else model

    def save_pretrained(self, save_directory, is_main_process: bool = True, state_dict: dict | None = None, **kwargs):
        """Saves with the digests of the quantizer's parts."""
        note_digests(self, state_dict)
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)


class UniCode2Model(UniCode2PreTrainedModel):
    r"""
    Images and text to hidden states. Image pixels become codes through the frozen quantizer (SigLIP and C1, Eq. 5); codes,
    whether from pixels or given as visual token ids, are embedded by C2 (Eq. 6) and the projector.
    """

    def __init__(self, config: UniCode2Config):
        super().__init__(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.visual_embeddings = UniCode2VisualEmbeddings(
            config.codebook_config.codebook_size, config.codebook_config.codebook_dim
        )
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
        """Ids of the unified vocabulary `(batch_size, num_tokens)` to embeddings `(batch_size, num_tokens, hidden_size)`."""
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
        """Where image placeholders are, `(batch_size, num_tokens)`. Raises `ValueError` unless there are `num_features` of them."""
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
                Ids of the unified vocabulary; `num_image_tokens` times `image_token_id` for each image in `pixel_values`.
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, height, width)`, *optional*):
                Images, in the order of their placeholders.
            mm_encoder_outputs (`dict`, *optional*):
                `{"image": get_image_features(...)}` in place of `pixel_values`.
            cache (`Cache`, *optional*):
                What Transformers calls `past_key_values` from 5.24 on; either name will do.
        """
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
            features = torch.cat(tuple(images.pooler_output)).to(
                inputs_embeds
            )  # (num_images * num_image_tokens, hidden_size)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, len(features))
            inputs_embeds = inputs_embeds.masked_scatter(mask[..., None], features)
            if (
                len(features) % self.config.num_image_tokens == 0
            ):  # not so where a chunk of a prompt ends inside an image
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

    `generate(generation_mode="text")` never computes visual scores and `generate(generation_mode="image")` never text scores once
    a plan, if it writes one, is done.
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
        if config.tie_word_embeddings:  # what quantizers leave alone: a tied head has no weight of its own to quantize
            self._keep_in_fp32_modules.add("lm_head")
        self.get_quantizer().freeze()
        # DDP would send C1 to all ranks before each forward; it never changes
        self._ddp_params_and_buffers_to_ignore = [n for n, _ in self.named_buffers() if ".quantizer." in n]

    def get_quantizer(self) -> UniCode2Quantizer:
        return self.model.quantizer

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> UniCode2ImageFeatures:
        """See [`UniCode2Model.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_image_tokens(self, pixel_values: torch.Tensor) -> torch.LongTensor:
        """Images `(num_images, 3, height, width)` to visual token ids `(num_images, num_image_tokens)`."""
        return self.model.get_image_tokens(pixel_values)

    def use_c2(self) -> Callable:
        """C2's forward as a plain function; a module among the arguments of another would be moved by offloading."""
        return self.model.visual_embeddings.__call__

    def compute_logits(
        self,
        hidden_states: torch.Tensor,
        output_modality: str | None = None,
        visual_guidance_scale: float | None = None,
        visual_temperature: float | None = None,
    ) -> torch.Tensor:
        """Hidden states `(batch_size, num_tokens, hidden_size)` to scores over the unified vocabulary, or a part of it.

        `output_modality="text"` gives the text ids alone, `(..., visual_token_offset)`, with those that frame an image at minus
        infinity; `"plan"` leaves the one that begins an image among them; `"image"` gives all ids with the text ids at minus infinity; `None` computes both heads.
        """
        if output_modality in ("text", "plan"):
            logits = self.lm_head(hidden_states)
            for id_ in (self.config.eoi_token_id, self.config.image_token_id):
                logits[..., id_] = -torch.inf
            if output_modality == "text":
                logits[..., self.config.boi_token_id] = -torch.inf
            return logits
        visual = self.visual_head(
            hidden_states, self.use_c2(), visual_guidance_scale, visual_temperature
        )  # (..., codebook_size)
        if output_modality == "image":
            return nn.functional.pad(visual, (self.config.visual_token_offset, 0), value=-torch.inf)
        return torch.cat([self.lm_head(hidden_states), visual], dim=-1)

    def name_patches(
        self, targets: torch.LongTensor, input_ids: torch.LongTensor | None, image_tokens: torch.LongTensor | None
    ) -> torch.LongTensor:
        """Puts the visual token ids of images given as pixels, `(num_images, num_image_tokens)`, in the place of the placeholders
        among shifted targets `(batch_size, num_tokens)`. Raises `ValueError` when a placeholder has no patch."""
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
        """Loss, text part (Eq. 7) and visual part (Eq. 8); each text target over the text ids, each visual one over the codes.

        `hidden_states` is `(batch_size, num_tokens, hidden_size)`, `target` `(batch_size, num_tokens)` holds at each position the
        id of the unified vocabulary that it has to predict, or -100. The loss is the sum divided by `num_items_in_batch` (the
        number of targets if that is not given). Both heads always run, so that no rank waits for another. Raises `ValueError`
        on targets of another shape or outside the vocabulary.
        """
        offset, size = self.config.visual_token_offset, self.config.codebook_config.codebook_size
        self.check_targets(hidden_states, target)
        if self.training:
            check_trainable(self)
        hidden = hidden_states
        is_text, is_visual = (target >= 0) & (target < offset), target >= offset
        text = sum_in_chunks(
            lambda h, t: nn.functional.cross_entropy(self.lm_head(h).float(), t, reduction="sum"),
            hidden[is_text],
            target[is_text],
            offset,
        )
        visual = sum_in_chunks(
            lambda h, t: self.visual_head(h, self.use_c2(), target=t),
            hidden[is_visual],
            target[is_visual] - offset,
            size,
        )
        num_text, num_visual = is_text.sum(), is_visual.sum()
        total = (num_text + num_visual).clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return (text + visual) / total, text / num_text.clamp(min=1), visual / num_visual.clamp(min=1)

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
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
                Ids of the unified vocabulary; `num_image_tokens` times `image_token_id` for each image in `pixel_values`.
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, height, width)`, *optional*):
                Images, in the order of their placeholders.
            labels (`torch.LongTensor` of shape `(batch_size, num_tokens)`, *optional*):
                Targets in the unified vocabulary, -100 for none. `image_token_id` stands for the visual token id of the
                patch whose place it holds. With labels, logits are returned only if `logits_to_keep` asks for some.
                `shift_labels`, in their place or beside them, stand at the positions that predict them.
            logits_to_keep (`int` or `torch.LongTensor`, *optional*, defaults to 0):
                Scores of the last so many positions, or of these positions; 0 for all.
            mm_encoder_outputs (`dict`, *optional*):
                `{"image": get_image_features(...)}` in place of `pixel_values`.
            output_modality (`str`, *optional*):
                `"text"` or `"image"` to compute the scores of one head only; `"plan"` is text that an image may follow.
            visual_guidance_scale (`float`, *optional*):
                Classifier-free guidance: the second half of the batch is the first one without its prompt, and the scores of
                the first half, moved away from the second's by this factor, are returned for it. Image scores only.
            visual_temperature (`float`, *optional*):
                With a two-level visual head, draws a cell at this temperature and scores the codes of that cell alone.
            num_items_in_batch (`int`, *optional*):
                Divisor of the loss; the number of targets by default.
            cache (`Cache`, *optional*):
                What Transformers calls `past_key_values` from 5.24 on; either name will do.
        """
        self.check_ids(input_ids)
        if output_modality not in (None, "text", "plan", "image"):
            raise ValueError(f"`output_modality` is {output_modality!r}; it must be 'text', 'plan', 'image' or None.")
        shift_labels = kwargs.pop(
            "shift_labels", None
        )  # not an argument: the Trainer takes every one with "label" for a target
        if "write_index" in kwargs and output_modality is None:  # continuous batching, which writes text
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
        losses, logits = (None, None, None), None
        if labels is not None or shift_labels is not None:
            if shift_labels is None:
                shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)  # position t predicts token t + 1
            targets = self.name_patches(
                shift_labels.to(outputs.last_hidden_state.device), input_ids, outputs.image_tokens
            )
            losses = self.compute_loss(outputs.last_hidden_state, targets, num_items_in_batch)
        if losses[0] is None or not isinstance(logits_to_keep, int) or logits_to_keep:
            kept = keep_positions(outputs.last_hidden_state, logits_to_keep).contiguous()  # for quantized heads
            logits = self.compute_logits(kept, output_modality, visual_guidance_scale, visual_temperature)
        return UniCode2CausalLMOutputWithPast(
            loss=losses[0],
            text_loss=losses[1],
            visual_loss=losses[2],
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def check_targets(self, hidden_states: torch.Tensor, target: torch.LongTensor) -> None:
        if target.shape != hidden_states.shape[:2]:
            raise ValueError(f"The labels are {tuple(target.shape)}, the tokens {tuple(hidden_states.shape[:2])}.")
        size = self.config.visual_token_offset + self.config.codebook_config.codebook_size
        wrong = target[((target < 0) & (target != -100)) | (target >= size)]
        if len(wrong):
            raise ValueError(
                f"{len(wrong)} labels lie outside the ids 0 to {size - 1} and are not -100; the first is {wrong[0].item()}."
            )

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """Stock resizing of the text vocabulary; visual token ids move along. Raises `ValueError` when it would cut off an id that
        frames images."""
        largest = max(self.config.image_token_id, self.config.boi_token_id, self.config.eoi_token_id)
        if new_num_tokens is not None and new_num_tokens <= largest:
            raise ValueError(f"{new_num_tokens} text ids are too few: {largest} is an id that images need.")
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def check_ids(self, input_ids: torch.LongTensor | None) -> None:
        """Raises `ValueError` on ids outside the unified vocabulary (on a CPU; a GPU is not made to wait for this)."""
        size = self.config.visual_token_offset + self.config.codebook_config.codebook_size
        if (
            input_ids is not None
            and input_ids.device.type == "cpu"
            and input_ids.numel()
            and not torch.compiler.is_compiling()
        ):
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
