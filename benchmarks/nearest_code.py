"""Cost of the nearest code, by exact and approximate search, beside FAISS; and whether the ids are right.

    python benchmarks/nearest_code.py --features outputs/features --images images --encoder clip-vit-b16
    python benchmarks/nearest_code.py --quick  # synthetic data only, small

Peers in the same run, with the same threads: `faiss.IndexFlatL2`, and `faiss.IndexIVFFlat` over the same cells with as
many probes as the approximate search. For the smallest batch, the plain search that travels with a checkpoint is also
timed.

Real codes come from k-means of the features of `real_features.py` (see `real_codebook.py`). Above 125,000 codes, they
are a seeded sample of the features instead, and the table says so. All are rounded to bfloat16. The queries are
features of other images. Synthetic codes lie in clusters with a spectrum like that of real features. Cells come from
k-means. The approximate search probes the fewest cells that hold the nearest code of 99.9 % of the calibration queries,
which are not timed. Ids are compared with brute force in float64; a tie counts as equal. The limit is the time of the
flat search's products alone, at the rate of a large float32 matrix product in the same run. On a GPU the peer is the
flat product in bfloat16.

Finished codebooks are kept in a JSON file beside the features: after a kill, the same command resumes.
"""

import argparse
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rows import Rows, describe_run

from transformers_unicode2 import UniCode2Codebook
from transformers_unicode2.codebook.clustering import FaissBackend
from transformers_unicode2.codebook.statistics import compute_probe_recall
from transformers_unicode2.codebook.storage import codebook_from_arrays
from transformers_unicode2.search.faiss_index import make_index
from transformers_unicode2.search_unicode2 import find_nearest

# Queries whose ids are compared with brute force.
NUM_CHECKED = 196
# Queries that determine the number of probes.
NUM_CALIBRATED = 4096
# The most real codes that k-means makes within minutes.
MOST_KMEANS = 125_000


def draw_synthetic(size: int, num_queries: int, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points in nested clusters, with standard deviations i ** -0.5 along rotated directions."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, dim + 1) ** -0.5
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    centres = torch.randn(256, dim, generator=generator) * spectrum
    smaller = centres[torch.randint(256, (8192,), generator=generator)]
    smaller = smaller + 0.6 * torch.randn(8192, dim, generator=generator) * spectrum
    points = torch.empty(size + num_queries, dim)
    for part in points.split(16384):
        chosen = torch.randint(8192, (len(part),), generator=generator)
        torch.mm(smaller[chosen] + 0.5 * torch.randn(len(part), dim, generator=generator) * spectrum, turn, out=part)
    return points[:size].numpy(), points[size:].numpy()


def draw_adversarial(name: str, size: int, num_queries: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes without structure (`sphere`), all equal (`equal rows`), or each eight times (`duplicates`).

    The queries lie on a sphere.
    """
    points = torch.randn(size + num_queries, dim, generator=torch.Generator().manual_seed(0))
    points = torch.nn.functional.normalize(points, dim=-1)
    codes, queries = points[:size], points[size:]
    if name == "equal rows":
        codes = codes[:1].expand(size, dim).clone()
    elif name == "duplicates":
        codes = codes[torch.arange(size) // 8]
    return codes.numpy(), queries.numpy()


def make_codebook(points: np.ndarray) -> UniCode2Codebook:
    """A codebook of the points, rounded to bfloat16 and sorted by cell, with 500 codes per cell on average."""
    backend, count = FaissBackend(max_points_per_centroid=64), max(16, len(points) // 500)
    sample = points[np.random.default_rng(0).permutation(len(points))[: 64 * count]]
    centroids = backend.kmeans(np.ascontiguousarray(sample), count, 0, 8)
    codes = torch.from_numpy(points).bfloat16().float()
    cells = np.concatenate([backend.assign(part.numpy(), centroids)[0] for part in codes.split(65536)])
    order = np.argsort(cells, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(cells, minlength=count))])
    return codebook_from_arrays(codes[torch.from_numpy(order)], np.float32(centroids), offsets)


class Memory:
    """Inside the context, records the peak of resident memory above its value before, in MiB."""

    def __enter__(self) -> "Memory":
        self.before, self.most, self.done = self.resident(), 0.0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.done.set()
        self.thread.join()

    def watch(self) -> None:
        while not self.done.wait(0.002):
            self.most = max(self.most, self.resident() - self.before)

    def resident(self) -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def measure(function, repeats: int) -> float:
    """Least seconds of `repeats` calls."""
    seconds = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_rate(dtype: torch.dtype, device: str, size: int) -> float:
    """Operations per second of a large matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / measure(lambda: a @ b, 5)


def check_peer(rate: float, size: int) -> None:
    """Stops where FAISS's products are far slower than torch's: its OpenBLAS does not know some processors."""
    points = np.random.default_rng(0).standard_normal((size, 512), np.float32)
    index = faiss_index(points)
    flat = 2 * size**2 * 512 / measure(lambda: index.search(points, 1), 3)
    if flat < rate / 4:
        raise SystemExit(
            f"FAISS makes {flat / 1e9:.0f} GFLOP/s of products and torch {rate / 1e9:.0f}, no fair comparison; "
            "set OPENBLAS_CORETYPE to a processor that OpenBLAS knows, such as SkylakeX or Haswell."
        )


def faiss_index(points: np.ndarray):
    """A flat index of points `(num_points, dim)`."""
    import faiss

    index = faiss.IndexFlatL2(points.shape[1])
    index.add(points)
    return index


def share_equal(queries: torch.Tensor, codes: torch.Tensor, found: torch.Tensor) -> float:
    """Share of queries whose code is as near as the nearest one, found by brute force in float64."""
    queries, found = queries[:NUM_CHECKED].double(), found[:NUM_CHECKED]
    best, nearest = torch.full_like(queries[:, 0], torch.inf), torch.zeros_like(found)
    for start in range(0, len(codes), 16384):
        part = codes[start : start + 16384].double()
        distance, index = (part.square().sum(-1) - 2 * queries @ part.T).min(-1)
        nearest = nearest.where(distance >= best, index + start)
        best = torch.minimum(best, distance)
    reference, ours = ((queries - codes[ids].double()).square().sum(-1) for ids in (nearest, found))
    return (ours <= reference).double().mean().item()


def make_searches(codebook: UniCode2Codebook, queries: np.ndarray, approximate: bool) -> dict:
    """The searches to compare, by name, the baseline first; the last queries calibrate the approximate ones."""
    flat = make_index(codebook)
    searches = {
        "FAISS flat": lambda x: torch.from_numpy(flat.search(x.numpy(), 1)[1][:, 0]),
        "ours, exact": codebook.encode,
    }
    if approximate:
        codebook.probe_recall = compute_probe_recall(codebook, queries[-NUM_CALIBRATED:])
        probes = codebook.num_probes_for(0.999)
        index = make_index(codebook, "ivf", probes)
        searches[f"ours, {probes} probes"] = lambda x: codebook.encode(x, num_probes=probes)
        searches[f"FAISS IVF, {probes} probes"] = lambda x: torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])
    return searches


def compare(
    name: str, codebook: UniCode2Codebook, queries: np.ndarray, sizes: list[int], rate: float, approximate: bool = True
):
    """Yields the rows of the table for one codebook: the time of each search for each number of queries."""
    codes, (size, dim) = codebook.codes, codebook.codes.shape
    start = time.perf_counter()
    codebook.encode(torch.from_numpy(queries[:1]))
    built, tables = time.perf_counter() - start, codebook.tables.auxiliary_bytes() / codes.nbytes
    searches = make_searches(codebook, queries, approximate)
    for count in sizes:
        batch, baseline = torch.from_numpy(queries[:count]), None
        plain = {"plain, exact": lambda x: find_nearest(x, *codebook.buffers_to_search())} if count == sizes[0] else {}
        for method, search in (searches | plain).items():
            with Memory() as memory:
                start = time.perf_counter()
                found = search(batch)
                seconds = time.perf_counter() - start
            if seconds < 10:
                seconds = measure(partial(search, batch), 9 if seconds < 0.2 else 3 if seconds < 1 else 1)
            baseline = baseline or seconds
            equal = share_equal(batch, codes, found)
            limit = 2 * count * size * dim / rate
            print(f"{name}, {size:,} codes, {count} queries, {method}: {seconds:.3f} s", file=sys.stderr, flush=True)
            yield name, size, count, method, seconds, baseline / seconds, limit, equal, memory.most, built, tables


def print_table(rows: list[tuple]) -> None:
    print("| data | codes | queries | search | ms | times flat | limit of flat, ms | equal ids, % | memory, MiB |")
    print("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for name, size, count, method, seconds, ratio, limit, equal, memory, *_ in rows:
        figures = f"{1e3 * seconds:.2f} | {ratio:.1f} | {1e3 * limit:.1f} | {100 * equal:.2f} | {memory:.0f}"
        print(f"| {name} | {size:,} | {count} | {method} | {figures} |")
    print()
    for name in dict.fromkeys(row[0] for row in rows):
        chosen = [row for row in rows if row[0] == name and row[3] in ("ours, exact", "FAISS flat")]
        mine = {(row[1], row[3] == "FAISS flat"): row for row in chosen}
        sizes = sorted({size for size, _ in mine})
        for size in sizes:
            *_, built, tables = mine[size, False]
            print(f"- {name}, {size:,} codes: tables {100 * tables:.1f} % of the codes, made in {built:.1f} s")
        if len(sizes) > 1:
            slopes = [
                np.polyfit(np.log(sizes), [np.log(mine[size, peer][4] / mine[size, peer][2]) for size in sizes], 1)[0]
                for peer in (False, True)
            ]
            print(f"- {name}, largest batch: time grows as K^{slopes[0]:.2f}, FAISS flat as K^{slopes[1]:.2f}")
    print()


@torch.no_grad()
def compare_encoders(args: argparse.Namespace, codebook: UniCode2Codebook, num_images: int) -> None:
    """Compares the ids of the same images by dtype and device of the encoder with those of float32 on the CPU."""
    from transformers_unicode2.codebook.features import Encoder, read_batches
    from transformers_unicode2.codebook.images import ImageSource

    source = ImageSource(args.images)
    ways = [("cpu", "float32"), ("cpu", "bfloat16")]
    ways += [("cuda", "float32"), ("cuda", "bfloat16")] * torch.cuda.is_available()
    pixels, features, rows = None, None, []
    for device, dtype in ways:
        encoder = Encoder(args.encoder, dtype, device)
        if pixels is None:
            pixels = next(read_batches(source, encoder, 0, num_images))[1]
        output = torch.from_numpy(encoder(pixels)[0]).flatten(0, 1)
        home = codebook.to(device)
        codes = home.encode(output.to(device)).cpu()
        if features is None:
            features, expected = output.double(), codes
        codebook.to("cpu")
        own, other = ((features - codebook.codes[ids].double()).norm(dim=-1) for ids in (expected, codes))
        differs = codes != expected
        farther = (other / own - 1)[differs]
        figures = farther.quantile(torch.tensor([0.5, 0.99]).double()).tolist() if differs.any() else (0.0, 0.0)
        rows.append((f"{device} {dtype}", 100 * (~differs).double().mean().item(), *(100 * value for value in figures)))
    print(f"Encoder on {len(pixels)} images and {len(codebook.codes):,} codes, beside float32 on the CPU:\n")
    print("| encoder | equal ids, % | where not: farther by, %, median | 99th percentile |")
    print("| --- | ---: | ---: | ---: |")
    for name, equal, median, most in rows:
        print(f"| {name} | {equal:.2f} | {median:.3f} | {most:.3f} |")
    print()


@torch.no_grad()
def compare_on_gpu(
    name: str, codebook: UniCode2Codebook, queries: np.ndarray, count: int, encoder_seconds: float
) -> None:
    """Prints one line each for the flat bfloat16 product, the exact and the approximate search."""
    codebook.probe_recall = compute_probe_recall(codebook, queries[-NUM_CALIBRATED:])
    probes = codebook.num_probes_for(0.999)
    codebook.to("cuda")
    batch, codes = torch.from_numpy(queries[:count]).cuda(), codebook.codes.bfloat16()
    narrow, parts = batch.bfloat16(), codes.split(max(1, 2**28 // count))

    def product():
        for part in parts:
            narrow @ part.T

    product()
    baseline = measure(product, 10)
    searches = {"bfloat16 product": product, "exact": lambda: codebook.encode(batch)}
    searches[f"{probes} probes"] = lambda: codebook.encode(batch, num_probes=probes)
    for method, search in searches.items():
        search()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found, seconds = search(), measure(search, 10)
        memory = (torch.cuda.max_memory_allocated() - before) / 2**20
        equal = "" if found is None else f"{100 * share_equal(batch, codebook.codes, found):.2f}"
        share = f"{100 * seconds / encoder_seconds:.1f}"
        figures = f"{1e3 * seconds:.2f} | {baseline / seconds:.2f} | {share} | {equal} | {memory:.0f}"
        print(f"| {name} | {len(codes):,} | {count} | {method} | {figures} |")


@torch.no_grad()
def time_encoder() -> float:
    """Seconds of a forward pass of so400m-384 for one image, with random bfloat16 weights."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    from transformers_unicode2.configuration_unicode2 import SIGLIP_SO400M_384

    config = SiglipVisionConfig(**{k: v for k, v in SIGLIP_SO400M_384.items() if k != "model_type"})
    model = SiglipVisionModel(config).to("cuda", torch.bfloat16).eval()
    pixels = torch.randn(1, 3, 384, 384, device="cuda", dtype=torch.bfloat16)
    model(pixels)
    return measure(lambda: model(pixels), 10)


def draw_real(folder: str, size: int, num_queries: int) -> tuple[str, UniCode2Codebook, np.ndarray]:
    """Name of the codes, the codebook, and a seeded sample of the held-out features as queries."""
    from real_codebook import load_real_codebook
    from real_features import load_features

    def sample(rows: np.ndarray, count: int) -> np.ndarray:
        order = np.random.default_rng(0).choice(len(rows), count, replace=False)
        return np.float32(rows[np.sort(order)])[np.argsort(np.argsort(order))]

    fit, held_out = load_features(folder)
    queries = sample(held_out, num_queries)
    if size <= MOST_KMEANS:
        return f"real, {fit.shape[1]}", load_real_codebook(folder, size), queries
    return f"real, {fit.shape[1]}, sampled codes", make_codebook(sample(fit, size)), queries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", help="folder of images, for the table of encoders")
    parser.add_argument("--encoder", help="CLIP or SigLIP vision encoder, for the same table")
    parser.add_argument("--features", help="folder that real_features.py wrote (default: synthetic features only)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[31_000, 125_000, 500_000], help="numbers of codes")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="images per batch (default: 1 and 16)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", help="file for finished rows (default: beside the features)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to check the script")
    args = parser.parse_args()
    import faiss

    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    images = (1, 2) if args.quick else args.batches
    sizes, adversarial_size = ([9_000, 18_000], 9_000) if args.quick else (args.sizes, 31_000)
    dim, num_patches = (256, 196) if args.quick else (1152, 729)
    results = args.results or f"{args.features or 'outputs'}/nearest_code.json"
    kept = Rows(results, {"threads": args.threads, "quick": args.quick, "batches": args.batches})
    side = 512 if args.quick else 2048
    rate = kept.measure("rate", lambda: {"rate": measure_rate(torch.float32, "cpu", side)})["rate"]
    check_peer(rate, 4 * side)
    print(describe_run(args.threads, "faiss-cpu") + f"\nfloat32 products {rate / 1e9:.0f} GFLOP/s\n", flush=True)

    def draw(name: str, size: int, images: int = 16) -> tuple[str, UniCode2Codebook, np.ndarray]:
        if name == "real":
            return draw_real(args.features, size, images * 196 + NUM_CALIBRATED)
        if name == "synthetic":
            points, queries = draw_synthetic(size, images * num_patches + NUM_CALIBRATED, dim)
            return f"synthetic, {dim}", make_codebook(points), queries
        points, queries = draw_adversarial(name, size, 196, 256 if args.quick else 768)
        return name, make_codebook(points), queries

    def run(name: str, size: int, counts: list[int]) -> list[tuple]:
        return list(compare(*draw(name, size), counts, rate, approximate=name in names))

    rows, names = [], ["real", "synthetic"] if args.features else ["synthetic"]
    num_queries = {"real": [196 * count for count in images], "synthetic": [num_patches * count for count in images]}
    works = [(name, size, num_queries[name]) for size in sizes for name in names]
    works += [(name, adversarial_size, [196]) for name in ("sphere", "equal rows", "duplicates")]
    for work in works:
        rows += kept.measure(f"{work[0]} {work[1]}", lambda work=work: {"rows": run(*work)})["rows"]
    print_table(rows)
    if torch.cuda.is_available():
        encoder_seconds = time_encoder()
        columns = "data | codes | queries | on the GPU | ms | times the product | of so400m-384, % | equal ids, %"
        print(f"| {columns} | memory, MiB |")
        print("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
        for name, size in [(name, size) for size in sizes for name in names]:
            compare_on_gpu(*draw(name, size, 1), num_queries[name][0], encoder_seconds)
        print()
    if args.images and args.features:
        # Codes that are sampled features can almost equal a query.
        size = min(sizes[-1], MOST_KMEANS)
        compare_encoders(args, draw_real(args.features, size, 1)[1], 4 if args.quick else 32)


if __name__ == "__main__":
    main()
