"""Stages 1, 1.5 and 2: understanding (Eq. 7) and generation (Eq. 8) over the unified vocabulary, with TRL.

    accelerate launch -m transformers_unicode2.training.sft --config training_recipes/unicode2-tiny/stage1.yaml
    accelerate launch -m transformers_unicode2.training.sft --config my_stage.yaml --max_steps 10

The data are pre-tokenized (`unicode2 tokenize`), so neither the encoder nor C1 works during training. The quantizer
stays frozen; `train_modules` says what else learns. A run that was killed resumes from its newest whole checkpoint. To
continue from other weights, name them as `model`.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path

import pyarrow.compute as pc
from trl import SFTConfig

from ..processes import agree
from .chats import build_examples
from .mixtures import MixturePart, check_mixture, check_targets, find_parts, hash_parts, open_mixture
from .optimizer import MuonWithAdamW, check_muon
from .outcome import describe
from .parameters import adapt, check_rates, freeze_all_but, read_rates
from .prompt_images import swap_images
from .stage import Stage, hash_inputs, run, stage
from .trainer import OF_TEXTS, UniCode2SFTTrainer, check_lengths, check_thinning, joins_rows


@dataclass
class StageArguments:
    model: str = field(metadata={"help": "checkpoint to continue from"})
    datasets: list[dict] = field(
        metadata={
            "help": "folders that `unicode2 tokenize` wrote, mixed: {path, fraction, split} of each, see `mixtures.py`"
        }
    )
    eval_datasets: list[dict] = field(default_factory=list, metadata={"help": "data to evaluate on, in the same form"})
    drop_prompt_share: float = field(
        default=0.0,
        metadata={
            "help": "share of the answers with an image whose image is learnt once more without any text, for "
            "classifier-free guidance"
        },
    )
    caption_prompt: str | None = field(
        default=None,
        metadata={
            "help": "question that captions answer, by which pipelines read drawings back; kept in the config of the "
            "checkpoint (default: the one there)"
        },
    )
    text_weight: float = field(
        default=1.0,
        metadata={"help": "weight of a text token in the loss; an answer has far fewer tokens than an image"},
    )
    max_plan_tokens: int | None = field(
        default=None,
        metadata={
            "help": "longest plan before an image, for tasks whose answer is a text and an image; kept in the "
            "generation config of the checkpoint, which LoRA adapters do not have"
        },
    )
    learn_all_images: bool = field(
        default=False, metadata={"help": "images in questions are targets, too, not only those in answers"}
    )
    dtype: str = field(default="float32", metadata={"help": "dtype of the weights; `bf16: true` adds mixed precision"})
    muon: bool = field(
        default=False, metadata={"help": "Muon for the matrices, AdamW for the rest; AdamW alone if false"}
    )
    learning_rates: dict = field(
        default_factory=dict,
        metadata={
            "help": "learning rates of parts by the names of modules, such as {projector: 1e-3, visual_embeddings: "
            "1e-3}; the rest has `learning_rate`"
        },
    )
    master_weights: bool = field(
        default=False,
        metadata={"help": "the optimizer keeps float32 copies of the weights, for `dtype: bfloat16` without FSDP"},
    )
    codes_per_image: int | None = field(
        default=None,
        metadata={
            "help": "codes of each image in a question that a step reads, drawn anew in each step and kept in order; "
            "evaluation and inference read all (default: all)"
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "attention of the language model (default: as Transformers chooses)"}
    )
    lora: dict = field(
        default_factory=dict,
        metadata={"help": "fields of LoraConfig, such as {r: 16}, to train adapters of the language model"},
    )
    train_modules: list[str] = field(
        default_factory=lambda: ["visual_embeddings", "projector", "language_model", "lm_head", "visual_head"],
        metadata={"help": "modules that learn, such as `projector` or `language_model.layers`; the rest is frozen"},
    )

    def __post_init__(self):
        self.learning_rates = read_rates(self.learning_rates)


def main(args: StageArguments, training_args: SFTConfig) -> None:
    """See `stage` for what may change when a stage is started again."""
    check_arguments(args, training_args)
    parts, eval_parts = find_parts(args.datasets, "`datasets`"), find_parts(args.eval_datasets, "`eval_datasets`")
    name_parts(eval_parts)

    # How the sequences of a step are spread does not matter to a loss over their tokens
    spread = {"gradient_accumulation_steps": 1, "num_processes": 1}
    num_sequences = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    spread["per_device_train_batch_size"] = num_sequences * training_args.world_size

    def hash_all() -> dict:
        # What is evaluated changes what is learnt only where it chooses the result
        chosen_by = {"eval_datasets": hash_parts(eval_parts)} if training_args.load_best_model_at_end else {}
        return {**hash_inputs(args, checkpoints=("model",)), "datasets": hash_parts(parts), **chosen_by, **spread}

    with stage("sft", args, training_args, hash_all, evaluates=True) as held:
        if not held.finished:
            train(args, training_args, parts, eval_parts, held)


def check_arguments(args: StageArguments, training_args: SFTConfig) -> None:
    """Raises `ValueError` on options that cannot be, or that chats which are tokenized by the checkpoint's processor
    do not follow.
    """
    if args.max_plan_tokens is not None and args.max_plan_tokens < 0:
        raise ValueError(f"`max_plan_tokens` is {args.max_plan_tokens}; it must be at least 0.")
    if not args.datasets:
        raise ValueError("`datasets` is empty; name at least one folder that `unicode2 tokenize` wrote.")
    if not 0 <= args.drop_prompt_share <= 1:
        raise ValueError(f"`drop_prompt_share` is {args.drop_prompt_share:g}; it must be in [0, 1].")
    if args.codes_per_image is not None and args.codes_per_image < 1:
        raise ValueError(f"`codes_per_image` is {args.codes_per_image}; it must be at least 1.")
    if training_args.do_eval and not args.eval_datasets:
        raise ValueError("Evaluation is asked for, and there are no `eval_datasets`; name at least one.")
    if args.codes_per_image is not None:
        check_thinning(training_args)
        if args.learn_all_images:
            raise ValueError(
                "`learn_all_images` learns every code of every image, so `codes_per_image` would leave out none; give "
                "one of the two."
            )
    if args.muon:
        check_muon(training_args)
        if args.master_weights:
            raise ValueError("`master_weights` is not for `muon`; leave out one of the two.")
    for name in ("model_init_kwargs", "trust_remote_code", *OF_TEXTS):
        default = next(field.default for field in fields(SFTConfig) if field.name == name)
        if getattr(training_args, name) != default:
            raise ValueError(
                f"`{name}` is {getattr(training_args, name)}; a stage does not follow it: the checkpoint says how "
                "it is loaded and how chats are tokenized."
            )


def train(
    args: StageArguments,
    training_args: SFTConfig,
    parts: list[MixturePart],
    eval_parts: list[MixturePart],
    held: Stage,
) -> None:
    from transformers import AutoProcessor, set_seed

    from transformers_unicode2 import UniCode2ForConditionalGeneration

    set_seed(training_args.seed)
    model = UniCode2ForConditionalGeneration.from_pretrained(
        args.model, dtype=args.dtype, attn_implementation=args.attn_implementation
    )
    agree(lambda: check_mixture([*parts, *eval_parts], args.model, model.config))
    keep_settings(model, args)
    processor = AutoProcessor.from_pretrained(args.model)
    offset = model.config.visual_token_offset
    examples, held_out = build_data(args, training_args, parts, eval_parts, processor, offset)
    model = select_parameters(model, args)
    trainer = make_trainer(model, args, training_args, examples, held_out, processor)
    held.train(trainer)
    metrics = trainer.evaluate() if held_out else {}
    with held.result() as folder:
        trainer.save_model(str(folder))
        if trainer.is_world_process_zero():
            processor.save_pretrained(folder)
            made_of, state = held.made_of, trainer.state
            describe(folder, model, training_args.output_dir, args, parts, made_of, state, metrics)
    if trainer.is_world_process_zero():
        output = training_args.output_dir
        print(f"{output}: {trainer.state.global_step} steps are done. Measure it on rows that it has not learnt from:")
        print(f"unicode2 evaluate captions --model {output} --data TOKENS")


def build_data(
    args: StageArguments,
    training_args: SFTConfig,
    parts: list[MixturePart],
    eval_parts: list[MixturePart],
    processor,
    visual_token_offset: int,
) -> tuple:
    """The examples of a stage, and those of each evaluation data set by its name."""
    rows = open_mixture(parts, training_args.seed)
    examples = build_examples(rows, processor, visual_token_offset, args.learn_all_images, args.drop_prompt_share)
    check_targets(examples, visual_token_offset, args.train_modules)
    held_out = {
        name: build_examples(open_mixture([part], training_args.seed), processor, visual_token_offset)
        for name, part in name_parts(eval_parts).items()
    }
    check_best_metric(training_args, held_out, visual_token_offset)
    if training_args.max_length is not None:
        for name, data in {"train": examples, **held_out}.items():
            check_lengths(name, data, training_args.max_length)
    return examples, held_out


def check_best_metric(training_args: SFTConfig, held_out: dict, visual_token_offset: int) -> None:
    """Raises `ValueError` when `metric_for_best_model` is no metric of the evaluation to come.

    Args:
        training_args: training arguments.
        held_out: examples by the names of data sets, as `build_data` makes them.
        visual_token_offset: first visual token id.
    """
    if training_args.metric_for_best_model is None or training_args.eval_strategy == "no":
        return
    known = []
    for name, examples in held_out.items():
        batches = examples.select_columns("labels").with_format("arrow").iter(4096)
        targets = [pc.list_flatten(batch["labels"]) for batch in batches]
        has_visual = any((pc.max(part).as_py() or 0) >= visual_token_offset for part in targets)
        text = (pc.and_(pc.greater_equal(part, 0), pc.less(part, visual_token_offset)) for part in targets)
        has_text = any(pc.any(part).as_py() for part in text)
        has_gap = not joins_rows(training_args) and len(swap_images(examples, visual_token_offset)[0]) >= 2
        found = ["loss", *["text_loss", "text_accuracy"] * has_text, *["visual_loss", "visual_accuracy"] * has_visual]
        found += ["image_gap"] * has_gap
        known += [f"eval_{name}_{metric}" if len(held_out) > 1 else f"eval_{metric}" for metric in found]
    if f"eval_{training_args.metric_for_best_model.removeprefix('eval_')}" not in known:
        raise ValueError(
            f"`metric_for_best_model` is {training_args.metric_for_best_model}, and the evaluation has "
            f"{', '.join(known)}; name one of these."
        )


def name_parts(parts: list[MixturePart]) -> dict[str, MixturePart]:
    """Parts by the shortest ends of their paths that tell them apart, with their splits where paths are equal.

    Raises `ValueError` when two parts are the same, or one has a fraction, since evaluation reads all rows.
    """
    if any(part.fraction is not None for part in parts):
        raise ValueError("`eval_datasets` have a `fraction`; evaluation reads all rows of each, so leave it out.")
    names = []
    for length in range(1, 1 + max((len(Path(part.path).parts) for part in parts), default=0)):
        ends = ["_".join(Path(part.path).parts[-length:]) for part in parts]
        names = [f"{end}-{part.split}" if ends.count(end) > 1 else end for end, part in zip(ends, parts)]
        if len(set(names)) == len(parts):
            break
    if len(set(names)) < len(parts):
        raise ValueError(f"`eval_datasets` name {', '.join(names)}; each data set and split may be there once.")
    return dict(zip(names, parts))


def keep_settings(model, args: StageArguments) -> None:
    """Notes in the configs of a model what it is going to learn."""
    if args.caption_prompt is not None:
        model.config.caption_prompt = args.caption_prompt
    if args.max_plan_tokens is not None:
        defaults = getattr(model.generation_config, "image_generation", None) or {}
        model.generation_config.image_generation = {**defaults, "max_plan_tokens": args.max_plan_tokens}
        # Else it would be made anew from the model's config when loaded
        model.generation_config._from_model_config = False


def select_parameters(model, args: StageArguments):
    """The model with the parameters that learn, or with adapters."""
    if args.lora:
        return adapt(model, args.lora, args.train_modules)
    freeze_all_but(model, args.train_modules)
    return model


def make_trainer(
    model, args: StageArguments, training_args: SFTConfig, examples, held_out: dict, processor
) -> UniCode2SFTTrainer:
    """The trainer of a stage, with the optimizer and the loss that the recipe names.

    Of a single evaluation data set the metrics begin with `eval_`, of several with `eval_` and the name.
    """
    muon = None
    if args.muon:
        check_rates(model, args.learning_rates)
        muon = MuonWithAdamW.for_trainer(model, training_args, ("visual_head",), args.learning_rates)
    trainer = UniCode2SFTTrainer(
        model,
        training_args,
        train_dataset=examples,
        eval_dataset=(held_out if len(held_out) > 1 else next(iter(held_out.values()))) if held_out else None,
        processing_class=processor.tokenizer,
        optimizers=(muon, None),
    )
    trainer.text_weight, trainer.codes_per_image, trainer.processor = args.text_weight, args.codes_per_image, processor
    trainer.learning_rates, trainer.master_weights = args.learning_rates, args.master_weights
    return trainer


if __name__ == "__main__":
    run(main, StageArguments, SFTConfig)
