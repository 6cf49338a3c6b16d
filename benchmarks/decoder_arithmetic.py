"""What the paper's decoders cost with codes for a prompt, by arithmetic: no weight is loaded, no number is measured.

    python benchmarks/decoder_arithmetic.py

FLUX.1-dev and SDXL are built in their true sizes on torch's meta device, where tensors have shapes and no content. A
picture and two training steps of the mapper run there, and `FlopCounterMode` counts their operations. Memory is that of
weights, the codes among them; activations, libraries and fragmentation take more.
"""

import torch
from rows import describe_run
from torch.utils.flop_counter import FlopCounterMode

GIB = 2**30
STEPS, TOKENS, SIZE = 50, 729, 512
# With a scale for each 32 weights
BYTES_OF_FOUR_BITS = 4.5 / 8
FLUX = {"guidance_embeds": True}
UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
WITH_MODEL = ("C1 and C2", "mapper", "language model")
WITH_FOUR_BITS = ("C1 and C2", "mapper", "language model/4")
# GiB of a GPU, the decoder, how it is loaded, and the weights that are there at once; see `print_ladder`
LADDER = (
    (8, "SDXL", "float16, from `prompt_embeds`; `UniCode2PriorPipeline` stays on the CPU", ("sdxl",)),
    (16, "SDXL", "float16; the language model in 4 bits, all at once", ("sdxl", *WITH_FOUR_BITS)),
    (16, "FLUX.1-dev", "4 bits, from `prompt_embeds`; `UniCode2PriorPipeline` stays on the CPU", ("flux/4",)),
    (16, "FLUX.1-dev", "4 bits, and so is the language model; `pipe.enable_model_cpu_offload()`", WITH_FOUR_BITS),
    (24, "FLUX.1-dev", "4 bits, and so is the language model, all at once", ("flux/4", *WITH_FOUR_BITS)),
    (48, "FLUX.1-dev", "bfloat16, all at once", ("flux", *WITH_MODEL)),
    (80, "FLUX.1-dev", "bfloat16, all at once, with its own text encoders", ("flux", *WITH_MODEL, "flux texts")),
)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def make_parts() -> dict[str, torch.nn.Module]:
    """The decoders and mappers in their true sizes, without content."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel
    from transformers import (
        AutoConfig,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        T5Config,
        T5EncoderModel,
    )

    from transformers_unicode2 import UniCode2ConditionMapper, UniCode2ForConditionalGeneration

    large = {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    giant = {"num_hidden_layers": 32, "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20}
    t5 = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
    with torch.device("meta"):
        return {
            "flux": FluxTransformer2DModel(**FLUX),
            "sdxl": UNet2DConditionModel(**UNET),
            "flux vae": AutoencoderKL(**VAE, latent_channels=16),
            "sdxl vae": AutoencoderKL(**VAE, latent_channels=4),
            "clip large": CLIPTextModel(CLIPTextConfig(**large)),
            "clip giant": CLIPTextModelWithProjection(CLIPTextConfig(**giant, projection_dim=1280)),
            "t5": T5EncoderModel(T5Config(vocab_size=32128, **t5)),
            "flux mapper": UniCode2ConditionMapper(),
            "sdxl mapper": UniCode2ConditionMapper(output_dim=2048, pooled_dim=1280),
            "model": UniCode2ForConditionalGeneration(AutoConfig.from_pretrained("hub_configs/unicode2-7b")),
        }


def make_condition(mapper: torch.nn.Module, batch: int):
    return mapper(torch.empty(batch, TOKENS, 1152, device="meta"))


def step_flux(flux: torch.nn.Module, condition, batch: int) -> torch.Tensor:
    """A prediction of FLUX for pictures of `SIZE` pixels."""
    tokens, like = (SIZE // 16) ** 2, {"device": "meta"}
    return flux(
        hidden_states=torch.empty(batch, tokens, 64, **like),
        encoder_hidden_states=condition.prompt_embeds,
        pooled_projections=condition.pooled_prompt_embeds,
        timestep=torch.empty(batch, **like),
        guidance=torch.empty(batch, **like),
        img_ids=torch.empty(tokens, 3, **like),
        txt_ids=torch.empty(condition.prompt_embeds.shape[1], 3, **like),
    ).sample


def step_sdxl(unet: torch.nn.Module, condition, batch: int) -> torch.Tensor:
    side, like = SIZE // 8, {"device": "meta"}
    added = {"text_embeds": condition.pooled_prompt_embeds, "time_ids": torch.empty(batch, 6, **like)}
    latents, times = torch.empty(batch, 4, side, side, **like), torch.empty(batch, **like)
    return unet(latents, times, encoder_hidden_states=condition.prompt_embeds, added_cond_kwargs=added).sample


def count_operations(function, *args) -> float:
    """Floating-point operations of a call, a multiplication and an addition being two."""
    counter = FlopCounterMode(display=False)
    with counter:
        function(*args)
    return counter.get_total_flops()


def train(step, painter: torch.nn.Module, mapper: torch.nn.Module, batch: int = 4) -> None:
    """A training step of the mapper through the frozen decoder."""
    painter.requires_grad_(False)
    step(painter, make_condition(mapper, batch), batch).square().mean().backward()
    mapper.zero_grad()


def print_parts(parts: dict) -> None:
    print("| part | parameters | bfloat16, GiB |\n| --- | ---: | ---: |")
    for name, part in parts.items():
        print(f"| {name} | {count(part):,} | {2 * count(part) / GIB:.2f} |")


def print_operations(parts: dict) -> None:
    print("\n| decoder | a step, TFLOP | picture of 50 steps | mapper | its share | two training steps of 4 images |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    # SDXL is guided: each of its steps sees a picture twice
    for kind, step, batch in (("flux", step_flux, 1), ("sdxl", step_sdxl, 2)):
        painter, mapper = parts[kind], parts[f"{kind} mapper"]
        with torch.no_grad():
            condition = make_condition(mapper, batch)
            one = count_operations(step, painter, condition, batch)
            mapping = count_operations(make_condition, mapper, 1)
        training = sum(count_operations(train, step, painter, mapper) for _ in range(2))
        share = mapping / (STEPS * one + mapping)
        cells = [f"{one / 1e12:.2f}", f"{STEPS * one / 1e12:.0f}", f"{mapping / 1e12:.3f}", f"{share:.3%}"]
        print(f"| {kind} | {' | '.join(cells)} | {training / 1e12:.0f} |")


def print_ladder(parts: dict) -> None:
    model, c2 = parts["model"], parts["model"].model.visual_embeddings
    language = count(model) - count(c2)
    flux, vae = count(parts["flux"]), count(parts["flux vae"])
    sizes = {"flux": 2 * (flux + vae), "flux/4": BYTES_OF_FOUR_BITS * flux + 2 * vae}
    sizes |= {"sdxl": 2 * (count(parts["sdxl"]) + count(parts["sdxl vae"])), "mapper": 2 * count(parts["flux mapper"])}
    sizes |= {"language model": 2 * language, "language model/4": BYTES_OF_FOUR_BITS * language}
    sizes |= {"flux texts": 2 * (count(parts["clip large"]) + count(parts["t5"]))}
    # C1 computes in float32
    sizes |= {"C1 and C2": 4 * c2.weight.numel() + 2 * c2.weight.numel()}
    print("\n| GPU, GiB | decoder | how | weights, GiB |\n| ---: | --- | --- | ---: |")
    for gpu, decoder, how, names in LADDER:
        print(f"| {gpu} | {decoder} | {how} | {sum(sizes[name] for name in names) / GIB:.1f} |")


if __name__ == "__main__":
    print(describe_run(torch.get_num_threads(), "diffusers", "transformers"), "\n")
    everything = make_parts()
    print_parts(everything)
    print_operations(everything)
    print_ladder(everything)
