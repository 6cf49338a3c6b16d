"""Composes checkpoints from parts, in the layouts of Transformers and Diffusers."""

import argparse
import json
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file

from .configuration_unicode2 import VISUAL_HEADS
from .files import whole_folder
from .loading_unicode2 import check_encoder_keys, find_digests
from .record import Record, hash_source, shorten


def compose_checkpoint(llm: str, vision: str, codebook: str, output: str, visual_head: str = "flat") -> list[dict]:
    """Writes a UniCode² checkpoint: language model, vision encoder and codebook as they are, C2 a copy of C1 (section 3.2).

    Works shard by shard, so it holds no more than the largest file of the language model or the codebook at a time. The
    language model keeps its dtype, which the new modules share; the quantizer is in float32.

    Args:
        llm: folder or Hub name of a causal language model, in safetensors, with its tokenizer.
        vision: folder or Hub name of a SigLIP with its image processor.
        codebook: folder written by `unicode2 codebook build`.
        output: folder to write.
        visual_head: `UniCode2Config.visual_head`.

    Returns:
        One `{"part", "parameters", "bytes"}` a part, in the order of the data flow; nothing when `output` was finished before.

    Raises:
        `ValueError`: when the parts do not fit together, the language model has no safetensors or is not built as Qwen2 or Llama
        are, or `output` holds anything else.
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
    }
    with Record(output, made_of).making() as finished:
        if finished:
            return []
        with whole_folder(output) as new:
            return write_checkpoint(llm, vision, folder, new, visual_head)


def write_checkpoint(llm: str, vision: str, codebook: str, output: Path, visual_head: str) -> list[dict]:
    """Fills an empty folder, see `compose_checkpoint`."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer

    from .codebook.storage import load_codebook
    from .configuration_unicode2 import UniCode2CodebookConfig, UniCode2Config
    from .modeling_unicode2 import UniCode2ForConditionalGeneration
    from .processing_unicode2 import UniCode2Processor

    tokenizer = AutoTokenizer.from_pretrained(llm, padding_side="left")
    text_config = AutoConfig.from_pretrained(llm)
    vision_model = load_vision_model(vision)
    vision_state = {f"vision_model.{name}": value for name, value in vision_model.state_dict().items()}
    stored = load_codebook(codebook)
    check_encoder(vision, codebook)
    prefix = AutoModelForCausalLM._model_mapping[type(text_config)].base_model_prefix
    if prefix != "model":
        raise ValueError(
            f"{llm} is a {text_config.model_type} model, whose weights begin with {prefix!r}, not with 'model'."
        )
    processor = UniCode2Processor(AutoImageProcessor.from_pretrained(vision), tokenizer, vision_model.config.patch_size)
    config = UniCode2Config(
        text_config=text_config,
        vision_config=vision_model.config,
        codebook_config=UniCode2CodebookConfig(**stored.describe(), **find_digests(vision_state)),
        image_token_id=processor.image_token_id,
        boi_token_id=processor.boi_token_id,
        eoi_token_id=processor.eoi_token_id,
        visual_head=visual_head,
        dtype=text_config.dtype or torch.float32,
    )
    check_processor(processor, config, llm, vision)
    with torch.device("meta"):
        model = UniCode2ForConditionalGeneration(config)
    writer = ShardWriter(output, {name: value.shape for name, value in model.state_dict().items()})
    for file in find_safetensors(llm):
        writer.write("language model", rename_language_model(load_file(file), config))
    writer.write("vision encoder", {f"model.quantizer.{name}": v for name, v in vision_state.items()})
    codebook_state = stored.state_dict()
    writer.write("codebook C1", {f"model.quantizer.codebook.{name}": v for name, v in codebook_state.items()})
    writer.write("C2", {"model.visual_embeddings.weight": stored.codes.to(config.dtype)})
    fresh = initialise(model, ("model.projector", "visual_head"), config.dtype)
    if visual_head == "two_level":
        fresh["visual_head.cell_offsets"] = stored.cell_offsets
    calibrate_visual_head(fresh, stored.codes, config.text_config.hidden_size)
    for part in ("model.projector", "visual_head"):
        writer.write(
            part.split(".")[-1].replace("_", " "), {n: v for n, v in fresh.items() if n.startswith(part + ".")}
        )
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    writer.finish(may_lack=tied)
    write_configurations(model, config, processor, output)
    return writer.report


def load_vision_model(vision: str):
    """The vision encoder of a SigLIP in float32, without the head that pools its patches. Raises `ValueError` when a weight is missing."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig.from_pretrained(vision)
    config.vision_use_head = False
    model, info = SiglipVisionModel.from_pretrained(
        vision, config=config, dtype=torch.float32, output_loading_info=True
    )
    check_encoder_keys(info, vision)
    return model


def write_configurations(model, config, processor, output: Path) -> None:
    """What a fresh checkpoint has beside its weights; with the code that travels."""
    from transformers import GenerationConfig
    from transformers.dynamic_module_utils import custom_object_save

    config.architectures = [type(model).__name__]
    custom_object_save(model, output, config=config)
    config.save_pretrained(output)
    GenerationConfig(
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        max_new_tokens=max(64, 2 * config.num_image_tokens),
        # what `generate(generation_mode="image")` does unless told otherwise: codes are sampled, with guidance, as unicode2-tiny draws best
        image_generation={"do_sample": True, "temperature": 0.6, "top_k": 0, "guidance_scale": 2.0},
    ).save_pretrained(output)
    processor.save_pretrained(output)


def check_encoder(vision: str, codebook: str) -> None:
    """Raises `ValueError` when a codebook was built with another encoder than `vision`, as far as it says with which."""
    from .codebook.features import Encoder
    from .codebook.storage import load_provenance

    command = load_provenance(codebook).get("command", {})
    known = command.get("encoder_sha256")
    own = Encoder(vision, command.get("dtype", "float32")).fingerprint() if known else None
    if own != known:
        raise ValueError(
            f"{codebook} was built with another encoder (SHA-256 {shorten(known)}) than {vision} ({shorten(own)}); "
            "give that encoder, or a codebook of this one."
        )


def check_processor(processor, config, llm: str, vision: str) -> None:
    """Raises `ValueError` when the tokenizer lacks a token that images need, or the images do not have the encoder's size."""
    vocabulary = processor.tokenizer.get_vocab()
    missing = [t for t in (processor.image_token, processor.boi_token, processor.eoi_token) if t not in vocabulary]
    if missing:
        raise ValueError(f"The tokenizer of {llm} lacks {', '.join(missing)}; add them and resize the language model.")
    if processor.num_image_tokens != config.num_image_tokens:
        raise ValueError(
            f"The image processor of {vision} makes images of {processor.num_image_tokens} patches, "
            f"its encoder reads {config.num_image_tokens}."
        )


def find_safetensors(source: str) -> list[Path]:
    """The safetensors files of a folder, or of a Hub repository, downloaded. Raises `ValueError` when there are none."""
    folder = Path(source)
    if not folder.is_dir():
        patterns = ["*.safetensors", "*.safetensors.index.json"]
        folder = Path(snapshot_download(source, allow_patterns=patterns, ignore_patterns=["*/*"]))
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    files = sorted(folder / name for name in names)
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ValueError(f"{source} lacks {', '.join(absent)}; the weights of a model must be in safetensors.")
    return files


def rename_language_model(state: dict[str, torch.Tensor], config) -> dict[str, torch.Tensor]:
    """Weights of a causal language model under the names that they have inside UniCode²; a tied head is left out."""
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
        state |= {
            f"{part}.{name}": value.to(dtype) if value.is_floating_point() else value
            for name, value in module.state_dict().items()
        }
    return state


def calibrate_visual_head(state: dict[str, torch.Tensor], codes: torch.Tensor, hidden_size: int) -> None:
    """Scales a fresh head so that the scores of the codes `(codebook_size, codebook_dim)` start about one apart, for normalised hidden
    states: the first loss is then near ln K however long the codes are."""
    spread = (codes - codes.mean(0)).square().sum(-1).mean().sqrt()
    for name, value in state.items():
        if name.startswith("visual_head.linear.weight"):
            value /= value.float().std() * hidden_size**0.5 * spread + 1e-12


class ShardWriter:
    """Writes the weights of a checkpoint file by file and checks them against the names and shapes that the model has.

    Args:
        output: empty folder to write to.
        expected: name to shape of everything in the model's state dict.
    """

    def __init__(self, output: Path, expected: dict[str, torch.Size]):
        self.folder, self.expected, self.report, self.weight_map = output, dict(expected), [], {}
        self.num_files = 0

    def write(self, part: str, state: dict[str, torch.Tensor]) -> None:
        """Writes one file. Raises `ValueError` on a weight that the model does not have, or has in another shape."""
        for name, value in state.items():
            if name not in self.expected:
                raise ValueError(f"The {part} has a weight {name} that the model does not have.")
            if value.shape != self.expected[name]:
                raise ValueError(
                    f"{name} of the {part} is {tuple(value.shape)}; the model has {tuple(self.expected[name])}."
                )
        self.num_files += 1
        file = f"part-{self.num_files:05d}.safetensors"
        save_file({n: v.contiguous() for n, v in state.items()}, self.folder / file, metadata={"format": "pt"})
        self.weight_map |= dict.fromkeys(state, file)
        if not self.report or self.report[-1]["part"] != part:
            self.report.append({"part": part, "parameters": 0, "bytes": 0})
        self.report[-1]["parameters"] += sum(value.numel() for value in state.values())
        self.report[-1]["bytes"] += sum(value.nbytes for value in state.values())

    def finish(self, may_lack: set[str]) -> None:
        """Gives the files their final names and writes the index. Raises `ValueError` when a weight never came."""
        missing = sorted(self.expected.keys() - self.weight_map.keys() - may_lack)
        if missing:
            raise ValueError(f"{len(missing)} of {len(self.expected)} weights are missing, the first is {missing[0]}.")
        names = {
            f"part-{i:05d}.safetensors": f"model-{i:05d}-of-{self.num_files:05d}.safetensors"
            for i in range(1, self.num_files + 1)
        }
        for old, new in names.items():
            (self.folder / old).rename(self.folder / new)
        index = {
            "metadata": {"total_size": sum(part["bytes"] for part in self.report)},
            "weight_map": {name: names[file] for name, file in sorted(self.weight_map.items())},
        }
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def check_checkpoint(name: str, *files: str) -> None:
    """Raises `FileNotFoundError` when the folder `name` lacks `config.json` or one of `files`. What is no folder may be a Hub name."""
    missing = [file for file in ("config.json", *files) if not (Path(name) / file).is_file()]
    if Path(name).is_dir() and missing:
        raise FileNotFoundError(f"{name} is no whole checkpoint: it has no {missing[0]}; copy or assemble it again.")


def assemble_pipeline(
    model: str,
    mapper: str,
    decoder: str,
    output: str,
    image_size: int,
    num_candidates: int = 1,
    true_cfg_scale: float = 1.0,
) -> bool:
    """Writes one repository that is both: a Transformers checkpoint in its root and a Diffusers pipeline around it.

    Everything is stored in bfloat16, except what of the quantizer bfloat16 does not hold exactly, since its values define the codes.

    Args:
        model: folder of a trained UniCode² checkpoint.
        mapper: folder of a trained condition mapper.
        decoder: folder or Hub name of the FLUX pipeline that the mapper was trained against.
        output: folder to write.
        image_size: side of the images that the pipeline draws, in pixels.
        num_candidates: images that the language model writes for a prompt, the best of which is painted.
        true_cfg_scale: classifier-free guidance with which FLUX paints; 1 is without.

    Returns:
        Whether `output` was finished before.

    Raises:
        `ValueError`: when `image_size` is no multiple of what the VAE and the patches of FLUX cut an image into, or `output` holds
        anything else.
    """
    numbers = {"image_size": image_size, "num_candidates": num_candidates, "true_cfg_scale": true_cfg_scale}
    parts = {"model": hash_source(model), "mapper": hash_source(mapper), "decoder": hash_source(decoder, deep=True)}
    with Record(output, {"command": "assemble", **parts, **numbers}).making() as finished:
        if not finished:
            with whole_folder(output) as new:
                write_pipeline(model, mapper, decoder, new, **numbers)
    return finished


def write_pipeline(model: str, mapper: str, decoder: str, output: Path, image_size: int, **numbers) -> None:
    """Fills an empty folder, see `assemble_pipeline`."""
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
        *(parts.scheduler, parts.vae, parts.transformer, encoder, processor, condition_mapper),
        image_size=image_size,
        **numbers,
    )
    grid = 2 * pipe.vae_scale_factor
    if image_size % grid:
        raise ValueError(f"--image-size is {image_size}; this decoder paints multiples of {grid} pixels.")
    state = {
        name: value.bfloat16() if value.dtype == torch.float32 and value.bfloat16().float().equal(value) else value
        for name, value in encoder.state_dict().items()
    }
    encoder.save_pretrained(output, state_dict=state)
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
    report = compose_checkpoint(args.llm, args.vision, args.codebook, args.output, args.visual_head)
    if not report:
        print(f"{args.output} is finished; nothing to do")
        return
    for part in [*report, {"part": "all", **{key: sum(p[key] for p in report) for key in ("parameters", "bytes")}}]:
        print(f"{part['part']:>15} {part['parameters']:>15,} parameters {part['bytes']:>15,} bytes")
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
    parser.add_argument(
        "--num-candidates",
        type=int,
        default=1,
        help="images written for a prompt, the best of which is painted (default: %(default)s)",
    )
    parser.add_argument(
        "--true-cfg-scale",
        type=float,
        default=1.0,
        help="classifier-free guidance of FLUX; 1 is without (default: %(default)s)",
    )
    parser.add_argument("--output", required=True, help="folder to write")
    return parser


def assemble(args: argparse.Namespace) -> None:
    for name in ("image_size", "num_candidates"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1.")
    if not 1 <= args.true_cfg_scale < float("inf"):
        raise ValueError(
            f"--true-cfg-scale is {args.true_cfg_scale:g}; it must be at least 1, which is without guidance."
        )
    for name in (args.model, args.mapper):
        check_checkpoint(name)
    numbers = (args.image_size, args.num_candidates, args.true_cfg_scale)
    finished = assemble_pipeline(args.model, args.mapper, args.decoder, args.output, *numbers)
    print(f"{args.output} is finished; nothing to do" if finished else f"{args.output}: assembled")
