"""The search beside brute force in float64, by every way that it can go."""

import copy
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import ADVERSARIAL, DIM, adversarial, brute_force, draw_clusters, equal_cells

from transformers_unicode2 import UniCode2Codebook, UniCode2CodebookConfig
from transformers_unicode2.codebook.statistics import compute_probe_recall
from transformers_unicode2.search import nearest
from transformers_unicode2.search.kernel import load_kernel
from transformers_unicode2.search.nearest import LEAST_SQUARE, MIN_SIZE, KernelBest, NearestCodeSearch
from transformers_unicode2.search.tables import BoundTables
from transformers_unicode2.search_unicode2 import Best, find_nearest

# With the kernel; with what is known of the codes, without it; and what travels.
WAYS = ("kernel", "scan", "plain")


def make_search(codes: torch.Tensor, cells: tuple[torch.Tensor, torch.LongTensor], way: str):
    """One of the ways, whatever the size of the codebook."""
    if way == "plain":
        return find_nearest
    if way == "kernel" and not load_kernel():
        pytest.skip("no C compiler")
    search = NearestCodeSearch(codes, cells[1])
    search.tables = None
    if way == "kernel":
        if search.half_norm is None or search.half_norm.where(search.half_norm.isfinite(), 0).mean() < LEAST_SQUARE / 2:
            pytest.skip("such codes are always scanned")
        search.tables = BoundTables(codes, search.mean, search.half_norm, cells[1])
    return search


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_codes_are_found_exactly(name, way):
    codes, features = adversarial(name)
    cells = equal_cells(codes.nan_to_num(0, 0, 0), 5)
    found = make_search(codes, cells, way)(features, codes, *cells)
    assert torch.equal(found, brute_force(features, codes.where(codes.isfinite().all(-1, keepdim=True), 3e38)))


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 700),
    dim=st.integers(60, 200),
    num_cells=st.integers(1, 40),
    far=st.sampled_from([0.0, 1.0, 30.0]),
    way=st.sampled_from(WAYS),
    workspace=st.sampled_from([2**16, 2**28]),
)
def test_drawn_codes_are_found_exactly(seed, size, dim, num_cells, far, way, workspace):
    codes, features = draw_clusters(seed, size, 10, dim, far)
    cells = equal_cells(codes, num_cells)
    search = make_search(codes, cells, way)
    assert torch.equal(search(features, codes, *cells, None, workspace), brute_force(features, codes))


@pytest.mark.parametrize("way", ["scan", "plain"])
@pytest.mark.parametrize("size", [2, 3, 5, 40])
def test_few_codes_of_which_some_are_not_finite(size, way):
    codes, features = draw_clusters(5, size, 6)
    codes[::2, 0] = torch.nan
    codes[-1] = codes[1]
    cells = equal_cells(codes, 2)
    found = make_search(codes, cells, way)(features, codes, *cells)
    assert torch.equal(found, brute_force(features, codes.nan_to_num(3e38)))


@pytest.mark.parametrize("way", ["scan", "plain"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_codebook_without_finite_codes_is_refused(value, way):
    codes, features = draw_clusters(5, 40, 6)
    cells = equal_cells(codes, 2)
    codes[:, 3] = value
    with pytest.raises(ValueError, match="None of the 40 codes is finite"):
        make_search(codes, cells, way)(features, codes, *cells)


def test_the_bounds_leave_nothing_to_a_scan(monkeypatch):
    """A few codes far from all others are no obstacle."""
    codes, features = draw_clusters(0, 3000, 60, 512)
    codes[[5, 1500]] *= torch.tensor([[1e6], [40.0]])
    cells = equal_cells(codes, 10)
    search, expected = make_search(codes, cells, "kernel"), brute_force(features, codes)
    monkeypatch.setattr(NearestCodeSearch, "scan", lambda *args: pytest.fail("scanned"))
    assert torch.equal(search(features, codes, *cells), expected)


@pytest.mark.parametrize("way", WAYS)
def test_every_code_finds_itself_or_the_first_of_its_equals(way):
    codes, _ = draw_clusters(1, 3000)
    codes[2000:2500] = codes[:500]
    expected = torch.arange(3000)
    expected[2000:2500] = torch.arange(500)
    cells = equal_cells(codes, 7)
    assert torch.equal(make_search(codes, cells, way)(codes, codes, *cells), expected)


@pytest.mark.parametrize("way", WAYS)
def test_probing_finds_the_nearest_code_of_the_nearest_cells(way):
    codes, features = draw_clusters(2, 3000, 60)
    cells = equal_cells(codes, 12)
    search = make_search(codes, cells, way)
    nearest = torch.cdist(features, cells[0]).argsort(-1)[:, :3]
    for row, found in enumerate(search(features, codes, *cells, 3)):
        inside = torch.cat([torch.arange(cells[1][cell], cells[1][cell + 1]) for cell in nearest[row]]).sort().values
        assert found == inside[brute_force(features[row : row + 1], codes[inside])[0]]
    assert torch.equal(search(features, codes, *cells, 12), brute_force(features, codes))
    assert torch.equal(search(features, codes, *cells, 99), brute_force(features, codes))


@pytest.mark.parametrize("way", ["kernel", "scan"])
@pytest.mark.parametrize("scale", [1e14, 1e16, 1e25])
def test_probing_finds_the_same_codes_for_far_features(scale, way):
    codes, features = draw_clusters(2, 3000, 60)
    cells = equal_cells(codes, 12)
    features[::2] *= scale
    found = make_search(codes, cells, way)(features, codes, *cells, 3)
    assert torch.equal(found, find_nearest(features, codes, *cells, 3))


@pytest.fixture(scope="module")
def codebook() -> UniCode2Codebook:
    """A codebook large enough for the bounds, with cells without codes."""
    codes, _ = draw_clusters(4, MIN_SIZE + 13, 1)
    cells = equal_cells(codes, 30)
    offsets = torch.cat([cells[1][:3], cells[1][2:3], cells[1][3:]])
    config = UniCode2CodebookConfig(codebook_size=len(codes), codebook_dim=DIM, num_cells=31)
    made = UniCode2Codebook(config)
    made.codes.copy_(codes)
    made.cell_centroids.copy_(torch.cat([cells[0][:2], cells[0][:1], cells[0][2:]]))
    made.cell_offsets.copy_(offsets)
    return made


@pytest.fixture(scope="module")
def features():
    return draw_clusters(4, MIN_SIZE + 13, 48)[1]


def test_ids_do_not_depend_on_batch_dtype_layout_workspace_or_precision(codebook, features):
    expected = brute_force(features, codebook.codes)
    assert torch.equal(codebook.encode(features), expected)
    assert torch.equal(codebook.encode(features.flip(0)).flip(0), expected)
    assert torch.equal(torch.cat([codebook.encode(part) for part in features.split([1, 40, 7])]), expected)
    assert torch.equal(codebook.encode(features.T.contiguous().T), expected)
    assert torch.equal(codebook.encode(features.view(4, 12, DIM)), expected.view(4, 12))
    assert torch.equal(codebook.search(features, workspace=2**18), expected)
    assert codebook.encode(features[:0]).shape == (0,)
    other = copy.deepcopy(codebook)
    other.codes = codebook.codes.T.contiguous().T
    assert torch.equal(other.encode(features), expected)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = features.to(dtype)
        assert torch.equal(codebook.encode(narrow), brute_force(narrow.float(), codebook.codes))
    torch.set_float32_matmul_precision("medium")
    try:
        fresh = copy.deepcopy(codebook)
        assert torch.equal(fresh.encode(features), expected)
        assert torch.equal(find_nearest(features, *fresh.buffers_to_search()), expected)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("setting", ["autocast", "default dtype", "default device", "float32 products by oneDNN"])
def test_tables_do_not_depend_on_what_is_set_around_them(setting, codebook, features, monkeypatch):
    expected, fresh = brute_force(features, codebook.codes), copy.deepcopy(codebook)
    codebook.encode(features)
    if setting == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            found, plain = fresh.encode(features), find_nearest(features, *fresh.buffers_to_search())
    elif setting == "float32 products by oneDNN":
        # What it does to them shows on some processors only.
        monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
        found, plain = fresh.encode(features), find_nearest(features, *fresh.buffers_to_search())
        if load_kernel():
            own, other = fresh.tables.tables, codebook.tables.tables
            assert (own.projected - other.projected).abs().max() < 1e-5
        assert torch.equal(found, expected) and torch.equal(plain, expected)
        return
    else:
        change, before = {
            "default dtype": (torch.set_default_dtype, torch.float32),
            "default device": (torch.set_default_device, None),
        }[setting]
        change(torch.bfloat16 if setting == "default dtype" else "meta")
        try:
            found, plain = fresh.encode(features), find_nearest(features, *fresh.buffers_to_search())
        finally:
            change(before)
    assert torch.equal(found, expected) and torch.equal(plain, expected)
    if load_kernel():
        own, other = fresh.tables.tables, codebook.tables.tables
        assert all(
            torch.equal(getattr(own, name), getattr(other, name)) for name in ("prefix", "rest", "constant", "extents")
        )


def test_large_float64_features_are_refused(codebook):
    with pytest.raises(ValueError, match="1 of 2 features are not finite; the first is number 1"):
        codebook.encode(torch.stack([torch.zeros(DIM), torch.full((DIM,), 1.0)]).double() * 1e300)


def test_bad_features_are_refused_by_position(codebook):
    features = torch.zeros(2, 3, DIM)
    features[1, 1, 5] = torch.inf
    with pytest.raises(ValueError, match="1 of 6 features are not finite; the first is number 4"):
        codebook.encode(features)
    with pytest.raises(ValueError, match="`num_probes` is 0"):
        codebook.encode(features[:1], num_probes=0)


def test_tables_take_a_tenth_and_are_no_state(codebook, features):
    expected = codebook.encode(features)
    assert codebook.tables.auxiliary_bytes() <= 0.1 * codebook.codes.nbytes
    assert set(codebook.state_dict()) == {"codes", "cell_centroids", "cell_offsets"}
    for twin in (copy.deepcopy(codebook), pickle.loads(pickle.dumps(codebook))):
        assert twin.tables is None
        assert torch.equal(twin.encode(features), expected)
    assert torch.equal(copy.deepcopy(codebook).bfloat16().encode(features), expected)
    with ThreadPoolExecutor(4) as pool:
        twin = copy.deepcopy(codebook)
        assert all(torch.equal(found, expected) for found in pool.map(lambda _: twin.encode(features), range(8)))


def test_tables_are_dropped_when_weights_are_loaded_or_moved(codebook, features):
    other = codebook.codes.flip(0).contiguous()
    # No two are equal.
    expected = len(other) - 1 - codebook.encode(features)
    for assign in (False, True):
        twin = copy.deepcopy(codebook)
        twin.encode(features)
        twin.load_state_dict({**twin.state_dict(), "codes": other}, assign=assign)
        assert torch.equal(twin.encode(features), expected)
    moved = copy.deepcopy(codebook)
    moved.encode(features)
    kept = moved.tables
    # As offloading does.
    moved._buffers["codes"] = moved.codes.clone()
    assert torch.equal(moved.encode(features), codebook.encode(features)) and moved.tables is kept
    assert moved.to("cpu").float().tables is kept
    assert moved.to("meta").tables is None


@pytest.mark.parametrize("size", [100, MIN_SIZE + 13, MIN_SIZE + 500])
def test_assigned_codes_and_cells_are_searched(codebook, features, size):
    twin = copy.deepcopy(codebook)
    twin.encode(features)
    # Cells of before are larger than the whole codebook then, and their codes are elsewhere.
    codes = draw_clusters(5, size, 1)[0]
    centroids, offsets = equal_cells(codes, 7)
    twin.codes, twin.cell_centroids, twin.cell_offsets = map(torch.nn.Buffer, (codes, centroids, offsets))
    assert torch.equal(twin.encode(features), brute_force(features, codes))
    # Rows that are equal are found in each of their cells.
    twin.codes = torch.nn.Buffer(codes[:1].expand(size, DIM).clone())
    twin.encode(features)
    twin.cell_offsets = torch.nn.Buffer(torch.tensor([0, size // 2, size]))
    twin.cell_centroids = torch.nn.Buffer(torch.stack([features.mean(0) + 100, features.mean(0)]))
    assert (twin.encode(features, num_probes=1) == size // 2).all()


def test_codes_of_another_size_are_searched_within_a_functional_call(codebook, features):
    twin = copy.deepcopy(codebook)
    expected = twin.encode(features)
    codes = draw_clusters(5, 100, 1)[0]
    centroids, offsets = equal_cells(codes, 7)
    weights = {"codes": codes, "cell_centroids": centroids, "cell_offsets": offsets}
    assert torch.equal(torch.func.functional_call(twin, weights, (features,)), brute_force(features, codes))
    assert torch.equal(twin.encode(features), expected)
    with pytest.raises(IndexError):
        torch.func.functional_call(twin, {"cell_offsets": offsets[[0, -1]]}, (features,), {"num_probes": 2})


def test_recall_is_that_of_probing(codebook, features):
    recall = compute_probe_recall(codebook, features.numpy())
    exact = codebook.encode(features)
    assert list(map(int, recall)) == [1, 2, 3, 4, 5, 6, 8, 9, 11, 13, 16, 19, 22, 26, 31] and recall["31"] == 1
    for count, share in recall.items():
        assert (codebook.encode(features, num_probes=int(count)) == exact).double().mean().item() == pytest.approx(
            share
        )
    with pytest.raises(ValueError, match="was not measured"):
        codebook.num_probes_for(0.9)
    twin = copy.deepcopy(codebook)
    twin.probe_recall = {"1": 0.7, "2": 0.9, "4": 0.99}
    assert [twin.num_probes_for(wanted) for wanted in (0.5, 0.8, 0.9, 0.95)] == [1, 2, 2, 4]
    with pytest.raises(ValueError, match="A recall of 0.999 was not reached, 0.99000 was"):
        twin.num_probes_for(0.999)


@pytest.mark.skipif(not load_kernel(), reason="no C compiler")
@pytest.mark.parametrize("dim", [1, 7, 64, 200, 1152])
def test_pairs_are_measured_alike_with_the_kernel_and_without(dim):
    generator = torch.Generator().manual_seed(dim)
    codes, features = (torch.randn(count, dim, generator=generator) for count in (300, 40))
    # Ties, and features without a pair.
    codes[200:] = codes[:100]
    row, code = (torch.randint(most, (5000,), generator=generator) for most in (30, 300))
    ways = [kind(features, codes, 2**20) for kind in (Best, KernelBest)]
    for best in ways:
        for part in (slice(0, 2000), slice(2000, 5000)):
            best.improve(row[part], code[part])
    assert torch.equal(ways[0].found, ways[1].found) and torch.equal(ways[0].distance, ways[1].distance)


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
    codebook = copy.deepcopy(model.get_quantizer().codebook)
    features = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    expected, entered, forked = codebook.encode(features), threading.Event(), threading.Event()
    make = nearest.NearestCodeSearch
    busy, parent = copy.deepcopy(codebook), os.getpid()

    def make_slowly(*arguments):
        if os.getpid() == parent:
            entered.set()
            forked.wait(60)
        return make(*arguments)

    monkeypatch.setattr(nearest, "NearestCodeSearch", make_slowly)
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
