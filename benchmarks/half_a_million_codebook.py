"""The steps of `half_a_million.py` that build and use codebooks."""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from functools import wraps
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from real_features import BLOCK, SyntheticFeatures
from rows import read_peak, start_child

PHASES = ("extract", "train_cells", "sort", "train_codes", "save")
DIM = 1152
# Every 20th image is held out.
HELD_OUT = 20
# Iterations of `unicode2 codebook build`.
ITERATIONS = 20
GIB = 2**30


class Sizes:
    """The sizes of a run, smaller by `divide`."""

    def __init__(self, args: argparse.Namespace):
        self.codes, self.cells = 500_000 // args.divide, max(4, 1000 // args.divide)
        self.features = max(1, 10_000_000 // args.divide // BLOCK) * BLOCK
        self.held_out = max(1, 2_000_000 // args.divide // BLOCK) * BLOCK
        self.added, self.images = 50_000 // args.divide, max(40, 2000 // args.divide)
        self.folder = Path(args.output)


def measure_limits(args: argparse.Namespace) -> list[dict]:
    """Rates of products and of the disk, which the limits of all other rows are made of."""
    import torch
    from nearest_code import measure_rate

    rates = {"float32": measure_rate(torch.float32, "cpu", 4096), "bfloat16": measure_rate(torch.bfloat16, "cpu", 4096)}
    content, file = np.random.default_rng(0).bytes(2**27), Path(args.output) / "rate"
    count = max(1, 16 // args.divide)
    start = time.perf_counter()
    with open(file, "wb") as opened:
        for _ in range(count):
            opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    rates["write"] = count * len(content) / (time.perf_counter() - start)
    with open(file, "rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        while opened.read(2**24):
            pass
    rates["read"] = count * len(content) / (time.perf_counter() - start)
    file.unlink()
    # Read alone: a copy would mostly measure how fast memory is mapped
    a = torch.ones(2**28 // (1 if args.divide == 1 else 16))
    a.sum()
    start = time.perf_counter()
    for _ in range(4):
        a.sum()
    rates["memory"] = 4 * a.nbytes / (time.perf_counter() - start)
    (Path(args.output) / "rates.json").write_text(json.dumps(rates))
    names = {"float32": "GFLOP/s", "bfloat16": "GFLOP/s", "write": "GB/s", "read": "GB/s", "memory": "GB/s"}
    return [{"what": f"rate: {name}", "found": f"{rates[name] / 1e9:.1f} {unit}"} for name, unit in names.items()]


def read_rates(args: argparse.Namespace) -> SimpleNamespace:
    return SimpleNamespace(**json.loads((Path(args.output) / "rates.json").read_text()))


def time_phases(kind: type, log: Path) -> type:
    """A `Build` that notes in a file when each phase begins and ends."""

    def timed(phase: str):
        method = getattr(kind, phase)

        @wraps(method)
        def run(self):
            note(log, phase, "begin", read_peak())
            output = method(self)
            note(log, phase, "end", read_peak())
            return output

        return run

    return type("TimedBuild", (kind,), {phase: timed(phase) for phase in PHASES})


def note(log: Path, phase: str, event: str, memory: float = 0.0, disk: float = 0.0) -> None:
    """Adds a line to the log of a build; `memory` and `disk` are GiB at their peaks so far."""
    line = {"phase": phase, "event": event, "moment": time.time(), "memory": memory, "disk": disk}
    with open(log, "a") as file:
        file.write(json.dumps(line) + "\n")


def read_notes(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def count_kills(log: Path) -> int:
    return sum(line["event"] == "killed" for line in read_notes(log))


def sum_phases(log: Path) -> dict[str, float]:
    """Seconds of each phase over all runs. A phase that was killed ends with the last note of its run."""
    seconds, begun, last = dict.fromkeys(PHASES, 0.0), None, 0.0
    for line in read_notes(log):
        if begun and line["event"] == "begin":
            seconds[begun["phase"]] += last - begun["moment"]
        elif begun and line["event"] in ("end", "killed"):
            seconds[begun["phase"]] += line["moment"] - begun["moment"]
            begun = None
        if line["event"] == "begin":
            begun = line
        last = line["moment"]
    return seconds


def make_synthetic_build(count: int, sorted_in: Path | None) -> type:
    """A `Build` of features that are drawn. With `sorted_in`, cells and sorted features are those of another build."""
    from transformers_unicode2.codebook.build import Build
    from transformers_unicode2.codebook.features import shard_path, write_arrays, write_file

    class SyntheticBuild(Build):
        def prepare(self):
            self.source, self.encoder, self.dim = SimpleNamespace(listing=list, left_out=None), None, DIM
            self.record = {"features": "synthetic", "count": count, "codebook_size": self.args.codebook_size}
            self.num_images = self.num_rows = count
            self.shard_bytes, self.images_per_shard, self.num_shards = 2 * DIM, BLOCK, count // BLOCK
            self.check_memory(0)

        def extract(self):
            from tqdm import tqdm

            if sorted_in:
                (self.work / "cells.safetensors").unlink(missing_ok=True)
                os.link(sorted_in / "cells.safetensors", self.work / "cells.safetensors")
            source = SyntheticFeatures(DIM)
            for shard in tqdm(range(self.num_shards), unit="shard", desc="features"):
                features, cells = shard_path(self.features, shard), shard_path(self.cells, shard)
                write_file(self.features / f"{shard:05d}.skipped.txt", b"")
                if sorted_in and not cells.exists():
                    os.link(shard_path(sorted_in / "cells", shard), cells)
                if not cells.exists() and not features.exists():
                    # Block 0 and those behind the last one are held out.
                    write_arrays(features, {"features": source.draw(shard + 1).astype(np.float16)})

    return SyntheticBuild


def build(args: argparse.Namespace) -> None:
    """Runs a build in this process: the child of `run_build`."""
    import torch

    from transformers_unicode2.codebook.build import Build, make_parser
    from transformers_unicode2.processes import follow_launcher, join

    torch.set_num_threads(args.threads)
    sorted_in = Path(args.sorted) if args.sorted else None
    kind = make_synthetic_build(args.count, sorted_in) if args.count else Build
    follow_launcher()
    state = join(cpu=True)
    try:
        time_phases(kind, Path(args.log))(make_parser().parse_args(args.words), state).run()
    finally:
        state.destroy_process_group()


def run_build(
    args: argparse.Namespace,
    output: Path,
    words: list,
    count: int = 0,
    kills: tuple = (),
    sorted_in: Path | None = None,
) -> dict:
    """A build in processes of its own. One is killed as soon as a folder of its work has a number of files.

    The log beside the output holds all that is returned, so that it is right after a kill of this process, too: seconds
    of each phase, the number of kills, and the peaks of memory and disk in GiB.
    """
    log = output.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    options = ["--threads", args.threads, "--count", count, "--log", log]
    options += ["--sorted", sorted_in] if sorted_in else []
    for mark in [*kills[count_kills(log) :], None]:
        process = start_child([__file__, *options, "--", *words, "--output", output], stdout=sys.stderr)
        killed = watch_build(process, output, log, mark, 0.5 if args.divide == 1 else 0.01)
        if process.wait() and not killed:
            raise SystemExit(f"The build of {output} ended with status {process.returncode}.")
    peaks = {name: max(line[name] for line in read_notes(log)) for name in ("memory", "disk")}
    return {"phases": sum_phases(log), "kills": count_kills(log), **peaks}


def watch_build(process, output: Path, log: Path, mark: tuple[str, int] | None, wait: float) -> bool:
    """Notes peaks of a build until it ends; returns whether it was killed at `mark`, a folder and a number of files."""
    memory, disk, noted = 0.0, 0.0, 0.0
    while process.poll() is None:
        memory, disk = max(memory, read_peak(process.pid)), max(disk, measure_disk(output))
        if mark and len(list((output / "work" / mark[0]).glob("*.safetensors"))) >= mark[1]:
            process.send_signal(signal.SIGKILL)
            note(log, "", "killed", memory, disk)
            return True
        if time.monotonic() - noted > 20 * wait:
            note(log, "", "watched", memory, disk)
            noted = time.monotonic()
        time.sleep(wait)
    note(log, "", "watched", memory, disk)
    return False


def measure_disk(folder: Path) -> float:
    """GiB of all files below a folder."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total / GIB


def check_codes(folder: Path, size: int) -> str:
    """Says that a codebook has exactly `size` distinct, finite codes. Stops if it has not."""
    from transformers_unicode2.codebook.clustering import hash_rows
    from transformers_unicode2.codebook.storage import load_codebook

    codes = load_codebook(folder).codes.numpy()
    distinct, finite = len(np.unique(hash_rows(codes))), bool(np.isfinite(codes).all())
    if (len(codes), distinct, finite) != (size, size, True):
        raise SystemExit(f"{folder} has {len(codes)} codes, {distinct} of them distinct, all finite: {finite}.")
    return f"{size:,} distinct, finite codes"


def list_phases(name: str, built: dict, limits: dict[str, tuple[float, str]], found: str) -> list[dict]:
    """Rows of a build: its phases with their limits, and the whole."""
    rows = [
        {"what": f"{name}: {phase.replace('_', ' ')}", "s": seconds, "peak GiB": None}
        | dict(zip(("limit, s", "limit of"), limits.get(phase, ())))
        for phase, seconds in built["phases"].items()
    ]
    whole = {"what": f"{name}: all phases, {built['kills']} kills", "s": sum(built["phases"].values())}
    whole |= {"peak GiB": built["memory"], "disk GiB": built["disk"], "found": found}
    return [*rows, whole]


def limit_phases(args, count: int, size: int, cells: int, dim: int, extract: tuple[float, str]) -> dict:
    """The limits of the phases of a build with a memory budget of 8 GiB."""
    rates, sampled = read_rates(args), min(512 * cells, 8 * GIB // 4 // (16 * dim), count)
    # The last two iterations and the last assignment are in float32, the others in bfloat16.
    per_point = (ITERATIONS - 2) / rates.bfloat16 + 2 / rates.float32
    codes = 2 * count * dim * size / cells * (per_point + 1 / rates.float32)
    moved = 2 * count * dim * (1 / rates.read + 1 / rates.write)
    products = 2 * count * cells * dim / rates.bfloat16
    # A sample of all features is read before the cells are trained, and for the recall when the codes are saved
    read = 2 * count * dim / rates.read
    return {
        "extract": extract,
        "train_cells": (2 * sampled * cells * dim * per_point + read, "products, disk"),
        "sort": (max(moved, products), "disk" if moved > products else "products"),
        "train_codes": (codes + read, "products, disk"),
        "save": (4 * size * dim / rates.write + read, "disk"),
    }


def build_synthetic(args: argparse.Namespace) -> list[dict]:
    sizes, rates = Sizes(args), read_rates(args)
    output = sizes.folder / "synthetic"
    words = ["--images", "-", "--encoder", "-", "--codebook-size", sizes.codes, "--num-cells", sizes.cells]
    words += ["--backend", "torch", "--preview-size", 0, "--max-memory-gib", 8, "--keep-work"]
    built = run_build(args, output, words, sizes.features, kills=(("cells", 1), ("fine", sizes.cells // 2)))
    extract = 2 * sizes.features * DIM / rates.write, "disk"
    limits = limit_phases(args, sizes.features, sizes.codes, sizes.cells, DIM, extract)
    name = f"build (a), {sizes.features / 1e6:g}M x {DIM}"
    return list_phases(name, built, limits, check_codes(output, sizes.codes))


def use_synthetic(args: argparse.Namespace) -> list[dict]:
    """Held-out features in codebooks of three sizes of the same features (Figure 1b and Table 3 of the paper)."""
    from transformers_unicode2.codebook.clustering import find_codes
    from transformers_unicode2.codebook.statistics import compute_statistics, fit_rate_distortion
    from transformers_unicode2.codebook.storage import load_codebook

    sizes, rows, distortions = Sizes(args), [], {}
    source, first = SyntheticFeatures(DIM), sizes.features // BLOCK + 1
    for size in (sizes.codes // 100, sizes.codes // 10, sizes.codes):
        folder = sizes.folder / ("synthetic" if size == sizes.codes else f"synthetic-{size}")
        cells = min(sizes.cells, size)
        if size < sizes.codes:
            words = ["--images", "-", "--encoder", "-", "--codebook-size", size, "--num-cells", cells]
            words += ["--backend", "torch", "--preview-size", 0, "--max-memory-gib", 8]
            kept = sizes.folder / "synthetic" / "work" if cells == sizes.cells else None
            built = run_build(args, folder, words, sizes.features, sorted_in=kept)
            rows += list_phases(f"build of the same, K = {size:,}", built, {}, check_codes(folder, size))[-1:]
        codebook, counts, error, seconds = load_codebook(folder), np.zeros(size, np.int64), 0.0, 0.0
        for block in range(first, first + sizes.held_out // BLOCK):
            points = source.draw(block).astype(np.float16).astype(np.float32)
            start = time.perf_counter()
            indices, distances = find_codes(codebook, points)
            seconds += time.perf_counter() - start
            counts += np.bincount(indices, minlength=size)
            error += float(distances.sum(dtype=np.float64))
        found = compute_statistics(counts, error)
        distortions[size] = found["distortion"]
        even = 1 - (1 - 1 / size) ** sizes.held_out
        said = f"used {found['utilization']:.2%}, under even use {even:.2%}; entropy {found['entropy']:.3f} nats "
        said += f"of {np.log(size):.3f}; distortion {found['distortion']:.4g}"
        limit = 2 * sizes.held_out * size * DIM / read_rates(args).float32
        what = f"codes of {sizes.held_out / 1e6:g}M held-out features, K = {size:,}"
        rows.append({"what": what, "s": seconds, "limit, s": limit, "limit of": "all products", "found": said})
    fit = fit_rate_distortion(np.array([*distortions]), np.array([*distortions.values()]))
    said = f"D = {fit['constant']:.3g} K^{fit['exponent']:.4f}, as in dimension {fit['dimension']:.1f}"
    shutil.rmtree(sizes.folder / "synthetic" / "work", ignore_errors=True)
    return [*rows, {"what": "Eq. 17 over these three", "found": said, "peak GiB": None}]


def link_images(args: argparse.Namespace) -> tuple[Path, Path, int]:
    """Two folders with links to the images, to fit and held out, and the number of the former."""
    places = (Path(place, name) for place, _, names in os.walk(args.images, followlinks=True) for name in names)
    # Several names of one file are one image, as `codebook build` has it
    files = sorted({file.resolve() for file in places if file.suffix.lower() in (".png", ".jpg", ".webp")})
    parts = [Path(args.output) / name for name in ("fit", "held")]
    for part in parts:
        part.mkdir(exist_ok=True)
    for number, file in enumerate(files):
        link = parts[number % HELD_OUT == 0] / f"{number:06d}{file.suffix}"
        if not link.is_symlink():
            link.symlink_to(file)
    return *parts, len(files) - -(-len(files) // HELD_OUT)


def build_real(args: argparse.Namespace) -> list[dict]:
    from transformers_unicode2.encoders_unicode2 import load_encoder

    sizes, rates, (fit, _, count) = Sizes(args), read_rates(args), link_images(args)
    output, encoder = sizes.folder / "real", load_encoder(args.encoder)[0]
    patches, dim = (encoder.config.image_size // encoder.config.patch_size) ** 2, encoder.config.hidden_size
    words = ["--images", fit, "--encoder", args.encoder, "--dtype", "bfloat16", "--codebook-size", sizes.codes]
    words += ["--num-cells", sizes.cells, "--backend", "torch", "--max-memory-gib", 8, "--max-unreadable", 0.05]
    built = run_build(args, output, words, kills=(("cells", 1), ("fine", sizes.cells // 2)))
    weights = sum(weight.numel() for name, weight in encoder.named_parameters() if "layers" in name)
    extract = 2 * count * patches * weights / rates.bfloat16, "products"
    limits = limit_phases(args, count * patches, sizes.codes, sizes.cells, dim, extract)
    name = f"build (b), {count * patches / 1e6:.3g}M x {dim}, from images"
    return list_phases(name, built, limits, check_codes(output, sizes.codes))


def run_command(*words) -> float:
    """Seconds of a `unicode2` command in this process.

    What is at its `--output` already is removed, since a command that is repeated after a kill does only the rest.
    """
    from transformers_unicode2.cli import main

    output = Path(words[words.index("--output") + 1])
    shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
    start, sys.argv = time.perf_counter(), ["unicode2", *map(str, words)]
    main()
    return time.perf_counter() - start


def write_report(args: argparse.Namespace) -> list[dict]:
    sizes, (_, held, _) = Sizes(args), link_images(args)
    page = sizes.folder / "report" / "report.html"
    seconds = run_command("codebook", "report", sizes.folder / "real", "--images", held, "--output", page.parent)
    opened, shown = time_page(page, sizes.codes)
    size = page.stat().st_size / 2**20
    report = json.loads((page.parent / "report.json").read_text())
    used, slope = report["statistics"]["utilization"], report["rate_distortion"]["exponent"]
    found = f"one file of {size:.0f} MiB; {report['num_images']} images use {used:.2%}; Eq. 17: K^{slope:.3f}"
    atlas = run_command("codebook", "preview", sizes.folder / "real", "--output", page.parent / "preview.png")
    return [
        {"what": "report", "s": seconds, "disk GiB": size / 1024, "found": found},
        {"what": "report: opened in a headless browser", "s": opened, "limit, s": 5.0, "limit of": "aim"},
        {"what": "report: a code by its number", "s": shown, "limit, s": 1.0, "limit of": "aim"},
        {"what": "preview", "s": atlas},
    ]


def time_page(file: Path, size: int) -> tuple[float, float]:
    """Seconds until a page has drawn its first code, and the longest until one asked for by its number is drawn."""
    sys.path.append(str(Path(__file__).parents[1] / "modeling_tests"))
    from browser import open_page

    start, longest = time.perf_counter(), 0.0
    with open_page(file) as (page, errors, _):
        page.wait_for_selector("#patches canvas[data-drawn]")
        opened = time.perf_counter() - start
        for number in np.random.default_rng(0).integers(size, size=10).tolist():
            start = time.perf_counter()
            page.fill("#code", str(number))
            page.dispatch_event("#code", "change")
            said = "number => document.querySelector('#about').textContent.includes(`code ${number}:`)"
            page.wait_for_function(said, arg=str(number))
            page.wait_for_function(
                "() => [...document.querySelectorAll('#patches canvas')].every(c => c.dataset.drawn)"
            )
            longest = max(longest, time.perf_counter() - start)
        page.screenshot(path=str(file.with_suffix(".png")))
        assert not errors, errors
    return opened, longest


def grow(args: argparse.Namespace) -> list[dict]:
    from transformers_unicode2.codebook.storage import load_codebook

    sizes, (fit, _, _) = Sizes(args), link_images(args)
    words = ["--add", sizes.added, "--images", fit, "--num-images", sizes.images, "--output", sizes.folder / "grown"]
    seconds = run_command("codebook", "grow", sizes.folder / "real", *words)
    before, after = (load_codebook(sizes.folder / name).codes for name in ("real", "grown"))
    assert len(after) == len(before) + sizes.added and bool((after[: len(before)] == before).all())
    return [{"what": f"grow, {sizes.added:,} codes, {sizes.images} images", "s": seconds, "found": "ids are stable"}]


def find_near(args: argparse.Namespace) -> list[dict]:
    """The 16 nearest codes of each code: from the nearest cells, beside all distances, of which a part is timed."""
    import torch

    from transformers_unicode2.codebook.storage import load_codebook
    from transformers_unicode2.search.neighbours import find_neighbours

    codebook = load_codebook(Sizes(args).folder / "real")
    codes, chosen = (
        codebook.codes,
        torch.randperm(len(codebook.codes), generator=torch.Generator().manual_seed(0))[:2048],
    )
    start, exact = time.perf_counter(), []
    for rows in chosen.split(1024):
        distances = torch.cdist(codes[rows], codes)
        distances[torch.arange(len(rows)), rows] = torch.inf
        exact.append(distances.topk(16, largest=False).indices)
    before, exact = (time.perf_counter() - start) * len(codes) / len(chosen), torch.cat(exact)
    limit = 2 * len(codes) * 8 * len(codes) / len(codebook.cell_centroids) * codes.shape[1] / read_rates(args).float32
    rows = [{"what": "16 near codes, all distances (projected from 2,048 rows)", "s": before}]
    for probes in (4, 8):
        start = time.perf_counter()
        found = find_neighbours(codes, codebook.cell_offsets, 16, probes)
        seconds = time.perf_counter() - start
        recall = (found[chosen][:, :, None] == exact[:, None]).any(1).float().mean().item()
        said = f"{recall:.1%} of the 16 nearest"
        at_most = {"limit, s": limit * probes / 8, "limit of": "products"}
        rows.append({"what": f"16 near codes, {probes} cells", "s": seconds, **at_most, "found": said})
    return rows


CODEBOOK_STEPS = {
    "limits": measure_limits,
    "build-synthetic": build_synthetic,
    "use": use_synthetic,
    "build-real": build_real,
    "report": write_report,
    "grow": grow,
    "neighbours": find_near,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, kind in (("--threads", int), ("--count", int), ("--log", str), ("--sorted", str)):
        parser.add_argument(name, type=kind)
    parser.add_argument("words", nargs="*")
    build(parser.parse_args())
