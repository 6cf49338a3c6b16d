"""Trains the stand-in for FLUX.1-dev and FLUX.1 Redux: a small `FluxPipeline`, from scratch, with its text encoders.

    accelerate launch training_recipes/unicode2-tiny/train_flux.py --config training_recipes/unicode2-tiny/flux.yaml

Flow matching on the VAE's latents: x_t = (1 - t) x_0 + t noise, the transformer predicts noise - x_0. The T5 and CLIP text
encoders learn with it. Some images come with a text, the others with an image prompt: the patch features of a SigLIP, brought
to the width of the T5 embeddings by two linear layers, as FLUX.1 Redux does for FLUX.1-dev. A part of these features is coarse: each is
replaced by the nearest one of a random table of patch features, so that FLUX learns to paint clean shapes from prompts that only hint
at them, as those of any codebook do; it never meets the codebook itself. FLUX has learnt from billions of images to paint what its
prompt embeddings say in detail; on a CPU, texts alone do not get that far. A few images come with a prompt of zeros, so that FLUX can be
guided away from what it paints without one. A second term, representation alignment (REPA), makes the image tokens of an inner block point
where the clean image's patch features point. Afterwards all of it is frozen, as the pretrained decoder of the paper is. The counterpart of
Redux is saved as `image_prompts` beside the pipeline; the mapper starts from it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from datasets import Dataset

from transformers_unicode2.training.data import pixel_collator

# of a pipeline, and what makes image prompts
FOLDERS = tuple("scheduler vae text_encoder text_encoder_2 tokenizer tokenizer_2 transformer image_prompts".split())


@dataclass
class FluxArguments:
    data: str = field(metadata={"help": "folder of train-*.parquet"})
    tokenizer: str = field(metadata={"help": "folder of the tokenizer"})
    vae: str = field(metadata={"help": "folder of the trained VAE"})
    encoder: str = field(metadata={"help": "folder of the SigLIP vision encoder"})
    start: str | None = field(
        default=None,
        metadata={
            "help": "UniCode² checkpoint whose FLUX transformer and the linear layers of its mapper go on learning"
        },
    )
    transformer: dict = field(default_factory=dict, metadata={"help": "fields of FluxTransformer2DModel"})
    t5: dict = field(default_factory=dict, metadata={"help": "fields of T5Config"})
    clip: dict = field(default_factory=dict, metadata={"help": "fields of CLIPTextConfig"})
    image_prompts: dict = field(
        default_factory=dict,
        metadata={"help": "fields of the UniCode2ConditionMapper that turns patch features into prompts"},
    )
    alignment_weight: float = field(default=0.5, metadata={"help": "weight of the alignment to the patch features"})
    image_prompt_share: float = field(default=0.75, metadata={"help": "share of images that are their own prompt"})
    coarse_share: float = field(default=0.7, metadata={"help": "share of the image prompts with coarse features"})
    table_size: int = field(
        default=16384, metadata={"help": "patch features in the table; each step rounds to a random half of them"}
    )
    drop_share: float = field(
        default=0.1, metadata={"help": "share of the images with zeros for a prompt, for classifier-free guidance"}
    )
    layout_share: float = field(
        default=0.8, metadata={"help": "share of the texts that are exact layouts, not captions"}
    )
    shift: float = field(
        default=1.0,
        metadata={
            "help": "of the times, in training and for the scheduler; above 1: more noise (with `start`: as there)"
        },
    )


def drop_prompts(share: float, *prompts: torch.Tensor) -> list[torch.Tensor]:
    """Zeros in place of the prompts of a share of the images, chosen at random: FLUX learns to paint without a prompt, too, and
    what it paints with one can then be guided away from that. Tensors of any shape, the first size is the number of images.

    Raises `ValueError` when `share` is not in [0, 1]."""
    if not 0 <= share <= 1:
        raise ValueError(f"`drop_share` is {share:g}; it must be in [0, 1].")
    kept = torch.rand(len(prompts[0]), device=prompts[0].device) >= share
    return [value * kept.view(-1, *[1] * (value.ndim - 1)) for value in prompts]


def check_shift(shift: float) -> None:
    """Raises `ValueError` when the times cannot be shifted so."""
    if shift <= 0:
        raise ValueError(f"`shift` is {shift:g}; it must be above 0.")


class CoarseFeatures:
    """Rounds patch features to the nearest of a random half of a table of patch features; which half is drawn anew each time.

    Args:
        encode: images `(1, 3, height, width)` to patch features `(1, num_patches, dim)`.
        images: the data set, of whose images the table holds some features each.
        size: of the table, in features; a whole number of images gives `per_image` each.
    """

    per_image = 16

    def __init__(self, encode: Callable, images: Dataset, size: int):
        rows = images.select(torch.randperm(len(images))[: size // self.per_image].tolist())
        patches = (encode(pixel_collator([row])["pixel_values"])[0] for row in rows)
        self.table = torch.cat([features[torch.randperm(len(features))[: self.per_image]] for features in patches])

    def __call__(self, features: torch.Tensor, share: float) -> torch.Tensor:
        """Rounds the first `share` of the images; `(num_images, num_patches, dim)`."""
        num_coarse = round(share * len(features))
        codes = self.table[torch.randperm(len(self.table))[: len(self.table) // 2]].to(features)
        coarse = codes[torch.cdist(features[:num_coarse].flatten(0, 1), codes).argmin(-1)]
        return torch.cat([coarse.view_as(features[:num_coarse]), features[num_coarse:]])


def main(args: FluxArguments, training_args) -> None:
    """See `stage` for what may change when a stage is started again."""
    from transformers_unicode2.training.stage import hash_inputs, stage

    check_shift(args.shift)
    with stage(
        "train_flux",
        args,
        training_args,
        lambda: hash_inputs(args, images=("data",), checkpoints=("tokenizer", "encoder"), pipelines=("vae", "start")),
        result=FOLDERS,
    ) as held:
        if not held.finished:
            train(args, training_args, held)


def train(args: FluxArguments, training_args, held) -> None:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import (
        AutoTokenizer,
        CLIPTextConfig,
        CLIPTextModel,
        SiglipVisionModel,
        T5Config,
        T5EncoderModel,
        set_seed,
    )

    from transformers_unicode2 import UniCode2ConditionMapper
    from transformers_unicode2.training.data import load_images
    from transformers_unicode2.training.mapper import encode_latents, flow_matching_loss, start_from
    from transformers_unicode2.training.optimizer import MuonWithAdamW
    from transformers_unicode2.training.stage import StageTrainer

    set_seed(training_args.seed)
    max_length = args.clip["max_position_embeddings"]  # of texts; image prompts have as many patches
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, padding_side="right", model_max_length=max_length)
    shared = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.pad_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }

    vae = AutoencoderKL.from_pretrained(args.vae).requires_grad_(False).eval()
    encoder = SiglipVisionModel.from_pretrained(args.encoder).requires_grad_(False).eval()
    width = encoder.config.hidden_size

    class FluxWithLoss(torch.nn.Module):
        _keys_to_ignore_on_save = (
            None  # read by the Trainer when a checkpoint lacks keys, as ours does (see state_dict)
        )

        def __init__(self):
            super().__init__()
            self.transformer = FluxTransformer2DModel(**args.transformer)
            self.text_encoder = CLIPTextModel(CLIPTextConfig(**shared, bos_token_id=None, **args.clip))
            self.text_encoder_2 = T5EncoderModel(T5Config(**shared, bos_token_id=None, use_cache=False, **args.t5))
            inner_dim = self.transformer.inner_dim
            self.align = torch.nn.Sequential(
                torch.nn.Linear(inner_dim, 2 * inner_dim), torch.nn.SiLU(), torch.nn.Linear(2 * inner_dim, width)
            )
            self.image_prompts = UniCode2ConditionMapper(**args.image_prompts)
            self.seen = {}
            inner = self.transformer.transformer_blocks[-1]
            inner.register_forward_hook(lambda module, args, output: self.seen.update(hidden=output[1]))

        def state_dict(self, *args, **kwargs):  # T5 holds its embedding twice, which a safetensors file must not
            return {
                k: v
                for k, v in super().state_dict(*args, **kwargs).items()
                if not k.endswith("encoder.embed_tokens.weight")
            }

        def forward(self, latents, features, input_ids, is_image_prompt):
            # chosen here, not in the collator, which runs ahead of what a killed run remembers of its random numbers
            exact = torch.rand(len(input_ids), 1, device=input_ids.device) < args.layout_share
            input_ids = torch.where(exact, input_ids[:, 0], input_ids[:, 1])
            texts = self.text_encoder_2(input_ids)[0]  # (num_texts, max_length, joint_attention_dim)
            pooled_texts = self.text_encoder(input_ids).pooler_output  # (num_texts, pooled_projection_dim)
            images = self.image_prompts(coarsen(features[is_image_prompt], args.coarse_share)).prompt_embeds
            prompts = images.new_zeros(len(latents), *images.shape[1:])
            prompts[is_image_prompt], prompts[~is_image_prompt] = images, texts.to(images)
            pooled = pooled_texts.new_zeros(len(latents), pooled_texts.shape[-1])  # Redux has none either
            pooled[~is_image_prompt] = pooled_texts
            prompts, pooled = drop_prompts(args.drop_share, prompts, pooled)
            flow = flow_matching_loss(self.transformer, latents, prompts, pooled, shift=scheduler.config.shift)
            aligned = self.align(self.seen.pop("hidden"))  # (batch_size, num_patches, width of the encoder)
            target = features - features.mean((0, 1))  # what all patches share says nothing
            alignment = 1 - torch.nn.functional.cosine_similarity(aligned.float(), target, dim=-1).mean()
            loss = flow + args.alignment_weight * alignment
            return {"loss": loss, "flow": flow.detach(), "alignment": alignment.detach()}

    def encode(pixel_values):
        with torch.no_grad(), torch.autocast(pixel_values.device.type, torch.bfloat16):
            return encoder(pixel_values).last_hidden_state.float()  # (batch_size, num_patches, width)

    def collate(rows):
        num_images = round(args.image_prompt_share * len(rows))  # the rows come in random order
        texts = [row[name] for row in rows[num_images:] for name in ("layout", "caption")]
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=max_length, return_tensors="pt")
        pixel_values = pixel_collator(rows)["pixel_values"]
        return {
            "latents": encode_latents(vae, pixel_values),
            "features": encode(pixel_values),
            "input_ids": tokens["input_ids"].unflatten(0, (-1, 2)),  # (num_texts, 2, max_length)
            "is_image_prompt": torch.arange(len(rows)) < num_images,
        }

    images = load_images(args.data)
    coarsen = CoarseFeatures(encode, images, args.table_size)
    model = FluxWithLoss()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=args.shift)
    if args.start:
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(args.start, subfolder="scheduler")
        start = FluxTransformer2DModel.from_pretrained(args.start, subfolder="transformer", torch_dtype=torch.float32)
        model.transformer.load_state_dict(start.state_dict())
        mapper = UniCode2ConditionMapper.from_pretrained(args.start, subfolder="condition_mapper")
        start_from(model.image_prompts, mapper.float())
    trainer = StageTrainer(
        model,
        training_args,
        train_dataset=images,
        data_collator=collate,
        optimizers=(
            MuonWithAdamW.for_trainer(model, training_args, ("x_embedder", "proj_out", "image_prompts.pool")),
            None,
        ),
    )
    held.train(trainer)
    model.eval()
    texts = (model.text_encoder, tokenizer, model.text_encoder_2, tokenizer)
    with held.result() as folder:
        if trainer.is_world_process_zero():
            FluxPipeline(scheduler, vae, *texts, model.transformer).save_pretrained(folder)
            model.image_prompts.save_pretrained(folder / "image_prompts")


if __name__ == "__main__":
    from transformers import TrainingArguments

    from transformers_unicode2.training.stage import run

    run(main, FluxArguments, TrainingArguments)
