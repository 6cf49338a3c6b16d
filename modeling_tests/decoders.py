"""Small random FLUX and SDXL pipelines with text encoders, and pairs to train a mapper on."""

import io
from pathlib import Path

import diffusers
import pyarrow as pa
import torch
from language_models import make_tokenizer
from painters import POOLED, WIDTH, make_flux_parts, make_sdxl_parts
from pyarrow import parquet
from tokenizing import picture
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

# Of a caption
NUM_TOKENS = 16


def make_stock_pipelines(folder: Path) -> None:
    """Saves the stock pipelines `flux`, with guidance embeddings, and `sdxl`, both with text encoders."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer("chatml", "bytes")
    tokenizer.model_max_length, tokenizer.pad_token = NUM_TOKENS, tokenizer.eos_token
    # Hidden states of both text encoders of SDXL stand side by side
    clip = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": len(tokenizer), "eos_token_id": 2}
    half = CLIPTextConfig(hidden_size=WIDTH // 2, projection_dim=POOLED, intermediate_size=16, **clip)
    texts = {"text_encoder": CLIPTextModel(half), "text_encoder_2": CLIPTextModelWithProjection(half)}
    texts |= {"tokenizer": tokenizer, "tokenizer_2": tokenizer}
    diffusers.StableDiffusionXLPipeline(**make_sdxl_parts(), **texts).save_pretrained(folder / "sdxl")
    pooled = CLIPTextConfig(hidden_size=POOLED, intermediate_size=16, **clip)
    t5 = T5Config(d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=len(tokenizer))
    texts |= {"text_encoder": CLIPTextModel(pooled), "text_encoder_2": T5EncoderModel(t5)}
    diffusers.FluxPipeline(**make_flux_parts(guidance_embeds=True), **texts).save_pretrained(folder / "flux")


def write_captioned(folder: Path, split: str, numbers: range, size: tuple[int, int] | None = None) -> None:
    """Writes a table of pictures of several sizes, or of one (width, height), with captions of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for number in numbers:
        file = io.BytesIO()
        picture(number).resize(size or (40 + number % 3, 48)).save(file, "PNG")
        images.append(file.getvalue())
    columns = {"image": images, "caption": [f"{number} pictures" for number in numbers]}
    parquet.write_table(pa.table(columns), folder / f"{split}-0.parquet")
