"""Assembles a trained checkpoint, its condition mapper and its decoder into one repository.

unicode2 assemble --model checkpoint --mapper mapper --decoder black-forest-labs/FLUX.1-dev --output repository
"""

import argparse
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from ..adapters import find_base, is_adapter, load_merged
from ..cards import write_card
from ..checkpoints import check_checkpoint
from ..cli import at_least
from ..files import whole_folder
from ..record import Record, hash_source

# Of the stock pipelines whose decoders are supported: the part that paints, and our default of its guidance.
DECODERS = {
    "FluxPipeline": ("transformer", {"true_cfg_scale": 1.0}),
    "StableDiffusionXLPipeline": ("unet", {"guidance_scale": 3.5}),
}


def assemble_pipeline(
    model: str,
    mapper: str,
    decoder: str,
    output: str,
    image_size: int,
    num_candidates: int = 1,
    true_cfg_scale: float | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float | None = None,
) -> bool:
    """Writes one repository that is both: a Transformers checkpoint in its root and a Diffusers pipeline around it.

    Everything is stored in bfloat16, except those weights of the quantizer that bfloat16 does not hold exactly, since
    their values define the codes.

    Args:
        model (`str`): folder of a trained UniCode² checkpoint, or of an adapter, which is merged.
        mapper (`str`): folder of a trained condition mapper.
        decoder (`str`): folder or Hub name of the FLUX or SDXL pipeline that the mapper was trained against.
        output (`str`): folder to write.
        image_size (`int`): side of the images that the pipeline draws, in pixels.
        num_candidates (`int`, *optional*, defaults to 1):
            Images that the language model writes for a prompt; the best one is painted.
        true_cfg_scale (`float`, *optional*, defaults to 1.0): classifier-free guidance of FLUX; 1 is none.
        num_inference_steps (`int`, *optional*, defaults to 50): steps of the decoder.
        guidance_scale (`float`, *optional*, defaults to 3.5): classifier-free guidance of SDXL; 1 is none.

    Returns:
        Whether `output` was finished before.

    Raises:
        `ValueError`: when `image_size` is not a multiple of what the decoder cuts an image into, on a decoder that is
        not supported, on the guidance of another one, or when `output` holds anything else.
    """
    from ..diffusion.registration import find_stock_class

    stock = find_stock_class(decoder)
    kind, defaults = f"UniCode2{stock}", DECODERS[stock][1]
    given = {"true_cfg_scale": true_cfg_scale, "guidance_scale": guidance_scale}
    wrong = [name for name, value in given.items() if value is not None and name not in defaults]
    if wrong:
        raise ValueError(f"`{wrong[0]}` is not kept with a {kind}, which has `{next(iter(defaults))}`; leave it out.")
    numbers = {"image_size": image_size, "num_candidates": num_candidates}
    numbers |= {name: default if given[name] is None else given[name] for name, default in defaults.items()}
    numbers |= {"num_inference_steps": num_inference_steps}
    parts = {
        "model": hash_source(model),
        "mapper": hash_source(mapper, deep=True),
        "decoder": hash_source(decoder, deep=True),
    }
    if is_adapter(model):
        parts["base"] = find_base(model)[1]
    with Record(output, {"command": "assemble", **parts, **numbers}).making() as finished:
        if not finished:
            with whole_folder(output) as new:
                write_pipeline(model, mapper, decoder, stock, new, **numbers)
                sources = {"model": model, "mapper": mapper, "decoder": decoder}
                write_pipeline_card(new, output, kind, sources, numbers)
    return finished


def write_pipeline(model: str, mapper: str, decoder: str, stock: str, output: Path, image_size: int, **numbers) -> None:
    """Fills an empty folder, see `assemble_pipeline`. `stock` is the class of the decoder's pipeline."""
    import diffusers
    from transformers import AutoProcessor

    import transformers_unicode2

    if is_adapter(model):
        base, _, note = find_base(model)
        encoder, processor = load_merged(model, base, note, dtype="bfloat16")
    else:
        encoder = transformers_unicode2.UniCode2ForConditionalGeneration.from_pretrained(model, dtype=torch.bfloat16)
        processor = AutoProcessor.from_pretrained(model)
    painter, _ = DECODERS[stock]
    texts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    parts = getattr(diffusers, stock).from_pretrained(decoder, dtype=torch.bfloat16, **texts)
    take_learnt(parts, painter, mapper)
    own = transformers_unicode2.UniCode2ConditionMapper.from_pretrained(mapper, dtype=torch.bfloat16)
    pipe = getattr(transformers_unicode2, f"UniCode2{stock}")(
        **{part: getattr(parts, part) for part in ("scheduler", "vae", painter)},
        vision_language_encoder=encoder,
        processor=processor,
        condition_mapper=own,
        image_size=image_size,
        **numbers,
    )
    # FLUX packs squares of four latents into a token
    grid = pipe.vae_scale_factor * (2 if painter == "transformer" else 1)
    if image_size % grid:
        raise ValueError(f"--image-size is {image_size}; this decoder paints multiples of {grid} pixels.")
    for part in ("vision_language_encoder", "vae", painter):
        check_finite_weights(part, getattr(pipe, part))
    encoder.save_pretrained(output, state_dict={name: shrink(value) for name, value in encoder.state_dict().items()})
    processor.save_pretrained(output)
    for part in ("scheduler", "vae", painter, "condition_mapper"):
        getattr(pipe, part).save_pretrained(f"{output}/{part}")
    pipe.save_config(output)


def take_learnt(pipe, painter: str, mapper: str) -> None:
    """Brings a decoder to what learnt beside a mapper, if it did: all of its weights, or a LoRA, which is merged.

    Args:
        pipe: stock pipeline, changed in place.
        painter: name of its transformer or U-Net.
        mapper: folder or Hub name that `transformers_unicode2.training.mapper` wrote.
    """
    from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

    folder = Path(mapper if Path(mapper).is_dir() else snapshot_download(mapper))
    if (folder / painter / "config.json").is_file():
        part = getattr(pipe, painter)
        pipe.register_modules(**{painter: type(part).from_pretrained(folder / painter, dtype=torch.bfloat16)})
    elif (folder / LORA_WEIGHT_NAME_SAFE).is_file():
        pipe.load_lora_weights(folder, weight_name=LORA_WEIGHT_NAME_SAFE)
        pipe.fuse_lora(components=[painter])
        pipe.unload_lora_weights()


def write_pipeline_card(folder: Path, name: str, kind: str, sources: dict[str, str], numbers: dict) -> None:
    """Writes the card of an assembled repository, see `assemble_pipeline`."""
    summary = (
        "A UniCode² checkpoint, its condition mapper and its decoder in one repository, put together by `unicode2 "
        f"assemble`. Transformers loads the root. Diffusers loads all of it as a {kind}. Licences of the parts apply; "
        "look at those of the decoder and of the language model."
    )
    bases = [sources["model"], sources["decoder"]]
    write_card(folder, name, summary, bases, settings={**sources, **numbers}, kind="pipeline")


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
    parser.add_argument("--decoder", required=True, help="folder or Hub name of the FLUX or SDXL pipeline")
    parser.add_argument(
        "--image-size", type=at_least(1), default=512, help="side of the images it draws (default: %(default)s pixels)"
    )
    parser.add_argument(
        "--num-candidates",
        type=at_least(1),
        default=1,
        help="images written for a prompt; the best one is painted (default: %(default)s)",
    )
    about = "classifier-free guidance of {}; 1 is none (default: {})"
    parser.add_argument("--true-cfg-scale", type=at_least(1.0), help=about.format("FLUX", 1.0))
    parser.add_argument("--guidance-scale", type=at_least(0.0), help=about.format("SDXL", 3.5))
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
        guidance_scale=args.guidance_scale,
    )
    print(f"{args.output} is finished; nothing to do" if finished else f"{args.output}: assembled")


__all__ = ["assemble_pipeline"]
