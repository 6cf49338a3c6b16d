import copy
import os
import threading

import numpy as np
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


def make_faiss_index(codes, spec, metric=1, ids=None):
    import faiss

    index = faiss.index_factory(codes.shape[1], spec, metric)
    index.train(codes)
    index.add(codes) if ids is None else index.add_with_ids(codes, ids)
    return index


def rotated(index):
    import faiss

    rotation = faiss.RandomRotationMatrix(index.d, index.d)
    rotation.init(1)
    return faiss.IndexPreTransform(rotation, index)


def swap(codes):
    return codes[[1, 0, *range(2, len(codes))]]


WRONG_INDICES = {
    "metric 0; codes are nearest by METRIC_L2": lambda c: make_faiss_index(c, "Flat", metric=0),
    "The IndexIVFFlat has FAISS's metric 0": lambda c: make_faiss_index(c, "IVF4,Flat", metric=0),
    "metric 2; codes are nearest by METRIC_L2": lambda c: make_faiss_index(c, "Flat", metric=2),
    "The IndexPreTransform has FAISS's metric 0": lambda c: make_faiss_index(c, "PCA16,Flat", metric=0),
    "applies a NormalizationTransform, after which other codes are nearest": lambda c: make_faiss_index(
        c, "L2norm,Flat"
    ),
    "applies a PCAMatrix, after which": lambda c: make_faiss_index(c, "PCAW16,Flat"),
    "The index holds 0 vectors": lambda c: rotated(make_faiss_index(c[:0], "Flat")),
    "2 of the 96 vectors in the index are not the codes": lambda c: make_faiss_index(swap(c), "IVF4,Flat"),
    "finds 0 of 48 codes by themselves": lambda c: make_faiss_index(c[::-1].copy(), "Flat"),
    "finds 0 of 48 codes by themselves; it does": lambda c: make_faiss_index(c[::-1].copy(), "SQ8"),
    "The ids of the IndexIDMap are not 0 to 95": lambda c: make_faiss_index(
        c, "IDMap,Flat", ids=np.arange(96)[::-1].copy()
    ),
    "The index is a list": lambda c: [c],
}


@pytest.mark.parametrize("message", WRONG_INDICES)
def test_an_index_that_would_find_other_codes_is_refused(model, message):
    pytest.importorskip("faiss")
    quantizer = model.get_quantizer()
    with pytest.raises(ValueError, match=message):
        quantizer.use_faiss(WRONG_INDICES[message](quantizer.codebook.codes.numpy().copy()))
    assert quantizer.index is None


@pytest.mark.parametrize("spec", ["PCA16,Flat", "HNSW8", "SQ8", "IDMap,Flat", "IDMap2,Flat", "IVF4,SQ8,RFlat", "ids"])
def test_an_index_of_the_codes_in_their_order_is_taken(model, pixel_values, spec):
    faiss = pytest.importorskip("faiss")
    quantizer, order = model.get_quantizer(), np.random.default_rng(0).permutation(96)
    expected, codes = quantizer.encode_images(pixel_values), quantizer.codebook.codes.numpy().copy()
    if spec == "ids":  # in another order, each under its own number
        index = make_faiss_index(codes[order], "IVF4,Flat", ids=order)
    else:
        index = make_faiss_index(codes, spec, ids=np.arange(96) if "IDMap" in spec else None)
    if spec == "IVF4,SQ8,RFlat":
        index.k_factor = 8
        faiss.downcast_index(index.base_index).nprobe = 4
    elif spec == "ids":
        index.nprobe = 4
    assert torch.equal(quantizer.use_faiss(index).encode_images(pixel_values), expected)


@pytest.mark.parametrize("count", [np.int64(2), np.int32(2), torch.tensor(2)])
def test_numbers_of_cells_may_be_of_any_library(model, count):
    pytest.importorskip("faiss")
    quantizer = model.get_quantizer()
    features = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantizer.encode_features(features, count), quantizer.encode_features(features, 2))
    assert quantizer.use_faiss("ivf", num_probes=count).index.nprobe == 2


@pytest.mark.parametrize("count", [2.0, np.float32(2), "2", -1, np.int64(0)])
def test_what_is_no_number_of_cells_is_refused(model, count):
    quantizer = model.get_quantizer()
    for use in (
        lambda: quantizer.encode_features(torch.zeros(1, 16), count),
        lambda: quantizer.use_faiss("ivf", count),
    ):
        with pytest.raises(ValueError, match="whole number from 1 on|at least one cell"):
            use()


def test_a_number_of_lists_goes_with_an_index_that_has_lists_and_is_made_here(model):
    quantizer = model.get_quantizer()
    with pytest.raises(ValueError, match="`num_probes` is 2, but a flat index has no lists"):
        quantizer.use_faiss("flat", num_probes=2)
    with pytest.raises(ValueError, match="`num_probes` is 2, but the index is yours; set its `nprobe`"):
        quantizer.use_faiss(quantizer.make_faiss_index(), num_probes=2)


class Codes(torch.utils.data.Dataset):
    """Codes that workers look up in a codebook."""

    def __init__(self, codebook, features):
        self.codebook, self.features = codebook, features

    def __len__(self):
        return len(self.features)

    def __getitem__(self, index):
        return self.codebook.encode(self.features[index])


@pytest.mark.parametrize("which", ["the same codebook", "another one"])
def test_workers_that_are_forked_while_tables_are_made_do_not_wait_for_them(model, which, monkeypatch):
    import transformers_unicode2.quantization_unicode2 as module

    codebook = copy.deepcopy(model.get_quantizer().codebook)
    features = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    expected, entered, forked = codebook.encode(features), threading.Event(), threading.Event()
    make = module.NearestCodeSearch
    busy, parent = copy.deepcopy(codebook), os.getpid()

    def make_slowly(*arguments):
        if os.getpid() == parent:
            entered.set()
            forked.wait(60)
        return make(*arguments)

    monkeypatch.setattr(module, "NearestCodeSearch", make_slowly)
    thread = threading.Thread(target=busy.encode, args=(features,))
    thread.start()
    assert entered.wait(60)
    dataset = Codes(busy if which == "the same codebook" else codebook, features)
    try:
        loader = torch.utils.data.DataLoader(dataset, num_workers=1, multiprocessing_context="fork", timeout=60)
        assert [found.item() for found in loader] == expected.tolist()
    finally:
        forked.set()
        thread.join()


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
