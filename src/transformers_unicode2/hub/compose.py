"""Composes a checkpoint from a language model, a vision encoder and a codebook.

unicode2 init --llm Qwen/Qwen2.5-0.5B --vision google/siglip-so400m-patch14-384 --codebook codebook --output unicode2
unicode2 init --llm HuggingFaceTB/SmolLM2-135M-Instruct --vision openai/clip-vit-base-patch16 --random-codebook 4096 \\
    --output unicode2 --dry-run
"""

import argparse
import json
from difflib import get_close_matches
from pathlib import Path

import torch

from ..cards import write_card
from ..cli import at_least
from ..configuration_unicode2 import VISUAL_HEADS
from ..encoders_unicode2 import load_encoder
from ..files import whole_folder
from ..loading_unicode2 import find_digests, hash_settings
from ..record import Record, hash_source, shorten
from .fresh import PROJECTOR_INITS, draw_codebook, make_projector, make_visual_head
from .language_models import (
    CHAT_TEMPLATES,
    TextSide,
    find_last_norm,
    load_text_config,
    prepare_text,
    read_language_model,
    settle_config,
)
from .plan import build_model, check_sources, plan_checkpoint, without_pooling
from .shards import ShardWriter

# What records of earlier versions lack.
BEFORE = {"chat_template": "chatml", "projector_init": "default"}
SUMMARY = """A UniCode² checkpoint, composed by `unicode2 init` and not trained. Its projector and visual head are
new, so it cannot read or draw images yet. It answers texts as its language model does.

- language model: `{llm}`; {notes}
- vision encoder: `{vision}`
- codebook: {codebook}
- projector: {projector_init} start"""


def compose_checkpoint(
    llm: str,
    vision: str,
    codebook: str | int,
    output: str,
    visual_head: str = "flat",
    image_generation: dict | None = None,
    chat_template: str = "own",
    projector_init: str = "calibrated",
) -> tuple[list[dict], list[str]]:
    """Writes a checkpoint made of a causal language model, a vision encoder and a codebook.

    Language model, vision encoder and codebook stay as they are; C2 begins as a copy of C1.
    Works shard by shard, so it holds no more than the largest file of the language model or the codebook at a time. The
    language model keeps its dtype, which the new modules share. The encoder gets that which the codebook was built
    with, and C1 is in float32.

    Args:
        llm (`str`): folder or Hub name of a causal language model, in safetensors, with its tokenizer.
        vision (`str`): folder or Hub name of a SigLIP, of a SigLIP 2 of a fixed size or of a CLIP, with its
            image processor.
        codebook (`str` or `int`): folder written by `unicode2 codebook build`, or its Hub name. A number makes a
            codebook of this many random codes, see `draw_codebook`.
        output (`str`): folder to write.
        visual_head (`str`, *optional*, defaults to `"flat"`): `UniCode2Config.visual_head`.
        image_generation (`dict`, *optional*): options of `generate` that image mode follows unless told otherwise.
        chat_template (`str`, *optional*, defaults to `"own"`): `"own"` keeps the language model's chat template and
            teaches it to carry images and to mark answers; `"chatml"` writes chats in ChatML.
        projector_init (`str`, *optional*, defaults to `"calibrated"`): `"calibrated"`, see `calibrate_projector`, or
            `"default"`, drawn as `from_config` does.

    Returns:
        One `{"part", "parameters", "bytes"}` a part, in the order of the data flow, and sentences about the texts;
        nothing when `output` was finished before.

    Raises:
        `ValueError`: when the parts do not fit together, or `output` holds anything else. Also on a language model
        without safetensors, or not built as Qwen2 and Llama are.
    """
    folder = check_sources(llm, vision, codebook, output)
    check_image_generation(image_generation)
    settings = {"visual_head": visual_head, "chat_template": chat_template, "projector_init": projector_init}
    made_of = {
        "command": "init",
        "language model": hash_source(llm),
        "encoder": hash_source(vision),
        "codebook": f"{codebook} random codes" if isinstance(codebook, int) else hash_source(folder),
        "image_generation": image_generation,
        **settings,
    }
    with Record(output, made_of, defaults=BEFORE).making() as finished:
        if finished:
            return [], []
        text_config = load_text_config(llm)
        settle_config(llm, text_config)
        text = prepare_text(llm, text_config, chat_template)
        with whole_folder(output) as new:
            parts = build_parts(text_config, text, vision, codebook if folder is None else folder, visual_head)
            model, processor, stored, vision_state = parts
            report = write_weights(model, llm, text, stored, vision_state, projector_init, new)
            write_configurations(model, processor, text.generation, image_generation, new)
            told = {"llm": llm, "vision": vision, "codebook": codebook, "projector_init": projector_init}
            write_card(new, output, summarize(told, text.notes), [llm, vision], {"Parts": report})
            return report, text.notes


def summarize(made_of: dict, notes: list[str]) -> str:
    """What the card says of a checkpoint."""
    codebook = made_of["codebook"]
    named = f"{codebook:,} random codes" if isinstance(codebook, int) else f"`{codebook}`"
    return SUMMARY.format(**{**made_of, "codebook": named}, notes="; ".join(notes))


def build_parts(text_config, text: TextSide, vision: str, codebook: str | int, visual_head: str) -> tuple:
    """The model on the meta device, its processor, the stored codebook, and the weights of the encoder."""
    from ..codebook.storage import load_codebook
    from ..configuration_unicode2 import UniCode2CodebookConfig
    from ..processing_unicode2 import UniCode2Processor

    stored = draw_codebook(vision, codebook) if isinstance(codebook, int) else load_codebook(codebook)
    vision_config, vision_state, image_processor = load_vision_model(vision, stored.encoder_dtype)
    if not isinstance(codebook, int):
        check_encoder(vision, codebook, stored)
    processor = UniCode2Processor(
        image_processor,
        text.tokenizer,
        vision_config.patch_size,
        text.tokenizer.chat_template,
        *text.image_tokens,
    )
    settings = hash_settings(vision_config, stored.encoder_dtype)
    digests = {**find_digests(vision_state), "vision_config_sha256": settings}
    codebook_config = UniCode2CodebookConfig(**stored.describe(), **digests)
    model = build_model(text_config, text, vision_config, codebook_config, visual_head)
    return model, processor, stored, vision_state


def write_weights(
    model, llm: str, text: TextSide, stored, vision_state: dict[str, torch.Tensor], projector_init: str, output: Path
) -> list[dict]:
    """Writes the weights of all parts, see `ShardWriter`, and returns its report."""
    config = model.config
    writer = ShardWriter(output, {name: value.shape for name, value in model.state_dict().items()})
    embedding, norm = None, {}
    last_norm = f"model.language_model.{find_last_norm(model.model.language_model)}"
    for state in read_language_model(llm, config.tie_word_embeddings, text):
        writer.write("language model", state)
        embedding = state.get("model.language_model.embed_tokens.weight", embedding)
        norm |= {name: value for name, value in state.items() if name.startswith(f"{last_norm}.")}
    writer.write("vision encoder", {f"model.quantizer.{name}": v for name, v in vision_state.items()})
    writer.write("codebook C1", {f"model.quantizer.codebook.{name}": v for name, v in stored.state_dict().items()})
    writer.write("C2", {"model.visual_embeddings.weight": stored.codes.to(config.dtype)})
    writer.write("projector", make_projector(model, stored.codes, embedding, projector_init))
    writer.write("visual head", make_visual_head(model, stored.codes, stored.cell_offsets, norm))
    writer.finish(may_lack={"lm_head.weight"} if config.tie_word_embeddings else set())
    return writer.report


def write_configurations(model, processor, generation: dict, image_generation: dict | None, output: Path) -> None:
    """Writes what a fresh checkpoint has beside its weights, the code that travels included."""
    from transformers import GenerationConfig
    from transformers.dynamic_module_utils import custom_object_save

    config = model.config
    config.architectures = [type(model).__name__]
    custom_object_save(model, output, config=config)
    config.save_pretrained(output)
    sampling = {} if image_generation is None else {"image_generation": image_generation}
    GenerationConfig(
        **generation,
        pad_token_id=processor.tokenizer.pad_token_id,
        max_new_tokens=max(64, 2 * config.num_image_tokens),
        **sampling,
    ).save_pretrained(output)
    processor.save_pretrained(output)


def load_vision_model(vision: str, dtype: str) -> tuple:
    """Configuration, weights and image processor of an encoder, without the head that pools the patches of a SigLIP.

    Raises `ValueError` as `load_encoder` does.
    """
    model, image_processor = load_encoder(vision, dtype)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    return (
        without_pooling(model.config),
        {f"vision_model.{name}": value for name, value in weights.items()},
        image_processor,
    )


def check_encoder(vision: str, codebook: str, stored) -> None:
    """Raises `ValueError` when a codebook names the encoder that it was built with, and `vision` is another.

    Args:
        vision, codebook: folders or Hub names.
        stored (`UniCode2Codebook`): what `codebook` holds.
    """
    from ..codebook.features import Encoder
    from ..codebook.storage import load_provenance

    command = load_provenance(codebook).get("command", {})
    known = stored.encoder_sha256
    own = Encoder(vision, command.get("dtype", stored.encoder_dtype)).fingerprint() if known else None
    if own != known:
        raise ValueError(
            f"{codebook} was built with another encoder (SHA-256 {shorten(known)}) than {vision} ({shorten(own)}); "
            "give that encoder, or a codebook of this one."
        )


def check_image_generation(options: dict | None) -> None:
    """Raises `ValueError` on options that `generate` does not know."""
    from transformers import GenerationConfig

    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")} | {"max_plan_tokens"}
    unknown = sorted(set(options or ()) - known)
    if unknown:
        close = get_close_matches(unknown[0], known, 1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"--image-generation has {unknown[0]!r}, which `generate` does not know{hint}")


def read_options(text: str) -> dict:
    """A JSON object given on the command line. Raises `argparse.ArgumentTypeError` on anything else."""
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object, such as '{{\"temperature\": 0.7}}'")
    return options


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 init", description="Composes a checkpoint from a language model, an encoder and a codebook."
    )
    add = parser.add_argument
    add(
        "--llm", required=True, help="folder or Hub name of the language model: Qwen, Llama, Mistral, Gemma, Phi-3, ..."
    )
    add("--vision", required=True, help="folder or Hub name of the SigLIP, SigLIP 2 or CLIP")
    codebook = parser.add_mutually_exclusive_group(required=True)
    codebook.add_argument("--codebook", help="folder written by `unicode2 codebook build`, or its Hub name")
    codebook.add_argument(
        "--random-codebook",
        type=at_least(4, 2**31 - 1),
        metavar="K",
        help="K random codes in its place, to try the rest with",
    )
    add("--output", required=True, help="folder to write")
    default = "(default: %(default)s)"
    add("--visual-head", default="flat", choices=VISUAL_HEADS, help=f"how codes are scored {default}")
    about = "the language model's own, taught to carry images and to mark answers, or ChatML"
    add("--chat-template", default="own", choices=CHAT_TEMPLATES, help=f"{about} {default}")
    about = "calibrated: codes come out on the scale of the token embeddings; default: drawn as `from_config` does"
    add("--projector-init", default="calibrated", choices=PROJECTOR_INITS, help=f"{about} {default}")
    add(
        "--image-generation",
        type=read_options,
        metavar="JSON",
        help='sampling options of image mode, such as \'{"do_sample": true, "guidance_scale": 2.0}\' (default: none)',
    )
    add("--dry-run", action="store_true", help="report parts, parameters and bytes; read no weights, write nothing")
    return parser


def main(args: argparse.Namespace) -> None:
    codebook = args.codebook if args.random_codebook is None else args.random_codebook
    if args.dry_run:
        check_image_generation(args.image_generation)
        report, notes = plan_checkpoint(args.llm, args.vision, codebook, args.visual_head, args.chat_template)
    else:
        report, notes = compose_checkpoint(
            llm=args.llm,
            vision=args.vision,
            codebook=codebook,
            output=args.output,
            visual_head=args.visual_head,
            image_generation=args.image_generation,
            chat_template=args.chat_template,
            projector_init=args.projector_init,
        )
    if not report:
        print(f"{args.output} is finished; nothing to do")
        return
    for part in [*report, {"part": "all", **{key: sum(p[key] for p in report) for key in ("parameters", "bytes")}}]:
        print(f"{part['part']:>15} {part['parameters']:>15,} parameters {part['bytes']:>15,} bytes")
    if args.random_codebook is not None:
        notes = [*notes, f"the codebook is random: {args.random_codebook:,} codes that no picture has formed"]
    for note in notes:
        print(note)
    print(f"{args.output}: " + ("nothing was written, as --dry-run asks" if args.dry_run else "composed"))


__all__ = ["compose_checkpoint"]
