"""Training of the condition mapper against a frozen FLUX or SDXL (section 3.4).

    accelerate launch -m transformers_unicode2.training.mapper --config mapper.yaml

    model: unicode2                     # whose C2 embeds the codes
    datasets: [{path: tokens}]          # of `unicode2 tokenize`: chats of one image and the text about it
    images: [journeydb.jsonl]           # what it was given as --data, for the losses that need pictures
    decoder: black-forest-labs/FLUX.1-dev
    image_size: 512
    output_dir: mapper

Three losses, weighted by the recipe. The contrastive loss is the paper's (Eq. 10): the pooled conditioning of an image
against the frozen text encoder's pooled embedding of its caption. The negatives are the other captions of the step, of
all processes and accumulated batches. It leaves the scale and the single tokens free. The loss that the decoder itself
was trained by, flow matching for FLUX, teaches the tokens what the decoder understands; the paper does not use it. The
third loss is for a decoder that reads image prompts already, as FLUX.1-dev does with FLUX.1 Redux. The mapper then
starts from what makes these prompts of patch features, and regression draws it to the prompts of the same image
(`image_prompts`, `regression_weight`). C2 does not learn. The decoder does not either, unless `train_decoder` or
`decoder_lora` says so.

What frozen parts make of captions and pictures is computed once, see `decoder_cache.py`. With `eval_datasets` and
`eval_strategy: steps`, held-out figures are logged, see `MapperTrainer.evaluate`.
"""

from dataclasses import asdict, dataclass, field
from inspect import signature
from pathlib import Path

import torch

from ..cards import name_places, write_card
from ..diffusion.registration import find_stock_class
from ..processes import agree
from ..record import shorten
from .decoders import DECODERS, load_decoder, read_widths
from .mapper_data import MapperCollator, MapperData, fill_all
from .mapper_losses import MapperWithLosses, NearCodes
from .mapper_trainer import MapperTrainer, make_show
from .mixtures import check_mixture
from .outcome import describe_figures, describe_part
from .parameters import read_rates

# What the stage writes beside the mapper
RESULT = ("transformer/*", "unet/*", "validation/*.png")


@dataclass
class MapperArguments:
    model: str = field(metadata={"help": "UniCode² checkpoint whose C2 embeds the codes"})
    datasets: list[dict] = field(
        metadata={"help": "folders that `unicode2 tokenize` wrote: {path, fraction, split} of each"}
    )
    images: list[str] = field(
        default_factory=list,
        metadata={"help": "what it was given as --data, in the same order; only for losses that need pictures"},
    )
    image_root: str | None = field(default=None, metadata={"help": "folder that the paths of images are relative to"})
    image_column: str | None = field(default=None, metadata={"help": "column with the image (default: by its name)"})
    eval_datasets: list[dict] = field(default_factory=list, metadata={"help": "held-out data, as `datasets`"})
    eval_images: list[str] = field(default_factory=list, metadata={"help": "their pictures, as `images`"})
    decoder: str | None = field(
        default=None,
        metadata={"help": "frozen FLUX or SDXL pipeline with its text encoders; regression alone needs none"},
    )
    decoder_dtype: str = field(default="float32", metadata={"help": "dtype of the decoder's weights"})
    decoder_quantization: dict | None = field(
        default=None,
        metadata={"help": "arguments of diffusers' `PipelineQuantizationConfig`, for a decoder in fewer bits"},
    )
    decoder_offload: bool = field(
        default=False,
        metadata={"help": "keep the blocks of the frozen decoder in CPU memory; one at a time is on the GPU"},
    )
    train_decoder: bool = field(default=False, metadata={"help": "whether all of the decoder learns, too"})
    decoder_lora: dict | None = field(
        default=None, metadata={"help": "low-rank weights of the decoder that learn, such as {r: 16}"}
    )
    learning_rates: dict = field(
        default_factory=dict, metadata={"help": "learning rates of parts: {mapper: ..., decoder: ...}"}
    )
    guidance_scale: float = field(
        default=3.5,
        metadata={"help": "what a guidance-distilled FLUX is told; also of validation pictures"},
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "pixels of a side that images are resized to: their middle, or all of them, as their codes are of, "
            "see `unicode2 tokenize --center-crop` (default: as they are)"
        },
    )
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "folder for what frozen parts make of the data (default: output_dir and `-cache`)"},
    )
    start: str | None = field(
        default=None,
        metadata={
            "help": "UniCode2ConditionMapper to continue from, as it is or with more layers; without `image_prompts`, "
            "regression draws to what it makes of the patch features"
        },
    )
    mapper: dict = field(
        default_factory=dict, metadata={"help": "fields of UniCode2ConditionMapper (default: of `start`)"}
    )
    contrastive_weight: float = 1.0
    flow_matching_weight: float = field(
        default=1.0, metadata={"help": "weight of the loss that the decoder was trained by"}
    )
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
    num_validation_images: int = field(
        default=0, metadata={"help": "held-out images whose paintings an evaluation writes to `validation`"}
    )
    validation_steps: int = field(default=50, metadata={"help": "diffusion steps of these paintings"})

    def __post_init__(self):
        self.learning_rates = read_rates(self.learning_rates)

    @property
    def has_teacher(self) -> bool:
        """Whether regression draws to image prompts."""
        return bool(self.image_prompts or self.start and self.regression_weight)

    @property
    def learns_decoder(self) -> bool:
        return bool(self.train_decoder or self.decoder_lora)


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
    for name in ("code_noise", "flow_matching_share"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"`{name}` is {getattr(args, name):g}; it must be in [0, 1].")
    if not args.temperature > 0:
        raise ValueError(f"`temperature` is {args.temperature:g}; it must be above 0.")
    if args.decoder_dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"`decoder_dtype` is {args.decoder_dtype}; it must be float32, bfloat16 or float16.")
    if args.train_decoder and (args.decoder_lora or args.decoder_quantization):
        raise ValueError("`train_decoder` changes all of the weights, so `decoder_lora` and quantization are left out.")
    if args.decoder_offload and (args.learns_decoder or args.decoder_quantization):
        raise ValueError(
            "`decoder_offload` is of a decoder that is frozen and not quantized; leave out `decoder_offload`, or "
            "`train_decoder`, `decoder_lora` and `decoder_quantization`."
        )
    if args.learns_decoder and not (args.decoder and weights["flow_matching"]):
        raise ValueError(f"A decoder learns by its own loss; set `decoder` and `flow_matching_weight`; got {given}.")
    check_places(args, weights)


def check_places(args: MapperArguments, weights: dict[str, float]) -> None:
    """Raises `ValueError` when data are missing that a loss, or a picture to look at, needs."""
    if not args.datasets:
        raise ValueError("`datasets` is empty; name at least one folder that `unicode2 tokenize` wrote.")
    needs = "flow matching" if weights["flow_matching"] else "regression" if args.has_teacher else None
    for name in ("", "eval_"):
        if needs and getattr(args, f"{name}datasets") and not getattr(args, f"{name}images"):
            raise ValueError(
                f"The loss of {needs} needs the pictures; name in `{name}images` what `unicode2 tokenize` was given as "
                f"--data for `{name}datasets`."
            )
    if args.num_validation_images and not (args.decoder and args.eval_datasets):
        raise ValueError(
            f"`num_validation_images` is {args.num_validation_images}; paintings need a `decoder` and `eval_datasets`."
        )
    if args.num_validation_images and not (args.image_size or weights["flow_matching"]):
        raise ValueError("`num_validation_images` needs `image_size`, the pixels of a side of the paintings.")


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
    mapper.make_identity(len(other.layers))
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
    if args.contrastive_weight and mapper.config.pooled_dim and not mapper.pool.weight.any():
        # A Redux pools nothing, and zeros have no direction that a cosine could turn
        mapper.pool.reset_parameters()
    return mapper


def main(args: MapperArguments, training_args) -> None:
    """See `stage` for what may change when a stage is started again."""
    from .optimizer import check_muon
    from .stage import hash_inputs, stage

    check_arguments(args)
    if args.muon:
        check_muon(training_args)
    data = [MapperData(args), *([MapperData(args, "eval_")] if args.eval_datasets else [])]

    def hash_all() -> dict:
        checkpoints = ("model", "start", "image_prompts", "encoder")
        digests = hash_inputs(args, checkpoints=checkpoints, pipelines=("decoder",))
        for part in data:
            digests |= part.hash_all()
        return digests

    with stage("mapper", args, training_args, hash_all, RESULT, evaluates=len(data) > 1) as held:
        if not held.finished:
            train(args, training_args, data, held)


def train(args: MapperArguments, training_args, data: list[MapperData], held) -> None:
    from accelerate import PartialState
    from transformers import set_seed

    from transformers_unicode2 import UniCode2ForConditionalGeneration

    set_seed(training_args.seed)
    source = UniCode2ForConditionalGeneration.from_pretrained(args.model)
    config = source.config
    agree(lambda: check_mixture([part for one in data for part in one.parts], args.model, config))
    place = Path(args.cache_dir or f"{training_args.output_dir}-cache")
    (pairs, scales), *held_out = fill_all(data, place, held.made_of, training_args, PartialState())
    collate = MapperCollator(args, training_args, source, args.has_teacher and data[0].crop)
    mapper = make_mapper(args, scales, collate.teacher)
    check_widths(mapper, config, args.decoder)
    visual_embeddings = source.model.visual_embeddings.weight.detach().to(training_args.device)
    offsets = source.get_quantizer().codebook.cell_offsets
    near_codes = NearCodes(visual_embeddings, offsets) if args.code_noise else None
    # The language model learns nothing here
    del source
    model = MapperWithLosses(mapper, open_painter(args, training_args.device), visual_embeddings, args, near_codes)
    data_sets = {"train_dataset": pairs, "eval_dataset": held_out[0][0] if held_out else None}
    trainer = make_trainer(model, training_args, data_collator=collate, **data_sets)
    held.train(trainer)
    metrics = trainer.evaluate() if held_out else {}
    with held.result() as folder:
        if trainer.is_world_process_zero():
            mapper.save_pretrained(folder)
            if args.learns_decoder:
                model.frozen[0].save_learnt(folder, bool(args.decoder_lora))
            write_mapper_card(folder, args, training_args, data, held.made_of, trainer.state, metrics)


def make_trainer(model: MapperWithLosses, training_args, **options) -> MapperTrainer:
    """The trainer with its optimizer; `options` are those of `Trainer`."""
    from .optimizer import MuonWithAdamW

    args, optimizer = model.args, None
    if args.muon:
        optimizer = MuonWithAdamW.for_trainer(model, training_args, ("down", "pool"), args.learning_rates)
    show = make_show(model.frozen[0], args, training_args.seed)
    trainer = MapperTrainer(model, training_args, show, optimizers=(optimizer, None), **options)
    trainer.learning_rates = {} if args.muon else args.learning_rates
    trainer.master_weights = any(p.dtype != torch.float32 for p in model.parameters() if p.requires_grad)
    return trainer


def check_widths(mapper: torch.nn.Module, config, decoder: str | None) -> None:
    """Raises `ValueError` when the mapper does not fit the model of this configuration, or the decoder."""
    expected = {"visual_dim": (config.codebook_config.codebook_dim, "the codes have")}
    expected["num_visual_tokens"] = config.num_image_tokens, "an image has"
    for name, width in (read_widths(decoder) if decoder else {}).items():
        expected[name] = width, "the decoder reads"
    for name, (width, owner) in expected.items():
        if mapper.config[name] != width:
            raise ValueError(
                f"`{name}` of the mapper is {mapper.config[name]}, and {owner} {width}; set it in `mapper`."
            )


def open_painter(args: MapperArguments, device: torch.device):
    """The decoder with the parts that the losses and the pictures to look at need; `None` if they need none."""
    if not args.flow_matching_weight and not args.num_validation_images:
        return None
    decoder = load_decoder(
        args.decoder,
        device,
        args.decoder_dtype,
        args.decoder_quantization,
        texts=False,
        vae=bool(args.num_validation_images),
        guidance_scale=args.guidance_scale,
        offload=args.decoder_offload,
    )
    if args.decoder_lora:
        decoder.add_lora(args.decoder_lora)
    elif args.train_decoder:
        decoder.painter.requires_grad_(True)
    return decoder


def write_mapper_card(
    folder: Path, args: MapperArguments, training_args, data: list[MapperData], made_of: dict, state, metrics: dict
) -> None:
    """Writes the card of a mapper; `made_of` is that of the stage, `metrics` are those of the last evaluation."""
    name, learnt = Path(training_args.output_dir).name, ""
    names = {"model": name_places(args.model), "decoder": "", "pipeline": "UniCode2PriorPipeline"}
    if args.decoder:
        stock = find_stock_class(args.decoder)
        names |= {"decoder": f', "{name_places(args.decoder)}"', "pipeline": f"UniCode2{stock}"}
        part = DECODERS[stock].part
        if args.decoder_lora:
            learnt = f'pipe.load_lora_weights("{name}")\n'
        elif args.train_decoder:
            # With `subfolder`, Diffusers would take the mapper's file in the folder above
            load = f'type(pipe.{part}).from_pretrained("{name}/{part}", dtype=torch.bfloat16)'
            learnt = f"pipe.register_modules({part}={load})\n"
    digests = [{"part": part, "digest": shorten(made_of[part])} for part in ("model", "decoder") if part in made_of]
    parts = [describe_part(part, made_of["datasets"][str(n)]) for n, part in enumerate(data[0].parts, 1)]
    what = "the mapper and the decoder" if args.learns_decoder else "the mapper"
    write_card(
        folder,
        training_args.output_dir,
        f"A condition mapper from the codes of `{args.model}` to the conditioning of "
        f"`{args.decoder or args.image_prompts or args.start}`. What learnt in {state.global_step:,} steps of "
        f"`transformers_unicode2.training.mapper`: {what}.",
        [place for place in (args.model, args.decoder) if place],
        {
            f"Figures after {state.global_step:,} steps": describe_figures(state, metrics),
            "Data": parts,
            "Parts": digests,
        },
        {**asdict(args), "max_steps": training_args.max_steps, "batch": training_args.per_device_train_batch_size},
        kind="mapper",
        names={**names, "learnt": learnt},
    )


if __name__ == "__main__":
    from transformers import TrainingArguments

    from transformers_unicode2.training.stage import run

    run(main, MapperArguments, TrainingArguments)
