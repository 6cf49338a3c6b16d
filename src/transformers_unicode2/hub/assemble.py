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
from ..diffusion.arguments_unicode2 import check_finite_weights
from ..files import whole_folder
from ..images_unicode2 import one_line
from ..record import Record, hash_source, read_record, shorten

# Side of the images that the paper draws, in pixels
IMAGE_SIZE = 512
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
    image_size: int | None = None,
    num_candidates: int = 1,
    true_cfg_scale: float | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float | None = None,
    dtype: str = "bfloat16",
) -> bool:
    """Writes one repository that is both: a Transformers checkpoint in its root and a Diffusers pipeline around it.

    Weights of the quantizer that `dtype` does not hold exactly stay in float32, since their values define the codes.

    Args:
        model (`str`): folder of a trained UniCode² checkpoint, or of an adapter, which is merged.
        mapper (`str`): folder of a trained condition mapper.
        decoder (`str`): folder or Hub name of the FLUX or SDXL pipeline that the mapper was trained against.
        output (`str`): folder to write.
        image_size (`int`, *optional*): side of the images that the pipeline draws, in pixels; by default that of the
            mapper's training, or 512 where the mapper does not tell.
        num_candidates (`int`, *optional*, defaults to 1):
            Images that the language model writes for a prompt; the best one is painted.
        true_cfg_scale (`float`, *optional*, defaults to 1.0): classifier-free guidance of FLUX; 1 is none.
        num_inference_steps (`int`, *optional*, defaults to 50): steps of the decoder.
        guidance_scale (`float`, *optional*, defaults to 3.5): classifier-free guidance of SDXL; 1 is none.
        dtype (`str`, *optional*, defaults to `"bfloat16"`): of all weights that are written.

    Returns:
        Whether `output` was finished before.

    Raises:
        `ValueError`: when `image_size` is not a multiple of what the decoder cuts an image into, on a decoder that is
        not supported, on the guidance of another one, when what a decoder learnt beside the mapper does not fit this
        one, or when `output` holds anything else.
    """
    from ..diffusion.registration import find_stock_class

    stock = find_stock_class(decoder)
    guidance = choose_guidance(stock, true_cfg_scale=true_cfg_scale, guidance_scale=guidance_scale)
    trained = (read_record(mapper) or {}).get("made_of", {}) if Path(mapper).is_dir() else {}
    numbers = {"image_size": image_size or trained.get("image_size") or IMAGE_SIZE, "num_candidates": num_candidates}
    numbers |= {**guidance, "num_inference_steps": num_inference_steps}
    parts = {
        "model": hash_source(model),
        "mapper": hash_source(mapper, deep=True),
        "decoder": hash_source(decoder, deep=True),
    }
    if is_adapter(model):
        parts["base"] = find_base(model)[1]
    made_of = {"command": "assemble", **parts, **numbers, "dtype": dtype}
    with Record(output, made_of, defaults={"dtype": "bfloat16"}).making() as finished:
        if not finished:
            compare_origin(trained, parts, mapper)
            with whole_folder(output) as new:
                learnt = write_pipeline(model, mapper, decoder, stock, new, dtype, **numbers)
                sources = {"model": model, "mapper": mapper, "decoder": decoder}
                kind, settings = f"UniCode2{stock}", {**numbers, "dtype": dtype}
                write_pipeline_card(new, output, kind, sources, settings, learnt)
    return finished


def choose_guidance(stock: str, **given: float | None) -> dict[str, float]:
    """The guidance that is kept with a pipeline, or its default. Raises `ValueError` on that of another decoder."""
    defaults = DECODERS[stock][1]
    wrong = [name for name, value in given.items() if value is not None and name not in defaults]
    if wrong:
        raise ValueError(
            f"`{wrong[0]}` is not kept with a UniCode2{stock}, which has `{next(iter(defaults))}`; leave it out."
        )
    return {name: default if given[name] is None else given[name] for name, default in defaults.items()}


def compare_origin(trained: dict, parts: dict[str, str], mapper: str) -> None:
    """Says so when a mapper was trained with another model or decoder than those that it is assembled with."""
    for part in ("model", "decoder"):
        if trained.get(part) not in (None, parts[part]):
            print(
                f"{mapper} was trained with another {part} ({shorten(trained[part])}) than the one given here "
                f"({shorten(parts[part])}); look at what it paints."
            )


def write_pipeline(
    model: str, mapper: str, decoder: str, stock: str, output: Path, dtype: str, image_size: int, **numbers
) -> str:
    """Fills an empty folder, see `assemble_pipeline`, and returns what `take_learnt` did.

    `stock` is the class of the decoder's pipeline.
    """
    import diffusers

    import transformers_unicode2

    encoder, processor = load_model(model, dtype)
    painter, _ = DECODERS[stock]
    texts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    options = {"dtype": getattr(torch, dtype)}
    parts = getattr(diffusers, stock).from_pretrained(decoder, **options, **texts)
    learnt = take_learnt(parts, painter, mapper)
    own = transformers_unicode2.UniCode2ConditionMapper.from_pretrained(mapper, **options)
    pipe = getattr(transformers_unicode2, f"UniCode2{stock}")(
        **{part: getattr(parts, part) for part in ("scheduler", "vae", painter)},
        vision_language_encoder=encoder,
        processor=processor,
        condition_mapper=own,
        image_size=image_size,
        **numbers,
    )
    if image_size % pipe.size_factor:
        raise ValueError(f"--image-size is {image_size}; this decoder paints multiples of {pipe.size_factor} pixels.")
    for part in ("vision_language_encoder", "vae", painter):
        check_finite_weights(f"The {part}", getattr(pipe, part))
    kept = (lambda value: value) if dtype == "float32" else shrink
    encoder.save_pretrained(output, state_dict={name: kept(value) for name, value in encoder.state_dict().items()})
    processor.save_pretrained(output)
    for part in ("scheduler", "vae", painter, "condition_mapper"):
        getattr(pipe, part).save_pretrained(f"{output}/{part}")
    pipe.save_config(output)
    return learnt


def load_model(model: str, dtype: str) -> tuple:
    """The language model of a checkpoint, or of an adapter, which is merged, and its processor."""
    from transformers import AutoProcessor

    from transformers_unicode2 import UniCode2ForConditionalGeneration

    if is_adapter(model):
        base, _, note = find_base(model)
        return load_merged(model, base, note, dtype=dtype)
    encoder = UniCode2ForConditionalGeneration.from_pretrained(model, dtype=getattr(torch, dtype))
    return encoder, AutoProcessor.from_pretrained(model)


def take_learnt(pipe, painter: str, mapper: str) -> str:
    """Brings a decoder to what learnt beside a mapper, if it did: all of its weights, or a LoRA, which is merged.

    Args:
        pipe: stock pipeline, changed in place.
        painter: name of its transformer or U-Net.
        mapper: folder or Hub name that `transformers_unicode2.training.mapper` wrote.

    Returns:
        A sentence about it, empty where nothing learnt.

    Raises:
        `ValueError`: when what learnt is of another kind of decoder, or of other shapes.
    """
    from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
    from safetensors import safe_open

    folder = Path(mapper if Path(mapper).is_dir() else snapshot_download(mapper))
    file, part = folder / LORA_WEIGHT_NAME_SAFE, getattr(pipe, painter)
    learnt = [name for name, _ in DECODERS.values() if (folder / name / "config.json").is_file()]
    if file.is_file():
        with safe_open(file, framework="pt") as weights:
            learnt += sorted({key.split(".")[0] for key in weights.keys()})
    if learnt and learnt != [painter]:
        raise ValueError(
            f"Beside {mapper} a {learnt[0]} learnt, and the decoder given here paints by a {painter}; give the decoder "
            "that they were trained with."
        )
    if file.is_file():
        try:
            pipe.load_lora_weights(folder, weight_name=LORA_WEIGHT_NAME_SAFE)
        except RuntimeError as error:
            raise ValueError(
                f"The LoRA in {mapper} does not fit this decoder ({one_line(str(error)):.200}); give the decoder that "
                "it was trained with."
            ) from error
        pipe.fuse_lora(components=[painter])
        pipe.unload_lora_weights()
        return f"A LoRA of its {painter}, which was trained with the mapper, is merged into it."
    if learnt:
        pipe.register_modules(**{painter: type(part).from_pretrained(folder / painter, dtype=part.dtype)})
        return f"Its {painter} was fine-tuned with the mapper."
    return ""


def write_pipeline_card(
    folder: Path, name: str, kind: str, sources: dict[str, str], numbers: dict, learnt: str
) -> None:
    """Writes the card of an assembled repository, see `assemble_pipeline`."""
    summary = (
        "A UniCode² checkpoint, its condition mapper and its decoder in one repository, put together by `unicode2 "
        f"assemble`, in {numbers['dtype']}. The decoder is that of `{sources['decoder']}`. {learnt}".strip()
        + f"\n\nTransformers loads the root. Diffusers loads all of it as a {kind}. Without the package, both load it "
        "with `trust_remote_code=True`.\n\nThe licences of the language model, of the encoder and of the decoder apply "
        "to their weights. A mapper that was trained through a decoder, or that began as FLUX.1 Redux, may count as a "
        "derivative of it."
    )
    bases = [sources["model"], sources["decoder"]]
    write_card(folder, name, summary, bases, settings={**sources, **numbers}, kind="pipeline")


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
        "--image-size",
        type=at_least(1),
        help=f"side of the images it draws, in pixels (default: that of the mapper's training, or {IMAGE_SIZE})",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of all weights that are written (default: %(default)s)",
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
        dtype=args.dtype,
    )
    print(f"{args.output} is finished; nothing to do" if finished else f"{args.output}: assembled")


__all__ = ["assemble_pipeline"]
