"""Models that are loaded quantized: encoder and codebook stay in float32, so that an image keeps its codes."""

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, BitsAndBytesConfig, QuantoConfig, TorchAoConfig
from transformers.utils import is_bitsandbytes_available, is_optimum_quanto_available

from transformers_unicode2 import UniCode2ForConditionalGeneration, UniCode2Model, UniCode2Quantizer


def make_torchao(name, skip):
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(getattr(quantization, name)(), modules_to_not_convert=skip)


def make_bitsandbytes(bits, skip):
    if not is_bitsandbytes_available():
        pytest.skip("bitsandbytes is not installed")
    return BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=skip)


def make_quanto(weights, skip):
    if not is_optimum_quanto_available():
        pytest.skip("optimum-quanto is not installed")
    return QuantoConfig(weights=weights, modules_to_not_convert=skip)


METHODS = [
    (make_torchao, "Int8WeightOnlyConfig"),
    (make_torchao, "Int8DynamicActivationInt8WeightConfig"),
    (make_bitsandbytes, 8),
    (make_bitsandbytes, 4),
    (make_quanto, "int8"),
    (make_quanto, "int4"),
    (make_quanto, "int2"),
]


def is_plain(layer):
    return type(layer) is torch.nn.Linear and type(layer.weight) is torch.nn.Parameter


@pytest.mark.parametrize("make, which", METHODS)
@pytest.mark.parametrize("dtype", ["auto", torch.float16])
def test_encoder_and_codebook_stay_in_float32(model, pixel_values, make, which, dtype, tmp_path):
    model.save_pretrained(tmp_path)
    right = model.get_quantizer().encode_images(pixel_values)
    loaders = (
        UniCode2ForConditionalGeneration,
        UniCode2Model,
        UniCode2Quantizer,
        AutoModel,
        AutoModelForImageTextToText,
    )
    for loader in loaders:
        loaded = loader.from_pretrained(tmp_path, quantization_config=make(which, None), dtype=dtype)
        quantizer = loaded.get_quantizer()
        assert all(type(p) is torch.nn.Parameter and p.dtype == torch.float32 for p in quantizer.parameters())
        assert torch.equal(quantizer.encode_images(pixel_values), right)
        layers = [m for name, m in loaded.named_modules() if "language_model" in name and hasattr(m, "in_features")]
        assert not any(is_plain(layer) for layer in layers) and (layers or loader is UniCode2Quantizer)


@pytest.mark.parametrize("make, which", METHODS)
@pytest.mark.parametrize("tied", [False, True])
def test_what_the_caller_leaves_out_stays_out(make_config, make, which, tied, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 64}  # bitsandbytes computes with blocks of 64
    text = {**make_config().text_config.to_dict(), **sizes, "tie_word_embeddings": tied}
    UniCode2ForConditionalGeneration(make_config(text_config=text)).save_pretrained(tmp_path)
    skip = ["model.projector", "visual_head"] + ([] if tied else ["lm_head"])  # a tied head stays out by itself
    loaded = UniCode2ForConditionalGeneration.from_pretrained(tmp_path, quantization_config=make(which, skip)).eval()
    assert all(is_plain(m) for m in (loaded.model.projector.linear_1, loaded.lm_head, loaded.visual_head.linear))
    assert not is_plain(loaded.model.language_model.layers[0].mlp.up_proj)
    for mode in ("text", "image"):
        loaded.generate(torch.tensor([[20, 21]]), generation_mode=mode, max_new_tokens=16, do_sample=False)


def test_an_encoder_that_is_quantized_all_the_same_is_refused(model, monkeypatch, tmp_path):
    pytest.importorskip("torchao")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(UniCode2Quantizer, "_keep_in_fp32_modules", None)  # as for a quantizer that does not ask
    with pytest.raises(ValueError, match="12 of 37 weights of the frozen encoder would be quantized by torchao"):
        UniCode2Model.from_pretrained(tmp_path, quantization_config=make_torchao("Int8WeightOnlyConfig", None))


def quantize_with_torchao(model, layers=None):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), layers)


def cast_layerwise(model):
    hooks = pytest.importorskip("diffusers.hooks")
    hooks.apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32)


CONVERSIONS = {
    "torchao": quantize_with_torchao,
    "dynamic": lambda model: torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, inplace=True),
    "layerwise casting": cast_layerwise,
    "bfloat16": lambda model: model.get_quantizer().vision_model.to(torch.bfloat16),
    "one weight": lambda model: model.get_quantizer().vision_model.post_layernorm.half(),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_an_encoder_that_is_converted_after_loading_is_refused_where_it_is_used(model, pixel_values, name):
    CONVERSIONS[name](model)
    quantizer = model.get_quantizer()
    calls = (quantizer, quantizer.encode_images, quantizer.get_image_features, model.get_image_features)
    for call in (*calls, model.get_image_tokens, model.model.get_image_features):
        with pytest.raises(ValueError, match="of the frozen encoder are not as they were loaded.*changes the codes"):
            call(pixel_values)


def test_what_leaves_the_encoder_alone_keeps_the_codes(model, pixel_values):
    right = model.get_image_tokens(pixel_values)
    language_model = model.model.language_model
    torch.ao.quantization.quantize_dynamic(language_model, {torch.nn.Linear}, inplace=True)
    assert torch.equal(model.get_image_tokens(pixel_values), right)
    for convert in (model.bfloat16, model.half):
        assert torch.equal(convert().get_image_tokens(pixel_values), right)
    compiled = torch.compile(model.get_quantizer().vision_model, backend="eager")
    model.get_quantizer().vision_model = compiled
    assert torch.equal(model.get_image_tokens(pixel_values), right)


def test_an_encoder_whose_weights_are_offloaded_keeps_the_codes(model, pixel_values):
    accelerate = pytest.importorskip("accelerate")
    right = model.get_image_tokens(pixel_values)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in model.get_quantizer().vision_model.parameters())
    assert torch.equal(model.get_image_tokens(pixel_values), right)
