"""The losses of the condition mapper, and errors in codes that it learns to bear."""

from contextlib import nullcontext
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, normalize

from ..search.neighbours import find_neighbours

# Cells of the codebook in which the nearest codes of a code are sought.
NUM_PROBES = 8
# Cosines above which two captions count as one
SAME = 1 - 1e-5


def compare_texts(mapped: torch.Tensor, text: torch.Tensor, own: torch.Tensor | None = None) -> tuple:
    """
    Cosines of images with texts, and which texts are another image's own.

    Args:
        mapped: pooled conditioning, `(batch_size, dim)`.
        text: pooled embeddings of captions, `(num_texts, dim)`.
        own: numbers of the texts of the images, int64 `(batch_size,)`; by default their own numbers.

    Returns:
        Cosines, float32 `(batch_size, num_texts)`; texts that equal the own one without being it, bool of that shape;
        and `own`.
    """
    own = torch.arange(len(mapped), device=mapped.device) if own is None else own
    # Products of mixed precision would take near captions for equal ones, and miss equal ones
    with torch.autocast(mapped.device.type, enabled=False):
        mapped, text = normalize(mapped.float(), dim=-1), normalize(text.float(), dim=-1)
        twins = text[own] @ text.T > SAME
        return mapped @ text.T, twins.scatter(1, own[:, None], False), own


def contrastive_loss(
    mapped: torch.Tensor, text: torch.Tensor, temperature: float, own: torch.Tensor | None = None
) -> torch.Tensor:
    """Eq. 10: cosine similarity over `temperature`, with the other texts as negatives, but for those that are equal.

    See `compare_texts`. Texts are constants, so the negatives may be those of other processes and other batches: the
    gradient is that of one batch of all of them.
    """
    cosines, twins, own = compare_texts(mapped, text, own)
    return cross_entropy((cosines / temperature).masked_fill(twins, -torch.inf), own)


def find_own(mapped: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Whether the own text of each image, or an equal one, is the nearest of all, bool `(batch_size,)`."""
    cosines, twins, own = compare_texts(mapped, text)
    nearest = cosines.argmax(1)
    return (nearest == own) | twins.gather(1, nearest[:, None])[:, 0]


class NearCodes:
    """Replaces codes by one of their nearest, as a language model errs that writes an image.

    They are found once a run, among those of the nearest cells, see `find_neighbours`.

    Args:
        visual_embeddings: C2, `(codebook_size, visual_dim)`.
        cell_offsets: first code of each cell of the codebook, `(num_cells + 1,)`.
        num_nearest: how many of the nearest codes it chooses from; fewer where there are fewer.
    """

    def __init__(self, visual_embeddings: torch.Tensor, cell_offsets: torch.Tensor, num_nearest: int = 16):
        from tqdm import tqdm

        progress = partial(tqdm, unit="cell", desc="nearest codes")
        nearest = find_neighbours(visual_embeddings, cell_offsets, num_nearest, NUM_PROBES, progress)
        self.counts = (nearest >= 0).sum(1).clamp(min=1)
        # A code that is alone is replaced by itself
        own = torch.arange(len(nearest), dtype=torch.int32, device=nearest.device)[:, None]
        self.nearest = torch.where(nearest >= 0, nearest, own)  # (codebook_size, num_nearest)

    def __call__(self, codes: torch.Tensor, share: float) -> torch.Tensor:
        """Codes `(num_images, num_visual_tokens)`, int64, with a share that is uniform in [0, `share`] replaced."""
        choice = (torch.rand(codes.shape, device=codes.device) * self.counts[codes]).long()
        limits = share * torch.rand(len(codes), 1, device=codes.device)
        replaced = torch.rand(codes.shape, device=codes.device) < limits
        return torch.where(replaced, self.nearest[codes, choice].long(), codes)


class MapperWithLosses(torch.nn.Module):
    """What learns: the mapper, and the decoder if `args.train_decoder` or `args.decoder_lora` says so.

    What is frozen is not in its state dict.

    Args:
        mapper (`UniCode2ConditionMapper`): learns.
        decoder (`Decoder`, *optional*): what paints, for its own loss.
        visual_embeddings (`torch.Tensor` of shape `(codebook_size, visual_dim)`): C2.
        args (`MapperArguments`): with the weights of the losses.
        near_codes (`NearCodes`, *optional*): errors in codes.
    """

    # Read by the Trainer when a checkpoint lacks keys, as ours does (see state_dict)
    _keys_to_ignore_on_save = None

    def __init__(self, mapper, decoder, visual_embeddings: torch.Tensor, args, near_codes: NearCodes | None = None):
        super().__init__()
        self.mapper, self.args = mapper, args
        # In a list, so that nothing of it is registered
        self.frozen = [decoder, visual_embeddings.detach(), near_codes]
        if args.train_decoder or args.decoder_lora:
            self.decoder = decoder.painter

    def state_dict(self, *args, **kwargs):
        learning = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if name in learning or name.startswith("mapper.")}

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        result, kept = super().load_state_dict(state_dict, False, assign), self.state_dict()
        return result._replace(missing_keys=[name for name in result.missing_keys if name in kept])

    def make_condition(self, codes: torch.LongTensor):
        """Conditioning of codes `(batch_size, num_visual_tokens)`, see `UniCode2ConditionMapper`."""
        embeds = self.frozen[1][codes]  # (batch_size, num_visual_tokens, visual_dim)
        small = embeds.device.type == "cpu" and embeds.shape[1] <= 256
        # The fastest there
        with sdpa_kernel(SDPBackend.MATH) if small else nullcontext():
            return self.mapper(embeds)

    def compute_flow(self, latents: torch.Tensor, condition) -> torch.Tensor:
        """The loss that the decoder itself was trained by, a scalar."""
        return self.frozen[0].compute_loss(latents, condition.prompt_embeds, condition.pooled_prompt_embeds)

    @staticmethod
    def compute_distance(condition, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """Squared distance to image prompts, relative to their variance, a scalar."""
        return (condition.prompt_embeds.float() - prompt_embeds).square().mean() / prompt_embeds.var()

    def forward(self, codes, latents=None, text=None, own=None, prompt_embeds=None, with_flow: bool = True):
        """
        Args:
            codes (`torch.LongTensor` of shape `(batch_size, num_visual_tokens)`): of the images.
            latents (`torch.Tensor` of shape `(batch_size, channels, height, width)`, *optional*): of the VAE, for the
                decoder's own loss.
            text (`torch.Tensor` of shape `(num_texts, pooled_dim)`, *optional*): pooled embeddings of captions, for the
                contrastive loss.
            own (`torch.LongTensor` of shape `(batch_size,)`, *optional*): numbers of the texts of the images.
            prompt_embeds (`torch.Tensor` of shape `(batch_size, num_visual_tokens, output_dim)`, *optional*): image
                prompts, for regression.
            with_flow (`bool`): whether the decoder's own loss is part of this step.

        Returns:
            `loss`, and its parts without their weights.
        """
        if self.frozen[2] and self.training:
            codes = self.frozen[2](codes, self.args.code_noise)
        condition = self.make_condition(codes)
        loss, losses = condition.prompt_embeds.sum() * 0.0, {}
        if self.args.contrastive_weight:
            contrastive = contrastive_loss(condition.pooled_prompt_embeds, text, self.args.temperature, own)
            loss = loss + self.args.contrastive_weight * contrastive
            losses["contrastive"] = contrastive.detach()
        # A pass through the decoder, by far the largest part of a step
        if self.args.flow_matching_weight and with_flow:
            flow = self.compute_flow(latents, condition)
            loss = loss + self.args.flow_matching_weight * flow
            losses["flow"] = flow.detach()
        if prompt_embeds is not None:
            distance = self.compute_distance(condition, prompt_embeds)
            loss = loss + self.args.regression_weight * distance
            losses["regression"] = distance.detach()
        return {"loss": loss, **losses}
