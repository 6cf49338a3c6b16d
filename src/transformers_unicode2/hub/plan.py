"""What a checkpoint will be, from configurations alone: its model on the meta device, and the size of each part."""

import copy
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from ..encoders_unicode2 import ENCODERS, HOLDERS, check_kind, check_side
from .fresh import count_cells
from .language_models import TextSide, load_text_config, prepare_text, settle_config

# Names of weights and of the parts that they belong to.
PARTS = {
    "model.language_model.": "language model",
    "lm_head.": "language model",
    "model.quantizer.vision_model.": "vision encoder",
    "model.quantizer.codebook.": "codebook C1",
    "model.visual_embeddings.": "C2",
    "model.projector.": "projector",
    "visual_head.": "visual head",
}


def plan_checkpoint(
    llm: str, vision: str, codebook: str | int, visual_head: str = "flat", chat_template: str = "own"
) -> tuple[list[dict], list[str]]:
    """What `compose_checkpoint` would write, from configurations: no weights need be there.

    Where a language model has its weights in a folder, their names are looked at, and what `settle_config` says.

    Returns and raises as `compose_checkpoint` does. The digest of the encoder is not compared.
    """
    from transformers import AutoConfig

    from ..codebook.storage import check_tensors, read_config
    from ..configuration_unicode2 import UniCode2CodebookConfig

    folder = check_sources(llm, vision, codebook, None)
    text_config, vision_config = load_text_config(llm), AutoConfig.from_pretrained(vision)
    if any(file for pattern in ("*.safetensors*", "*.bin") for file in Path(llm).glob(pattern)):
        settle_config(llm, text_config)
    check_kind(vision_config, vision, (*HOLDERS, *ENCODERS))
    vision_config = vision_config.vision_config if vision_config.model_type in HOLDERS else vision_config
    check_side(vision_config, vision)
    vision_config = without_pooling(vision_config)
    if isinstance(codebook, int):
        sizes = {"codebook_size": codebook, "num_cells": count_cells(codebook)}
        codebook_config = UniCode2CodebookConfig(codebook_dim=vision_config.hidden_size, **sizes)
    else:
        codebook_config = read_config(Path(folder))
        if Path(folder, "codebook.safetensors").is_file():
            check_tensors(Path(folder, "codebook.safetensors"), codebook_config)
    if Path(llm).is_dir() and not any(Path(llm).glob("tokenizer*")):
        note = f"{llm} has no tokenizer: rows for image tokens are not counted"
        size = text_config.vocab_size
        text = TextSide(None, ("", "", ""), "", size, size, size, [], {}, [note])
    else:
        text = prepare_text(llm, text_config, chat_template)
    model = build_model(text_config, text, vision_config, codebook_config, visual_head)
    return count_parts(model), text.notes


def check_sources(llm: str, vision: str, codebook: str | int, output: str | None) -> str | None:
    """The folder of the codebook, downloaded if it is on the Hub; `None` for a random one.

    Raises `ValueError` on a part that is not there, and when the output is the folder of a part.
    """
    named = {"--llm": llm, "--vision": vision, **({} if isinstance(codebook, int) else {"--codebook": codebook})}
    for option, name in named.items():
        if output is not None and Path(output).resolve().is_relative_to(Path(name).resolve()):
            raise ValueError(
                f"{output} is in {name}, which holds a part of the model; choose another folder for the checkpoint."
            )
        if Path(name).is_dir():
            continue
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
            raise ValueError(f"{option} is {name}; there is no such folder, and no repository can have this name.")
        try:
            snapshot_download(name, allow_patterns=["config.json", "codebook.json"])
        except LocalEntryNotFoundError as error:
            raise ValueError(
                f"{option} is {name}; there is no such folder, and the Hub cannot be reached for a repository of this "
                "name."
            ) from error
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{option} is {name}; there is no such folder, and the Hub gives no repository of this name."
            ) from error
    if isinstance(codebook, int):
        return None
    return codebook if Path(codebook).is_dir() else snapshot_download(codebook)


def build_model(text_config, text: TextSide, vision_config, codebook_config, visual_head: str):
    """The model on the meta device, with the rows that the text side adds."""
    from ..configuration_unicode2 import UniCode2Config
    from ..modeling_unicode2 import UniCode2ForConditionalGeneration

    ids = [0, 1, 2] if text.tokenizer is None else text.tokenizer.convert_tokens_to_ids(list(text.image_tokens))
    text_config = copy.deepcopy(text_config)
    text_config.vocab_size = text.num_rows
    for part in (text_config, vision_config):
        # A place of this machine
        part._name_or_path = "" if Path(part._name_or_path).exists() else part._name_or_path
    config = UniCode2Config(
        text_config=text_config,
        vision_config=vision_config,
        codebook_config=codebook_config,
        **dict(zip(("image_token_id", "boi_token_id", "eoi_token_id"), ids)),
        visual_head=visual_head,
        dtype=text_config.dtype or torch.float32,
    )
    with torch.device("meta"):
        return UniCode2ForConditionalGeneration(config)


def count_parts(model) -> list[dict]:
    """One `{"part", "parameters", "bytes"}` a part of a model on the meta device, as it will be stored."""
    config, report = model.config, {name: {"part": name, "parameters": 0, "bytes": 0} for name in PARTS.values()}
    encoder_dtype = getattr(torch, config.codebook_config.encoder_dtype)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        part = next(part for prefix, part in PARTS.items() if name.startswith(prefix))
        dtype = {"vision encoder": encoder_dtype, "codebook C1": value.dtype}.get(part, config.dtype)
        report[part]["parameters"] += value.numel()
        report[part]["bytes"] += value.numel() * (dtype if value.is_floating_point() else value.dtype).itemsize
    return list(report.values())


def without_pooling(vision_config):
    """The configuration of an encoder, changed so that it builds no head that pools patches."""
    if vision_config.model_type == "siglip_vision_model":
        vision_config.vision_use_head = False
    return vision_config


__all__ = ["build_model", "check_sources", "plan_checkpoint"]
