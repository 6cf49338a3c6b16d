"""Trains the stand-in for siglip-so400m from scratch: a small SigLIP on captioned scenes and emoji.

    accelerate launch training_recipes/unicode2-tiny/stand_ins/train_siglip.py \\
      --config training_recipes/unicode2-tiny/stand_ins/siglip.yaml

Three losses, as in SigLIP 2 rather than SigLIP, since minutes must do: the sigmoid loss over all pairs of a batch; a
small decoder that captions the image from its patch features; another that reads the pixels back from all patches
together, so that a feature need not repeat what its neighbours say. For the last two, every feature is exchanged for
the nearest one of other images in the batch, as any codebook will exchange it for a code. What they need is thus drawn
together where it is alike, and apart where it is not. Only the image tower is used afterwards.
"""

import math
from dataclasses import dataclass, field

import torch
from torch.nn import functional


@dataclass
class SiglipArguments:
    data: str = field(metadata={"help": "folder of train-*.parquet"})
    tokenizer: str = field(metadata={"help": "folder of the tokenizer"})
    vision: dict = field(default_factory=dict, metadata={"help": "fields of SiglipVisionConfig"})
    text: dict = field(default_factory=dict, metadata={"help": "fields of SiglipTextConfig"})
    pixel_weight: float = field(default=1.0, metadata={"help": "weight of the reconstruction of the pixels"})
    pixel_layers: int = field(default=2, metadata={"help": "transformer layers between features and pixels"})
    caption_weight: float = field(default=1.0, metadata={"help": "weight of the captioning loss"})
    exchange_share: float = field(
        default=1.0, metadata={"help": "share of the images whose features are exchanged for those of others"}
    )


class SiglipWithDecoders(torch.nn.Module):
    """`SiglipModel` and two decoders of its patch features: one to pixels, one to captions."""

    def __init__(self, config, args: SiglipArguments):
        from transformers import SiglipModel

        super().__init__()
        self.args, width, vision, text = (
            args,
            config.vision_config.hidden_size,
            config.vision_config,
            config.text_config,
        )
        # The fastest attention at this size on a CPU
        self.siglip = SiglipModel._from_config(config, attn_implementation="eager")
        # SigLIP's starting point, section 3.2 of its paper
        self.siglip.logit_scale.data.fill_(math.log(10))
        self.siglip.logit_bias.data.fill_(-10)
        shape = {"d_model": width, "nhead": 3, "dim_feedforward": 2 * width, "dropout": 0.0, "activation": "relu"}
        shape |= {"batch_first": True, "norm_first": True}
        layer = torch.nn.TransformerEncoderLayer(**shape)
        self.pixel_decoder = torch.nn.TransformerEncoder(layer, args.pixel_layers, enable_nested_tensor=False)
        self.to_pixels = torch.nn.Linear(width, 3 * vision.patch_size**2)
        self.words = torch.nn.Embedding(text.vocab_size, width)
        self.places = torch.nn.Embedding(text.max_position_embeddings, width)
        self.patches = torch.nn.Embedding(self.siglip.vision_model.embeddings.num_patches, width)
        layer = torch.nn.TransformerDecoderLayer(**shape)
        self.decoder = torch.nn.TransformerDecoder(layer, 2, torch.nn.LayerNorm(width))
        self.to_words = torch.nn.Linear(width, text.vocab_size)

    def forward(self, input_ids, pixel_values, same_text):
        vision = self.siglip.vision_model(pixel_values)
        contrastive = self.contrastive_loss(vision.pooler_output, input_ids, same_text)
        features = exchange(
            vision.last_hidden_state, self.args.exchange_share
        )  # (batch_size, num_patches, hidden_size)
        patch_size = self.siglip.config.vision_config.patch_size
        pixels = functional.unfold(pixel_values, patch_size, stride=patch_size).transpose(1, 2)
        painted = self.to_pixels(self.pixel_decoder(features + self.patches.weight))
        pixel_loss = functional.l1_loss(painted.float(), pixels)
        caption_loss = self.caption_loss(features, input_ids)
        loss = contrastive + self.args.pixel_weight * pixel_loss + self.args.caption_weight * caption_loss
        parts = {"contrastive": contrastive, "pixels": pixel_loss, "caption": caption_loss}
        return {"loss": loss} | {name: value.detach() for name, value in parts.items()}

    def contrastive_loss(self, pooled, input_ids, same_text):
        text = self.siglip.text_model(input_ids=input_ids).pooler_output
        image_embeds = functional.normalize(pooled, dim=-1)  # (batch_size, hidden_size)
        text_embeds = functional.normalize(text, dim=-1)  # (batch_size, hidden_size)
        logits = text_embeds @ image_embeds.T * self.siglip.logit_scale.exp() + self.siglip.logit_bias
        sign = 2 * torch.eye(len(logits), device=logits.device) - 1
        pairs = functional.logsigmoid(sign * logits.float()).masked_fill(same_text & (sign < 0), 0)
        return -pairs.sum(-1).mean()

    def caption_loss(self, features, input_ids):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        length, padding = input_ids.shape[1], self.siglip.config.text_config.pad_token_id
        hidden = self.words(input_ids) + self.places.weight[:length]
        causal = torch.nn.Transformer.generate_square_subsequent_mask(length, device=features.device)
        # The fastest at this size on a CPU
        with sdpa_kernel(SDPBackend.MATH):
            hidden = self.decoder(hidden, features + self.patches.weight, tgt_mask=causal, tgt_is_causal=True)
        # The first padding token is learnt as the end
        target, ended = input_ids[:, 1:], (input_ids == padding)[:, :-1]
        logits = self.to_words(hidden[:, :-1]).float().transpose(1, 2)
        return functional.cross_entropy(logits, target.masked_fill(ended, -100))


def exchange(features: torch.Tensor, share: float) -> torch.Tensor:
    """The nearest features of the other half of the batch, for the first `share` of each half.

    Gradients pass straight through. `features` is `(batch_size, num_patches, hidden_size)`.
    """
    halves = features.chunk(2)
    tables = [half.detach().float().flatten(0, 1) for half in reversed(halves)]
    output = []
    for half, table in zip(halves, tables):
        first = half[: round(share * len(half))]
        nearest = table[torch.cdist(first.detach().float().flatten(0, 1), table).argmin(-1)].view_as(first)
        output += [first + (nearest - first).detach(), half[len(first) :]]
    return torch.cat(output)


class CaptionCollator:
    """Rows to images and captions, with marks where two captions are equal."""

    def __init__(self, tokenizer, max_length: int):
        self.tokenizer, self.options = (
            tokenizer,
            {"padding": "max_length", "truncation": True, "max_length": max_length},
        )

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        from transformers_unicode2.training.data import pixel_collator

        texts = [row["dense_caption"] if row["kind"] == "scene" else row["caption"] for row in rows]
        tokens = self.tokenizer(texts, return_tensors="pt", **self.options)
        same = torch.tensor([[a == b for b in texts] for a in texts])
        return {"input_ids": tokens["input_ids"], "same_text": same, **pixel_collator(rows)}


def main(args: SiglipArguments, training_args) -> None:
    """See `stage` for what may change when a stage is started again."""
    from transformers_unicode2.training.stage import hash_inputs, stage

    def hash_all() -> dict:
        return hash_inputs(args, images=("data",), checkpoints=("tokenizer",))

    with stage("train_siglip", args, training_args, hash_all) as held:
        if not held.finished:
            train(args, training_args, held)


def train(args: SiglipArguments, training_args, held) -> None:
    from transformers import AutoTokenizer, SiglipConfig, SiglipImageProcessor, set_seed

    from transformers_unicode2.training.data import load_images
    from transformers_unicode2.training.optimizer import MuonWithAdamW
    from transformers_unicode2.training.stage import StageTrainer

    set_seed(training_args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, padding_side="right")
    text = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **args.text}
    config = SiglipConfig(vision_config=args.vision, text_config=text)
    side = config.vision_config.image_size
    image_processor = SiglipImageProcessor(size={"height": side, "width": side})
    rows = load_images(args.data)
    model = SiglipWithDecoders(config, args)
    collate = CaptionCollator(tokenizer, config.text_config.max_position_embeddings)
    optimizer = MuonWithAdamW.for_trainer(model, training_args, ("to_pixels", "to_words"))
    trainer = StageTrainer(
        model, training_args, train_dataset=rows, data_collator=collate, optimizers=(optimizer, None)
    )
    held.train(trainer)
    # So that a checkpoint may store it in bfloat16
    siglip = trainer.model.siglip.to(torch.bfloat16).to(torch.float32)
    with held.result() as folder:
        if trainer.is_world_process_zero():
            for part in (siglip, image_processor, tokenizer):
                part.save_pretrained(folder)


if __name__ == "__main__":
    from transformers import TrainingArguments

    from transformers_unicode2.training.stage import run

    run(main, SiglipArguments, TrainingArguments)
