"""`DiffusionPipeline.from_pretrained` from folders and a Hub, with the package and as remote code without it."""

import json

import pytest
import torch
from fake_hub import serve_hub
from test_hub_unicode2 import WITH_PACKAGE, WITHOUT_PACKAGE, run_python

from transformers_unicode2 import UniCode2FluxPipeline

DRAW = """
import json, sys, torch
torch.set_num_threads(2)
def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    ids, seeded = torch.arange(800, 864)[None], torch.Generator().manual_seed(0)
    images = pipe(visual_token_ids=ids, generator=seeded, num_inference_steps=1, output_type="pt").images
    model = pipe.vision_language_encoder
    inputs = pipe.processor(text="<|im_start|>user\\na red circle", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs, output_modality="image").logits[0, -1, 768:]
    return {"class": type(pipe).__name__, "sizes": [pipe.config.image_size, pipe.config.num_candidates],
        "settings": model.generation_config.image_generation, "logits": logits.double().std().item(),
        "pixels": images.double().std().item(),
        "classes": {name: type(part).__module__.split(".")[0] for name, part in pipe.components.items()}}
"""
LOAD = """
from diffusers import DiffusionPipeline
source, target, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
pipe = DiffusionPipeline.from_pretrained(source, **options)
print(json.dumps(draw(pipe)))
if target:
    pipe.save_pretrained(target)
"""
OURS = {"vision_language_encoder", "processor", "condition_mapper"}


@pytest.fixture(scope="module")
def repository(tiny_checkpoint, tmp_path_factory):
    """unicode2-tiny as its pipeline saves it: sharded, with all code that travels."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    UniCode2FluxPipeline.from_pretrained(tiny_checkpoint).save_pretrained(folder, max_shard_size="5MB")
    return folder


def load(source, target="", installed=True, environment=None, **options):
    head = WITH_PACKAGE if installed else WITHOUT_PACKAGE
    options = options if installed else {"trust_remote_code": True, **options}
    code = head + DRAW + LOAD
    report = json.loads(run_python(code, source, target, json.dumps(options), **(environment or {})).splitlines()[-1])
    assert report.pop("class") == "UniCode2FluxPipeline"
    classes = report.pop("classes")
    package = {classes[name] for name in OURS}
    assert (
        package == {"transformers_unicode2"} if installed else package == {"transformers_modules", "diffusers_modules"}
    )
    return report


def test_a_saved_pipeline_is_a_whole_repository(repository, tiny_checkpoint, tmp_path):
    index = json.loads((repository / "model_index.json").read_text())
    assert (repository / f"{index['_class_name'][0]}.py").is_file()
    assert not any((repository / name).exists() for name in ("vision_language_encoder", "processor"))
    assert len(list(repository.glob("model-*-of-*.safetensors"))) > 1
    auto_map = json.loads((repository / "config.json").read_text())["auto_map"]
    assert all((repository / f"{name.split('.')[0]}.py").is_file() for name in auto_map.values())
    pipe = UniCode2FluxPipeline.from_pretrained(repository)
    pipe.save_config(tmp_path)
    assert {file.name for file in tmp_path.glob("*.py")} == {file.name for file in repository.glob("*.py")}
    (tmp_path / "vision_language_encoder").mkdir()  # where diffusers would look first
    pipe.save_pretrained(tmp_path)
    pipe.save_pretrained(tmp_path)  # over itself
    assert not (tmp_path / "vision_language_encoder").exists() and (tmp_path / "model.safetensors").is_file()
    assert UniCode2FluxPipeline.from_pretrained(tmp_path).config.image_size == pipe.config.image_size


@pytest.mark.parametrize("first", ["package", pytest.param("diffusers", marks=pytest.mark.slow)])
def test_with_the_package_no_class_is_touched_and_no_code_trusted(repository, tiny_checkpoint, tmp_path, first):
    code = (
        """
import sys
first, package, embedded, source = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4]
if first == "diffusers":
    from diffusers import AutoPipelineForText2Image, DiffusionPipeline
import transformers_unicode2
if first != "diffusers":
    assert "diffusers" not in sys.modules
"""
        + DRAW
        + """
from diffusers import AutoModel, AutoPipelineForImage2Image, AutoPipelineForText2Image, DiffusionPipeline, FluxPipeline
seen = [draw(DiffusionPipeline.from_pretrained(folder)) for folder in (embedded, source, "org/tiny")]
seen += [draw(auto.from_pretrained("org/tiny")) for auto in (AutoPipelineForText2Image, AutoPipelineForImage2Image)]
pipe = DiffusionPipeline.from_pretrained("org/tiny", trust_remote_code=True)
seen += [draw(pipe), draw(AutoPipelineForText2Image.from_pipe(pipe, dtype=torch.float32))]
mapper = AutoModel.from_pretrained(source, subfolder="condition_mapper")
assert type(mapper).__module__.startswith("transformers_unicode2.")
stock = FluxPipeline.from_pretrained(source, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None)
assert type(stock) is FluxPipeline
print(json.dumps(seen))
"""
    )
    with serve_hub({"org/tiny": {"main": repository}}) as (address, _):
        environment = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        seen = json.loads(run_python(code, first, "", tiny_checkpoint, repository, **environment).splitlines()[-1])
    assert all({report["classes"][name] for name in OURS} == {"transformers_unicode2"} for report in seen)
    assert len(seen) == 7 and all(same(report, seen[0]) for report in seen)


def test_without_the_package_on_trust(repository, tmp_path):
    scope = {}
    exec(DRAW, scope)
    expected = scope["draw"](UniCode2FluxPipeline.from_pretrained(repository))
    code = """
from diffusers import DiffusionPipeline
seen = [draw(DiffusionPipeline.from_pretrained(source, trust_remote_code=True)) for source in (sys.argv[1], "org/tiny")]
print(json.dumps(seen))
"""
    with serve_hub({"org/tiny": {"main": repository}}) as (address, _):
        environment = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        seen = json.loads(run_python(WITHOUT_PACKAGE + DRAW + code, repository, **environment).splitlines()[-1])
    for report in seen:
        assert {report["classes"][name] for name in OURS} == {"transformers_modules", "diffusers_modules"}
        assert same(report, expected)


@pytest.mark.slow
@pytest.mark.parametrize("saved_by", ["installed", "remote"])
def test_load_save_load_in_each_combination(repository, tmp_path, saved_by):
    expected = load(repository, tmp_path / "again", installed=saved_by == "installed")
    with serve_hub({"org/again": {"main": tmp_path / "again"}}) as (address, _):
        environment = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        for installed in (True, False):
            for source in (tmp_path / "again", "org/again"):
                assert same(load(source, "", installed, environment), expected), (installed, source)


@pytest.mark.slow
@pytest.mark.parametrize("installed", [True, False])
def test_options_of_loading(repository, tiny_checkpoint, tmp_path, installed):
    """Dtypes, parts, places, variants and another pipeline of the same parts; from folders and the Hub."""
    code = """
import json, sys, torch
trust, repository, half = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
from diffusers import DiffusionPipeline, FluxPipeline
load = DiffusionPipeline.from_pretrained
parts = ("vae", "transformer", "vision_language_encoder", "condition_mapper")
for source in (repository, "org/tiny"):
    pipe = load(source, dtype=torch.bfloat16, **trust)
    assert {getattr(pipe, part).dtype for part in parts} == {torch.bfloat16}
    assert {p.dtype for p in pipe.vision_language_encoder.get_quantizer().parameters()} == {torch.float32}
    mixed = load(source, dtype={"transformer": torch.bfloat16, "default": torch.float16}, **trust)
    wanted = [torch.float16, torch.bfloat16, torch.float16, torch.float16]
    assert [getattr(mixed, part).dtype for part in parts] == wanted
    for place in ("cpu", "balanced"):
        assert load(source, device_map=place, **trust).vision_language_encoder.device.type == "cpu"
    model = pipe.vision_language_encoder
    given = load(source, vision_language_encoder=model, processor=pipe.processor, image_size=128, **trust)
    assert given.vision_language_encoder is model and given.processor is pipe.processor
    assert given.config.image_size == 128
for source in (half, "org/half"):
    assert load(source, variant="fp16", **trust).vision_language_encoder.dtype == torch.float16
twin = type(pipe)(**pipe.components, **pipe.parameters)
assert twin.components == pipe.components and dict(twin.parameters) == dict(pipe.parameters)
stock = FluxPipeline.from_pipe(pipe, dtype=torch.bfloat16)
own = {name: getattr(pipe, name) for name in (*parts[2:], "processor")}
back = type(pipe).from_pipe(stock, dtype=torch.bfloat16, **own)
assert back.transformer is pipe.transformer and back.vision_language_encoder is model
folder = DiffusionPipeline.download("org/tiny", **trust)
assert type(load(folder, **trust)).__name__ == "UniCode2FluxPipeline"
"""
    pipe = UniCode2FluxPipeline.from_pretrained(tiny_checkpoint, dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    trust = {} if installed else {"trust_remote_code": True}
    with serve_hub({"org/tiny": {"main": repository}, "org/half": {"main": tmp_path / "half"}}) as (address, _):
        environment = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        head = WITH_PACKAGE if installed else WITHOUT_PACKAGE
        run_python(head + code, json.dumps(trust), repository, tmp_path / "half", **environment)


def same(first, second):
    numbers = (first[name] for name in ("logits", "pixels"))
    close = pytest.approx(list(numbers), rel=1e-3) == [second[name] for name in ("logits", "pixels")]
    return close and all(first[name] == second[name] for name in ("sizes", "settings"))
