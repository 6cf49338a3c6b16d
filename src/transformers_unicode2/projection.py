"""How a projector starts: it reads standardised codes, and writes on the scale of the token embeddings.

The paper does not say how its projector starts; this is ours. A language model knows inputs of the mean and the spread
of its token embeddings. Features of an encoder have others: of CLIP ViT-B/16, one dimension has the mean 6.4, where the
median standard deviation is 0.31.
"""

import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import linear

# Numbers of a block in float64: 64 MiB.
BLOCK = 2**23


@torch.no_grad()
def calibrate_projector(
    projector: nn.Module, codes: torch.Tensor, mean: torch.Tensor, spread: float, seed: int = 0
) -> None:
    """Draws the weights of a projector so that codes come out like token embeddings.

    `linear_1` standardises the codes per dimension: what it gives has mean 0 and variance 1. `linear_2` follows from
    `rescale_projector`. The weights are computed in float32 and stored in the dtype of the projector.

    Args:
        projector (`UniCode2Projector`): changed in place.
        codes (`torch.Tensor` of shape `(codebook_size, codebook_dim)`): what it will read.
        mean (`torch.FloatTensor` of shape `(hidden_size,)`): of the token embeddings, see `measure_embeddings`.
        spread (`float`): of the token embeddings.
        seed (`int`, *optional*, defaults to 0): of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    center, variance = compute_moments(codes[rows] for rows in blocks(codes.shape))
    # A dimension without variance says nothing, and is left out.
    scale = torch.where(variance > 0, variance.rsqrt(), 0.0)
    for layer, factor in ((projector.linear_1, scale), (projector.linear_2, torch.ones(()))):
        bound = math.sqrt(3 / layer.in_features)
        drawn = torch.empty(layer.weight.shape).uniform_(-bound, bound, generator=generator)
        layer.weight.copy_(drawn * factor)
        layer.bias.zero_()
    first = projector.linear_1
    first.bias.copy_(-(first.weight.double() @ center.to(first.weight.device, torch.float64)))
    rescale_projector(projector, codes, mean, spread)


@torch.no_grad()
def rescale_projector(projector: nn.Module, codes: torch.Tensor, mean: torch.Tensor, spread: float) -> None:
    """Scales and shifts the output of a projector, so that over all codes it has the given mean and spread.

    Everything else of it stays: `linear_2` is multiplied by one number, and its bias is set.

    Args:
        projector (`UniCode2Projector`): changed in place.
        codes (`torch.Tensor` of shape `(codebook_size, codebook_dim)`): what it reads.
        mean (`torch.FloatTensor` of shape `(hidden_size,)`): of the output, per dimension.
        spread (`float`): of the output, see `measure_embeddings`.

    Raises:
        `ValueError`: when all codes come out the same, or not finite.
    """
    first, last = projector.linear_1, projector.linear_2
    weights = [weight.float() for weight in (first.weight, first.bias, last.weight)]

    def project(rows: torch.Tensor) -> torch.Tensor:
        hidden = projector.act(linear(rows.to(weights[0]), weights[0], weights[1]))  # (num_rows, hidden_size)
        return linear(hidden, weights[2])

    size = (len(codes), max(last.weight.shape))
    center, variance = compute_moments(project(codes[rows]) for rows in blocks(size))
    current = variance.mean().sqrt().item()
    if not math.isfinite(current):
        raise ValueError(f"Not all of {len(codes)} codes leave the projector as finite numbers; check the codebook.")
    if current == 0:
        raise ValueError(f"All {len(codes)} codes leave the projector the same; it cannot be brought to a scale.")
    factor = spread / current
    last.weight.mul_(factor)
    last.bias.copy_(mean.to(center) - factor * center)


@torch.no_grad()
def measure_embeddings(embedding: nn.Module) -> tuple[torch.Tensor, float]:
    """Mean and spread of token embeddings as the language model sees them, with the factor that Gemma gives them.

    Args:
        embedding (`torch.nn.Embedding`): of the text ids, with `num_embeddings` rows.

    Returns:
        The mean, float32 `(hidden_size,)`, and the root of the mean variance over all dimensions.
    """
    ids = torch.arange(embedding.num_embeddings, device=embedding.weight.device)
    mean, variance = compute_moments(embedding(ids[rows]) for rows in blocks(embedding.weight.shape))
    return mean.float(), variance.mean().sqrt().item()


def compute_moments(parts: Iterator[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of each dimension over rows that come in parts `(num_rows, dim)`, float64 `(dim,)`."""
    count, shift, total, square = 0, None, 0.0, 0.0
    for part in parts:
        part = part.double()
        # Sums about a mean of some rows lose no digits.
        shift = part.mean(0) if shift is None else shift
        total, square = total + (part - shift).sum(0), square + (part - shift).square().sum(0)
        count += len(part)
    return shift + total / count, (square / count - (total / count).square()).clamp(min=0)


def blocks(shape: tuple[int, int]) -> Iterator[slice]:
    """Slices of the rows of a table, `BLOCK` numbers at most in each."""
    size = max(1, BLOCK // shape[1])
    return (slice(start, start + size) for start in range(0, shape[0], size))


__all__ = ["calibrate_projector", "measure_embeddings", "rescale_projector"]
