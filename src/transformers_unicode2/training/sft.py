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
import torch
from datasets import Dataset, IterableDataset
from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer

from ..processes import agree
from .chats import build_examples
from .data import load_rows
from .optimizer import MuonWithAdamW, check_muon
from .stage import Stage, WholeCheckpoints, hash_inputs, run, stage
from .tokens import check_codes, find_tables

# options that this trainer's loss does not follow: their defaults, and why
UNFOLLOWED = {
    "label_smoothing_factor": (0.0, "the loss is the model's own, over two heads"),
    "loss_type": ("nll", "the loss is the model's own, over two heads"),
    "neftune_noise_alpha": (None, "the noise would reach text embeddings, but not those of images"),
    "use_liger_kernel": (False, "there are no Liger kernels for this model"),
    "liger_kernel_config": (None, "there are no Liger kernels for this model"),
}
# options about how texts become ids, and their defaults
OF_TEXTS = {
    "completion_only_loss": None,
    "assistant_only_loss": False,
    "dataset_text_field": "text",
    "chat_template_path": None,
    "eos_token": None,
}


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


class UniCode2SFTTrainer(WholeCheckpoints, SFTTrainer):
    """`SFTTrainer` whose loss is the model's own, over both heads; TRL's fused one knows a single head.

    Logs `text_loss` (Eq. 7) and `visual_loss` (Eq. 8) beside the loss, to which each text token adds `text_weight`
    times its share. `predict`, and `evaluate` with `compute_metrics`, give scores over the unified vocabulary,
    `(batch_size, num_tokens, visual_token_offset + codebook_size)`; `preprocess_logits_for_metrics` can make less of
    them. Takes what `SFTTrainer` takes.

    Raises:
        `ValueError`: on options that this loss or data that are tokenized already would ignore, see `check_options`.
    """

    text_weight = 1.0

    def __init__(self, model, args=None, **kwargs):
        check_options(model, args, kwargs)
        super().__init__(model, args, **kwargs)
        if self.aux_loss_enabled:
            raise ValueError(
                "The loss has no part for the routers of experts; set `router_aux_loss_coef` to 0 to train without it."
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        if return_outputs:  # the scores of all positions, which the loss does without
            length = inputs["input_ids"].shape[1]
            inputs = {**inputs, "logits_to_keep": torch.arange(length, device=inputs["input_ids"].device)}
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

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        if not isinstance(eval_dataset, str):  # the name of one that the trainer has
            check_datasets({"eval": eval_dataset}, self.args, self._formatting_func)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset, *args, **kwargs):
        """As of `Trainer`, with data of the kinds that training takes."""
        check_datasets({"test": test_dataset}, self.args, self._formatting_func)
        if not self._skip_prepare_dataset:
            options = (self.processing_class, self.args, False, self._formatting_func, "test")
            test_dataset = self._prepare_dataset(test_dataset, *options)
        return super().predict(test_dataset, *args, **kwargs)

    def create_model_card(self, *args, **kwargs):
        """None is written: TRL's knows neither the stage nor its data, and would lie beside weights that are not there
        yet.
        """


def check_options(model, args: TrainingArguments | None, others: dict) -> None:
    """Raises `ValueError` on what is handed to a trainer and would be ignored: by the loss, or because data are
    tokenized already.

    Args:
        model: model, or name of one.
        args: training arguments.
        others: further arguments of `SFTTrainer`.
    """
    loss = others.get("compute_loss_func")
    if loss is not None:
        raise ValueError(f"`compute_loss_func` is {loss}; it is not followed, since the loss is the model's own.")
    args = as_sft_config(args)
    for name, (default, reason) in UNFOLLOWED.items():
        if getattr(args, name) != default:
            raise ValueError(f"`{name}` is {getattr(args, name)}; it is not followed, since {reason}.")
    if args.activation_offloading and not torch.accelerator.is_available():
        raise ValueError("`activation_offloading` is true; it moves activations off an accelerator, and there is none.")
    if not isinstance(model, str) and (args.model_init_kwargs or others.get("quantization_config")):
        raise ValueError(
            "`model_init_kwargs` and `quantization_config` are for a model by name; load the model with them."
        )
    datasets = {"train": others.get("train_dataset"), "eval": others.get("eval_dataset")}
    check_datasets(datasets, args, others.get("formatting_func"))


def as_sft_config(args: TrainingArguments | None) -> SFTConfig:
    """The training arguments that `SFTTrainer` makes of others, or of none."""
    if isinstance(args, SFTConfig):
        return args
    if args is None:
        return SFTConfig("trainer_output")
    settings = args.to_dict()
    # `to_dict` hides the tokens
    settings |= {"hub_token": args.hub_token}
    settings.pop("push_to_hub_token", None)
    return SFTConfig(**settings)


def check_datasets(datasets: dict, args: SFTConfig, formatting_func) -> None:
    """`check_dataset` of all data sets, and of those in dictionaries."""
    for name, dataset in datasets.items():
        if isinstance(dataset, dict):
            check_datasets({f"{name} {key}": part for key, part in dataset.items()}, args, formatting_func)
        elif dataset is not None:
            check_dataset(name, dataset, args, formatting_func)


def check_dataset(name: str, dataset, args: SFTConfig, formatting_func) -> None:
    """Raises `ValueError` when `args` ask for what is not done to this data set."""
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise ValueError(
            f"The {name} data are a {type(dataset).__name__}; give a `Dataset` or an `IterableDataset` of the library "
            "`datasets`."
        )
    tokenized = "input_ids" in (dataset.column_names or next(iter(dataset)))
    asked = [option for option, default in OF_TEXTS.items() if getattr(args, option) != default]
    asked += ["formatting_func"] if formatting_func else []
    if tokenized and asked:
        raise ValueError(f"The {name} data are tokenized already, so `{asked[0]}` has no effect on them; leave it out.")
    if not (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        return
    asked = [option for option in ("packing", "shuffle_dataset") if getattr(args, option)]
    if asked:
        raise ValueError(f"`{asked[0]}` has no effect with `skip_prepare_dataset`; leave out one of the two.")
    if args.max_length is not None:
        check_lengths(name, dataset, args.max_length)


def check_lengths(name: str, dataset, max_length: int) -> None:
    """Raises `ValueError` when an example is longer than `max_length`, or may be, since nothing cuts it."""
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"`max_length` is {max_length}, and `skip_prepare_dataset` leaves all lengths; set it to null."
        )
    batches = dataset.select_columns("input_ids").with_format("arrow").iter(4096)
    lengths = [length for batch in batches for length in pc.list_value_length(batch["input_ids"]).to_pylist()]
    too_long = sum(length > max_length for length in lengths)
    if too_long:
        raise ValueError(
            f"{too_long} of {len(lengths)} {name} examples are longer than `max_length` {max_length}, the longest has "
            f"{max(lengths)} ids; none is cut, since images would be: raise `max_length` or set it to null."
        )


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

    PEFT saves its adapters and `modules_to_save` and silently nothing else, so no module learns that is in neither.
    The text head gets an adapter with the language model, whose weights it may share. Raises `ValueError` when
    `train_modules` leave the language model out, since then there is nothing to adapt.
    """
    from peft import LoraConfig

    if not isinstance(lora, dict):
        raise ValueError(f"`lora` is {lora!r}; it needs fields of LoraConfig, such as {{r: 16}}.")
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
