"""The arguments of the mapper's stage, and what is wrong with them, before any work."""

import math
from dataclasses import dataclass, field
from inspect import signature

from ..images_unicode2 import one_line
from .parameters import read_rates

# Captions among which two different ones are sought
NUM_LOOKED_AT = 10_000


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
        metadata={"help": "guidance that a distilled FLUX receives in training, and of validation pictures"},
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
        default=0, metadata={"help": "held-out images to paint at each evaluation, saved in `validation`"}
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
    if not all(0 <= weight < math.inf for weight in weights.values()) or not learnt:
        raise ValueError(
            f"There is nothing to learn: {given}; each must be at least 0, and regression needs `image_prompts` or "
            "`start`."
        )
    if weights["regression"] and not teacher:
        raise ValueError(
            f"`regression_weight` is {weights['regression']:g}, and nothing makes image prompts; name their mapper in "
            "`image_prompts`, or begin with it by `start`."
        )
    check_numbers(args)
    check_parts(args)
    check_decoder(args)
    check_places(args, weights)


def check_numbers(args: MapperArguments) -> None:
    """Raises `ValueError` on numbers out of their ranges."""
    for name in ("code_noise", "flow_matching_share"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"`{name}` is {getattr(args, name):g}; it must be in [0, 1].")
    if not 0 < args.temperature < math.inf:
        raise ValueError(f"`temperature` is {args.temperature:g}; it must be a finite number above 0.")
    if not 0 <= args.guidance_scale < math.inf:
        raise ValueError(f"`guidance_scale` is {args.guidance_scale:g}; it must be a finite number of at least 0.")
    if args.image_size is not None and args.image_size < 1:
        raise ValueError(f"`image_size` is {args.image_size}; it must be at least 1.")
    if args.num_validation_images < 0 or args.validation_steps < 1:
        raise ValueError(
            f"`num_validation_images` is {args.num_validation_images} and `validation_steps` {args.validation_steps}; "
            "they must be at least 0 and 1."
        )


def check_decoder(args: MapperArguments) -> None:
    """Raises `ValueError` on settings of the decoder that do not go together."""
    if args.decoder_dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"`decoder_dtype` is {args.decoder_dtype}; it must be float32, bfloat16 or float16.")
    if args.train_decoder and (args.decoder_lora or args.decoder_quantization):
        raise ValueError(
            "`train_decoder` trains all weights and cannot be combined with `decoder_lora` or quantization; leave them "
            "out."
        )
    if args.decoder_offload and (args.learns_decoder or args.decoder_quantization):
        raise ValueError(
            "`decoder_offload` is of a decoder that is frozen and not quantized; leave out `decoder_offload`, or "
            "`train_decoder`, `decoder_lora` and `decoder_quantization`."
        )
    if args.learns_decoder and not (args.decoder and args.flow_matching_weight):
        raise ValueError(
            "A decoder learns by its own loss; set `decoder` and `flow_matching_weight`; got "
            f"`flow_matching_weight` {args.flow_matching_weight:g}."
        )


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


def check_parts(args: MapperArguments) -> None:
    """Raises `ValueError` on fields that a mapper does not have, and on a quantization that Diffusers does not."""
    from diffusers import PipelineQuantizationConfig

    from transformers_unicode2 import UniCode2ConditionMapper

    known = signature(UniCode2ConditionMapper).parameters
    unknown = [name for name in args.mapper if name not in known]
    if unknown:
        raise ValueError(f"`mapper` has {unknown[0]}, which is no field of it; those are {', '.join(known)}.")
    try:
        PipelineQuantizationConfig(**args.decoder_quantization) if args.decoder_quantization else None
    except (TypeError, ValueError, ImportError) as error:
        raise ValueError(f"`decoder_quantization` is {args.decoder_quantization}: {one_line(str(error))}.") from error


def check_captions(args: MapperArguments, training_args, pairs) -> None:
    """Raises `ValueError` when a step, or the last of an epoch, has no captions for the contrastive loss to compare."""
    if not args.contrastive_weight:
        return
    size, count = training_args.per_device_train_batch_size, len(pairs)
    batch = min(size * training_args.gradient_accumulation_steps * training_args.world_size, count)
    different = len(set(pairs.pairs["caption"][:NUM_LOOKED_AT]))
    if batch < 2 or different < 2:
        raise ValueError(
            f"The contrastive loss compares captions: a step has {batch}, and the data {different} different ones. "
            "It needs 2 of each; enlarge the batch, or set `contrastive_weight: 0`."
        )
    # What an epoch leaves for its last step; several processes would share it evenly, so that none is alone
    whole = count - count % size if training_args.dataloader_drop_last else count
    ends = not 0 < training_args.max_steps * batch <= count
    if training_args.world_size == 1 and whole % batch == 1 and ends:
        raise ValueError(
            f"The last step of an epoch has 1 of the {count} pairs, and no other caption to compare; set "
            "`dataloader_drop_last: true` or another batch size."
        )
