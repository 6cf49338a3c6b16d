"""Training of the condition mapper against a frozen FLUX or SDXL (section 3.4).

    accelerate launch -m transformers_unicode2.training.mapper --config training_recipes/unicode2-tiny/mapper-flux.yaml

Three losses, weighted by the recipe. The contrastive loss is the paper's (Eq. 10): the pooled conditioning of an image
against the frozen text encoder's pooled embedding of its caption; the other captions of the batch are negatives. It
leaves the scale and the single tokens free. The loss that the decoder itself was trained by, flow matching for FLUX,
teaches the tokens what the decoder understands; the paper does not use it. The third loss is for a decoder that reads
image prompts already, as FLUX.1-dev does with FLUX.1 Redux. The mapper then starts from what makes these prompts of
patch features, and regression draws it to the prompts of the same image (`image_prompts`, `regression_weight`). Neither
the decoder nor C2 learns.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..search.neighbours import find_neighbours
from .decoders import Decoder, load_decoder


@dataclass
class MapperArguments:
    data: str = field(metadata={"help": "folder of train-*.parquet with images and captions"})
    tokens: str = field(metadata={"help": "folder that `unicode2 tokenize` made of these rows, by one task"})
    model: str = field(metadata={"help": "UniCode² checkpoint whose C2 embeds the tokens"})
    decoder: str | None = field(
        default=None,
        metadata={"help": "frozen FLUX or SDXL pipeline with its text encoders; regression alone needs none"},
    )
    decoder_dtype: str = field(default="float32", metadata={"help": "dtype of the decoder's weights"})
    decoder_quantization: dict | None = field(
        default=None,
        metadata={"help": "arguments of diffusers' `PipelineQuantizationConfig`, for a decoder in fewer bits"},
    )
    guidance_scale: float = field(
        default=3.5, metadata={"help": "what a guidance-distilled FLUX is told while the mapper learns"}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "pixels of a side: images are resized to it and cropped (default: as they are)"}
    )
    start: str | None = field(
        default=None,
        metadata={
            "help": "UniCode2ConditionMapper to continue from, as it is or with more layers; without `image_prompts`, "
            "regression draws to what it makes of the patch features"
        },
    )
    caption_column: str = field(default="caption", metadata={"help": "column of the captions"})
    mapper: dict = field(
        default_factory=dict, metadata={"help": "fields of UniCode2ConditionMapper (default: of `start`)"}
    )
    contrastive_weight: float = 1.0
    flow_matching_weight: float = 1.0
    flow_matching_share: float = field(
        default=1.0, metadata={"help": "share of the steps with flow matching, which takes most of a step's time"}
    )
    regression_weight: float = field(
        default=0.0, metadata={"help": "weight of the squared distance to the image prompts"}
    )
    image_prompts: str | None = field(
        default=None, metadata={"help": "UniCode2ConditionMapper from patch features to prompts of this decoder"}
    )
    encoder: str | None = field(
        default=None, metadata={"help": "vision encoder of these patch features (default: the one in `model`)"}
    )
    code_noise: float = field(
        default=0.0,
        metadata={
            "help": "largest share of the codes of an image that are replaced by near ones, as a language model errs"
        },
    )
    temperature: float = field(default=0.07, metadata={"help": "tau of Eq. 10"})
    muon: bool = field(
        default=False, metadata={"help": "Muon for the matrices, AdamW for the rest; AdamW alone if false"}
    )


# Cells of the codebook in which the nearest codes of a code are sought.
NUM_PROBES = 8


def contrastive_loss(mapped: torch.Tensor, text: torch.Tensor, temperature: float) -> torch.Tensor:
    """Eq. 10: cosine similarity over `temperature`, with the other rows as negatives, but for those of equal texts.

    Both are `(batch_size, dim)`.
    """
    mapped, text = (
        torch.nn.functional.normalize(mapped.float(), dim=-1),
        torch.nn.functional.normalize(text.float(), dim=-1),
    )
    twins = (text @ text.T > 1 - 1e-5).fill_diagonal_(False)
    logits = (mapped @ text.T / temperature).masked_fill(twins, -torch.inf)
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


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
    """The mapper, the only part that learns, and what its losses need, frozen and out of its state dict."""

    def __init__(
        self,
        mapper,
        decoder,
        visual_embeddings: torch.Tensor,
        args: MapperArguments,
        near_codes: NearCodes | None = None,
    ):
        super().__init__()
        self.mapper, self.args = mapper, args
        # In a list, so that nothing of it is registered
        self.frozen = [decoder, visual_embeddings.detach(), near_codes]

    def forward(self, codes, latents=None, text=None, prompt_embeds=None):
        """
        Args:
            codes: int64 `(batch_size, num_visual_tokens)`.
            latents: of the VAE, `(batch_size, channels, height, width)`, for the decoder's own loss.
            text: pooled embeddings of the captions, `(batch_size, pooled_dim)`, for the contrastive loss.
            prompt_embeds: image prompts `(batch_size, num_visual_tokens, output_dim)`, for regression.

        Returns:
            `loss`, and its parts without their weights.
        """
        decoder, visual_embeddings, near_codes = self.frozen
        if near_codes:
            codes = near_codes(codes, self.args.code_noise)
        embeds = visual_embeddings[codes]  # (batch_size, num_visual_tokens, visual_dim)
        small = embeds.device.type == "cpu" and embeds.shape[1] <= 256
        # The fastest there
        with sdpa_kernel(SDPBackend.MATH) if small else nullcontext():
            condition = self.mapper(embeds)
        loss, losses = condition.prompt_embeds.sum() * 0.0, {}
        if self.args.contrastive_weight:
            contrastive = contrastive_loss(condition.pooled_prompt_embeds, text, self.args.temperature)
            loss = loss + self.args.contrastive_weight * contrastive
            losses["contrastive"] = contrastive.detach()
        # A pass through the decoder, by far the largest part of a step
        if self.args.flow_matching_weight and torch.rand(()) < self.args.flow_matching_share:
            flow = decoder.compute_loss(latents, condition.prompt_embeds, condition.pooled_prompt_embeds)
            loss = loss + self.args.flow_matching_weight * flow
            losses["flow"] = flow.detach()
        if prompt_embeds is not None:
            distance = (condition.prompt_embeds.float() - prompt_embeds).square().mean() / prompt_embeds.var()
            loss = loss + self.args.regression_weight * distance
            losses["prompt_embeds"] = distance.detach()
        return {"loss": loss, **losses}


def check_arguments(args: MapperArguments) -> None:
    """Raises `ValueError` when what a loss needs is not given, or when nothing would be learnt."""
    teacher = args.image_prompts or args.start
    if args.encoder and not teacher:
        raise ValueError("`encoder` makes the patch features for `image_prompts`, which is not given.")
    weights = {name: getattr(args, f"{name}_weight") for name in ("contrastive", "flow_matching", "regression")}
    given = ", ".join(f"`{name}_weight` {value:g}" for name, value in weights.items())
    if not args.decoder and (weights["contrastive"] or weights["flow_matching"]):
        raise ValueError(f"Without a `decoder` there is regression only; got {given}.")
    learnt = weights["contrastive"] or weights["flow_matching"] or weights["regression"] and teacher
    if min(weights.values()) < 0 or not learnt:
        raise ValueError(
            f"There is nothing to learn: {given}; none may be negative, and regression needs `image_prompts` or "
            "`start`."
        )
    if not 0 <= args.code_noise <= 1:
        raise ValueError(f"`code_noise` is {args.code_noise:g}; it must be in [0, 1].")


def start_from(mapper: torch.nn.Module, other: torch.nn.Module, whole: bool = False) -> None:
    """Copies the weights of `other` that make `prompt_embeds`, as far as `mapper` has them in the same shape.

    With `whole`, all of its weights are copied. Transformer layers that only `mapper` has begin as the identity.

    Raises:
        `ValueError`: with `whole`, when `mapper` has no place for a weight.
    """
    own, given = mapper.state_dict(), other.state_dict()
    fitting = {name: weight for name, weight in given.items() if name in own and weight.shape == own[name].shape}
    if whole and len(fitting) < len(given):
        name = next(name for name in given if name not in fitting)
        raise ValueError(f"`start` has {name} {tuple(given[name].shape)}, which these fields of `mapper` leave out.")
    for layer in mapper.layers[len(other.layers) :]:
        for last in (layer.self_attn.out_proj, layer.linear2):
            torch.nn.init.zeros_(last.weight)
            torch.nn.init.zeros_(last.bias)
    copied = {name: weight for name, weight in fitting.items() if whole or not name.startswith("pool")}
    mapper.load_state_dict({**mapper.state_dict(), **copied})


def make_mapper(args: MapperArguments, scales: dict[str, float], teacher: torch.nn.Module | None) -> torch.nn.Module:
    """The mapper that learns: from scratch, from what makes image prompts, or as `start` has it."""
    from transformers_unicode2 import UniCode2ConditionMapper

    if not args.start:
        mapper = UniCode2ConditionMapper(**{**scales, **args.mapper})
        if teacher:
            start_from(mapper, teacher)
        return mapper
    start = UniCode2ConditionMapper.from_pretrained(args.start).float()
    fields = {name: start.config[name] for name in signature(UniCode2ConditionMapper).parameters}
    mapper = UniCode2ConditionMapper(**{**fields, **args.mapper})
    start_from(mapper, start, whole=True)
    return mapper


def main(args: MapperArguments, training_args) -> None:
    """See `stage` for what may change when a stage is started again."""
    from ..tokens import find_tables
    from .data import check_same_rows
    from .optimizer import check_muon
    from .stage import hash_inputs, stage

    check_arguments(args)
    if args.muon:
        check_muon(training_args)
    find_tables(args.data, "train", "`data`")
    tokens = find_tables(args.tokens, "train", "`tokens`")

    def hash_all() -> dict:
        check_same_rows(args.data, tokens)
        checkpoints = ("model", "start", "image_prompts", "encoder")
        return hash_inputs(args, images=("data",), tokens=("tokens",), checkpoints=checkpoints, pipelines=("decoder",))

    with stage("mapper", args, training_args, hash_all) as held:
        if not held.finished:
            train(args, training_args, tokens, held)


def train(args: MapperArguments, training_args, tokens: list[Path], held) -> None:
    from transformers import set_seed

    from transformers_unicode2 import UniCode2ForConditionalGeneration

    from ..processes import agree
    from ..tokens import check_codes
    from .data import load_images_with_codes
    from .optimizer import MuonWithAdamW
    from .stage import StageTrainer

    set_seed(training_args.seed)
    source = UniCode2ForConditionalGeneration.from_pretrained(args.model)
    size, num_tokens = source.config.codebook_config.codebook_size, source.config.num_image_tokens
    agree(lambda: check_codes(tokens, args.model, size, num_tokens))
    rows = load_images_with_codes(args.data, args.tokens)
    decoder = open_decoder(args, training_args.device) if args.decoder else None
    collate = MapperCollator(args, training_args, decoder, source)
    scales = decoder.measure_scales(rows[args.caption_column][:64]) if decoder and not args.start else {}
    mapper = make_mapper(args, scales, collate.teacher)
    visual_embeddings = source.model.visual_embeddings.weight.detach().to(training_args.device)
    offsets = source.get_quantizer().codebook.cell_offsets
    near_codes = NearCodes(visual_embeddings, offsets) if args.code_noise else None
    model = MapperWithLosses(mapper, decoder, visual_embeddings, args, near_codes)
    optimizer = MuonWithAdamW.for_trainer(model, training_args, ("down", "pool")) if args.muon else None
    optimizers = (optimizer, None)
    trainer = StageTrainer(model, training_args, train_dataset=rows, data_collator=collate, optimizers=optimizers)
    held.train(trainer)
    with held.result() as folder:
        if trainer.is_world_process_zero():
            mapper.save_pretrained(folder)


def open_decoder(args: MapperArguments, device: torch.device) -> Decoder:
    """The decoder with the parts that the losses need."""
    return load_decoder(
        args.decoder,
        device,
        args.decoder_dtype,
        args.decoder_quantization,
        texts=bool(args.contrastive_weight or not args.start),
        painter=bool(args.flow_matching_weight),
        guidance_scale=args.guidance_scale,
    )


class MapperCollator:
    """Rows with images, captions and codes to what the losses of `MapperWithLosses` need."""

    def __init__(self, args: MapperArguments, training_args, decoder, source):
        self.device, self.bf16, self.decoder = training_args.device, training_args.bf16, decoder
        self.args, self.teacher = args, None
        if args.image_prompts or args.start and args.regression_weight:
            self.load_teacher(args, source)

    def load_teacher(self, args: MapperArguments, source) -> None:
        """Loads what makes image prompts of images. Raises `ValueError` when its width is not the encoder's."""
        from transformers import AutoImageProcessor

        from transformers_unicode2 import UniCode2ConditionMapper, UniCode2ImageProcessor

        from ..encoders_unicode2 import load_encoder

        teacher = UniCode2ConditionMapper.from_pretrained(args.image_prompts or args.start).float()
        if args.encoder:
            encoder, image_processor = load_encoder(args.encoder)
        else:
            encoder = source.get_quantizer().vision_model
            image_processor = AutoImageProcessor.from_pretrained(args.model)
        if encoder.config.hidden_size != teacher.config.visual_dim:
            raise ValueError(
                f"{args.image_prompts or args.start} reads patch features of width {teacher.config.visual_dim}; those "
                f"of {args.encoder or args.model} are {encoder.config.hidden_size} wide."
            )
        self.image_processor = UniCode2ImageProcessor.adopt(image_processor)
        self.teacher, self.encoder = (part.requires_grad_(False).eval().to(self.device) for part in (teacher, encoder))

    def __call__(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        from ..encoders_unicode2 import encode_patches
        from .data import decode_row, pixel_collator

        inputs = {"codes": torch.tensor([row["codes"] for row in batch])}
        if self.decoder and self.args.contrastive_weight:
            inputs["text"] = self.decoder.encode_captions([row[self.args.caption_column] for row in batch]).cpu()
        if self.decoder and self.args.flow_matching_weight:
            pixel_values = pixel_collator(batch, self.args.image_size)["pixel_values"]
            inputs["latents"] = self.decoder.encode_latents(pixel_values).cpu()
        if self.teacher:
            # Sizes and means of an encoder need not be those of the decoder.
            pixels = self.image_processor([decode_row(row) for row in batch], return_tensors="pt")["pixel_values"]
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                features = encode_patches(self.encoder, pixels.to(self.device)).last_hidden_state
                inputs["prompt_embeds"] = self.teacher(features.float()).prompt_embeds.float().cpu()
        return inputs


if __name__ == "__main__":
    from transformers import TrainingArguments

    from transformers_unicode2.training.stage import run

    run(main, MapperArguments, TrainingArguments)
