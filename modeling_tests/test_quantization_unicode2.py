import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_unicode2 import UniCode2Codebook, UniCode2CodebookConfig, UniCode2Quantizer


def make_codebook(codes: torch.Tensor) -> UniCode2Codebook:
    codebook = UniCode2Codebook(
        UniCode2CodebookConfig(codebook_size=len(codes), codebook_dim=codes.shape[1], num_cells=1)
    )
    codebook.codes.copy_(codes)
    return codebook


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 200), st.integers(1, 24))
def test_encode_agrees_with_brute_force_in_float64(seed, size, dim):
    generator = torch.Generator().manual_seed(seed)
    codebook = make_codebook(torch.randn(size, dim, generator=generator).bfloat16().float())
    features = torch.randn(50, dim, generator=generator)
    distance = torch.cdist(features.double(), codebook.codes.double())
    chosen = distance.gather(1, codebook.search(features, workspace=2**16)[:, None])[:, 0]
    assert (chosen - distance.amin(1)).max() < 1e-5


def test_every_code_is_its_own_nearest_code(model):
    codebook = model.get_quantizer().codebook
    assert torch.equal(codebook.encode(codebook.codes), torch.arange(len(codebook.codes)))
    assert torch.equal(
        codebook.encode(codebook.decode(torch.arange(96).reshape(4, 24))), torch.arange(96).reshape(4, 24)
    )


def test_ties_go_to_the_lowest_code():
    codes = torch.randn(10, 4)
    codes[7] = codes[3]
    assert make_codebook(codes).search(codes[7:8], workspace=1).item() == 3


def test_bad_features_are_refused_by_position_and_width(model):
    codebook = model.get_quantizer().codebook
    features = torch.zeros(5, 16)
    features[2, 3] = torch.nan
    with pytest.raises(ValueError, match="1 of 5 features are not finite; the first is number 2"):
        codebook.encode(features)
    with pytest.raises(ValueError, match="features are 8 wide and the codes 16"):
        codebook.encode(torch.zeros(5, 8))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.complex64])
def test_features_of_another_kind_are_refused(model, dtype):
    codebook = model.get_quantizer().codebook
    with pytest.raises(ValueError, match=f"The features are {dtype}; give them in float32, bfloat16, float16 or"):
        codebook.encode(torch.zeros(5, 16, dtype=dtype))


def test_quantizer_loads_alone_and_stays_frozen(model, pixel_values, tmp_path):
    model.get_quantizer().save_pretrained(tmp_path)
    quantizer = UniCode2Quantizer.from_pretrained(tmp_path)
    assert torch.equal(quantizer.encode_images(pixel_values), model.get_quantizer().encode_images(pixel_values))
    assert not any(parameter.requires_grad for parameter in quantizer.train().parameters())
    assert not quantizer.training


def test_images_of_another_size_are_refused(model):
    with pytest.raises(
        ValueError, match=r"The images are \(1, 3, 64, 64\); the encoder reads \(batch_size, 3, 32, 32\)"
    ):
        model.get_quantizer().encode_images(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.bfloat16().float(),
        lambda m: m.to(torch.float8_e4m3fn),
        lambda m: m._apply(lambda t: t.to(torch.float16) if t.is_floating_point() else t),
        lambda m: m.get_quantizer().codebook.bfloat16(),
    ],
)
def test_conversion_of_the_model_leaves_the_quantizer_as_it_is(model, pixel_values, convert):
    before = {name: value.clone() for name, value in model.get_quantizer().state_dict().items()}
    convert(model)
    after = model.get_quantizer().state_dict()
    assert all(torch.equal(value, after[name]) and value.dtype == after[name].dtype for name, value in before.items())


def test_model_made_in_bfloat16_has_a_float32_quantizer(config):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    assert {p.dtype for p in model.get_quantizer().parameters()} == {torch.float32}
    assert model.model.language_model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_default_dtype_does_not_round_a_codebook(model, dtype):
    codebook = model.get_quantizer().codebook
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        again = UniCode2Codebook(model.config.codebook_config)
    finally:
        torch.set_default_dtype(before)
    again.load_state_dict(codebook.state_dict())
    assert again.codes.dtype == again.cell_centroids.dtype == torch.float32
