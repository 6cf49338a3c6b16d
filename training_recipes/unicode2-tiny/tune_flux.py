"""The FLUX transformer of a checkpoint goes on alone, on image prompts that the checkpoint's mapper makes of coarse patch features.

    accelerate launch training_recipes/unicode2-tiny/tune_flux.py --config training_recipes/unicode2-tiny/flux-coarse.yaml

The last part of what `train_flux.py` does, with the mapper as it is, in the place of the counterpart of Redux: it does not learn, and so
the two still fit together. Features are coarse as there, rounded to a table that has nothing to do with the codebook.
"""

from dataclasses import dataclass, field

import torch
from train_flux import FOLDERS, CoarseFeatures, check_shift, drop_prompts


@dataclass
class TuneFluxArguments:
    data: str = field(metadata={"help": "folder of train-*.parquet"})
    model: str = field(metadata={"help": "UniCode² checkpoint with a FLUX pipeline around it"})
    mapper: str | None = field(
        default=None,
        metadata={
            "help": "UniCode2ConditionMapper that makes the image prompts; stays as it is (default: the one in `model`)"
        },
    )
    coarse_share: float = field(default=0.8, metadata={"help": "share of the images with coarse features"})
    drop_share: float = field(
        default=0.1, metadata={"help": "share of the images with zeros for a prompt, for classifier-free guidance"}
    )
    table_size: int = field(
        default=32768, metadata={"help": "patch features in the table; each step rounds to a random half of them"}
    )
    shift: float | None = field(
        default=None,
        metadata={
            "help": "of the times, in training and for the scheduler; above 1: more noise (default: as in `model`)"
        },
    )


def check_arguments(args: TuneFluxArguments) -> None:
    """Raises `ValueError` when a number is out of its range."""
    for name in ("coarse_share", "drop_share"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"`{name}` is {getattr(args, name):g}; it must be in [0, 1].")
    if args.table_size < CoarseFeatures.per_image:
        raise ValueError(f"`table_size` is {args.table_size}; it must be {CoarseFeatures.per_image} at least.")
    if args.shift is not None:
        check_shift(args.shift)


def main(args: TuneFluxArguments, training_args) -> None:
    """See `stage` for what may change when a stage is started again."""
    from transformers_unicode2.training.stage import hash_inputs, stage

    check_arguments(args)
    with stage(
        "tune_flux",
        args,
        training_args,
        lambda: hash_inputs(args, images=("data",), checkpoints=("mapper",), pipelines=("model",)),
        result=FOLDERS,
    ) as held:
        if not held.finished:
            train(args, training_args, held)


def train(args: TuneFluxArguments, training_args, held) -> None:
    from diffusers import FluxPipeline
    from transformers import set_seed

    from transformers_unicode2 import UniCode2ConditionMapper, UniCode2ForConditionalGeneration
    from transformers_unicode2.training.data import load_images, pixel_collator
    from transformers_unicode2.training.mapper import encode_latents, flow_matching_loss
    from transformers_unicode2.training.optimizer import MuonWithAdamW
    from transformers_unicode2.training.stage import StageTrainer

    set_seed(training_args.seed)
    encoder = UniCode2ForConditionalGeneration.from_pretrained(args.model).get_quantizer().vision_model
    mapper = UniCode2ConditionMapper.from_pretrained(
        args.mapper or args.model, subfolder=None if args.mapper else "condition_mapper"
    )
    without_texts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    parts = FluxPipeline.from_pretrained(args.model, **without_texts)
    for module in (encoder, mapper, parts.vae):
        module.float().requires_grad_(False).eval().to(training_args.device)
    scheduler = parts.scheduler
    if args.shift is not None:
        scheduler = type(scheduler).from_config(scheduler.config, shift=args.shift)
    shift = scheduler.config.shift

    @torch.no_grad()
    def encode(pixel_values):
        with torch.autocast(pixel_values.device.type, torch.bfloat16, enabled=training_args.bf16):
            return encoder(pixel_values).last_hidden_state.float()  # (batch_size, num_patches, visual_dim)

    @torch.no_grad()
    def collate(rows):
        pixel_values = pixel_collator(rows)["pixel_values"].to(training_args.device)
        return {"latents": encode_latents(parts.vae, pixel_values).cpu(), "features": encode(pixel_values).cpu()}

    class FluxWithLoss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer = parts.transformer.float().train().requires_grad_(True)

        def forward(self, latents, features):
            with torch.no_grad():
                condition = mapper(coarsen(features, args.coarse_share)).values()
                prompts = drop_prompts(args.drop_share, *condition)
            return {"loss": flow_matching_loss(self.transformer, latents, *prompts, shift=shift)}

    images = load_images(args.data)
    coarsen = CoarseFeatures(
        lambda pixel_values: encode(pixel_values.to(training_args.device)), images, args.table_size
    )
    model = FluxWithLoss()
    optimizer = MuonWithAdamW.for_trainer(model, training_args, ("x_embedder", "proj_out"))
    trainer = StageTrainer(
        model, training_args, train_dataset=images, data_collator=collate, optimizers=(optimizer, None)
    )
    held.train(trainer)
    pipe = FluxPipeline(scheduler, parts.vae, None, None, None, None, model.transformer.eval())
    with held.result() as folder:
        if trainer.is_world_process_zero():
            pipe.save_pretrained(folder)


if __name__ == "__main__":
    from transformers import TrainingArguments

    from transformers_unicode2.training.stage import run

    run(main, TuneFluxArguments, TrainingArguments)
