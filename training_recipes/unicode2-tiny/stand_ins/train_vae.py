"""Trains the VAE of the stand-in for FLUX.1-dev from scratch: a small `AutoencoderKL`.

    accelerate launch training_recipes/unicode2-tiny/stand_ins/train_vae.py \\
      --config training_recipes/unicode2-tiny/stand_ins/vae.yaml

The loss is L1 + L2 plus a small KL term. `scaling_factor` and `shift_factor` are set from the latents' own mean and
spread.
"""

from dataclasses import dataclass, field

import torch


@dataclass
class VaeArguments:
    data: str = field(metadata={"help": "folder of train-*.parquet"})
    model: dict = field(default_factory=dict, metadata={"help": "fields of AutoencoderKL"})
    kl_weight: float = field(default=1e-5, metadata={"help": "weight of the KL term"})


class VaeWithLoss(torch.nn.Module):
    def __init__(self, args: VaeArguments):
        from diffusers import AutoencoderKL

        super().__init__()
        self.kl_weight, blocks = args.kl_weight, len(args.model["block_out_channels"])
        down, up = ("DownEncoderBlock2D",) * blocks, ("UpDecoderBlock2D",) * blocks
        self.vae = AutoencoderKL(down_block_types=down, up_block_types=up, **args.model)
        self.start_linear()

    @torch.no_grad()
    def start_linear(self) -> None:
        """Residual branches at zero, convolutions orthogonal, next to no noise: a well-conditioned linear autoencoder.

        From the usual start, a net this narrow learns luminance and needs hours more for each color.
        """
        for name, module in self.vae.named_modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.orthogonal_(module.weight)
                torch.nn.init.zeros_(module.bias)
            if name.endswith(("conv2", "to_out.0")):
                torch.nn.init.zeros_(module.weight)
        # The half of the channels that holds log variances
        noise = slice(self.vae.config.latent_channels, None)
        self.vae.encoder.conv_out.weight[noise] *= 0.1
        self.vae.encoder.conv_out.bias[noise] = -6

    def forward(self, pixel_values):
        posterior = self.vae.encode(pixel_values).latent_dist
        decoded = self.vae.decode(posterior.sample()).sample
        difference = decoded.float() - pixel_values
        l1, l2 = difference.abs().mean(), difference.square().mean()
        kl = posterior.kl().mean() / pixel_values[0].numel()
        return {"loss": l1 + l2 + self.kl_weight * kl, "l1": l1.detach(), "l2": l2.detach()}


def main(args: VaeArguments, training_args) -> None:
    """See `stage` for what may change when a stage is started again."""
    from transformers_unicode2.training.stage import hash_inputs, stage

    with stage("train_vae", args, training_args, lambda: hash_inputs(args, images=("data",))) as held:
        if not held.finished:
            train(args, training_args, held)


def train(args: VaeArguments, training_args, held) -> None:
    from transformers import set_seed

    from transformers_unicode2.training.data import load_images, pixel_collator
    from transformers_unicode2.training.stage import StageTrainer

    set_seed(training_args.seed)
    rows = load_images(args.data)
    trainer = StageTrainer(VaeWithLoss(args), training_args, train_dataset=rows, data_collator=pixel_collator)
    held.train(trainer)
    vae = trainer.model.vae.eval()
    sample = pixel_collator([rows[i] for i in range(min(512, len(rows)))])["pixel_values"]
    with torch.no_grad():
        latents = vae.encode(sample).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    with held.result() as folder:
        if trainer.is_world_process_zero():
            vae.save_pretrained(folder)


if __name__ == "__main__":
    from transformers import TrainingArguments

    from transformers_unicode2.training.stage import run

    run(main, VaeArguments, TrainingArguments)
