"""SigLIP, SigLIP 2 and CLIP: the codes of an image are those of an independent search, by every way to them."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import load_dataset
from encoders import KINDS, find_codes, make_codes, make_encoder, make_pixels, make_quantizer, randomize, save_encoder
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Qwen2Config,
    Qwen2ForCausalLM,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTImageProcessorPil,
)

from transformers_unicode2 import (
    UniCode2ForConditionalGeneration,
    UniCode2ImageProcessor,
    UniCode2Processor,
    UniCode2Quantizer,
    UniCode2QuantizerConfig,
    cli,
)
from transformers_unicode2.codebook.features import Encoder
from transformers_unicode2.codebook.storage import codebook_from_arrays, load_codebook, read_description, save_codebook
from transformers_unicode2.encoders_unicode2 import ENCODERS, load_encoder
from transformers_unicode2.loading_unicode2 import hash_settings


@pytest.fixture(scope="module")
def place(tmp_path_factory, processor):
    """A folder with pictures of several shapes, a small language model and an encoder of each kind."""
    folder = tmp_path_factory.mktemp("encoders")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number, shape in enumerate([(60, 80), (200, 50), (32, 32), (97, 331), (8, 8)]):
        pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    config = Qwen2Config(
        vocab_size=768,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "llm")
    processor.tokenizer.save_pretrained(folder / "llm")
    for kind in KINDS:
        save_encoder(folder / kind, kind)
    return folder


@pytest.fixture
def run(monkeypatch):
    """Runs a command as the shell does."""

    def call(*words):
        monkeypatch.setattr("sys.argv", ["unicode2", *map(str, words)])
        cli.main()

    return call


def write_codebook(folder, encoder, dtype: str):
    """A codebook as `unicode2 codebook build` leaves it for an encoder in a folder that is named after its kind."""
    codes = make_codes(encoder.name)
    arrays = codes, torch.stack([part.mean(0) for part in codes.split(24)]), torch.arange(0, 97, 24)
    command = {"encoder": str(encoder), "dtype": dtype, "encoder_sha256": Encoder(str(encoder), dtype).fingerprint()}
    save_codebook(codebook_from_arrays(*arrays, encoder_dtype=dtype), folder, {"command": command})
    return folder


def init(run, place, vision, codebook, output):
    run("init", "--llm", place / "llm", "--vision", vision, "--codebook", codebook, "--output", output)


def read_images(place) -> list[Image.Image]:
    return [Image.open(file) for file in sorted((place / "images").iterdir())]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_an_independent_search_by_every_way(place, run, tmp_path, kind, dtype):
    codebook = write_codebook(tmp_path / "codebook", place / kind, dtype)
    init(run, place, place / kind, codebook, tmp_path / "model")
    images = read_images(place)
    right = find_codes(place / kind, kind, images, make_codes(kind), getattr(torch, dtype))
    assert len(right.unique()) > 10
    model = UniCode2ForConditionalGeneration.from_pretrained(tmp_path / "model")
    processor = UniCode2Processor.from_pretrained(tmp_path / "model")
    offset, num_tokens = model.config.visual_token_offset, right.shape[1]
    assert {weight.dtype for weight in model.get_quantizer().vision_model.parameters()} == {getattr(torch, dtype)}
    assert model.config.num_image_tokens == processor.num_image_tokens == num_tokens
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    stock = KINDS[kind][2](images, return_tensors="pt")["pixel_values"]
    assert pixels.dtype == torch.float32 and torch.equal(pixels, stock)
    assert torch.equal(model.get_image_tokens(pixels) - offset, right)
    found = model.get_image_features(pixels)
    assert found.last_hidden_state.shape == (5, num_tokens, 16) and torch.equal(found.image_tokens - offset, right)
    processor.attach_quantizer(model.get_quantizer(), offset)
    assert torch.equal(processor(images=images, return_tensors="pt")["visual_token_ids"] - offset, right)
    words = ("--data", place / "images", "--task", "draw", "--num-workers", 0, "--max-bad-share", 1)
    (place / "images" / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{n}.png", "text": f"picture {n}"}) + "\n" for n in range(5))
    )
    run("tokenize", *words, "--model", tmp_path / "model", "--output", tmp_path / "tokens")
    (place / "images" / "metadata.jsonl").unlink()
    rows = load_dataset("parquet", data_files=str(tmp_path / "tokens/train-*.parquet"), split="train")
    told = {row["messages"][-2]["content"][0]["text"]: row["codes"][0] for row in rows}
    codes = [next(codes for text, codes in told.items() if f"picture {n}" in text) for n in range(5)]
    assert codes == right.tolist()
    features = Encoder(str(place / kind), dtype)(list(stock))[0]
    assert torch.equal(load_codebook(codebook).encode(torch.from_numpy(features)), right)


def test_a_build_in_bfloat16_sets_the_dtype_of_the_encoder_from_there_on(place, run, tmp_path):
    words = ("--images", place / "images", "--preview-size", 4, "--dtype", "bfloat16", "--backend", "torch")
    sizes = ("--codebook-size", 24, "--num-cells", 2)
    run("codebook", "build", *words, *sizes, "--encoder", place / "clip", "--output", tmp_path / "codebook")
    run("codebook", "preview", tmp_path / "codebook", "--images", place / "images", "--preview-size", 8)
    grown = ("--add", 4, "--images", place / "images", "--output", tmp_path / "grown")
    run("codebook", "grow", tmp_path / "codebook", *grown)
    for name in ("codebook", "grown"):
        assert load_codebook(tmp_path / name).encoder_dtype == "bfloat16"
    assert "keeps the encoder in bfloat16" in (tmp_path / "codebook/README.md").read_text()
    init(run, place, place / "clip", tmp_path / "codebook", tmp_path / "model")
    quantizer = UniCode2Quantizer.from_pretrained(tmp_path / "model")
    assert quantizer.encoder_dtype == quantizer.vision_model.dtype == torch.bfloat16
    codes = load_codebook(tmp_path / "codebook").codes
    images = read_images(place)
    pixels = UniCode2Processor.from_pretrained(tmp_path / "model")(images=images, return_tensors="pt")["pixel_values"]
    right = find_codes(place / "clip", "clip", images, codes, torch.bfloat16)
    assert torch.equal(quantizer.encode_images(pixels), right)


def test_a_codebook_that_does_not_name_a_dtype_keeps_its_encoder_in_float32(place, run, tmp_path):
    codebook = write_codebook(tmp_path / "codebook", place / "clip", "bfloat16")
    content = json.loads((codebook / "codebook.json").read_text())
    del content["config"]["encoder_dtype"]
    (codebook / "codebook.json").write_text(json.dumps(content))
    assert read_description(codebook, "provenance")["command"]["dtype"] == "bfloat16"
    init(run, place, place / "clip", codebook, tmp_path / "model")
    model = UniCode2ForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert model.get_quantizer().vision_model.dtype == torch.float32


def make_holder(folder, name: str):
    """A model that holds an encoder beside other parts, with an image processor. Returns the encoder's weights."""
    text = {**KINDS["clip"][1], "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    vision = make_encoder("siglip" if name == "siglip" else "clip")[0].config.to_dict()
    text = {**text, "num_attention_heads": 2, "max_position_embeddings": 8}
    model = {
        "siglip": lambda: SiglipModel(SiglipConfig(text_config=text, vision_config=vision)),
        "clip": lambda: CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)),
        "projection": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**{**vision, "projection_dim": 8})),
    }[name]()
    randomize(model).save_pretrained(folder)
    make_encoder("siglip" if name == "siglip" else "clip")[1].save_pretrained(folder)
    return model.vision_model.state_dict()


@pytest.mark.parametrize("name", ["siglip", "clip", "projection"])
def test_the_encoder_inside_a_larger_model_is_loaded_whole(tmp_path, name):
    right = make_holder(tmp_path, name)
    # As the files of OpenAI's CLIP do.
    state = load_file(tmp_path / "model.safetensors")
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    encoder, _ = load_encoder(str(tmp_path))
    assert encoder.config.model_type == ("siglip_vision_model" if name == "siglip" else "clip_vision_model")
    loaded = encoder.state_dict()
    assert loaded.keys() == right.keys() and all(torch.equal(loaded[key], right[key]) for key in right)
    state.pop("vision_model.post_layernorm.bias")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights, which would be random; the first is post_layernorm.bias"):
        load_encoder(str(tmp_path))


OTHERS = {
    "dinov2": Dinov2Config(),
    "vit": ViTConfig(),
    "siglip2_vision_model": Siglip2VisionConfig(),
    "clip_text_model": CLIPTextConfig(),
    "bert": BertConfig(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_encoder_of_another_kind_is_refused_by_name(tmp_path, name):
    OTHERS[name].save_pretrained(tmp_path)
    taken = rf"is a {name} model.*SigLIP, a SigLIP 2 of a fixed size or a CLIP: one of .*{', '.join(ENCODERS)}\.$"
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be used as an encoder: it {taken}") as error:
        load_encoder(str(tmp_path))
    assert ("(NaFlex)" in str(error.value)) == (name == "siglip2_vision_model")
    with pytest.raises(ValueError, match=f"`vision_config` {taken}"):
        UniCode2QuantizerConfig(vision_config=OTHERS[name].to_dict())


@pytest.mark.parametrize(
    "image_processor, message",
    [
        (
            UniCode2ImageProcessor(size={"height": 64, "width": 64}),
            "of 64 x 64 pixels.*the encoder reads 32 x 32",
        ),
        (UniCode2ImageProcessor(size={"shortest_edge": 32}), "size depends on the image .*shortest_edge.*32"),
        (
            ViTImageProcessorPil(size={"height": 32, "width": 32}),
            "image processor is a ViTImageProcessor; it must",
        ),
    ],
)
def test_an_image_processor_that_does_not_fit_is_refused(place, tmp_path, image_processor, message):
    shutil.copytree(place / "clip", tmp_path / "clip")
    image_processor.save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=message):
        Encoder(str(tmp_path / "clip"))


def test_a_codebook_of_another_encoder_of_equal_size_is_refused(place, run, tmp_path, capsys):
    codebook = write_codebook(tmp_path / "codebook", place / "clip", "float32")
    for vision in (place / "siglip", save_encoder(tmp_path / "twin", "clip", seed=1)):
        with pytest.raises(SystemExit, match="2"):
            init(run, place, vision, codebook, tmp_path / "model")
        message = capsys.readouterr().err
        assert f"{codebook} was built with another encoder (SHA-256 " in message and f"than {vision}" in message


def test_weights_of_another_encoder_are_refused_by_a_quantizer(tmp_path):
    quantizer, other = make_quantizer("clip"), make_quantizer("clip", seed=1)
    quantizer.save_pretrained(tmp_path)
    state = {name: value for name, value in other.state_dict().items() if name.startswith("vision_model.")}
    save_file({**quantizer.state_dict(), **state}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="The weights of the encoder in .* are not those that its configuration names"):
        UniCode2Quantizer.from_pretrained(tmp_path)


CONVERSIONS = (
    lambda model: model.to(torch.bfloat16),
    lambda model: model.half(),
    lambda model: model.float(),
    lambda model: model.double(),
    lambda model: model.bfloat16().float().train(),
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_encoder_keeps_its_dtype_whatever_is_asked_for(tmp_path, dtype):
    quantizer, pixels, own = make_quantizer("clip", dtype), make_pixels("clip"), getattr(torch, dtype)
    right = quantizer.encode_images(pixels)

    def check(loaded):
        assert {weight.dtype for weight in loaded.vision_model.parameters()} == {own}
        assert loaded.codebook.codes.dtype == loaded.codebook.cell_centroids.dtype == torch.float32
        assert torch.equal(loaded.encode_images(pixels), right)

    check(quantizer)
    quantizer.save_pretrained(tmp_path)
    for asked in ("auto", torch.float32, torch.bfloat16, torch.float16):
        check(UniCode2Quantizer.from_pretrained(tmp_path, dtype=asked))
    check(AutoModel.from_pretrained(tmp_path, dtype=torch.float16))
    made = AutoModel.from_config(quantizer.config, dtype=torch.bfloat16)
    made.load_state_dict(quantizer.state_dict())
    check(made)
    for convert in CONVERSIONS:
        check(convert(UniCode2Quantizer.from_pretrained(tmp_path)))
    with pytest.raises(ValueError, match="of the frozen encoder are not as they were loaded"):
        quantizer.vision_model.to(torch.float32 if dtype != "float32" else torch.bfloat16)
        quantizer.encode_images(pixels)


@pytest.mark.parametrize("device_map", ["cpu", {"vision_model": "disk", "codebook": "cpu"}])
def test_an_encoder_that_is_offloaded_keeps_its_dtype(tmp_path, device_map):
    quantizer, pixels = make_quantizer("clip", "bfloat16"), make_pixels("clip")
    quantizer.save_pretrained(tmp_path / "quantizer")
    loaded = UniCode2Quantizer.from_pretrained(
        tmp_path / "quantizer", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert {weight.dtype for weight in loaded.vision_model.parameters()} == {torch.bfloat16}
    assert any(weight.is_meta for weight in loaded.vision_model.parameters()) == (device_map != "cpu")
    assert torch.equal(loaded.encode_images(pixels), quantizer.encode_images(pixels))


def test_a_model_that_is_loaded_quantized_keeps_the_dtype_of_its_encoder(make_config, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    quantizer = make_quantizer("clip", "bfloat16")
    vision, codebook = quantizer.config.vision_config, quantizer.config.codebook_config
    config = make_config(vision_config=vision.to_dict(), codebook_config=codebook.to_dict())
    model = UniCode2ForConditionalGeneration(config)
    model.get_quantizer().load_state_dict(quantizer.state_dict())
    model.save_pretrained(tmp_path)
    assert "CLIPEncoderLayer" in model._no_split_modules
    loaded = UniCode2ForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()), dtype=torch.float16
    )
    assert {weight.dtype for weight in loaded.get_quantizer().vision_model.parameters()} == {torch.bfloat16}
    pixels = make_pixels("clip")
    assert torch.equal(loaded.get_quantizer().encode_images(pixels), quantizer.encode_images(pixels))


def test_another_encoder_dtype_is_another_quantizer(tmp_path):
    from transformers_unicode2.tokens import hash_quantizer

    digests = set()
    for dtype in ("float32", "bfloat16"):
        quantizer = make_quantizer("clip", dtype)
        quantizer.vision_model.load_state_dict(make_quantizer("clip", "bfloat16").vision_model.state_dict())
        quantizer.save_pretrained(tmp_path / dtype)
        digests.add(hash_quantizer(str(tmp_path / dtype)))
    assert len(digests) == 2
    config = quantizer.config.vision_config
    assert hash_settings(config, "float32") == hash_settings(config) != hash_settings(config, "bfloat16")
    file = tmp_path / "bfloat16/config.json"
    file.write_text(file.read_text().replace('"encoder_dtype": "bfloat16"', '"encoder_dtype": "float32"'))
    with pytest.raises(ValueError, match="or its `encoder_dtype`, is not that which its codebook was saved with"):
        UniCode2Quantizer.from_pretrained(tmp_path / "bfloat16")
    file.write_text(file.read_text().replace('"encoder_dtype": "float32"', '"encoder_dtype": "int8"'))
    with pytest.raises(ValueError, match="`encoder_dtype` of the codebook is 'int8'; it must be in float32, bfloat16"):
        UniCode2Quantizer.from_pretrained(tmp_path / "bfloat16")


def test_settings_of_clip_survive_saving_and_long_images_are_refused(tmp_path):
    own, stock = UniCode2ImageProcessor.adopt(KINDS["clip"][2]), KINDS["clip"][2]
    own.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(again) is UniCode2ImageProcessor and again.to_dict() == own.to_dict()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (41, 67, 4), dtype=np.uint8))
    white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    pixels = again(picture, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, stock(white, return_tensors="pt")["pixel_values"])
    with pytest.raises(ValueError, match=r"1 x 90000 pixels would be resized to 32 x 2880000, more than \d+ pixels"):
        again(Image.new("RGB", (1, 90000)))


def test_what_is_no_quantizer_is_not_attached(processor):
    for wrong, message in (
        ("x", "`quantizer` is of type str; give a UniCode2Quantizer"),
        (make_encoder("siglip")[0], "`quantizer` is of type SiglipVisionModel"),
        (make_quantizer("clip"), "makes 16 codes of an image, and an image has 64 places"),
    ):
        with pytest.raises(ValueError, match=message):
            processor.attach_quantizer(wrong, 100_000)
    assert processor.quantizer is None


def test_image_prompts_are_made_of_the_features_of_the_encoder_that_is_named(place, tmp_path):
    pytest.importorskip("diffusers")
    from types import SimpleNamespace

    from transformers_unicode2 import UniCode2ConditionMapper
    from transformers_unicode2.training.mapper import MapperArguments
    from transformers_unicode2.training.mapper_data import MapperCollator

    torch.manual_seed(0)
    sizes = {"visual_dim": 16, "output_dim": 8, "pooled_dim": 8, "num_visual_tokens": 16, "hidden_dim": 8}
    teacher = UniCode2ConditionMapper(**sizes).eval()
    teacher.save_pretrained(tmp_path / "teacher")
    arguments = MapperArguments("", [], image_prompts=str(tmp_path / "teacher"), encoder=str(place / "clip"))
    collate = MapperCollator(arguments, SimpleNamespace(device=torch.device("cpu"), bf16=False), None)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    content = (tmp_path / "image.png").read_bytes()
    batch = collate([{"picture": content, "codes": torch.arange(16)}])
    encoder, image_processor = make_encoder("clip")
    with torch.no_grad():
        features = encoder(image_processor(image, return_tensors="pt")["pixel_values"]).last_hidden_state[:, 1:]
        right = teacher(features).prompt_embeds
    assert torch.allclose(batch["prompt_embeds"], right, atol=1e-6)


REMOTE = """
import importlib.util, sys
sys.path = [p for p in sys.path if not p.rstrip("/").endswith("src")]
sys.meta_path = [f for f in sys.meta_path if "editable" not in str(f).lower()]
assert importlib.util.find_spec("transformers_unicode2") is None
import torch
from transformers import AutoModel
pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float16)
assert model.vision_model.dtype == torch.bfloat16
print(model.encode_images(pixels).tolist())
"""


def test_a_quantizer_with_clip_in_bfloat16_loads_without_the_package(tmp_path):
    quantizer = make_quantizer("clip", "bfloat16")
    quantizer.save_pretrained(tmp_path / "quantizer")
    words = [sys.executable, "-S", "-c", f"import site; site.main()\n{REMOTE}", str(tmp_path / "quantizer")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == quantizer.encode_images(make_pixels("clip")).tolist()


def change_config(folder, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": [32, 32]}, r"reads images of `image_size` .* with 3 channels; it must be one number of pixels"),
        ({"num_channels": 1}, "with 1 channels; it must be one number of pixels, and 3 channels"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "has quantized weights"),
        ({"patch_size": 16}, r"weights of another size than its configuration says; .*\(16, 3, 8, 8\) there and"),
        (
            {"intermediate_size": 28},
            r"has 6 weights of another size .*, \(24,\) there and \(28,\) in the",
        ),
    ],
)
def test_encoder_whose_configuration_does_not_fit_is_one_sentence(tmp_path, changes, message):
    save_encoder(tmp_path, "clip")
    load_encoder(str(tmp_path))
    change_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"cannot be used as an encoder: .*{message}"):
        load_encoder(str(tmp_path))
