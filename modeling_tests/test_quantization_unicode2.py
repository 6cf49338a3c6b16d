import copy

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
    chosen = distance.gather(1, codebook.encode(features, workspace=2**16)[:, None])[:, 0]
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
    assert make_codebook(codes).encode(codes[7:8], workspace=1).item() == 3


def test_bad_features_are_refused_by_position_and_width(model):
    codebook = model.get_quantizer().codebook
    features = torch.zeros(5, 16)
    features[2, 3] = torch.nan
    with pytest.raises(ValueError, match="1 of 5 features are not finite; the first is number 2"):
        codebook.encode(features)
    with pytest.raises(ValueError, match="features are 8 wide and the codes 16"):
        codebook.encode(torch.zeros(5, 8))


def test_quantizer_loads_alone_and_stays_frozen(model, pixel_values, tmp_path):
    model.get_quantizer().save_pretrained(tmp_path)
    quantizer = UniCode2Quantizer.from_pretrained(tmp_path)
    assert torch.equal(quantizer.encode_images(pixel_values), model.get_quantizer().encode_images(pixel_values))
    assert not any(parameter.requires_grad for parameter in quantizer.train().parameters())
    assert not quantizer.training


@pytest.mark.parametrize("index", ["flat", "ivf", "foreign"])
def test_faiss_finds_the_same_codes(model, pixel_values, index):
    import faiss

    quantizer = model.get_quantizer()
    expected = quantizer.encode_images(pixel_values)
    own = index
    if index == "foreign":
        codes = quantizer.codebook.codes.numpy()
        own = faiss.index_factory(codes.shape[1], "IVF4,Flat")
        own.train(codes)
        own.add(codes)
        own.nprobe = 4
    assert torch.equal(quantizer.use_faiss(own).encode_images(pixel_values), expected)
    with pytest.raises(ValueError, match="1 of 1 features are not finite"):
        quantizer.search_index(torch.full((1, 16), torch.nan))


def test_faiss_is_named_when_it_is_missing(model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match="needs faiss-cpu"):
        model.get_quantizer().use_faiss()


def test_an_index_that_does_not_fit_or_finds_nothing_is_refused(model, pixel_values):
    faiss = pytest.importorskip("faiss")
    quantizer = model.get_quantizer()
    codes = quantizer.codebook.codes.numpy()
    half = faiss.IndexFlatL2(16)
    half.add(codes[:50])
    with pytest.raises(ValueError, match="holds 50 vectors of width 16, the codebook 96 of width 16"):
        quantizer.use_faiss(half)
    index = faiss.index_factory(16, "IVF40,Flat")
    index.train(codes)
    index.add(codes)
    features = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    assert (quantizer.use_faiss(index).encode_features(features) >= 0).all()
    quantizer.index = None


def test_an_index_does_not_outlive_its_codes(model):
    pytest.importorskip("faiss")
    quantizer = copy.deepcopy(model.get_quantizer()).use_faiss()
    features = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="`num_probes` is 3, but a FAISS index is in use"):
        quantizer.encode_features(features, num_probes=3)
    quantizer.encode_features(features)
    quantizer.codebook.codes[7] = features[0]
    with pytest.raises(ValueError, match="The codes have changed since the FAISS index was made"):
        quantizer.encode_features(features)
    assert quantizer.use_faiss().encode_features(features)[0] == 7


def test_images_of_another_size_are_refused(model):
    with pytest.raises(
        ValueError, match=r"The images are \(1, 3, 64, 64\); the encoder reads \(batch_size, 3, 32, 32\)"
    ):
        model.get_quantizer().encode_images(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(
    "convert", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16().float()]
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
