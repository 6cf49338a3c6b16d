"""Trains the stand-in for siglip-so400m: a small SigLIP on captioned scenes and emoji, from scratch.

    accelerate launch training_recipes/unicode2-tiny/train_siglip.py --config training_recipes/unicode2-tiny/siglip.yaml

The loss is SigLIP's (sigmoid over all pairs of a batch) plus, as SigLIP 2 does with a decoder, a term that keeps local
detail in the patch features: a linear head reads each patch's own pixels back from its feature. Only the image tower is used afterwards.
"""

import io
import math
from dataclasses import dataclass, field


@dataclass
class SiglipArguments:
    data: str = field(metadata={"help": "folder of train-*.parquet"})
    tokenizer: str = field(metadata={"help": "folder of the tokenizer"})
    vision: dict = field(default_factory=dict, metadata={"help": "fields of SiglipVisionConfig"})
    text: dict = field(default_factory=dict, metadata={"help": "fields of SiglipTextConfig"})
    pixel_weight: float = field(default=1.0, metadata={"help": "weight of the reconstruction of a patch's pixels"})


def main(args: SiglipArguments, training_args) -> None:
    import PIL.Image
    import torch
    from datasets import Image, load_dataset
    from transformers import AutoTokenizer, SiglipConfig, SiglipImageProcessor, SiglipModel, Trainer, set_seed
    from transformers.trainer_utils import get_last_checkpoint

    set_seed(training_args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, padding_side="right")
    config = SiglipConfig(
        vision_config=args.vision,
        text_config={"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **args.text},
    )
    image_processor = SiglipImageProcessor(
        size={"height": config.vision_config.image_size, "width": config.vision_config.image_size}
    )

    class SiglipWithPixels(torch.nn.Module):
        """SiglipModel and a linear head from patch features to the pixels of the patch."""

        def __init__(self):
            super().__init__()
            self.siglip = SiglipModel._from_config(
                config, attn_implementation="eager"
            )  # the fastest at this size on a CPU
            self.siglip.logit_scale.data.fill_(math.log(10))  # SigLIP's starting point, section 3.2 of its paper
            self.siglip.logit_bias.data.fill_(-10)
            self.to_pixels = torch.nn.Linear(config.vision_config.hidden_size, 3 * config.vision_config.patch_size**2)

        def forward(self, input_ids, pixel_values, same_text):
            vision = self.siglip.vision_model(pixel_values)
            text = self.siglip.text_model(input_ids=input_ids)
            image_embeds = torch.nn.functional.normalize(vision.pooler_output, dim=-1)  # (batch_size, hidden_size)
            text_embeds = torch.nn.functional.normalize(text.pooler_output, dim=-1)  # (batch_size, hidden_size)
            logits = text_embeds @ image_embeds.T * self.siglip.logit_scale.exp() + self.siglip.logit_bias
            sign = 2 * torch.eye(len(logits), device=logits.device) - 1
            pairs = torch.nn.functional.logsigmoid(sign * logits.float()).masked_fill(same_text & (sign < 0), 0)
            contrastive = -pairs.sum(-1).mean()
            patches = torch.nn.functional.unfold(
                pixel_values, config.vision_config.patch_size, stride=config.vision_config.patch_size
            )
            pixels = torch.nn.functional.l1_loss(
                self.to_pixels(vision.last_hidden_state).float(), patches.transpose(1, 2)
            )
            return {
                "loss": contrastive + args.pixel_weight * pixels,
                "contrastive": contrastive.detach(),
                "pixels": pixels.detach(),
            }

    def collate(rows):
        texts = [row["dense_caption"] if row["kind"] == "scene" else row["caption"] for row in rows]
        tokens = tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        same = torch.tensor([[a == b for b in texts] for a in texts])
        pixels = image_processor(
            [PIL.Image.open(io.BytesIO(row["image"]["bytes"])) for row in rows], return_tensors="pt"
        )["pixel_values"]
        return {"input_ids": tokens["input_ids"], "pixel_values": pixels, "same_text": same}

    rows = load_dataset("parquet", data_files=f"{args.data}/train-*.parquet", split="train").cast_column(
        "image", Image(decode=False)
    )
    trainer = Trainer(SiglipWithPixels(), training_args, train_dataset=rows, data_collator=collate)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(training_args.output_dir))
    trainer.model.siglip.save_pretrained(training_args.output_dir)
    image_processor.save_pretrained(training_args.output_dir)
    tokenizer.save_pretrained(training_args.output_dir)


if __name__ == "__main__":
    from transformers import TrainingArguments
    from trl import TrlParser

    main(*TrlParser((SiglipArguments, TrainingArguments)).parse_args_and_config())
