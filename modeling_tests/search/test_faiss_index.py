"""FAISS as another search of a codebook: the same codes, or a sentence that says what is wrong with an index."""

import copy
import pickle

import numpy as np
import pytest
import torch
from vectors import ADVERSARIAL, adversarial, brute_force, equal_cells

from transformers_unicode2 import FaissSearch, UniCode2Codebook, UniCode2CodebookConfig


@pytest.fixture
def quantizer(model):
    return model.get_quantizer()


def search_with(quantizer, *options):
    quantizer.codebook.search = FaissSearch(quantizer.codebook, *options)
    return quantizer


@pytest.mark.parametrize("index", ["flat", "ivf", "foreign"])
def test_faiss_finds_the_same_codes(quantizer, pixel_values, index):
    import faiss

    expected = quantizer.encode_images(pixel_values)
    own = index
    if index == "foreign":
        codes = quantizer.codebook.codes.numpy()
        own = faiss.index_factory(codes.shape[1], "IVF4,Flat")
        own.train(codes)
        own.add(codes)
        own.nprobe = 4
    assert torch.equal(search_with(quantizer, own).encode_images(pixel_values), expected)
    with pytest.raises(ValueError, match="1 of 1 features are not finite"):
        quantizer.encode_features(torch.full((1, 16), torch.nan))


def test_faiss_is_named_when_it_is_missing(quantizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match="needs faiss-cpu"):
        FaissSearch(quantizer.codebook)


def test_an_index_that_does_not_fit_is_refused(quantizer):
    faiss = pytest.importorskip("faiss")
    half = faiss.IndexFlatL2(16)
    half.add(quantizer.codebook.codes.numpy()[:50])
    with pytest.raises(ValueError, match="holds 50 vectors of width 16, the codebook 96 of width 16"):
        FaissSearch(quantizer.codebook, half)


def make_codebook(codes, num_cells=5):
    centroids, offsets = equal_cells(codes, num_cells)
    config = UniCode2CodebookConfig(codebook_size=len(codes), codebook_dim=codes.shape[1], num_cells=num_cells)
    codebook = UniCode2Codebook(config)
    codebook.load_state_dict({"codes": codes, "cell_centroids": centroids, "cell_offsets": offsets})
    return codebook


@pytest.mark.parametrize("kind", ["flat", "ivf"])
@pytest.mark.parametrize("name", [*ADVERSARIAL, "centroid that overflows", "at one point"])
def test_faiss_finds_adversarial_codes_exactly(name, kind):
    pytest.importorskip("faiss")
    codes, features = adversarial(name)
    if name == "centroid that overflows":
        codes[:200] *= 1e19
        features[:12] = codes[:12]
    elif name == "at one point":
        # At a distance of zero there is no rounding error to be wary of.
        codes[3::10], features = 0, features * 0
    codebook = make_codebook(codes.nan_to_num(0, 0, 0))
    codebook.codes = codes
    codebook.search = FaissSearch(codebook, kind)
    expected = brute_force(features, codes.where(codes.isfinite().all(-1, keepdim=True), 3e38))
    assert torch.equal(codebook.encode(features), expected)


def test_the_codebook_is_searched_where_an_index_finds_nothing(quantizer):
    faiss = pytest.importorskip("faiss")
    codebook, codes = quantizer.codebook, quantizer.codebook.codes.numpy()
    index = faiss.index_factory(16, "IVF4,Flat")
    index.train(codes)
    index.add(codes)
    index.nprobe = 4
    features = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    expected = codebook.encode(features)
    codebook.search = FaissSearch(codebook, index)
    # A list without a vector is near to all features.
    faiss.downcast_index(index.quantizer).reset()
    faiss.downcast_index(index.quantizer).add(np.array([[1e3], [1e4], [0], [1e5]], dtype=np.float32).repeat(16, 1))
    index.nprobe = 1
    index.invlists.resize(2, 0)
    assert (index.search(features.numpy(), 4)[1] < 0).all()
    assert torch.equal(codebook.encode(features), expected)


def test_a_search_of_another_codebook_is_refused(quantizer):
    pytest.importorskip("faiss")
    codebook = quantizer.codebook
    for other in (copy.deepcopy(codebook), make_codebook(codebook.codes[:50].clone())):
        with pytest.raises(ValueError, match="The search is of another codebook"):
            codebook.search = FaissSearch(other)
    assert "search" not in vars(codebook)


def test_an_index_ends_when_codes_are_assigned(quantizer, caplog):
    codebook = search_with(quantizer).codebook
    codebook.codes = codebook.codes.flip(0).contiguous()
    assert "search" not in vars(codebook) and "is of the old, and dropped" in caplog.text
    assert torch.equal(codebook.encode(codebook.codes), torch.arange(96))


def test_an_index_does_not_outlive_its_codes(quantizer, caplog):
    codebook = search_with(copy.deepcopy(quantizer)).codebook
    features = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    expected = codebook.encode(features)
    with pytest.raises(ValueError, match="`num_probes` is 3, but a FAISS index is in use; give it to `FaissSearch`"):
        codebook.encode(features, num_probes=3)
    other = codebook.codes.clone()
    other[7] = features[0]
    codebook.load_state_dict({**codebook.state_dict(), "codes": other})
    assert not isinstance(codebook.search, FaissSearch)
    found = codebook.encode(features)
    assert found[0] == 7 and torch.equal(found[1:], expected[1:])


def test_an_index_is_copied_and_moves_with_its_codebook(quantizer):
    codebook = search_with(quantizer).codebook
    features = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    for twin in (copy.deepcopy(codebook), pickle.loads(pickle.dumps(codebook)), codebook.float().to("cpu")):
        assert isinstance(twin.search, FaissSearch) and twin.search.codebook is twin
        assert torch.equal(twin.encode(features), codebook.encode(features))
    del codebook.search
    assert not isinstance(codebook.search, FaissSearch)


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_a_processor_searches_with_faiss(kind, tiny_model, processor, photo):
    """The image processor of SigLIP, its encoder and a FAISS index of the codes: images to ids."""
    quantizer, offset = copy.deepcopy(tiny_model.get_quantizer()), tiny_model.config.visual_token_offset
    images = processor.image_processor(photo, return_tensors="pt")
    expected = quantizer.encode_images(images["pixel_values"])
    own = copy.copy(processor).attach_quantizer(search_with(quantizer, kind), offset)
    assert torch.equal(own(images=photo, return_tensors="pt")["visual_token_ids"], expected + offset)


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
def test_an_index_that_would_find_other_codes_is_refused(quantizer, message):
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match=message):
        FaissSearch(quantizer.codebook, WRONG_INDICES[message](quantizer.codebook.codes.numpy().copy()))


@pytest.mark.parametrize("spec", ["PCA16,Flat", "HNSW8", "SQ8", "IDMap,Flat", "IDMap2,Flat", "IVF4,SQ8,RFlat", "ids"])
def test_an_index_of_the_codes_in_their_order_is_taken(quantizer, pixel_values, spec):
    faiss = pytest.importorskip("faiss")
    order = np.random.default_rng(0).permutation(96)
    expected, codes = quantizer.encode_images(pixel_values), quantizer.codebook.codes.numpy().copy()
    # In another order, each under its own number.
    if spec == "ids":
        index = make_faiss_index(codes[order], "IVF4,Flat", ids=order)
    else:
        index = make_faiss_index(codes, spec, ids=np.arange(96) if "IDMap" in spec else None)
    if spec == "IVF4,SQ8,RFlat":
        index.k_factor = 8
        faiss.downcast_index(index.base_index).nprobe = 4
    elif spec == "ids":
        index.nprobe = 4
    assert torch.equal(search_with(quantizer, index).encode_images(pixel_values), expected)


@pytest.mark.parametrize("count", [np.int64(2), np.int32(2), torch.tensor(2)])
def test_numbers_of_cells_may_be_of_any_library(quantizer, count):
    pytest.importorskip("faiss")
    features = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantizer.encode_features(features, count), quantizer.encode_features(features, 2))
    assert FaissSearch(quantizer.codebook, "ivf", num_probes=count).index.nprobe == 2


@pytest.mark.parametrize("count", [2.0, np.float32(2), "2", -1, np.int64(0)])
def test_what_is_no_number_of_cells_is_refused(quantizer, count):
    for use in (
        lambda: quantizer.encode_features(torch.zeros(1, 16), count),
        lambda: FaissSearch(quantizer.codebook, "ivf", count),
    ):
        with pytest.raises(ValueError, match="whole number from 1 on|at least one cell"):
            use()


def test_a_number_of_lists_goes_with_an_index_that_has_lists_and_is_made_here(quantizer):
    with pytest.raises(ValueError, match="`num_probes` is 2, but a flat index has no lists"):
        FaissSearch(quantizer.codebook, "flat", num_probes=2)
    with pytest.raises(ValueError, match="`num_probes` is 2, but the index is yours; set its `nprobe`"):
        FaissSearch(quantizer.codebook, FaissSearch(quantizer.codebook).index, num_probes=2)
