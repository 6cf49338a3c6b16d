"""Auto classes from folders and from a Hub, installed and as remote code, through load, save and load again."""

import json
import os
import subprocess
import sys

import pytest
import torch
from fake_hub import serve_hub

from transformers_unicode2 import UniCode2ForConditionalGeneration

WITHOUT_PACKAGE = """
import sys
sys.path = [p for p in sys.path if not p.rstrip("/").endswith("src")]
sys.meta_path = [f for f in sys.meta_path if "editable" not in str(f).lower()]
import importlib.util
assert importlib.util.find_spec("transformers_unicode2") is None
"""
WITH_PACKAGE = "import transformers_unicode2\n"
LOAD = """
import json, sys, torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM
torch.set_num_threads(2)
source, target, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
config = AutoConfig.from_pretrained(source, **options)
assert config.model_type == "unicode2" and config.num_image_tokens == 16
processor = AutoProcessor.from_pretrained(source, **options)
assert type(processor).__name__ == "UniCode2Processor"
assert type(AutoTokenizer.from_pretrained(source, **options)).__name__ == "Qwen2Tokenizer"
assert type(AutoImageProcessor.from_pretrained(source, **options)).__name__ == "UniCode2ImageProcessor"
names = {}
for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model = auto.from_pretrained(source, **options).eval()
    names[auto.__name__] = type(model).__name__
    assert not any(p.requires_grad for p in model.get_quantizer().parameters())
ids = torch.arange(20, 40)[None]
with torch.no_grad():
    logits = model(ids).logits
print(json.dumps({"names": names, "logits": logits[0, -1, ::97].double().tolist(), "module": type(model).__module__}))
if target:
    model.save_pretrained(target)
    processor.save_pretrained(target)
"""
CLASSES = {
    "AutoModel": "UniCode2Model",
    "AutoModelForImageTextToText": "UniCode2ForConditionalGeneration",
    "AutoModelForMultimodalLM": "UniCode2ForConditionalGeneration",
}


def run_python(code, *arguments, **environment):
    command = [sys.executable, "-S", "-c", "import site; site.main()\n" + code, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def load(source, target="", installed=True, environment=None, **options):
    options["trust_remote_code"] = not installed
    output = run_python(
        (WITH_PACKAGE if installed else WITHOUT_PACKAGE) + LOAD,
        source,
        target,
        json.dumps(options),
        **(environment or {}),
    )
    report = json.loads(output.splitlines()[-1])
    assert report["names"] == CLASSES
    assert report["module"].startswith("transformers_unicode2." if installed else "transformers_modules.")
    return report["logits"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory, processor, make_config):
    """Folder of a small checkpoint, sharded, with its processor and code."""
    folder = tmp_path_factory.mktemp("hub") / "unicode2-small"
    make_checkpoint(folder, processor, make_config, seed=0)
    return folder


def make_checkpoint(folder, processor, make_config, seed):
    torch.manual_seed(seed)
    ids = {name: getattr(processor, name) for name in ("image_token_id", "boi_token_id", "eoi_token_id")}
    config = make_config(**ids)
    model = UniCode2ForConditionalGeneration(config)
    model.get_quantizer().codebook.codes.normal_()
    model.save_pretrained(folder, max_shard_size="100KB")
    processor.save_pretrained(folder)


def test_every_save_carries_all_that_remote_code_needs(repository):
    config = json.loads((repository / "config.json").read_text())
    for name in ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoProcessor"):
        module, _ = config["auto_map"][name].split(".")
        assert (repository / f"{module}.py").is_file(), name
    assert len(list(repository.glob("model-*.safetensors"))) > 1


@pytest.mark.slow
@pytest.mark.parametrize("saved_by", ["installed", "remote"])
@pytest.mark.parametrize("loaded_by", ["installed", "remote"])
def test_load_save_load_in_each_combination(repository, tmp_path, saved_by, loaded_by):
    first = load(repository, tmp_path / "again", installed=saved_by == "installed")
    second = load(tmp_path / "again", installed=loaded_by == "installed")
    assert first == second


@pytest.mark.slow
def test_hub_and_pinned_revision(repository, processor, make_config, tmp_path):
    make_checkpoint(tmp_path / "old", processor, make_config, seed=1)
    with serve_hub({"org/unicode2-small": {"main": repository, "v0": tmp_path / "old"}}) as (address, asked):
        environment = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        logits = {}
        for installed in (False, True):
            for revision in ("main", "v0"):
                logits[installed, revision] = load(
                    "org/unicode2-small", installed=installed, environment=environment, revision=revision
                )
    assert logits[False, "main"] == logits[True, "main"] == load(repository)
    assert logits[False, "v0"] == logits[True, "v0"] == load(tmp_path / "old")
    assert logits[False, "main"] != logits[False, "v0"]
    assert any(path.endswith("model-00001-of-00003.safetensors") or "/model-" in path for path in asked)


def test_quantizer_loads_alone(repository, tmp_path):
    """From the whole checkpoint, reading only its own weights; and from a folder of its own."""
    code = """
import json, sys, torch
from transformers_unicode2 import UniCode2Quantizer
quantizer = UniCode2Quantizer.from_pretrained(sys.argv[1])
pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
print(json.dumps(quantizer.encode_images(pixels).tolist()))
quantizer.save_pretrained(sys.argv[2])
"""
    whole = json.loads(run_python(code, repository, tmp_path / "quantizer").splitlines()[-1])
    model = UniCode2ForConditionalGeneration.from_pretrained(repository)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert whole == model.get_quantizer().encode_images(pixels).tolist()
    alone = """
import json, sys, torch
from transformers import AutoModel
quantizer = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
print(json.dumps(quantizer(pixels).codes.tolist()))
"""
    for head in (WITHOUT_PACKAGE, WITH_PACKAGE):
        assert json.loads(run_python(head + alone, tmp_path / "quantizer").splitlines()[-1]) == whole
    held = sum(file.stat().st_size for file in (tmp_path / "quantizer").glob("*.safetensors"))
    assert held < 0.5 * sum(file.stat().st_size for file in repository.glob("*.safetensors"))


def test_quantizer_fetches_no_file_without_a_part_of_it(repository, tmp_path):
    places = json.loads((repository / "model.safetensors.index.json").read_text())["weight_map"]
    wanted = {place for name, place in places.items() if "quantizer." in name}
    assert wanted < set(places.values())
    code = """
import json, sys, torch
from transformers_unicode2 import UniCode2Quantizer
quantizer = UniCode2Quantizer.from_pretrained("org/tiny")
pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
print(json.dumps(quantizer.encode_images(pixels).tolist()))
"""
    with serve_hub({"org/tiny": {"main": repository}}) as (address, asked):
        environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        codes = json.loads(run_python(code, **environment).splitlines()[-1])
    # A single file would come first, as in Transformers; there is none
    names = {path.split("/")[-1] for path in asked if path.endswith(".safetensors")}
    assert names - {"model.safetensors"} == wanted and not (repository / "model.safetensors").exists()
    model = UniCode2ForConditionalGeneration.from_pretrained(repository)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert codes == model.get_quantizer().encode_images(pixels).tolist()


def test_configuration_saved_alone_brings_all_code(make_config, tmp_path):
    make_config().save_pretrained(tmp_path / "whole")
    make_config().get_quantizer_config().save_pretrained(tmp_path / "quantizer")
    for folder in (tmp_path / "whole", tmp_path / "quantizer"):
        named = json.loads((folder / "config.json").read_text())["auto_map"].values()
        assert all((folder / f"{name.split('.')[0]}.py").is_file() for name in named)
    code = (
        WITHOUT_PACKAGE
        + """
from transformers import AutoConfig, AutoModelForImageTextToText
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(AutoModelForImageTextToText.from_config(config, trust_remote_code=True)).__name__)
"""
    )
    assert run_python(code, tmp_path / "whole").split()[-1] == "UniCode2ForConditionalGeneration"


def test_a_model_whose_class_a_library_changed_is_saved_with_our_code(model, tmp_path):
    """FSDP gives a model a class of its own, whose file is no code of ours."""
    model.__class__ = type("FSDPModel", (type(model),), {"__module__": "torch.distributed.fsdp"})
    model.save_pretrained(tmp_path)
    assert all("_unicode2" in file.name for file in tmp_path.glob("*.py"))
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForImageTextToText"] == "modeling_unicode2.UniCode2ForConditionalGeneration"
