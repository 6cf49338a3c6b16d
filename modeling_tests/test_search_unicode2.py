"""The search beside brute force in float64, by every way that it can go."""

import copy
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_unicode2 import UniCode2Codebook, UniCode2CodebookConfig
from transformers_unicode2.codebook.statistics import compute_probe_recall
from transformers_unicode2.kernel_unicode2 import load_kernel
from transformers_unicode2.screen_unicode2 import Screen
from transformers_unicode2.search_unicode2 import MIN_SIZE, Best, Cells, NearestCodeSearch, exact_distance

WAYS = ("kernel", "torch", "scan")
DIM = 160


def brute_force(features: torch.Tensor, codes: torch.Tensor) -> torch.LongTensor:
    """The definition: the smallest distance in float64, the lowest of equals."""
    return torch.stack([exact_distance(feature[None].expand_as(codes), codes).argmin() for feature in features])


def equal_cells(codes: torch.Tensor, count: int) -> Cells:
    offsets = torch.arange(count + 1) * len(codes) // count
    parts = [codes[first:last] for first, last in zip(offsets[:-1], offsets[1:])]
    return Cells(torch.stack([part.mean(0) if len(part) else codes[0] for part in parts]), offsets)


def make_search(codes: torch.Tensor, cells: Cells, way: str) -> NearestCodeSearch:
    """Tables for one of the ways, whatever the size of the codebook."""
    if way == "kernel" and not load_kernel():
        pytest.skip("no C compiler")
    search = NearestCodeSearch(codes, cells.offsets)
    search.screen = None
    if way != "scan":
        if not (search.moderate and search.all_finite):
            pytest.skip("such codes are always scanned")
        kernel = load_kernel() if way == "kernel" else None
        search.screen = Screen(codes, search.mean, search.half_norm, search.unused, cells.offsets, kernel)
    return search


def draw_clusters(seed: int, size: int = 2000, count: int = 24, dim: int = DIM, far: float = 0.0):
    """Codes in clusters with a falling spectrum, rounded to bfloat16, and features like them."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, dim + 1) ** -0.6
    centres = torch.randn(20, dim, generator=generator) * spectrum + far
    points = centres[torch.randint(20, (size + count,), generator=generator)]
    points += 0.7 * spectrum * torch.randn(size + count, dim, generator=generator)
    return points[:size].bfloat16().float(), points[size:]


def adversarial(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randn(1000, DIM, generator=generator)
    features = torch.randn(24, DIM, generator=generator)
    if name == "sphere":
        codes, features = codes / codes.norm(dim=-1, keepdim=True), features / features.norm(dim=-1, keepdim=True)
    elif name == "equal rows":
        codes = codes[:1].expand(1000, DIM).clone()
    elif name == "duplicates":
        codes = codes[torch.arange(1000) // 7]
    elif name == "nearly equal":
        codes = (1000 + codes * 2**-12).contiguous()
        features = codes[::42] + features[:, :1] * 2**-13
    elif name == "dynamic range":
        codes *= torch.logspace(-12, 12, 1000)[torch.randperm(1000, generator=generator)][:, None]
        features *= torch.logspace(-12, 12, 24)[:, None]
    elif name == "outlier":
        codes[500] *= 1e6
    elif name == "permuted":  # distances to zero that differ in rounding only
        codes = torch.stack([codes[0, torch.randperm(DIM, generator=generator)] for _ in range(1000)])
        features[:12] = 0
    elif name in ("huge", "tiny", "denormal"):
        scale = {"huge": 1e30, "tiny": 1e-25, "denormal": 1e-42}[name]
        codes, features = codes * scale, features * scale
    elif name == "low rank":
        codes = codes[:, :8] @ torch.randn(8, DIM, generator=generator)
    elif name == "codes themselves":
        features = codes[::40]
    elif name == "not finite":
        codes[::3, 5], codes[1::3, 7] = torch.nan, torch.inf
    return codes, features


ADVERSARIAL = (
    (
        "sphere equal rows,duplicates,nearly equal,dynamic range,outlier,permuted,huge,tiny,denormal,low rank,codes themselves,not finite"
    )
    .replace("sphere equal", "sphere,equal")
    .split(",")
)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_codes_are_found_exactly(name, way):
    codes, features = adversarial(name)
    cells = equal_cells(codes.nan_to_num(0, 0, 0), 5)
    found = make_search(codes, cells, way)(features, codes, cells)
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
    assert torch.equal(search(features, codes, cells, None, workspace), brute_force(features, codes))


@pytest.mark.skipif(not load_kernel(), reason="no C compiler")
@pytest.mark.parametrize("dim", [1, 7, 64, 200, 1152])
def test_pairs_are_measured_alike_with_the_kernel_and_without(dim):
    generator = torch.Generator().manual_seed(dim)
    codes, features = (torch.randn(count, dim, generator=generator) for count in (300, 40))
    codes[200:] = codes[:100]  # ties
    row, code = (torch.randint(most, (5000,), generator=generator) for most in (30, 300))  # some features have no pair
    ways = [Best(features, codes, 2**20) for _ in range(2)]
    ways[0].kernel = load_kernel()
    for best in ways:
        for part in (slice(0, 2000), slice(2000, 5000)):
            best.improve(row[part], code[part])
    assert torch.equal(ways[0].found, ways[1].found) and torch.equal(ways[0].distance, ways[1].distance)


@pytest.mark.parametrize("size", [2, 3, 5, 40])
def test_few_codes_of_which_some_are_not_finite(size):
    codes, features = draw_clusters(5, size, 6)
    codes[::2, 0] = torch.nan
    codes[-1] = codes[1]
    cells = equal_cells(codes, 2)
    found = make_search(codes, cells, "scan")(features, codes, cells)
    assert torch.equal(found, brute_force(features, codes.nan_to_num(3e38)))


@pytest.mark.parametrize("way", ["kernel", "torch"])
def test_the_bounds_leave_nothing_to_a_scan(way, monkeypatch):
    """A few codes far from all others are no obstacle."""
    codes, features = draw_clusters(0, 3000, 60, 512)
    codes[[5, 1500]] *= torch.tensor([[1e6], [40.0]])
    cells = equal_cells(codes, 10)
    search = make_search(codes, cells, way)
    expected = search.scan(features, codes, 2**28)
    monkeypatch.setattr(NearestCodeSearch, "scan", lambda *args: pytest.fail("scanned"))
    assert torch.equal(search(features, codes, cells), expected)


@pytest.mark.parametrize("way", WAYS)
def test_every_code_finds_itself_or_the_first_of_its_equals(way):
    codes, _ = draw_clusters(1, 3000)
    codes[2000:2500] = codes[:500]
    expected = torch.arange(3000)
    expected[2000:2500] = torch.arange(500)
    cells = equal_cells(codes, 7)
    assert torch.equal(make_search(codes, cells, way)(codes, codes, cells), expected)


@pytest.mark.parametrize("way", WAYS)
def test_probing_finds_the_nearest_code_of_the_nearest_cells(way):
    codes, features = draw_clusters(2, 3000, 60)
    cells = equal_cells(codes, 12)
    search = make_search(codes, cells, way)
    nearest = torch.cdist(features, cells.centroids).argsort(-1)[:, :3]
    for row, found in enumerate(search(features, codes, cells, 3)):
        inside = (
            torch.cat([torch.arange(cells.offsets[cell], cells.offsets[cell + 1]) for cell in nearest[row]])
            .sort()
            .values
        )
        assert found == inside[brute_force(features[row : row + 1], codes[inside])[0]]
    assert torch.equal(search(features, codes, cells, 12), brute_force(features, codes))
    assert torch.equal(search(features, codes, cells, 99), brute_force(features, codes))


@pytest.fixture(scope="module")
def codebook() -> UniCode2Codebook:
    """A codebook large enough for the bounds, with cells without codes."""
    codes, _ = draw_clusters(4, MIN_SIZE + 13, 1)
    cells = equal_cells(codes, 30)
    offsets = torch.cat([cells.offsets[:3], cells.offsets[2:3], cells.offsets[3:]])
    config = UniCode2CodebookConfig(codebook_size=len(codes), codebook_dim=DIM, num_cells=31)
    made = UniCode2Codebook(config)
    made.codes.copy_(codes)
    made.cell_centroids.copy_(torch.cat([cells.centroids[:2], cells.centroids[:1], cells.centroids[2:]]))
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
    assert torch.equal(codebook.encode(features, workspace=2**18), expected)
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
        assert torch.equal(fresh.search.scan(features, fresh.codes, 2**28), expected)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("setting", ["autocast", "default dtype", "default device", "float32 products by oneDNN"])
def test_tables_do_not_depend_on_what_is_set_around_them(setting, codebook, features, monkeypatch):
    expected, fresh = brute_force(features, codebook.codes), copy.deepcopy(codebook)
    codebook.encode(features)
    if setting == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            found = fresh.encode(features)
    elif setting == "float32 products by oneDNN":  # what it does to them shows on some processors only
        monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
        found = fresh.encode(features)
        assert (fresh.search.screen.projected - codebook.search.screen.projected).abs().max() < 1e-5
        return
    else:
        change, before = {
            "default dtype": (torch.set_default_dtype, torch.float32),
            "default device": (torch.set_default_device, None),
        }[setting]
        change(torch.bfloat16 if setting == "default dtype" else "meta")
        try:
            found = fresh.encode(features)
        finally:
            change(before)
    assert torch.equal(found, expected)
    if load_kernel():
        own, other = fresh.search.screen, codebook.search.screen
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
    assert codebook.search.auxiliary_bytes() <= 0.1 * codebook.codes.nbytes
    assert set(codebook.state_dict()) == {"codes", "cell_centroids", "cell_offsets"}
    for twin in (copy.deepcopy(codebook), pickle.loads(pickle.dumps(codebook))):
        assert twin.search is None
        assert torch.equal(twin.encode(features), expected)
    assert torch.equal(copy.deepcopy(codebook).bfloat16().encode(features), expected)
    with ThreadPoolExecutor(4) as pool:
        twin = copy.deepcopy(codebook)
        assert all(torch.equal(found, expected) for found in pool.map(lambda _: twin.encode(features), range(8)))


def test_tables_follow_the_codes(codebook, features):
    other = codebook.codes.flip(0).contiguous()
    expected = len(other) - 1 - codebook.encode(features)  # no two are equal
    changes = {
        "in place": lambda twin: twin.codes.copy_(other),
        "around the count of versions": lambda twin: twin.codes.data.copy_(other),
        "load_state_dict": lambda twin: twin.load_state_dict({**twin.state_dict(), "codes": other}),
        "assign": lambda twin: twin.load_state_dict({**twin.state_dict(), "codes": other}, assign=True),
    }
    for name, change in changes.items():
        twin = copy.deepcopy(codebook)
        twin.encode(features)
        change(twin)
        assert torch.equal(twin.encode(features), expected), name
    moved = copy.deepcopy(codebook)
    moved.encode(features)
    kept, moved.codes = moved.search, moved.codes.clone()  # as offloading does
    assert torch.equal(moved.encode(features), codebook.encode(features)) and moved.search is kept
    assert moved.to("meta").search is None


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


def test_kernel_is_left_out_on_request_or_without_a_compiler(monkeypatch, tmp_path):
    load = load_kernel.__wrapped__
    monkeypatch.setenv("UNICODE2_KERNEL", "0")
    assert load() is None
    monkeypatch.delenv("UNICODE2_KERNEL")
    monkeypatch.setenv("UNICODE2_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", str(tmp_path / "no-compiler"))
    assert load() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not load_kernel(), reason="no C compiler")
def test_cache_of_the_kernel(monkeypatch, tmp_path):
    """Compiled by two processes at once; made again when damaged; not used where it cannot be or where others can write."""
    load = load_kernel.__wrapped__
    environment = {**os.environ, "UNICODE2_CACHE": str(tmp_path / "cache")}
    code = "from transformers_unicode2.kernel_unicode2 import load_kernel; assert load_kernel()"
    runs = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    (library,) = (tmp_path / "cache").iterdir()
    monkeypatch.setenv("UNICODE2_CACHE", str(tmp_path / "cache"))
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    assert load() and library.read_bytes() == whole
    library.unlink()  # it is mapped
    library.write_bytes(b"planted")
    os.chmod(tmp_path / "cache", 0o777)
    assert load() and library.read_bytes() == b"planted"
    (tmp_path / "file").touch()
    monkeypatch.setenv("UNICODE2_CACHE", str(tmp_path / "file" / "cache"))
    assert load()
