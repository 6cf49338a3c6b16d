"""Trains the stand-in for FLUX.1-dev: a small text-conditioned `FluxPipeline`, from scratch, with its text encoders.

    accelerate launch training_recipes/unicode2-tiny/train_flux.py --config training_recipes/unicode2-tiny/flux.yaml

Flow matching on the VAE's latents: x_t = (1 - t) x_0 + t noise, the transformer predicts noise - x_0. The T5 and CLIP text
encoders learn with it. A second term, representation alignment (REPA), makes the image tokens of an inner block point where the
clean image's patch features point; without it a CPU would need days. Afterwards all of it is frozen, as the pretrained
decoder of the paper is.
"""

from dataclasses import dataclass, field


@dataclass
class FluxArguments:
    data: str = field(metadata={"help": "folder of train-*.parquet"})
    tokenizer: str = field(metadata={"help": "folder of the tokenizer"})
    vae: str = field(metadata={"help": "folder of the trained VAE"})
    tokens: str = field(metadata={"help": "folder of the same rows, pre-tokenized"})
    codebook: str = field(metadata={"help": "folder of the codebook that they are tokenized with"})
    transformer: dict = field(default_factory=dict, metadata={"help": "fields of FluxTransformer2DModel"})
    t5: dict = field(default_factory=dict, metadata={"help": "fields of T5Config"})
    clip: dict = field(default_factory=dict, metadata={"help": "fields of CLIPTextConfig"})
    alignment_weight: float = field(default=0.5, metadata={"help": "weight of the alignment to the patch features"})
    layout_share: float = field(
        default=0.8, metadata={"help": "share of images that come with their exact layout as text"}
    )


def main(args: FluxArguments, training_args) -> None:
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, Trainer, set_seed
    from transformers.trainer_utils import get_last_checkpoint

    from transformers_unicode2.codebook.storage import load_codebook
    from transformers_unicode2.training.data import load_images_with_codes, pixel_collator
    from transformers_unicode2.training.mapper import encode_latents, flow_matching_loss
    from transformers_unicode2.training.optimizer import MuonWithAdamW

    set_seed(training_args.seed)
    max_length = args.clip["max_position_embeddings"]
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, padding_side="right", model_max_length=max_length)
    shared = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.pad_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }

    vae = AutoencoderKL.from_pretrained(args.vae).requires_grad_(False).eval()
    codes = load_codebook(args.codebook).codes
    codes = codes - codes.mean(0)  # what all patches share says nothing

    class FluxWithLoss(torch.nn.Module):
        _keys_to_ignore_on_save = (
            None  # read by the Trainer when a checkpoint lacks keys, as ours does (see state_dict)
        )

        def __init__(self):
            super().__init__()
            self.transformer = FluxTransformer2DModel(**args.transformer)
            self.text_encoder = CLIPTextModel(CLIPTextConfig(**shared, bos_token_id=None, **args.clip))
            self.text_encoder_2 = T5EncoderModel(T5Config(**shared, bos_token_id=None, use_cache=False, **args.t5))
            width = self.transformer.inner_dim
            self.align = torch.nn.Sequential(
                torch.nn.Linear(width, 2 * width), torch.nn.SiLU(), torch.nn.Linear(2 * width, codes.shape[1])
            )
            self.seen = {}
            inner = self.transformer.transformer_blocks[-1]
            inner.register_forward_hook(lambda module, args, output: self.seen.update(hidden=output[1]))

        def state_dict(self, *args, **kwargs):  # T5 holds its embedding twice, which a safetensors file must not
            return {
                k: v
                for k, v in super().state_dict(*args, **kwargs).items()
                if not k.endswith("encoder.embed_tokens.weight")
            }

        def forward(self, latents, input_ids, features):
            prompt_embeds = self.text_encoder_2(input_ids)[0]  # (batch_size, max_length, joint_attention_dim)
            pooled = self.text_encoder(input_ids).pooler_output  # (batch_size, pooled_projection_dim)
            flow = flow_matching_loss(self.transformer, latents, prompt_embeds, pooled)
            aligned = self.align(self.seen.pop("hidden"))  # (batch_size, num_patches, codebook_dim)
            alignment = 1 - torch.nn.functional.cosine_similarity(aligned.float(), features, dim=-1).mean()
            loss = flow + args.alignment_weight * alignment
            return {"loss": loss, "flow": flow.detach(), "alignment": alignment.detach()}

    def collate(rows):
        exact = torch.rand(len(rows)) < args.layout_share
        texts = [row["layout"] if flag else row["caption"] for row, flag in zip(rows, exact)]
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=max_length, return_tensors="pt")
        latents = encode_latents(vae, pixel_collator(rows)["pixel_values"])
        features = codes[torch.tensor([row["codes"] for row in rows])]
        return {"latents": latents, "input_ids": tokens["input_ids"], "features": features}

    model = FluxWithLoss()
    trainer = Trainer(
        model,
        training_args,
        train_dataset=load_images_with_codes(args.data, args.tokens),
        data_collator=collate,
        optimizers=(MuonWithAdamW.for_trainer(model, training_args, ("x_embedder", "proj_out")), None),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(training_args.output_dir))
    model.eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    FluxPipeline(
        scheduler, vae, model.text_encoder, tokenizer, model.text_encoder_2, tokenizer, model.transformer
    ).save_pretrained(training_args.output_dir)  # fmt: skip


if __name__ == "__main__":
    from transformers import TrainingArguments
    from trl import TrlParser

    main(*TrlParser((FluxArguments, TrainingArguments)).parse_args_and_config())
