"""Composes checkpoints from parts, in the layouts of Transformers and Diffusers."""

import argparse

import torch

from .configuration_unicode2 import VISUAL_HEADS


def compose_checkpoint(llm: str, vision: str, codebook: str, output: str, visual_head: str = "flat") -> None:
    """Writes a UniCode² checkpoint: language model, vision encoder and codebook as they are, C2 a copy of C1 (section 3.2).

    Args:
        llm: folder or Hub name of a causal language model with its tokenizer.
        vision: folder or Hub name of a SigLIP with its image processor.
        codebook: folder written by `unicode2 codebook build`.
        output: folder to write.
        visual_head: `UniCode2Config.visual_head`.
    """
    from transformers import (
        AutoImageProcessor,
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        SiglipVisionModel,
    )

    from .codebook.storage import load_codebook
    from .configuration_unicode2 import UniCode2CodebookConfig, UniCode2Config
    from .modeling_unicode2 import UniCode2ForConditionalGeneration
    from .processing_unicode2 import UniCode2Processor

    tokenizer = AutoTokenizer.from_pretrained(llm, padding_side="left")
    language_model = AutoModelForCausalLM.from_pretrained(llm)
    vision_model = SiglipVisionModel.from_pretrained(vision, vision_use_head=False)
    stored = load_codebook(codebook)
    processor = UniCode2Processor(AutoImageProcessor.from_pretrained(vision), tokenizer, vision_model.config.patch_size)
    config = UniCode2Config(
        text_config=language_model.config,
        vision_config=vision_model.config,
        codebook_config=UniCode2CodebookConfig(
            codebook_size=len(stored.codes),
            codebook_dim=stored.codes.shape[1],
            num_cells=len(stored.cell_centroids),
            preview_size=0 if stored.previews is None else stored.previews.shape[1],
        ),
        image_token_id=processor.image_token_id,
        boi_token_id=processor.boi_token_id,
        eoi_token_id=processor.eoi_token_id,
        visual_head=visual_head,
    )
    torch.manual_seed(0)
    model = UniCode2ForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.lm_head.load_state_dict(language_model.lm_head.state_dict())
    quantizer = model.get_quantizer()
    quantizer.vision_model.load_state_dict(vision_model.state_dict())
    quantizer.codebook.load_state_dict(stored.state_dict())
    if visual_head == "two_level":
        model.visual_head.cell_offsets.copy_(stored.cell_offsets)
    with torch.no_grad():
        model.model.visual_embeddings.weight.copy_(stored.codes)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=64,
        # what `generate(generation_mode="image")` does unless told otherwise: codes are sampled, with guidance
        image_generation={"do_sample": True, "temperature": 1.0, "top_k": 0, "guidance_scale": 3.0},
    )
    model.save_pretrained(output)
    processor.save_pretrained(output)


def assemble_pipeline(model: str, mapper: str, decoder: str, output: str, image_size: int) -> None:
    """Writes one repository that is both: a Transformers checkpoint in its root and a Diffusers pipeline around it.

    Everything is stored in bfloat16 but the quantizer, which stays in float32 since its dtype defines the codes.

    Args:
        model: folder of a trained UniCode² checkpoint.
        mapper: folder of a trained condition mapper.
        decoder: folder or Hub name of the FLUX pipeline that the mapper was trained against.
        output: folder to write.
        image_size: side of the images that the pipeline draws, in pixels.
    """
    from diffusers import FluxPipeline
    from transformers import AutoProcessor

    from . import UniCode2ConditionMapper, UniCode2FluxPipeline, UniCode2ForConditionalGeneration

    encoder = UniCode2ForConditionalGeneration.from_pretrained(model, dtype=torch.bfloat16)
    processor = AutoProcessor.from_pretrained(model)
    parts = FluxPipeline.from_pretrained(
        decoder, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, torch_dtype=torch.bfloat16
    )
    condition_mapper = UniCode2ConditionMapper.from_pretrained(mapper, torch_dtype=torch.bfloat16)
    pipe = UniCode2FluxPipeline(
        parts.scheduler, parts.vae, parts.transformer, encoder, processor, condition_mapper, image_size=image_size
    )
    encoder.save_pretrained(output)
    processor.save_pretrained(output)
    for name in ("scheduler", "vae", "transformer", "condition_mapper"):
        getattr(pipe, name).save_pretrained(f"{output}/{name}")
    pipe.save_config(output)


def make_init_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 init", description="Composes a checkpoint from a language model, an encoder and a codebook."
    )
    parser.add_argument("--llm", required=True, help="folder or Hub name of the language model")
    parser.add_argument("--vision", required=True, help="folder or Hub name of the SigLIP vision encoder")
    parser.add_argument("--codebook", required=True, help="folder written by `unicode2 codebook build`")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--visual-head", default="flat", choices=VISUAL_HEADS, help="default: %(default)s")
    return parser


def init(args: argparse.Namespace) -> None:
    compose_checkpoint(args.llm, args.vision, args.codebook, args.output, args.visual_head)
    print(f"{args.output}: composed")


def make_assemble_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 assemble",
        description="Puts a trained checkpoint, its mapper and its decoder into one repository.",
    )
    parser.add_argument("--model", required=True, help="folder of the trained checkpoint")
    parser.add_argument("--mapper", required=True, help="folder of the trained condition mapper")
    parser.add_argument("--decoder", required=True, help="folder or Hub name of the FLUX pipeline")
    parser.add_argument(
        "--image-size", type=int, default=512, help="side of the images it draws (default: %(default)s pixels)"
    )
    parser.add_argument("--output", required=True, help="folder to write")
    return parser


def assemble(args: argparse.Namespace) -> None:
    assemble_pipeline(args.model, args.mapper, args.decoder, args.output, args.image_size)
    print(f"{args.output}: assembled")
