"""Stages 1, 1.5 and 2: understanding (Eq. 7) and generation (Eq. 8) over the unified vocabulary, with TRL.

    accelerate launch -m transformers_unicode2.training.sft --config training_recipes/unicode2-tiny/stage1.yaml
    accelerate launch -m transformers_unicode2.training.sft --config training_recipes/unicode2-tiny/stage1.yaml --max_steps 10

The data are pre-tokenized (`unicode2 tokenize`), so neither the encoder nor C1 works during training. The quantizer stays
frozen; what else is trained is up to `train_modules`. A run that was killed goes on from its last checkpoint.
"""

from dataclasses import dataclass, field

from trl import SFTConfig, SFTTrainer, TrlParser


@dataclass
class StageArguments:
    model: str = field(metadata={"help": "checkpoint to start from"})
    data: str = field(metadata={"help": "folder of pre-tokenized train-*.parquet"})
    tasks: dict = field(default_factory=dict, metadata={"help": "task: share of the rows that take part in it"})
    text_weight: float = field(
        default=1.0,
        metadata={"help": "weight of a text token in the loss; an answer has far fewer tokens than an image"},
    )
    max_turns: int = field(default=4, metadata={"help": "questions asked about one image"})
    max_plan_tokens: int | None = field(
        default=None,
        metadata={
            "help": "image mode of the checkpoint plans in so many tokens at most, as `planned_text_to_image` teaches; kept in its "
            "generation config, which LoRA adapters do not have"
        },
    )
    learn_all_images: bool = field(
        default=False, metadata={"help": "the images that texts are about are targets, too, not only those asked for"}
    )
    dtype: str = field(default="float32", metadata={"help": "dtype of the weights; `bf16: true` adds mixed precision"})
    muon: bool = field(
        default=False, metadata={"help": "Muon for the matrices, AdamW for the rest; AdamW alone if false"}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "attention of the language model"})
    lora: dict = field(
        default_factory=dict,
        metadata={"help": "fields of LoraConfig; if given, the language model learns through adapters"},
    )
    train_modules: list[str] = field(
        default_factory=lambda: ["visual_embeddings", "projector", "language_model", "lm_head", "visual_head"],
        metadata={"help": "modules that learn; the rest is frozen"},
    )


class UniCode2SFTTrainer(SFTTrainer):
    """`SFTTrainer` whose loss is the model's own, over both heads; TRL's fused one knows a single head.

    Logs `text_loss` (Eq. 7) and `visual_loss` (Eq. 8) beside the loss, to which each text token adds `text_weight` times its share.
    """

    text_weight = 1.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        outputs = model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss
        if self.text_weight != 1:
            targets = inputs["labels"][:, 1:]
            text = (targets >= 0) & (targets < self.accelerator.unwrap_model(model).config.visual_token_offset)
            count = (targets >= 0).sum() if num_items_in_batch is None else num_items_in_batch
            loss = loss + (self.text_weight - 1) * outputs.text_loss * text.sum() / count
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        for name in ("text_loss", "visual_loss"):
            self._metrics[mode][name].append(
                self.accelerator.gather_for_metrics(getattr(outputs, name).detach()).mean().item()
            )
        return (loss, outputs) if return_outputs else loss


def freeze_all_but(model, modules: list[str]) -> None:
    """Lets the parameters learn whose path holds one of `modules`. Raises `ValueError` for a name that matches none."""
    check_modules(model, modules)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not set(modules).isdisjoint(name.split(".")) and ".quantizer." not in name)


def check_modules(model, modules: list[str]) -> None:
    names = [name for name, _ in model.named_parameters()]
    for module in modules:
        if not any(module in name.split(".") for name in names) and module != "lm_head":  # a tied head has no parameter
            raise ValueError(f"No parameter of the model lies in `{module}`; check `train_modules`.")


def make_lora_config(lora: dict, train_modules: list[str]):
    """LoRA on the language model's linear layers, the other modules that learn trained and saved whole.

    PEFT saves its adapters and `modules_to_save` and silently nothing else, so no module learns that is in neither. The text head
    gets an adapter with the language model, whose weights it may share. Raises `ValueError` when `train_modules` leave the language
    model out, since then there is nothing to adapt.
    """
    from peft import LoraConfig

    if "language_model" not in train_modules:
        raise ValueError(
            f"`lora` adapts the language model, which is not among `train_modules`: {', '.join(train_modules)}."
        )
    whole = [name for name in train_modules if name not in ("language_model", "lm_head")]
    head = r"|lm_head" if "lm_head" in train_modules else ""
    defaults = {
        "target_modules": rf".*language_model\.layers.*_proj{head}",
        "modules_to_save": whole,
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**{**defaults, **lora})


def main(args: StageArguments, training_args: SFTConfig) -> None:
    from datasets import load_dataset
    from transformers import AutoProcessor, set_seed
    from transformers.trainer_utils import get_last_checkpoint

    from transformers_unicode2 import UniCode2ForConditionalGeneration
    from transformers_unicode2.training.data import build_examples
    from transformers_unicode2.training.optimizer import MuonWithAdamW

    set_seed(training_args.seed)
    model = UniCode2ForConditionalGeneration.from_pretrained(
        args.model, dtype=args.dtype, attn_implementation=args.attn_implementation
    )
    processor = AutoProcessor.from_pretrained(args.model)
    if args.max_plan_tokens is not None:
        if args.max_plan_tokens < 0:
            raise ValueError(f"`max_plan_tokens` is {args.max_plan_tokens}; it must be at least 0.")
        defaults = getattr(model.generation_config, "image_generation", None) or {}
        model.generation_config.image_generation = {**defaults, "max_plan_tokens": args.max_plan_tokens}
        model.generation_config._from_model_config = (
            False  # else it would be made anew from the model's config when loaded
        )
    if args.lora:
        from peft import get_peft_model

        check_modules(model, args.train_modules)
        model = get_peft_model(model, make_lora_config(args.lora, args.train_modules))
    else:
        freeze_all_but(model, args.train_modules)
    rows = load_dataset("parquet", data_files=f"{args.data}/train-*.parquet", split="train")
    examples = build_examples(
        rows, args.tasks, processor, model.config.visual_token_offset, args.max_turns, args.learn_all_images
    )
    optimizer = MuonWithAdamW.for_trainer(model, training_args, ("visual_head",)) if args.muon else None
    trainer = UniCode2SFTTrainer(
        model,
        training_args,
        train_dataset=examples,
        processing_class=processor.tokenizer,
        optimizers=(optimizer, None),
    )
    trainer.text_weight = args.text_weight
    trainer.train(resume_from_checkpoint=get_last_checkpoint(training_args.output_dir))
    trainer.save_model()
    processor.save_pretrained(training_args.output_dir)


if __name__ == "__main__":
    main(*TrlParser((StageArguments, SFTConfig)).parse_args_and_config())
