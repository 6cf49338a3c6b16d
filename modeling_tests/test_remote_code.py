"""A checkpoint loads, and gives the same bits, in a process that cannot import the package."""

import json
import shutil
import subprocess
import sys

import torch
from safetensors.torch import load_file, save_file

SCRIPT = """
import importlib.util, json, sys
sys.path = [p for p in sys.path if not p.rstrip("/").endswith("src")]
sys.meta_path = [f for f in sys.meta_path if "editable" not in str(f).lower()]
assert importlib.util.find_spec("transformers_unicode2") is None
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
torch.set_num_threads(2)
folder, photo, damaged = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=Image.open(photo), text="<|image_pad|>what is this?", return_tensors="pt")
output = {}
for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    torch.manual_seed(0)
    output[auto.__name__] = {
        "logits": model(**inputs).logits[0, -1, :8].double().tolist(),
        "text": model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist(),
        "image": model.generate(inputs["input_ids"][:, -4:], generation_mode="image", do_sample=False)[0].tolist(),
    }
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert model.get_image_tokens(inputs["pixel_values"]).shape == (1, 64)
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "unicode2"
for auto in (AutoModel, AutoModelForImageTextToText):
    try:
        auto.from_pretrained(damaged, trust_remote_code=True)
    except ValueError as error:
        assert "The codes in" in str(error), error
    else:
        raise AssertionError("a damaged codebook was loaded")
print(json.dumps(output))
"""


def damage(folder, copy):
    """A copy of a checkpoint with one flipped bit in a code."""
    shutil.copytree(folder, copy)
    state = load_file(copy / "model.safetensors")
    state["model.quantizer.codebook.codes"].view(torch.int32)[7, 7] ^= 1
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_remote_code_gives_the_same_bits(tiny_model, processor, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    tiny_model.save_pretrained(tmp_path / "repository")  # with the code that travels
    processor.save_pretrained(tmp_path / "repository")
    run = subprocess.run(
        [
            sys.executable,
            "-S",
            "-c",
            "import site; site.main()\n" + SCRIPT,
            str(tmp_path / "repository"),
            str(tmp_path / "photo.png"),
            str(damage(tmp_path / "repository", tmp_path / "damaged")),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    inputs = processor(images=photo, text="<|image_pad|>what is this?", return_tensors="pt")
    with torch.no_grad():
        expected = {
            "logits": tiny_model(**inputs).logits[0, -1, :8].double().tolist(),
            "text": tiny_model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist(),
            "image": tiny_model.generate(inputs["input_ids"][:, -4:], generation_mode="image", do_sample=False)[
                0
            ].tolist(),
        }
    for output in json.loads(run.stdout.splitlines()[-1]).values():
        assert output == expected
