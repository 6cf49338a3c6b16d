"""What every loader checks: nothing that defines the codes of an image is missing, damaged, rounded or exchanged."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.core_model_loading import WeightRenaming
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
AGAIN = "Copy or build it again."
# What each digest in a codebook's configuration is of: names of weights, as they end.
DIGESTS = {
    "codes_sha256": r"codebook\.codes",
    "cells_sha256": r"codebook\.cell_(?:centroids|offsets)",
    "vision_sha256": r"vision_model\..+",
    "previews_sha256": r"codebook\.previews",
}
# Entries of a configuration that do not change what the model computes.
NOT_HASHED = ("transformers_version", "dtype", "architectures", "processor_class")
# Those that do not change the features of a frozen encoder either. Not every version of Transformers writes all of
# them.
NOT_FEATURES = (
    *NOT_HASHED,
    *("attention_dropout", "initializer_factor", "initializer_range", "projection_dim", "vision_use_head"),
    *("chunk_size_feed_forward", "id2label", "is_encoder_decoder", "label2id", "output_attentions"),
    *("output_hidden_states", "problem_type", "return_dict", "tie_word_embeddings"),
)
# What modules with weights of their own say of their size, as linear layers, convolutions, embeddings and norms do.
SIZES = ("in_features", "in_channels", "num_embeddings", "normalized_shape")


def find_digests(tensors: dict[str, torch.Tensor], wanted: Iterable[str] = tuple(DIGESTS)) -> dict[str, str]:
    """The digests of codes, cells, encoder and thumbnails, as far as a quantizer or a model has them in its weights."""
    digests = {}
    for digest in wanted:
        matches = {name: re.search(rf"(?:^|\.)({DIGESTS[digest]})$", name) for name in tensors}
        found = {match[1]: tensors[name] for name, match in matches.items() if match}
        # ZeRO-3 leaves weights empty outside of their modules, so that they cannot be hashed.
        if found and not any(tensor.is_meta or not tensor.numel() for tensor in found.values()):
            digests[digest] = hash_tensors(found)
    return digests


def hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names, shapes and values: bytes, or little-endian float32 or int64, whatever dtype holds them.

    500K codes of width 1152 take 1.2 s, a third of what it takes to read them from a disk at 0.7 GB/s.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        kind, dtype = ("<f4", torch.float32) if tensor.is_floating_point() else ("<i8", torch.int64)
        if tensor.dtype == torch.uint8:
            kind, dtype = "|u1", torch.uint8
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        for part in tensor.detach().reshape(-1).split(2**22):
            digest.update(part.to("cpu", dtype).numpy().astype(kind, copy=False))
    return digest.hexdigest()


def check_digests(tensors: dict[str, torch.Tensor], config, source: str) -> None:
    """Raises `ValueError` when the weights of a quantizer have other digests than its codebook's configuration."""
    wanted = {name: getattr(config, name) for name in DIGESTS if getattr(config, name)}
    for digest, found in find_digests(tensors, wanted).items():
        if found != wanted[digest]:
            parts = {"vision_sha256": "weights of the encoder", "previews_sha256": "thumbnails"}
            part = parts.get(digest, digest.removesuffix("_sha256"))
            raise ValueError(
                f"The {part} in {source} are not those that its configuration names (SHA-256 {found[:12]}, there "
                f"{wanted[digest][:12]}): they are damaged, rounded or others. If that is on purpose, set `{digest}` "
                "to null there."
            )


def hash_settings(config, dtype: str = "float32") -> str:
    """SHA-256 of what the features of an encoder depend on in its configuration, as far as it is not the default.

    The dtype that it computes in counts likewise.
    """
    usual, own = type(config)().to_dict(), config.to_dict()
    kept = {name: value for name, value in own.items() if name not in NOT_FEATURES and not name.startswith("_")}
    kept = {name: value for name, value in kept.items() if name == "model_type" or value != usual.get(name)}
    if dtype != "float32":
        kept["encoder_dtype"] = dtype
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def check_settings(vision_config, codebook_config, source: str) -> None:
    """Raises `ValueError` when the encoder's configuration or dtype has another digest than the codebook's names."""
    found, wanted = hash_settings(vision_config, codebook_config.encoder_dtype), codebook_config.vision_config_sha256
    if wanted not in (None, found):
        raise ValueError(
            f"The `vision_config` of {source}, or its `encoder_dtype`, is not that which its codebook was saved with "
            f"(SHA-256 {found[:12]}, then {wanted[:12]}), so images would get other codes. If that is on purpose, set "
            "`vision_config_sha256` to null there."
        )


def check_codebook(codebook: nn.Module, source: str) -> None:
    """Raises `ValueError` on cells that do not hold the codes exactly, and on codes or centroids that are not finite.

    What is on the meta device cannot be looked at.
    """
    if codebook.codes.is_meta:
        return
    check_cells(codebook.cell_offsets, len(codebook.codes), source)
    check_finite("codes", codebook.codes, source)
    check_finite("cell centroids", codebook.cell_centroids, source)


def check_cells(offsets: torch.LongTensor, size: int, source: str) -> None:
    """Raises `ValueError` unless offsets `(num_cells + 1,)` lead through codes 0 to `size` without going back."""
    if offsets.dtype != torch.long:
        raise ValueError(f"The cell offsets of {source} are {offsets.dtype}, not whole numbers of 64 bits. {AGAIN}")
    first, last = offsets[0].item(), offsets[-1].item()
    if first != 0 or last != size:
        raise ValueError(f"The cells of {source} go from {first} to {last}, not through codes 0 to {size}. {AGAIN}")
    back = (offsets.diff() < 0).nonzero()[:, 0].tolist()
    if back:
        raise ValueError(
            f"{len(back)} of {len(offsets) - 1} cells of {source} end before they begin, the first is {back[0]}. "
            f"{AGAIN}"
        )


def check_finite(name: str, rows: torch.Tensor, source: str) -> None:
    """Raises `ValueError` when some of the rows `(num_rows, dim)` are not finite."""
    # A finite sum has finite terms, and takes one pass.
    if rows.sum().isfinite():
        return
    bad = (~rows.isfinite().all(-1)).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(rows)} {name} of {source} are not finite; the first is number {bad[0]}. {AGAIN}"
        )


def load_whole(load: Callable, source, *args, **kwargs):
    """A model, or with `output_loading_info` a model and the report, that was loaded and checked, its quantizer frozen.

    The encoder is loaded in float32 and then brought to its dtype, whatever dtype the model is asked for in.

    Args:
        load (`Callable`): stock `from_pretrained`.
        source (`str` or `Path`, *optional*): folder or Hub name.

    Raises:
        `ValueError`: on a file that is damaged, on weights of another size, and see `check_loaded`.
    """
    want_info, ignored = (kwargs.pop(name, False) for name in ("output_loading_info", "ignore_mismatched_sizes"))
    with damage_named(source, kwargs):
        # Sizes are compared below, where both can be told.
        model, info = load(source, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    if not ignored:
        check_sizes(info, "the state dict" if source is None else str(source))
    check_loaded(model, info, source, want_info)
    model.get_quantizer().freeze()
    forget_unused_names(model)
    return (model, info) if want_info else model


def forget_unused_names(model) -> None:
    """Drops changes of weights' names that the checkpoint had no use for, which saving would undo all the same.

    Transformers does so itself, but not under DeepSpeed ZeRO-3.
    """
    changes = getattr(model, "_weight_conversions", None)
    if changes:
        model._weight_conversions = [
            change for change in changes if not isinstance(change, WeightRenaming) or change.was_used()
        ]


def read_quantizer(name, options: dict) -> dict[str, torch.Tensor] | None:
    """The quantizer's weights under their names in a whole checkpoint, from those of its files that hold any.

    `None` unless `name`, a folder or Hub repository, is a whole checkpoint in several safetensors files.
    """
    options = {key: value for key, value in options.items() if key in HUB_OPTIONS}
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    index = name and cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **options)
    # Transformers takes a single file first; an index beside it is an old one.
    if not index or cached_file(name, SAFE_WEIGHTS_NAME, **quiet, **options):
        return None
    with open(index) as file:
        places = json.load(file)["weight_map"]
    wanted = {key: place for key, place in places.items() if re.match(r"(model\.)?quantizer\.", key)}
    state = {}
    for place in sorted(set(wanted.values())):
        with safe_open(cached_file(name, place, **options), framework="pt") as tensors:
            state |= {key: tensors.get_tensor(key) for key in wanted if wanted[key] == place}
    return state or None


@contextmanager
def damage_named(source, options: dict) -> Iterator[None]:
    """Has an error name the damaged file that it came from, if there is one in a folder or Hub repository `source`."""
    try:
        yield
    except Exception:
        hub = {name: value for name, value in options.items() if name in HUB_OPTIONS}
        quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
        config = source and cached_file(source, CONFIG_NAME, **quiet, **hub)
        if config:
            check_files(Path(config).parent)
        raise


def check_files(folder: Path) -> None:
    """Raises `ValueError` when a configuration, an index or weights in a folder cannot be read; reads no weight."""
    for name in ("*config.json", "*index.json", "*.safetensors"):
        for file in sorted(folder.glob(name)):
            try:
                check_file(file)
            except (ValueError, SafetensorError) as error:
                raise ValueError(f"{file} is damaged ({str(error).splitlines()[0]}). {AGAIN}") from error


def check_file(file: Path) -> None:
    """Raises `ValueError` or `SafetensorError` when a JSON object or a file of weights cannot be read."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt"):
            return
    content = json.loads(file.read_text())
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    if file.name.endswith(".safetensors.index.json") and not isinstance(content.get("weight_map"), dict):
        raise ValueError("it has no weight_map")


def check_sizes(info: dict, source: str) -> None:
    """Raises `ValueError` when loading reports weights of another size than the configuration gives them."""
    if info["mismatched_keys"]:
        name, stored, expected = sorted(info["mismatched_keys"])[0]
        raise ValueError(
            f"{len(info['mismatched_keys'])} weights in {source} have another size than in its configuration; the "
            f"first is {name}, {tuple(stored)} there and {tuple(expected)} in the configuration."
        )


def check_loaded(model, info: dict, source: str | None, want_info: bool) -> None:
    """Raises `ValueError` when a model that was loaded gives images other codes than its checkpoint, or is random.

    Args:
        model (`PreTrainedModel`): has `get_quantizer()` and a configuration with a `codebook_config`.
        info (`dict`): what loading reports.
        source (`str`, *optional*): folder or Hub name of the weights; `None` for a state dict.
        want_info (`bool`): whether the caller reads the report, so that weights may be missing.
    """
    source = "the state dict" if source is None else str(source)
    quantizer, config = model.get_quantizer(), model.config.codebook_config
    # What the names of its weights hold.
    part = "" if model is quantizer else "quantizer."
    if not want_info:
        check_keys(info, source, part)
    check_settings(model.config.vision_config, config, source)
    if getattr(model, "is_quantized", False):
        dtypes = (torch.float32, quantizer.encoder_dtype)
        check_precision(quantizer.vision_model, dtypes, f"would be quantized by {model.quantization_method.value}")
    absent = {*info["missing_keys"], *(key for key, _, _ in info["mismatched_keys"])}
    if not any("codebook." in key for key in absent):
        check_codebook(quantizer.codebook, source)
        check_head(model, quantizer.codebook, absent, source)
    if not any(part in key for key in absent):
        check_digests(quantizer.state_dict(), config, source)


def check_keys(info: dict, source: str, part: str) -> None:
    """Raises `ValueError` on weights that loading did not find, and on those of the quantizer that have no place.

    The names of the quantizer's weights hold `part`. A weight of another size has no place either.
    """
    missing, surplus = sorted(info["missing_keys"]), sorted(key for key in info["unexpected_keys"] if part in key)
    others = sorted(row for row in info["mismatched_keys"] if part in row[0])
    codebook = [key for key in missing if "codebook." in key]
    if any(key.endswith("codebook.codes") for key in codebook):
        raise ValueError(
            f"The checkpoint has no codebook: {', '.join(codebook)} not found in {source}. Build one with "
            "`unicode2 codebook build`."
        )
    if missing:
        raise ValueError(
            f"In {source} {len(missing)} weights are missing, which would be random; the first is {missing[0]}. "
            f"{AGAIN} `output_loading_info=True` loads it all the same."
        )
    if surplus:
        raise ValueError(
            f"In {source} are {len(surplus)} weights of the frozen quantizer that its configuration has no place for; "
            f"the first is {surplus[0]}. Give it the configuration that it was saved with."
        )
    if others:
        name, stored, expected = others[0]
        raise ValueError(
            f"{len(others)} weights of the frozen quantizer in {source} have another size, which no option may ignore; "
            f"the first is {name}, {tuple(stored)} there and {tuple(expected)} in the configuration."
        )


def check_head(model: nn.Module, codebook: nn.Module, absent: set[str], source: str) -> None:
    """Raises `ValueError` when a two-level visual head has other cells than the codebook."""
    cells = dict(model.named_buffers()).get("visual_head.cell_offsets")
    if cells is None or "visual_head.cell_offsets" in absent or cells.is_meta or codebook.cell_offsets.is_meta:
        return
    wrong = (cells.cpu() != codebook.cell_offsets.cpu()).sum().item()
    if wrong:
        raise ValueError(
            f"{wrong} of {len(cells)} cell offsets of the visual head of {source} are not the codebook's. {AGAIN}"
        )


def check_precision(
    encoder: nn.Module, dtypes: tuple[torch.dtype, ...], what: str = "are not as they were loaded"
) -> None:
    """Raises `ValueError` when weights of the frozen encoder are in other `dtypes`, or its layers were exchanged.

    Looks at types alone, so that the weights may be anywhere, as on the meta device while they are offloaded.
    """
    if torch.compiler.is_compiling():
        return
    weights = dict(encoder.named_parameters())
    # Those of torch itself, as a `DTensor`, hold the same values.
    changed = [name for name, weight in weights.items() if weight.dtype not in dtypes or not is_of_torch(weight)]
    layers = [n for n, m in encoder.named_modules() if any(hasattr(m, size) for size in SIZES) and not is_of_torch(m)]
    if changed or layers:
        count = f"{len(changed)} of {len(weights)} weights" if changed else f"{len(layers)} layers"
        raise ValueError(
            f"{count} of the frozen encoder {what}, which changes the codes; the first is {(changed or layers)[0]}. "
            "Leave `vision_model` out of what is quantized or converted, and load the model again."
        )


def is_of_torch(value) -> bool:
    """Whether the class of a weight or a layer is one of torch's, and none that quantizes."""
    name = f"{type(value).__module__}.{type(value).__name__}"
    return name.startswith(("torch.nn.", "torch.distributed.", "torch._", "torch.Tensor"))
