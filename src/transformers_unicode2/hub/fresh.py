"""What a checkpoint has that none of its parts brings: the projector, the visual head, a random codebook."""

import math
from copy import deepcopy

import torch
from torch import nn

from ..projection import calibrate_projector, measure_embeddings
from .language_models import find_last_norm

PROJECTOR_INITS = ("calibrated", "default")
# Random images whose features a random codebook is drawn like.
NUM_IMAGES = 8
# Random hidden states by which the last norm is measured.
NUM_MEASURED = 256


def make_projector(model, codes: torch.Tensor, embedding: torch.Tensor, how: str) -> dict[str, torch.Tensor]:
    """Starting weights of the projector, in the dtype of the model.

    Args:
        model (`UniCode2ForConditionalGeneration`): on the meta device.
        codes (`torch.Tensor` of shape `(codebook_size, codebook_dim)`): what the projector reads.
        embedding (`torch.Tensor` of shape `(num_rows, hidden_size)`): weight of the text embedding.
        how (`str`): `"calibrated"`, see `calibrate_projector`, or `"default"`, as `from_config` would draw it.
    """
    if how == "default":
        return initialise(model, "model.projector")
    projector = model.model.projector.to_empty(device="cpu").to(model.config.dtype)
    calibrate_projector(projector, codes, *measure_embeddings(fill_embedding(model, embedding)))
    return {f"model.projector.{name}": value for name, value in projector.state_dict().items()}


def fill_embedding(model, weight: torch.Tensor) -> nn.Embedding:
    """The text embedding of a model on the meta device with its weight, and with what its family multiplies it by."""
    embedding = model.get_input_embeddings().to_empty(device="cpu")
    # Its other numbers come from the initialisation, which draws few rows.
    embedding.weight = nn.Parameter(torch.empty((embedding.padding_idx or 0) + 1, weight.shape[1]))
    model.model.language_model._init_weights(embedding)
    embedding.weight = nn.Parameter(weight, requires_grad=False)
    return embedding


def make_visual_head(
    model, codes: torch.Tensor, cell_offsets: torch.Tensor, norm: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Starting weights of the visual head, scaled so that the scores of the codes start about one apart.

    The first loss is then near ln K, however long the codes are and however large the last norm leaves hidden states.

    Args:
        model (`UniCode2ForConditionalGeneration`): on the meta device.
        codes (`torch.Tensor` of shape `(codebook_size, codebook_dim)`): what is scored.
        cell_offsets (`torch.LongTensor` of shape `(num_cells + 1,)`): first code of each cell.
        norm (`dict[str, torch.Tensor]`): weights of the last norm of the language model, by their names.
    """
    state = initialise(model, "visual_head")
    spread = (codes - codes.mean(0)).square().sum(-1).mean().sqrt()
    weight = state["visual_head.linear.weight"]
    size = measure_hidden(model, norm) * model.config.text_config.hidden_size**0.5
    weight /= weight.float().std() * size * spread + 1e-12
    return {name: cell_offsets if name.endswith("cell_offsets") else value for name, value in state.items()}


@torch.no_grad()
def measure_hidden(model, norm: dict[str, torch.Tensor]) -> float:
    """Root mean square of the hidden states that the last norm of the language model leaves.

    Args:
        model (`UniCode2ForConditionalGeneration`): on the meta device.
        norm (`dict[str, torch.Tensor]`): weights of this norm, by their names in the model.
    """
    last = find_last_norm(model.model.language_model)
    module = deepcopy(model.model.language_model.get_submodule(last)).to_empty(device="cpu").float()
    prefix = f"model.language_model.{last}."
    module.load_state_dict({name.removeprefix(prefix): value.float() for name, value in norm.items()})
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_MEASURED, model.config.text_config.hidden_size, generator=generator)
    return module(hidden).square().mean().sqrt().item()


def initialise(model, part: str) -> dict[str, torch.Tensor]:
    """Seeded starting weights of a module of a model on the meta device, as `from_config` would draw them."""
    torch.manual_seed(0)
    module = model.get_submodule(part).to_empty(device="cpu")
    for child in module.modules():
        model._init_weights(child)
    return {
        f"{part}.{name}": value.to(model.config.dtype) if value.is_floating_point() else value
        for name, value in module.state_dict().items()
    }


def count_cells(codebook_size: int) -> int:
    """Cells of a random codebook: about as many as each has codes."""
    return math.isqrt(codebook_size)


@torch.no_grad()
def draw_codebook(vision: str, codebook_size: int):
    """A codebook of random codes, to try the rest with: seeded, drawn like the encoder's features of random images.

    Per dimension the codes have the mean and the standard deviation of these features. No picture has been seen.

    Args:
        vision (`str`): folder or Hub name of the encoder, whose digest the codebook keeps.
        codebook_size (`int`): number of codes.

    Returns:
        `UniCode2Codebook`.

    Raises:
        `ValueError`: as `load_encoder` does, and when the features are not finite.
    """
    from ..codebook.features import Encoder
    from ..codebook.storage import codebook_from_arrays

    encoder, generator = Encoder(vision), torch.Generator().manual_seed(0)
    side = encoder.model.config.image_size
    coarse = torch.randn(NUM_IMAGES, 3, 8, 8, generator=generator)
    pixels = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    features = torch.from_numpy(encoder(list(pixels))[0]).flatten(0, 1)  # (NUM_IMAGES * num_patches, dim)
    if not features.isfinite().all():
        raise ValueError(f"{vision} gives features that are not finite; copy the encoder again.")
    noise = torch.randn(codebook_size, encoder.dim, generator=generator)
    codes = (features.mean(0) + features.std(0) * noise).bfloat16().float()
    centroids = codes[: count_cells(codebook_size)]
    # Blocks, since all distances at once may not fit.
    cells = torch.cat([torch.cdist(part, centroids).argmin(1) for part in codes.split(4096)])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), cells.bincount(minlength=len(centroids)).cumsum(0)])
    codebook = codebook_from_arrays(codes[cells.argsort(stable=True)], centroids.clone(), offsets)
    codebook.encoder_sha256 = encoder.fingerprint()
    return codebook


__all__ = ["PROJECTOR_INITS", "draw_codebook", "make_projector", "make_visual_head"]
