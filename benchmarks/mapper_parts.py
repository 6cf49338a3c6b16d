"""Text encoders and image prompts of small decoders, for `mapper_losses.py`, which measures mappers against them.

The FLUX of `unicode2-tiny` comes without what it was trained with. Both are fitted to it again, through the frozen
decoder. The SDXL is trained from scratch, with the same VAE. Texts are dense captions and short ones, half and half;
image prompts are two linear layers over the patch features, as FLUX.1 Redux has them.
"""

import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

TINY = Path("hub_configs/unicode2-tiny")
WIDTH, LENGTH, BATCH = 192, 64, 32
PROMPTS = {
    "visual_dim": WIDTH,
    "hidden_dim": 768,
    "output_dim": WIDTH,
    "pooled_dim": WIDTH,
    "num_visual_tokens": LENGTH,
}
CLIP = {"num_attention_heads": 3, "max_position_embeddings": LENGTH}
UNET = {
    "sample_size": 16,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (64, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "cross_attention_dim": WIDTH,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 6 * 32 + WIDTH,
}


def load_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY, padding_side="right", model_max_length=LENGTH)


def make_flux():
    """A stock FLUX pipeline of the tiny decoder, with new text encoders."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    tokenizer = load_tokenizer()
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.pad_token_id, "pad_token_id": tokenizer.pad_token_id}
    clip = CLIPTextConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1, bos_token_id=None, **ids, **CLIP
    )
    t5 = {"d_model": WIDTH, "d_kv": 64, "num_heads": 3, "d_ff": 2 * WIDTH, "num_layers": 2, "dropout_rate": 0.0}
    t5 |= {"feed_forward_proj": "gated-gelu", "use_cache": False}
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler.from_pretrained(TINY, subfolder="scheduler"),
        AutoencoderKL.from_pretrained(TINY, subfolder="vae"),
        CLIPTextModel(clip),
        tokenizer,
        T5EncoderModel(T5Config(**ids, **t5)),
        tokenizer,
        FluxTransformer2DModel.from_pretrained(TINY, subfolder="transformer"),
    )


def make_sdxl():
    """A stock SDXL pipeline with a small U-Net and text encoders, all new but for the VAE."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = load_tokenizer()
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.pad_token_id, "pad_token_id": tokenizer.pad_token_id}
    half = {"hidden_size": WIDTH // 2, "intermediate_size": WIDTH, "num_hidden_layers": 3, "projection_dim": WIDTH}
    clip = CLIPTextConfig(bos_token_id=None, **half, **ids, **CLIP)
    # Those of SDXL
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "leading"}
    return StableDiffusionXLPipeline(
        AutoencoderKL.from_pretrained(TINY, subfolder="vae"),
        CLIPTextModel(clip),
        CLIPTextModelWithProjection(clip),
        tokenizer,
        tokenizer,
        UNet2DConditionModel(**UNET),
        EulerDiscreteScheduler(**noise, steps_offset=1),
        add_watermarker=False,
    )


class Prompted(torch.nn.Module):
    """What is fitted: the text encoders of a pipeline, image prompts, and the painter if it is to learn."""

    def __init__(self, decoder, trains_painter: bool):
        from transformers_unicode2 import UniCode2ConditionMapper

        super().__init__()
        self.decoder = decoder
        pipeline = decoder.pipeline
        self.texts = torch.nn.ModuleList([pipeline.text_encoder, pipeline.text_encoder_2]).requires_grad_(True)
        self.image_prompts = UniCode2ConditionMapper(**PROMPTS, output_scale=0.6)
        self.painter = decoder.painter.requires_grad_(trains_painter)

    def forward(self, latents, features, texts: list[str], share: float) -> torch.Tensor:
        """The decoder's loss: the first images have texts, the others prompts of their features, a `share` none."""
        embeds, pooled = self.decoder.encode_prompts(texts)
        images = self.image_prompts(features[len(texts) :]).prompt_embeds
        prompts = torch.cat([embeds.to(images.dtype), images])
        # Redux has none either for images
        pooled = torch.cat([pooled, pooled.new_zeros(len(images), pooled.shape[1])])
        kept = (torch.rand(len(prompts)) >= share).float()
        return self.decoder.compute_loss(latents, prompts * kept[:, None, None], pooled * kept[:, None])


def read_scenes(data: Path, decoder, model) -> tuple[torch.Tensor, torch.Tensor, list[str], list[str]]:
    """Latents, patch features, dense captions and short ones of all scenes."""
    from transformers_unicode2.training.data import load_images, pixel_collator

    rows, latents, features = load_images(str(data)), [], []
    encoder = model.get_quantizer().vision_model
    for start in tqdm(range(0, len(rows), 256), desc="features", unit="batch"):
        pixels = pixel_collator([rows[i] for i in range(start, min(start + 256, len(rows)))])["pixel_values"]
        latents.append(decoder.encode_latents(pixels))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            features.append(encoder(pixels).last_hidden_state.bfloat16())
    return torch.cat(latents), torch.cat(features), rows["dense_caption"][:], rows["caption"][:]


def fit_parts(kind: str, data: Path, output: Path, steps: int, seed: int = 0) -> dict:
    """Fits the parts of a decoder and saves the pipeline, with `image_prompts` in it. Returns losses and seconds."""
    from transformers import get_cosine_schedule_with_warmup

    from transformers_unicode2 import UniCode2ForConditionalGeneration
    from transformers_unicode2.training.decoders import FluxDecoder, StableDiffusionXLDecoder
    from transformers_unicode2.training.optimizer import MuonWithAdamW

    torch.manual_seed(seed)
    is_flux = kind == "flux"
    decoder = FluxDecoder(make_flux()) if is_flux else StableDiffusionXLDecoder(make_sdxl())
    model = UniCode2ForConditionalGeneration.from_pretrained(TINY)
    latents, features, dense, short = read_scenes(data, decoder, model)
    prompted = Prompted(decoder, trains_painter=not is_flux).train()
    optimizer = MuonWithAdamW(prompted, 1.5e-3, (0.9, 0.98), 0.0, ("conv_in", "conv_out", "proj_out"))
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, steps)
    start, losses = time.perf_counter(), []
    for _ in tqdm(range(steps), desc=f"fitting {kind}", mininterval=5, file=sys.stderr):
        rows = torch.randint(len(latents), (BATCH,))
        texts = [(dense if number % 2 else short)[row] for number, row in enumerate(rows[: BATCH // 2].tolist())]
        with torch.autocast("cpu", torch.bfloat16):
            # Zeros are a prompt that the frozen FLUX knows already
            loss = prompted(latents[rows], features[rows].float(), texts, 0.0 if is_flux else 0.1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in prompted.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    decoder.pipeline.save_pretrained(output)
    prompted.image_prompts.save_pretrained(output / "image_prompts")
    count = max(1, len(losses) // 10)
    ends = [sum(part) / count for part in (losses[:count], losses[-count:])]
    return {"seconds": seconds, "first tenth": ends[0], "last tenth": ends[1]}
