"""What a stage leaves beside its weights: a true model card, and what an adapter is an adapter of."""

from dataclasses import asdict
from pathlib import Path

from pyarrow import parquet

from ..adapters import note_base
from ..cards import write_card
from ..record import shorten
from .parameters import find_learning

# Of the training arguments those that a reader looks for first
TRAINING = tuple(
    """learning_rate lr_scheduler_type warmup_steps max_steps num_train_epochs per_device_train_batch_size optim
    weight_decay adam_beta1 adam_beta2 max_grad_norm seed bf16 packing max_length""".split()
)
# Ends of the names of metrics that are no figures of a checkpoint
OF_THE_RUN = ("runtime", "per_second", "epoch")


def describe_figures(state, metrics: dict[str, float]) -> list[dict]:
    """The losses that a stage logged last, and the figures of its last evaluation, as rows of a table."""
    logged = next((entry for entry in reversed(state.log_history) if "loss" in entry), {})
    figures = {f"train_{name}": value for name, value in logged.items() if "loss" in name} | metrics
    return [{"figure": n, "value": value} for n, value in figures.items() if not n.endswith(OF_THE_RUN)]


def describe(
    folder: Path, model, name: str, args, parts: list, made_of: dict, state, metrics: dict[str, float]
) -> None:
    """
    Writes the card of a stage's result and, of an adapter, `base_checkpoint.json`.

    Args:
        folder: with the result.
        model: that was trained.
        name: under which it will be loaded.
        args: `StageArguments`.
        parts: of the mixture.
        made_of: of the record of the stage, with the digest of `model` and the settings.
        state: `TrainerState` at the end.
        metrics: of the last evaluation.
    """
    if args.lora:
        note_base(folder, args.model, made_of["model"], model.config, model.generation_config)
    kind = "An adapter (LoRA) of" if args.lora else "Continued from"
    learnt = ", ".join(f"`{name}`" for name in find_learning(model, args.train_modules))
    write_card(
        folder,
        name,
        f"{kind} `{args.model}` in {state.global_step:,} steps of `transformers_unicode2.training.sft`. "
        f"What learnt: {learnt}. The image encoder and the codebook C1 stayed frozen.",
        [args.model],
        {
            f"Figures after {state.global_step:,} steps": describe_figures(state, metrics),
            "Data": [describe_part(part, made_of["datasets"][str(n)]) for n, part in enumerate(parts, 1)],
            "Base": [{"checkpoint": args.model, "digest": shorten(made_of["model"])}],
        },
        {**asdict(args), **{name: made_of[name] for name in TRAINING if name in made_of}},
        question=model.config.caption_prompt or "What is this?",
        kind="adapter" if args.lora else "checkpoint",
    )


def describe_part(part, digests: dict) -> dict:
    """A row about one data set of a mixture."""
    rows = sum(parquet.read_metadata(file).num_rows for file in part.files)
    fraction = "all" if part.fraction is None else part.fraction
    files = ", ".join(shorten(digests[file.name]) for file in part.files[:4]) + (", …" if len(part.files) > 4 else "")
    return {"data set": part.path, "split": part.split, "rows": rows, "fraction": fraction, "SHA-256 of files": files}
