"""Stages 1, 1.5 and 2: understanding (Eq. 7) and generation (Eq. 8) over the unified vocabulary, with TRL.

    accelerate launch -m transformers_unicode2.training.sft --config training_recipes/unicode2-tiny/stage1.yaml
    accelerate launch -m transformers_unicode2.training.sft --config my_stage.yaml --max_steps 10

The data are pre-tokenized (`unicode2 tokenize`), so neither the encoder nor C1 works during training. The quantizer
stays frozen; `train_modules` says what else learns. A run that was killed resumes from its newest whole checkpoint. To
continue from other weights, name them as `model`.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path

from trl import SFTConfig

from ..processes import agree
from .chats import build_examples
from .data import load_rows
from .optimizer import MuonWithAdamW, check_muon
from .parameters import check_modules, freeze_all_but, make_lora_config
from .stage import Stage, hash_inputs, run, stage
from .tokens import check_codes, find_tables
from .trainer import OF_TEXTS, UniCode2SFTTrainer, check_lengths


@dataclass
class StageArguments:
    model: str = field(metadata={"help": "checkpoint to continue from"})
    data: str = field(metadata={"help": "folder of pre-tokenized train-*.parquet"})
    tasks: dict = field(
        default_factory=dict,
        metadata={
            "help": "name: {user, assistant, share}, templates of chats over the columns of the data, see `chats.py`"
        },
    )
    unconditional_share: float = field(
        default=0.0,
        metadata={"help": "share of the images that are learnt without any text, for classifier-free guidance"},
    )
    caption_prompt: str | None = field(
        default=None,
        metadata={
            "help": "question that captions answer, kept in the config of the checkpoint (default: the one there)"
        },
    )
    text_weight: float = field(
        default=1.0,
        metadata={"help": "weight of a text token in the loss; an answer has far fewer tokens than an image"},
    )
    max_turns: int = field(default=4, metadata={"help": "questions asked about one image at most"})
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
    attn_implementation: str = field(default="sdpa", metadata={"help": "attention of the language model"})
    lora: dict = field(
        default_factory=dict,
        metadata={"help": "fields of LoraConfig, to train adapters of the language model"},
    )
    train_modules: list[str] = field(
        default_factory=lambda: ["visual_embeddings", "projector", "language_model", "lm_head", "visual_head"],
        metadata={"help": "modules that learn; the rest is frozen"},
    )


def main(args: StageArguments, training_args: SFTConfig) -> None:
    """See `stage` for what may change when a stage is started again."""
    check_arguments(args, training_args)
    files = find_tables(args.data, "train", "`data`")

    # how the sequences of a step are spread does not matter to a loss over their tokens
    spread = {"gradient_accumulation_steps": 1, "num_processes": 1}
    num_sequences = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    spread["per_device_train_batch_size"] = num_sequences * training_args.world_size

    def hash_all() -> dict:
        return {**hash_inputs(args, tokens=("data",), checkpoints=("model",)), **spread}

    with stage("sft", args, training_args, hash_all) as held:
        if not held.finished:
            train(args, training_args, files, held)


def check_arguments(args: StageArguments, training_args: SFTConfig) -> None:
    """Raises `ValueError` on options that cannot be, or that chats which are tokenized by the checkpoint's processor
    do not follow.
    """
    if args.max_plan_tokens is not None and args.max_plan_tokens < 0:
        raise ValueError(f"`max_plan_tokens` is {args.max_plan_tokens}; it must be at least 0.")
    if not 0 <= args.unconditional_share <= 1:
        raise ValueError(f"`unconditional_share` is {args.unconditional_share:g}; it must be in [0, 1].")
    if args.muon:
        check_muon(training_args)
    for name in ("model_init_kwargs", "trust_remote_code", *OF_TEXTS):
        default = next(field.default for field in fields(SFTConfig) if field.name == name)
        if getattr(training_args, name) != default:
            raise ValueError(
                f"`{name}` is {getattr(training_args, name)}; a stage does not follow it: the checkpoint says how "
                "it is loaded and how chats are tokenized."
            )


def train(args: StageArguments, training_args: SFTConfig, files: list[Path], held: Stage) -> None:
    from transformers import AutoProcessor, set_seed

    from transformers_unicode2 import UniCode2ForConditionalGeneration

    set_seed(training_args.seed)
    model = UniCode2ForConditionalGeneration.from_pretrained(
        args.model, dtype=args.dtype, attn_implementation=args.attn_implementation
    )
    size, num_tokens = model.config.codebook_config.codebook_size, model.config.num_image_tokens
    agree(lambda: check_codes(files, args.model, size, num_tokens))
    keep_settings(model, args)
    processor = AutoProcessor.from_pretrained(args.model)
    examples = build_examples(
        load_rows(args.data, "train"),
        args.tasks,
        processor,
        model.config.visual_token_offset,
        model.config.caption_prompt,
        args.max_turns,
        args.learn_all_images,
        args.unconditional_share,
    )
    if training_args.max_length is not None:
        check_lengths("train", examples, training_args.max_length)
    trainer = make_trainer(select_parameters(model, args), args, training_args, examples, processor)
    held.train(trainer)
    with held.result() as folder:
        trainer.save_model(str(folder))
        if trainer.is_world_process_zero():
            processor.save_pretrained(folder)


def keep_settings(model, args: StageArguments) -> None:
    """Notes in the configs of a model what it is going to learn."""
    if args.caption_prompt is not None:
        model.config.caption_prompt = args.caption_prompt
    if args.max_plan_tokens is not None:
        defaults = getattr(model.generation_config, "image_generation", None) or {}
        model.generation_config.image_generation = {**defaults, "max_plan_tokens": args.max_plan_tokens}
        # else it would be made anew from the model's config when loaded
        model.generation_config._from_model_config = False


def select_parameters(model, args: StageArguments):
    """The model with the parameters that learn, or with adapters."""
    if not args.lora:
        freeze_all_but(model, args.train_modules)
        return model
    from peft import get_peft_model

    check_modules(model, args.train_modules)
    return get_peft_model(model, make_lora_config(args.lora, args.train_modules))


def make_trainer(model, args: StageArguments, training_args: SFTConfig, examples, processor) -> UniCode2SFTTrainer:
    """The trainer of a stage, with the optimizer and the weight of text that the recipe names."""
    optimizer = MuonWithAdamW.for_trainer(model, training_args, ("visual_head",)) if args.muon else None
    trainer = UniCode2SFTTrainer(
        model,
        training_args,
        train_dataset=examples,
        processing_class=processor.tokenizer,
        optimizers=(optimizer, None),
    )
    trainer.text_weight = args.text_weight
    return trainer


if __name__ == "__main__":
    run(main, StageArguments, SFTConfig)
