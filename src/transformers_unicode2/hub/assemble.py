"""Assembles a trained checkpoint, its condition mapper and its decoder into one repository.

unicode2 assemble --model checkpoint --mapper mapper --decoder black-forest-labs/FLUX.1-dev --output repository
"""

import argparse
from pathlib import Path

import torch

from ..adapters import find_base, is_adapter, load_merged
from ..checkpoints import check_checkpoint
from ..cli import at_least
from ..files import whole_folder
from ..record import Record, hash_source


def assemble_pipeline(
    model: str,
    mapper: str,
    decoder: str,
    output: str,
    image_size: int,
    num_candidates: int = 1,
    true_cfg_scale: float = 1.0,
    num_inference_steps: int = 50,
) -> bool:
    """Writes one repository that is both: a Transformers checkpoint in its root and a Diffusers pipeline around it.

    Everything is stored in bfloat16, except those weights of the quantizer that bfloat16 does not hold exactly, since
    their values define the codes.

    Args:
        model (`str`): folder of a trained UniCode² checkpoint, or of an adapter, which is merged.
        mapper (`str`): folder of a trained condition mapper.
        decoder (`str`): folder or Hub name of the FLUX pipeline that the mapper was trained against.
        output (`str`): folder to write.
        image_size (`int`): side of the images that the pipeline draws, in pixels.
        num_candidates (`int`, *optional*, defaults to 1):
            Images that the language model writes for a prompt; the best one is painted.
        true_cfg_scale (`float`, *optional*, defaults to 1.0): classifier-free guidance of FLUX; 1 is none.
        num_inference_steps (`int`, *optional*, defaults to 50): steps of FLUX.

    Returns:
        Whether `output` was finished before.

    Raises:
        `ValueError`: when `image_size` is not a multiple of what the VAE and the patches of FLUX cut an image into, or
        `output` holds anything else.
    """
    numbers = {"image_size": image_size, "num_candidates": num_candidates, "true_cfg_scale": true_cfg_scale}
    numbers |= {"num_inference_steps": num_inference_steps}
    parts = {"model": hash_source(model), "mapper": hash_source(mapper), "decoder": hash_source(decoder, deep=True)}
    if is_adapter(model):
        parts["base"] = find_base(model)[1]
    with Record(output, {"command": "assemble", **parts, **numbers}).making() as finished:
        if not finished:
            with whole_folder(output) as new:
                write_pipeline(model, mapper, decoder, new, **numbers)
    return finished


def write_pipeline(model: str, mapper: str, decoder: str, output: Path, image_size: int, **numbers) -> None:
    """Fills an empty folder, see `assemble_pipeline`."""
    from diffusers import FluxPipeline
    from transformers import AutoProcessor

    from .. import UniCode2ConditionMapper, UniCode2FluxPipeline, UniCode2ForConditionalGeneration

    if is_adapter(model):
        base, _, note = find_base(model)
        encoder, processor = load_merged(model, base, note, dtype="bfloat16")
    else:
        encoder = UniCode2ForConditionalGeneration.from_pretrained(model, dtype=torch.bfloat16)
        processor = AutoProcessor.from_pretrained(model)
    parts = FluxPipeline.from_pretrained(
        decoder, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, torch_dtype=torch.bfloat16
    )
    pipe = UniCode2FluxPipeline(
        scheduler=parts.scheduler,
        vae=parts.vae,
        transformer=parts.transformer,
        vision_language_encoder=encoder,
        processor=processor,
        condition_mapper=UniCode2ConditionMapper.from_pretrained(mapper, torch_dtype=torch.bfloat16),
        image_size=image_size,
        **numbers,
    )
    grid = 2 * pipe.vae_scale_factor
    if image_size % grid:
        raise ValueError(f"--image-size is {image_size}; this decoder paints multiples of {grid} pixels.")
    for name in ("vision_language_encoder", "vae", "transformer"):
        check_finite_weights(name, getattr(pipe, name))
    encoder.save_pretrained(output, state_dict={name: shrink(value) for name, value in encoder.state_dict().items()})
    processor.save_pretrained(output)
    for name in ("scheduler", "vae", "transformer", "condition_mapper"):
        getattr(pipe, name).save_pretrained(f"{output}/{name}")
    pipe.save_config(output)


def check_finite_weights(name: str, module: torch.nn.Module) -> None:
    """Raises `ValueError` when a weight of a part is not finite."""
    bad = [key for key, value in module.state_dict().items() if not value.isfinite().all()]
    if bad:
        raise ValueError(f"{len(bad)} weights of the {name} are not finite; the first is {bad[0]}.")


def shrink(value: torch.Tensor) -> torch.Tensor:
    """A float32 tensor in bfloat16 if that holds it exactly, any other tensor as it is."""
    exact = value.dtype == torch.float32 and value.bfloat16().float().equal(value)
    return value.bfloat16() if exact else value


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 assemble",
        description="Puts a trained checkpoint, its mapper and its decoder into one repository.",
    )
    parser.add_argument("--model", required=True, help="folder of the trained checkpoint or adapter")
    parser.add_argument("--mapper", required=True, help="folder of the trained condition mapper")
    parser.add_argument("--decoder", required=True, help="folder or Hub name of the FLUX pipeline")
    parser.add_argument(
        "--image-size", type=at_least(1), default=512, help="side of the images it draws (default: %(default)s pixels)"
    )
    parser.add_argument(
        "--num-candidates",
        type=at_least(1),
        default=1,
        help="images written for a prompt; the best one is painted (default: %(default)s)",
    )
    parser.add_argument(
        "--true-cfg-scale",
        type=at_least(1.0),
        default=1.0,
        help="classifier-free guidance of FLUX; 1 is none (default: %(default)s)",
    )
    parser.add_argument("--steps", type=at_least(1), default=50, help="diffusion steps (default: %(default)s)")
    parser.add_argument("--output", required=True, help="folder to write")
    return parser


def main(args: argparse.Namespace) -> None:
    for name in (args.mapper,) if is_adapter(args.model) else (args.model, args.mapper):
        check_checkpoint(name)
    finished = assemble_pipeline(
        model=args.model,
        mapper=args.mapper,
        decoder=args.decoder,
        output=args.output,
        image_size=args.image_size,
        num_candidates=args.num_candidates,
        true_cfg_scale=args.true_cfg_scale,
        num_inference_steps=args.steps,
    )
    print(f"{args.output} is finished; nothing to do" if finished else f"{args.output}: assembled")


__all__ = ["assemble_pipeline"]
