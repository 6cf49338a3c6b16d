"""Trains the stand-in for FLUX.1-dev and FLUX.1 Redux from scratch: a small `FluxPipeline` with its text encoders.

    accelerate launch training_recipes/unicode2-tiny/stand_ins/train_flux.py \\
      --config training_recipes/unicode2-tiny/stand_ins/flux.yaml

Flow matching on the VAE's latents: x_t = (1 - t) x_0 + t noise, the transformer predicts noise - x_0. The T5 and CLIP
text encoders learn with it. Some images come with a text, the others with an image prompt. That is the patch features
of a SigLIP, brought to the width of the T5 embeddings by two linear layers, as FLUX.1 Redux does for FLUX.1-dev.

A part of these features is coarse: each is replaced by the nearest one of a random table of patch features. FLUX so
learns to paint clean shapes from prompts that only hint at them, as those of any codebook do; it never sees the
codebook itself. FLUX.1-dev has learnt from billions of images to paint what its prompt embeddings say in detail. On a
CPU, texts alone do not get that far. A few images come with a prompt of zeros, so that FLUX can be guided away from
what it paints without one.

A second term, representation alignment (REPA), makes the image tokens of an inner block point where the clean image's
patch features point. Afterwards all of it is frozen, as the pretrained decoder of the paper is. The counterpart of
Redux is saved as `image_prompts` beside the pipeline; the mapper starts from it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from datasets import Dataset

from transformers_unicode2.training.data import pixel_collator
from transformers_unicode2.training.decoders import encode_latents, flow_matching_loss

# Of a pipeline, and what makes image prompts
FOLDERS = tuple("scheduler vae text_encoder text_encoder_2 tokenizer tokenizer_2 transformer image_prompts".split())


@dataclass
class FluxArguments:
    data: str = field(metadata={"help": "folder of train-*.parquet"})
    tokenizer: str = field(metadata={"help": "folder of the tokenizer"})
    vae: str = field(metadata={"help": "folder of the trained VAE"})
    encoder: str = field(metadata={"help": "folder of the SigLIP vision encoder"})
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
        default=1.0, metadata={"help": "of the times, in training and for the scheduler; above 1: more noise"}
    )


def drop_prompts(share: float, *prompts: torch.Tensor) -> list[torch.Tensor]:
    """Zeros in place of the prompts of a share of the images, chosen at random.

    FLUX learns to paint without a prompt, too, and what it paints with one can then be guided away from that. The
    tensors have any shape; the first size is the number of images. Raises `ValueError` when `share` is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"`drop_share` is {share:g}; it must be in [0, 1].")
    kept = torch.rand(len(prompts[0]), device=prompts[0].device) >= share
    return [value * kept.view(-1, *[1] * (value.ndim - 1)) for value in prompts]


class CoarseFeatures:
    """Rounds patch features to the nearest ones of a random half of a table, another half at each call.

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


class FluxWithLoss(torch.nn.Module):
    """All that learns, with its loss."""

    # Read by the Trainer when a checkpoint lacks keys, as ours does (see state_dict)
    _keys_to_ignore_on_save = None

    def __init__(self, args: FluxArguments, tokenizer, encoder_width: int, coarsen: CoarseFeatures):
        from diffusers import FluxTransformer2DModel
        from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

        from transformers_unicode2 import UniCode2ConditionMapper

        super().__init__()
        self.args, self.coarsen = args, coarsen
        ids = {"eos_token_id": tokenizer.pad_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        self.transformer = FluxTransformer2DModel(**args.transformer)
        self.text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **ids, **args.clip))
        self.text_encoder_2 = T5EncoderModel(T5Config(vocab_size=len(tokenizer), **ids, use_cache=False, **args.t5))
        inner_dim = self.transformer.inner_dim
        self.align = torch.nn.Sequential(
            torch.nn.Linear(inner_dim, 2 * inner_dim), torch.nn.SiLU(), torch.nn.Linear(2 * inner_dim, encoder_width)
        )
        self.image_prompts = UniCode2ConditionMapper(**args.image_prompts)
        self.seen = {}
        inner = self.transformer.transformer_blocks[-1]
        inner.register_forward_hook(lambda module, args, output: self.seen.update(hidden=output[1]))

    def state_dict(self, *args, **kwargs):
        # T5 holds its embedding twice, which a safetensors file must not
        state = super().state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if not key.endswith("encoder.embed_tokens.weight")}

    def forward(self, latents, features, input_ids, is_image_prompt):
        prompts, pooled = self.make_prompts(features, input_ids, is_image_prompt)
        flow = flow_matching_loss(self.transformer, latents, prompts, pooled, shift=self.args.shift)
        aligned = self.align(self.seen.pop("hidden"))  # (batch_size, num_patches, encoder_width)
        # What all patches share says nothing
        target = features - features.mean((0, 1))
        alignment = 1 - torch.nn.functional.cosine_similarity(aligned.float(), target, dim=-1).mean()
        loss = flow + self.args.alignment_weight * alignment
        return {"loss": loss, "flow": flow.detach(), "alignment": alignment.detach()}

    def make_prompts(self, features, input_ids, is_image_prompt) -> list[torch.Tensor]:
        """`prompt_embeds` and `pooled_prompt_embeds` of a batch, some of them zeros."""
        # Chosen here, not in the collator, which runs ahead of what a killed run remembers of its random numbers
        exact = torch.rand(len(input_ids), 1, device=input_ids.device) < self.args.layout_share
        input_ids = torch.where(exact, input_ids[:, 0], input_ids[:, 1])
        texts = self.text_encoder_2(input_ids)[0]  # (num_texts, max_length, joint_attention_dim)
        pooled_texts = self.text_encoder(input_ids).pooler_output  # (num_texts, pooled_projection_dim)
        coarse = self.coarsen(features[is_image_prompt], self.args.coarse_share)
        images = self.image_prompts(coarse).prompt_embeds
        prompts = images.new_zeros(len(features), *images.shape[1:])
        prompts[is_image_prompt], prompts[~is_image_prompt] = images, texts.to(images)
        # Redux has none either for images
        pooled = pooled_texts.new_zeros(len(features), pooled_texts.shape[-1])
        pooled[~is_image_prompt] = pooled_texts
        return drop_prompts(self.args.drop_share, prompts, pooled)


class FluxCollator:
    """Rows to latents, patch features and texts. The first images of a batch are their own prompts."""

    def __init__(self, args: FluxArguments, tokenizer, vae, encoder):
        self.image_prompt_share, self.tokenizer, self.vae, self.encoder = (
            args.image_prompt_share,
            tokenizer,
            vae,
            encoder,
        )

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images to patch features, `(batch_size, num_patches, encoder_width)`."""
        with torch.no_grad(), torch.autocast(pixel_values.device.type, torch.bfloat16):
            return self.encoder(pixel_values).last_hidden_state.float()

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        # The rows come in random order
        num_images = round(self.image_prompt_share * len(rows))
        texts = [row[name] for row in rows[num_images:] for name in ("layout", "caption")]
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        pixel_values = pixel_collator(rows)["pixel_values"]
        return {
            "latents": encode_latents(self.vae, pixel_values),
            "features": self.encode(pixel_values),
            "input_ids": tokens["input_ids"].unflatten(0, (-1, 2)),  # (num_texts, 2, max_length)
            "is_image_prompt": torch.arange(len(rows)) < num_images,
        }


def main(args: FluxArguments, training_args) -> None:
    """See `stage` for what may change when a stage is started again."""
    from transformers_unicode2.training.stage import hash_inputs, stage

    if args.shift <= 0:
        raise ValueError(f"`shift` is {args.shift:g}; it must be above 0.")

    def hash_all() -> dict:
        return hash_inputs(args, images=("data",), checkpoints=("tokenizer", "encoder"), pipelines=("vae",))

    with stage("train_flux", args, training_args, hash_all, result=FOLDERS) as held:
        if not held.finished:
            train(args, training_args, held)


def train(args: FluxArguments, training_args, held) -> None:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import AutoTokenizer, SiglipVisionModel, set_seed

    from transformers_unicode2.training.data import load_images
    from transformers_unicode2.training.optimizer import MuonWithAdamW
    from transformers_unicode2.training.stage import StageTrainer

    set_seed(training_args.seed)
    # Of texts; image prompts have as many patches
    max_length = args.clip["max_position_embeddings"]
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, padding_side="right", model_max_length=max_length)
    vae = AutoencoderKL.from_pretrained(args.vae).requires_grad_(False).eval()
    encoder = SiglipVisionModel.from_pretrained(args.encoder).requires_grad_(False).eval()
    collate, images = FluxCollator(args, tokenizer, vae, encoder), load_images(args.data)
    coarsen = CoarseFeatures(collate.encode, images, args.table_size)
    model = FluxWithLoss(args, tokenizer, encoder.config.hidden_size, coarsen)
    adamw = ("x_embedder", "proj_out", "image_prompts.pool")
    optimizers = (MuonWithAdamW.for_trainer(model, training_args, adamw), None)
    trainer = StageTrainer(model, training_args, train_dataset=images, data_collator=collate, optimizers=optimizers)
    held.train(trainer)
    model.eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=args.shift)
    texts = (model.text_encoder, tokenizer, model.text_encoder_2, tokenizer)
    with held.result() as folder:
        if trainer.is_world_process_zero():
            FluxPipeline(scheduler, vae, *texts, model.transformer).save_pretrained(folder)
            model.image_prompts.save_pretrained(folder / "image_prompts")


if __name__ == "__main__":
    from transformers import TrainingArguments

    from transformers_unicode2.training.stage import run

    run(main, FluxArguments, TrainingArguments)
