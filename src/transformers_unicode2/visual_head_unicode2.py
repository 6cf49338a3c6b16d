"""C2, the projector and the visual heads: how codes are embedded (Eq. 6) and scored (Eq. 8).

Offloading, ZeRO-3 and FSDP bring a weight to its module only while the `forward` of that module runs. So a method that
needs the weights of a codebook, of C2, of a head or of a whole model is never called itself. The module is called, with
the method as its `task`, for example `codebook(codes, task="decode")`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput

from .configuration_unicode2 import UniCode2Config
from .quantization_unicode2 import equal_cells

# Scores that the loss holds at a time: 256 MiB in float32.
MAX_SCORES = 2**26


@dataclass
class UniCode2MeasuredTargets(ModelOutput):
    """
    How each target was foretold; all are `(batch_size, num_tokens)`, at the positions that predict.

    Args:
        targets (`torch.LongTensor`): ids of the unified vocabulary, -100 for none.
        nll (`torch.FloatTensor`): negative log-likelihood of the target, 0 where there is none.
        hits (`torch.BoolTensor`): whether the target has the best score of its head.
    """

    targets: torch.LongTensor | None = None
    nll: torch.FloatTensor | None = None
    hits: torch.BoolTensor | None = None


class UniCode2VisualEmbeddings(nn.Embedding):
    """C2: the trainable vectors of the codes, which only embed (Eq. 6) and score (Eq. 8)."""

    def forward(self, inputs: torch.Tensor, task: str = "embed", **options) -> torch.Tensor:
        """Runs `embed`, `score` or `compute_nll_in_cells`, see the top of this file."""
        return getattr(self, task)(inputs, **options)

    def embed(self, codes: torch.LongTensor) -> torch.Tensor:
        """Codes `(...)` to their vectors `(..., codebook_dim)`."""
        return super().forward(codes)

    def score(self, query: torch.Tensor) -> torch.Tensor:
        """Queries `(..., codebook_dim)` to their products with all codes, `(..., codebook_size)`, in their dtype."""
        return query @ self.weight.T.to(query.dtype)

    def compute_nll_in_cells(
        self, query: torch.Tensor, codes: torch.LongTensor, cell_offsets: torch.LongTensor
    ) -> torch.Tensor:
        """Summed negative log-likelihood, float32, of each code among the codes of its own cell.

        Args:
            query (`torch.Tensor` of shape `(num_targets, codebook_dim)`): what the codes are scored by.
            codes (`torch.LongTensor` of shape `(num_targets,)`): targets.
            cell_offsets (`torch.LongTensor` of shape `(num_cells + 1,)`): first code of each cell.
        """
        cells = find_cells(cell_offsets, codes)
        inside = codes - cell_offsets[cells]
        # Both get a gradient even where there are no targets.
        total = query.sum() * 0.0 + self.weight[:1].sum() * 0.0
        # Split at once: the gradient of a slice would be as large as C2, for every cell.
        blocks = self.weight.split(cell_offsets.diff().tolist())
        for cell in cells.unique().tolist():
            mine = cells == cell
            scores = query[mine] @ blocks[cell].T.to(query.dtype)  # (targets of this cell, its codes)
            total = total + cross_entropy(scores.float(), inside[mine], reduction="sum")
        return total


class UniCode2Projector(nn.Module):
    """MLP from codes to the width of the language model (section 3.3)."""

    def __init__(self, config: UniCode2Config):
        super().__init__()
        self.linear_1 = nn.Linear(config.codebook_config.codebook_dim, config.text_config.hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size)

    def forward(self, visual_embeds: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(visual_embeds)))


class UniCode2VisualHead(nn.Module):
    """Scores of the next code: hidden state, linear to the width of a code, inner product with C2 (Eq. 8)."""

    def __init__(self, config: UniCode2Config, num_cells: int = 0):
        super().__init__()
        self.codebook_size = config.codebook_config.codebook_size
        self.linear = nn.Linear(config.text_config.hidden_size, config.codebook_config.codebook_dim + num_cells)

    def forward(
        self, hidden_states: torch.Tensor, visual_embeddings: Callable, task: str = "score", **options
    ) -> torch.Tensor:
        """Runs `score`, `compute_nll` or `count_scores`, see the top of this file.

        `visual_embeddings` is the call of C2.
        """
        return getattr(self, task)(hidden_states, visual_embeddings, **options)

    def score(
        self,
        hidden_states: torch.Tensor,
        visual_embeddings: Callable,
        guidance_scale: float | None = None,
        temperature: float | None = None,
    ) -> torch.Tensor:
        """Hidden states `(batch_size, num_tokens, hidden_size)` to scores `(batch_size, num_tokens, codebook_size)`.

        With `guidance_scale`, see `guide`, the batch is halved. Only the two-level head uses `temperature`.
        """
        return visual_embeddings(guide(self.linear(hidden_states), guidance_scale), task="score")

    def compute_nll(
        self, hidden_states: torch.Tensor, visual_embeddings: Callable, codes: torch.LongTensor
    ) -> torch.Tensor:
        """Summed negative log-likelihood, float32, of `codes` `(num_targets,)`.

        `hidden_states` is `(num_targets, hidden_size)`.
        """
        return cross_entropy(self.score(hidden_states, visual_embeddings).float(), codes, reduction="sum")

    def count_scores(self, hidden_states: torch.Tensor, visual_embeddings: Callable) -> torch.LongTensor:
        """Scores that `compute_nll` holds for each target, at most; a tensor, since ZeRO-3 knows no numbers."""
        return torch.tensor(self.codebook_size)


class UniCode2TwoLevelVisualHead(UniCode2VisualHead):
    """Scores of the next code in two steps, P(code) = P(cell) P(code | cell): the cells, then the codes of one cell.

    The cells are the codebook's. To draw a code takes `num_cells` scores and those of one cell, not `codebook_size`.
    """

    def __init__(self, config: UniCode2Config):
        codebook = config.codebook_config
        super().__init__(config, codebook.num_cells)
        self.codebook_dim = codebook.codebook_dim
        self.cell_offsets = nn.Buffer(equal_cells(codebook.codebook_size, codebook.num_cells))
        self.largest_cell = None

    def measure_cells(self) -> None:
        """Notes how many codes the largest cell has, once, so that drawing a code need not wait for the answer."""
        if self.largest_cell is None:
            self.largest_cell = int(self.cell_offsets.diff().max())

    def project(
        self, hidden_states: torch.Tensor, guidance_scale: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries `(..., codebook_dim)` and float32 scores of the cells `(..., num_cells)`, empty ones at -infinity."""
        output = guide(self.linear(hidden_states), guidance_scale)
        cell_scores = output[..., self.codebook_dim :].float().masked_fill(self.cell_offsets.diff() == 0, -torch.inf)
        return output[..., : self.codebook_dim], cell_scores

    def score(
        self,
        hidden_states: torch.Tensor,
        visual_embeddings: Callable,
        guidance_scale: float | None = None,
        temperature: float | None = None,
    ) -> torch.Tensor:
        """Hidden states `(batch_size, num_tokens, hidden_size)` to float32 log-probabilities of all codes.

        They are `(batch_size, num_tokens, codebook_size)`. With `guidance_scale`, see `guide`, the batch is halved.
        With `temperature` a cell is drawn for each row. The log-probabilities are then those of its codes given the
        cell, and minus infinity elsewhere. A draw from them at the same temperature is a draw from the product.
        """
        query, cell_scores = self.project(hidden_states, guidance_scale)
        if temperature is not None:
            return self.score_drawn_cell(query, cell_scores / temperature, visual_embeddings)
        scores = visual_embeddings(query, task="score").float()
        cells = torch.repeat_interleave(self.cell_offsets.diff(), output_size=scores.shape[-1]).expand_as(scores)
        # The largest score of each cell, for a stable log-sum-exp over it.
        top = torch.full_like(cell_scores, -torch.inf).scatter_reduce(-1, cells, scores, "amax")
        mass = torch.zeros_like(cell_scores).scatter_add(-1, cells, (scores - top.gather(-1, cells)).exp())
        shift = cell_scores.log_softmax(-1) - mass.log() - top  # (..., num_cells)
        return scores + shift.gather(-1, cells)

    def score_drawn_cell(
        self, query: torch.Tensor, cell_scores: torch.Tensor, visual_embeddings: Callable
    ) -> torch.Tensor:
        """Log-probabilities `(..., codebook_size)` given a drawn cell.

        `query` is `(..., codebook_dim)`; `cell_scores`, `(..., num_cells)`, are those to draw from.
        """
        cells = torch.multinomial(cell_scores.flatten(0, -2).softmax(-1), 1)[:, 0]  # (num_rows,)
        start, end = self.cell_offsets[cells], self.cell_offsets[cells + 1]
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
        query, cell_scores = self.project(hidden_states)
        of_cells = cross_entropy(cell_scores, find_cells(self.cell_offsets, codes), reduction="sum")
        options = {"codes": codes, "cell_offsets": self.cell_offsets}
        return of_cells + visual_embeddings(query, task="compute_nll_in_cells", **options)

    def count_scores(self, hidden_states: torch.Tensor, visual_embeddings: Callable) -> torch.LongTensor:
        self.measure_cells()
        return torch.tensor(len(self.cell_offsets) - 1 + self.largest_cell)


VISUAL_HEAD_CLASSES = {"flat": UniCode2VisualHead, "two_level": UniCode2TwoLevelVisualHead}


def find_cells(cell_offsets: torch.LongTensor, codes: torch.LongTensor) -> torch.LongTensor:
    """The cell of each code, `(...)` to `(...)`."""
    return torch.searchsorted(cell_offsets, codes, right=True) - 1


def guide(output: torch.Tensor, guidance_scale: float | None) -> torch.Tensor:
    """Classifier-free guidance before the scores, which are linear in what a head projects to: one product is enough.

    The first half of `output` `(2 * batch_size, ...)` saw the prompt, the second did not. The first is moved away from
    the second by `guidance_scale`. Without a scale, `output` comes back.
    """
    if guidance_scale is None:
        return output
    conditional, unconditional = output.chunk(2)
    return torch.lerp(unconditional.float(), conditional.float(), guidance_scale).to(output.dtype)


def keep_positions(hidden_states: torch.Tensor, kept: int | torch.Tensor) -> torch.Tensor:
    """Hidden states `(batch_size, num_tokens, hidden_size)` of the last `kept` positions, all of them if it is 0.

    A tensor names positions: one row for all samples, one row a sample, or a mask, whose result is flattened.
    Transformers has this from 5.21 on.
    """
    if isinstance(kept, int):
        return hidden_states[:, -kept:]
    if kept.ndim == 1:
        return hidden_states[:, kept]
    return hidden_states[kept] if kept.dtype == torch.bool else hidden_states.take_along_dim(kept[..., None], dim=1)


def check_target_ids(target: torch.LongTensor, shape: torch.Size, num_ids: int) -> None:
    """Raises `ValueError` on targets of another shape, or outside the ids 0 to `num_ids` and not -100."""
    if target.shape != shape:
        raise ValueError(f"The labels are {tuple(target.shape)}, the tokens {tuple(shape)}.")
    wrong = target[((target < 0) & (target != -100)) | (target >= num_ids)]
    if len(wrong):
        raise ValueError(
            f"{len(wrong)} labels lie outside the ids 0 to {num_ids - 1} and are not -100; the first is "
            f"{wrong[0].item()}."
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether processes share the weights of a model, by ZeRO-3 or FSDP, so that each brings them to the others."""
    marks = ("ds_id", "device_mesh")
    shares = any(hasattr(weight, mark) for weight in model.parameters() for mark in marks)
    return shares or any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())


def split_targets(
    hidden_states: torch.Tensor, target: torch.LongTensor, num_scores: int, sharded: bool
) -> list[tuple[torch.Tensor, torch.LongTensor]]:
    """Hidden states and targets in parts of at most `MAX_SCORES` scores, `num_scores` for each target.

    Where weights are `sharded`, processes with fewer targets get empty parts behind theirs: each part asks for weights,
    and a process that asked more often than others would wait for ever.
    """
    size = max(MAX_SCORES // num_scores, 1)
    parts = list(zip(hidden_states.split(size), target.split(size)))
    if sharded and torch.distributed.is_initialized():
        most = torch.tensor(len(parts), device=hidden_states.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        parts += [(hidden_states[:0], target[:0])] * (int(most) - len(parts))
    return parts


def sum_in_chunks(
    function: Callable, hidden_states: torch.Tensor, target: torch.LongTensor, num_scores: int, sharded: bool
) -> torch.Tensor:
    """Sum of `function(hidden_states, target)` over parts of at most `MAX_SCORES` scores, see `split_targets`.

    Each part is recomputed in the backward pass, so a loss over `num_scores` classes never holds the scores of all
    targets. A single part is not recomputed.
    """
    parts = split_targets(hidden_states, target, num_scores, sharded)
    if len(parts) == 1:
        return function(*parts[0])
    return sum(checkpoint(function, *part, use_reentrant=False) for part in parts)


@torch.no_grad()
def measure_in_chunks(
    score: Callable, hidden_states: torch.Tensor, target: torch.LongTensor, num_scores: int, sharded: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood, float32, of each target `(num_targets,)`, and whether its score is the best one.

    `score` makes `(num, num_scores)` of hidden states `(num, hidden_size)`, in the parts of `split_targets`.
    """
    nll, hits = [], []
    for hidden, ids in split_targets(hidden_states, target, num_scores, sharded):
        scores = score(hidden).float()
        nll.append(cross_entropy(scores, ids, reduction="none"))
        hits.append(scores.argmax(-1) == ids)
    return torch.cat(nll), torch.cat(hits)
