"""Composes a checkpoint from a language model, a vision encoder and a codebook.

unicode2 init --llm Qwen/Qwen2.5-0.5B --vision google/siglip-so400m-patch14-384 --codebook codebook --output unicode2
"""

import argparse
import json
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file

from ..checkpoints import check_encoder_keys, find_safetensors
from ..configuration_unicode2 import VISUAL_HEADS
from ..files import whole_folder
from ..loading_unicode2 import find_digests, hash_settings
from ..record import Record, hash_source, shorten
from .shards import ShardWriter


def compose_checkpoint(
    llm: str,
    vision: str,
    codebook: str,
    output: str,
    visual_head: str = "flat",
    image_generation: dict | None = None,
) -> list[dict]:
    """Writes a UniCode² checkpoint (section 3.2).

    Language model, vision encoder and codebook stay as they are; C2 begins as a copy of C1.
    Works shard by shard, so it holds no more than the largest file of the language model or the codebook at a time. The
    language model keeps its dtype, which the new modules share; the quantizer is in float32.

    Args:
        llm (`str`): folder or Hub name of a causal language model, in safetensors, with its tokenizer.
        vision (`str`): folder or Hub name of a SigLIP with its image processor.
        codebook (`str`): folder written by `unicode2 codebook build`, or its Hub name.
        output (`str`): folder to write.
        visual_head (`str`, *optional*, defaults to `"flat"`): `UniCode2Config.visual_head`.
        image_generation (`dict`, *optional*): options of `generate` that image mode follows unless told otherwise.

    Returns:
        One `{"part", "parameters", "bytes"}` a part, in the order of the data flow; nothing when `output` was finished
        before.

    Raises:
        `ValueError`: when the parts do not fit together, the language model has no safetensors or is not built as Qwen2
        or Llama are, or `output` holds anything else.
    """
    if Path(output).resolve() in [Path(part).resolve() for part in (llm, vision, codebook)]:
        raise ValueError(f"{output} holds a part of the model; choose another folder for the checkpoint.")
    folder = codebook if Path(codebook).is_dir() else snapshot_download(codebook)
    made_of = {
        "command": "init",
        "language model": hash_source(llm),
        "encoder": hash_source(vision),
        "codebook": hash_source(folder),
        "visual_head": visual_head,
        "image_generation": image_generation,
    }
    with Record(output, made_of).making() as finished:
        if finished:
            return []
        with whole_folder(output) as new:
            model, processor, stored, vision_state = build_parts(llm, vision, folder, visual_head)
            report = write_weights(model, llm, stored, vision_state, new)
            write_configurations(model, processor, image_generation, new)
            return report


def build_parts(llm: str, vision: str, codebook: str, visual_head: str) -> tuple:
    """The model on the meta device, its processor, the stored codebook, and the weights of the encoder."""
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    from ..codebook.storage import load_codebook
    from ..configuration_unicode2 import UniCode2CodebookConfig, UniCode2Config
    from ..modeling_unicode2 import UniCode2ForConditionalGeneration
    from ..processing_unicode2 import UniCode2Processor

    tokenizer = AutoTokenizer.from_pretrained(llm, padding_side="left")
    text_config = AutoConfig.from_pretrained(llm)
    check_language_model(llm, text_config)
    encoder = load_vision_model(vision)
    vision_state = {f"vision_model.{name}": value for name, value in encoder.state_dict().items()}
    stored = load_codebook(codebook)
    check_encoder(vision, codebook)
    processor = UniCode2Processor(AutoImageProcessor.from_pretrained(vision), tokenizer, encoder.config.patch_size)
    digests = {**find_digests(vision_state), "vision_config_sha256": hash_settings(encoder.config)}
    config = UniCode2Config(
        text_config=text_config,
        vision_config=encoder.config,
        codebook_config=UniCode2CodebookConfig(**stored.describe(), **digests),
        image_token_id=processor.image_token_id,
        boi_token_id=processor.boi_token_id,
        eoi_token_id=processor.eoi_token_id,
        visual_head=visual_head,
        dtype=text_config.dtype or torch.float32,
    )
    check_processor(processor, config, llm, vision)
    with torch.device("meta"):
        model = UniCode2ForConditionalGeneration(config)
    return model, processor, stored, vision_state


def write_weights(model, llm: str, stored, vision_state: dict[str, torch.Tensor], output: Path) -> list[dict]:
    """Writes the weights of all parts, see `ShardWriter`, and returns its report."""
    config = model.config
    writer = ShardWriter(output, {name: value.shape for name, value in model.state_dict().items()})
    for file in find_safetensors(llm):
        writer.write("language model", rename_language_model(load_file(file), config))
    writer.write("vision encoder", {f"model.quantizer.{name}": v for name, v in vision_state.items()})
    writer.write("codebook C1", {f"model.quantizer.codebook.{name}": v for name, v in stored.state_dict().items()})
    writer.write("C2", {"model.visual_embeddings.weight": stored.codes.to(config.dtype)})
    fresh = initialise(model, ("model.projector", "visual_head"), config.dtype)
    if config.visual_head == "two_level":
        fresh["visual_head.cell_offsets"] = stored.cell_offsets
    calibrate_visual_head(fresh, stored.codes, config.text_config.hidden_size)
    for part, prefix in (("projector", "model.projector."), ("visual head", "visual_head.")):
        writer.write(part, {name: value for name, value in fresh.items() if name.startswith(prefix)})
    writer.finish(may_lack={"lm_head.weight"} if config.tie_word_embeddings else set())
    return writer.report


def write_configurations(model, processor, image_generation: dict | None, output: Path) -> None:
    """Writes what a fresh checkpoint has beside its weights, the code that travels included."""
    from transformers import GenerationConfig
    from transformers.dynamic_module_utils import custom_object_save

    config = model.config
    config.architectures = [type(model).__name__]
    custom_object_save(model, output, config=config)
    config.save_pretrained(output)
    sampling = {} if image_generation is None else {"image_generation": image_generation}
    GenerationConfig(
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        max_new_tokens=max(64, 2 * config.num_image_tokens),
        **sampling,
    ).save_pretrained(output)
    processor.save_pretrained(output)


def check_language_model(llm: str, config) -> None:
    """Raises `ValueError` on a model that is no causal language model, or is not built as Qwen2 or Llama are."""
    from transformers import AutoModelForCausalLM

    models = AutoModelForCausalLM._model_mapping
    if type(config) not in models:
        raise ValueError(f"{llm} is a {config.model_type} model; --llm must be a causal language model.")
    prefix = models[type(config)].base_model_prefix
    if prefix != "model":
        raise ValueError(
            f"{llm} is a {config.model_type} model, whose weights begin with {prefix!r}, not with 'model'."
        )


def load_vision_model(vision: str):
    """The vision encoder of a SigLIP in float32, without the head that pools its patches.

    Raises `ValueError` when a weight is missing.
    """
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig.from_pretrained(vision)
    config.vision_use_head = False
    model, info = SiglipVisionModel.from_pretrained(
        vision, config=config, dtype=torch.float32, output_loading_info=True
    )
    check_encoder_keys(info, vision)
    return model


def check_encoder(vision: str, codebook: str) -> None:
    """Raises `ValueError` when a codebook names the encoder that it was built with, and `vision` is another."""
    from ..codebook.features import Encoder
    from ..codebook.storage import load_provenance

    command = load_provenance(codebook).get("command", {})
    known = command.get("encoder_sha256")
    own = Encoder(vision, command.get("dtype", "float32")).fingerprint() if known else None
    if own != known:
        raise ValueError(
            f"{codebook} was built with another encoder (SHA-256 {shorten(known)}) than {vision} ({shorten(own)}); "
            "give that encoder, or a codebook of this one."
        )


def check_processor(processor, config, llm: str, vision: str) -> None:
    """Raises `ValueError` when the tokenizer lacks a token that images need, or images have another size."""
    vocabulary = processor.tokenizer.get_vocab()
    missing = [t for t in (processor.image_token, processor.boi_token, processor.eoi_token) if t not in vocabulary]
    if missing:
        raise ValueError(f"The tokenizer of {llm} lacks {', '.join(missing)}; add them and resize the language model.")
    if processor.num_image_tokens != config.num_image_tokens:
        raise ValueError(
            f"The image processor of {vision} makes images of {processor.num_image_tokens} patches, "
            f"its encoder reads {config.num_image_tokens}."
        )


def rename_language_model(state: dict[str, torch.Tensor], config) -> dict[str, torch.Tensor]:
    """Weights of a causal language model under the names that they have in UniCode²; a tied head is left out."""
    renamed = {}
    for name, value in state.items():
        if name != "lm_head.weight":
            renamed[re.sub(r"^model\.", "model.language_model.", name)] = value
        elif not config.tie_word_embeddings:
            renamed[name] = value
    return renamed


def initialise(model, parts: tuple[str, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Seeded starting weights of modules of a model on the meta device, as `from_config` would draw them."""
    torch.manual_seed(0)
    state = {}
    for part in parts:
        module = model.get_submodule(part).to_empty(device="cpu")
        for child in module.modules():
            model._init_weights(child)
        for name, value in module.state_dict().items():
            state[f"{part}.{name}"] = value.to(dtype) if value.is_floating_point() else value
    return state


def calibrate_visual_head(state: dict[str, torch.Tensor], codes: torch.Tensor, hidden_size: int) -> None:
    """Scales a fresh head so that the scores of the codes `(codebook_size, codebook_dim)` start about one apart.

    That is for normalised hidden states. The first loss is then near ln K, however long the codes are.
    """
    spread = (codes - codes.mean(0)).square().sum(-1).mean().sqrt()
    for name, value in state.items():
        if name.startswith("visual_head.linear.weight"):
            value /= value.float().std() * hidden_size**0.5 * spread + 1e-12


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
    parser.add_argument("--llm", required=True, help="folder or Hub name of the language model")
    parser.add_argument("--vision", required=True, help="folder or Hub name of the SigLIP vision encoder")
    parser.add_argument("--codebook", required=True, help="folder written by `unicode2 codebook build`")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--visual-head", default="flat", choices=VISUAL_HEADS, help="default: %(default)s")
    parser.add_argument(
        "--image-generation",
        type=read_options,
        metavar="JSON",
        help='sampling options of image mode, such as \'{"do_sample": true, "guidance_scale": 2.0}\' (default: none)',
    )
    return parser


def main(args: argparse.Namespace) -> None:
    report = compose_checkpoint(
        llm=args.llm,
        vision=args.vision,
        codebook=args.codebook,
        output=args.output,
        visual_head=args.visual_head,
        image_generation=args.image_generation,
    )
    if not report:
        print(f"{args.output} is finished; nothing to do")
        return
    for part in [*report, {"part": "all", **{key: sum(p[key] for p in report) for key in ("parameters", "bytes")}}]:
        print(f"{part['part']:>15} {part['parameters']:>15,} parameters {part['bytes']:>15,} bytes")
    print(f"{args.output}: composed")


__all__ = ["compose_checkpoint"]
