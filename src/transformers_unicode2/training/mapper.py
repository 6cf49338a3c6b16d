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

from dataclasses import asdict
from inspect import signature
from pathlib import Path

import torch

from ..cards import name_places, write_card
from ..diffusion.registration import find_stock_class
from ..processes import agree
from ..record import shorten
from .decoders import DECODERS, load_decoder, read_widths
from .mapper_arguments import MapperArguments, check_arguments, check_captions
from .mapper_data import MapperCollator, MapperData, fill_all
from .mapper_losses import MapperWithLosses, NearCodes
from .mapper_trainer import MapperTrainer, make_show
from .mixtures import check_mixture
from .outcome import describe_figures, describe_part

# What the stage writes beside the mapper
RESULT = ("transformer/*", "unet/*", "validation/*.png")


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
    args.mapper = {} if args.start else find_widths(config, args.decoder) | args.mapper
    with torch.random.fork_rng([]):
        agree(lambda: check_widths(make_mapper(args, {}, None), config, args.decoder))
    place = Path(args.cache_dir or f"{training_args.output_dir}-cache")
    (pairs, scales), *held_out = fill_all(data, place, held.made_of, training_args, PartialState())
    check_captions(args, training_args, pairs)
    collate = MapperCollator(args, training_args, source, args.has_teacher and data[0].crop)
    mapper = make_mapper(args, scales, collate.teacher)
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


def find_widths(config, decoder: str | None) -> dict[str, int]:
    """The fields of a mapper that follow from the model of a configuration and from the decoder."""
    own = {"visual_dim": config.codebook_config.codebook_dim, "num_visual_tokens": config.num_image_tokens}
    return own | (read_widths(decoder) if decoder else {})


def check_widths(mapper: torch.nn.Module, config, decoder: str | None) -> None:
    """Raises `ValueError` when the mapper does not fit the model of this configuration, or the decoder."""
    owners = {"visual_dim": "the codes have", "num_visual_tokens": "an image has"}
    wrong = [
        f"`{name}` of the mapper is {mapper.config[name]}, and {owners.get(name, 'the decoder reads')} {width}"
        for name, width in find_widths(config, decoder).items()
        if mapper.config[name] != width
    ]
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}. Set what fits in `mapper`.")


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


def fill_snippet(args: MapperArguments, name: str) -> dict[str, str]:
    """What the snippet of a mapper's card says of the mapper `name`, see `cards.MAPPER`."""
    learnt = ""
    names = {"model": name_places(args.model), "decoder": "", "pipeline": "UniCode2PriorPipeline"}
    names["draw"] = 'condition = pipe("a red circle")  # for a stock pipeline: condition.for_pipeline(stock)'
    if args.decoder:
        stock = find_stock_class(args.decoder)
        names |= {"decoder": f', "{name_places(args.decoder)}"', "pipeline": f"UniCode2{stock}"}
        size = f", height={args.image_size}, width={args.image_size}" if args.image_size else ""
        names["draw"] = f'pipe("a red circle"{size}).images[0].save("drawing.png")'
        part = DECODERS[stock].part
        if args.decoder_lora:
            learnt = f'pipe.load_lora_weights("{name}")\n'
        elif args.train_decoder:
            # With `subfolder`, Diffusers would take the mapper's file in the folder above
            load = f'type(pipe.{part}).from_pretrained("{name}/{part}", dtype=torch.bfloat16)'
            learnt = f"pipe.register_modules({part}={load})\n"
    return {**names, "learnt": learnt}


def write_mapper_card(
    folder: Path, args: MapperArguments, training_args, data: list[MapperData], made_of: dict, state, metrics: dict
) -> None:
    """Writes the card of a mapper; `made_of` is that of the stage, `metrics` are those of the last evaluation."""
    digests = [{"part": part, "digest": shorten(made_of[part])} for part in ("model", "decoder") if part in made_of]
    parts = [describe_part(part, made_of["datasets"][str(n)]) for n, part in enumerate(data[0].parts, 1)]
    what = "the mapper and the decoder" if args.learns_decoder else "the mapper"
    write_card(
        folder,
        training_args.output_dir,
        f"A condition mapper from the codes of `{args.model}` to the conditioning of "
        f"`{args.decoder or args.image_prompts or args.start}`. Trained for {state.global_step:,} steps by "
        f"`transformers_unicode2.training.mapper`: {what}. A mapper that was trained through a decoder, or that began "
        "as FLUX.1 Redux, may count as a derivative of it; look at its licence.",
        [place for place in (args.model, args.decoder) if place],
        {
            f"Figures after {state.global_step:,} steps": describe_figures(state, metrics),
            "Data": parts,
            "Parts": digests,
        },
        {**asdict(args), "max_steps": training_args.max_steps, "batch": training_args.per_device_train_batch_size},
        kind="mapper",
        names=fill_snippet(args, Path(training_args.output_dir).name),
    )


if __name__ == "__main__":
    from transformers import TrainingArguments

    from transformers_unicode2.training.stage import run

    run(main, MapperArguments, TrainingArguments)
