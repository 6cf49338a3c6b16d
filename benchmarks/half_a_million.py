"""The paper's codebook size through the whole path: build, use, page, growth, quantizer, model, training.

    python benchmarks/half_a_million.py --images pictures --encoder clip-vit-b16 --llm smollm2-135m
    python benchmarks/half_a_million.py --images pictures --encoder clip-vit-b16 --llm smollm2-135m --divide 100

Two codebooks of 500,000 codes are built, and each build is killed twice. One is of 10 million features that are drawn,
with the width of so400m, the other of all patches of the images, every 20th of which is held out. `--divide` makes
every size smaller by that factor. The limit of a row is arithmetic: what its products, or the bytes that it has to
move, take at the rates that the first step measures.

Each step is a process of its own, and its peak resident memory is in the table. Finished steps are kept, and so are the
times and peaks of an unfinished build: after a kill, which ends all processes, the same command resumes. `--again STEP`
runs one anew. The table is printed of all steps that are there.
"""

import argparse
import json
import sys
import time
from datetime import date
from pathlib import Path

from half_a_million_codebook import CODEBOOK_STEPS
from half_a_million_model import MODEL_STEPS
from rows import find_commit, name_processor, start_child, watch_peak

STEPS = CODEBOOK_STEPS | MODEL_STEPS
COLUMNS = ("what", "s", "limit, s", "limit of", "peak GiB", "disk GiB", "found")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--images", required=True, help="folder of images")
    add("--encoder", required=True, help="folder of a SigLIP or CLIP vision encoder")
    add("--llm", required=True, help="folder of a causal language model")
    add("--output", default="outputs/half_a_million", help="folder for everything (default: %(default)s)")
    add("--divide", type=int, default=1, help="factor by which all sizes are smaller (default: %(default)s)")
    add("--steps", nargs="+", choices=STEPS, help="run only these (default: all, in order)")
    add("--again", nargs="+", choices=STEPS, default=[], help="finished steps to run anew")
    add("--threads", type=int, default=2)
    add("--step", choices=STEPS, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    args.output = str(Path(args.output).absolute())
    if args.step:
        import torch

        torch.set_num_threads(args.threads)
        result_file(args, args.step).write_text(json.dumps({"rows": STEPS[args.step](args)}))
        return
    (Path(args.output) / "steps").mkdir(parents=True, exist_ok=True)
    for name in args.again:
        result_file(args, name).unlink(missing_ok=True)
    for name in args.steps or STEPS:
        if not is_finished(result_file(args, name)):
            run_step(args, name)
    print_table(args)


def result_file(args: argparse.Namespace, name: str) -> Path:
    return Path(args.output) / "steps" / f"{name}.json"


def is_finished(file: Path) -> bool:
    return file.is_file() and "peak" in json.loads(file.read_text())


def run_step(args: argparse.Namespace, name: str) -> None:
    """Runs a step in its own process. Its rows get the date, the commit and the peak memory."""
    words = [__file__, "--step", name, "--output", args.output, "--images", args.images]
    words += ["--encoder", args.encoder, "--llm", args.llm, "--divide", args.divide, "--threads", args.threads]
    print(f"{name}: running", file=sys.stderr, flush=True)
    start = time.perf_counter()
    process = start_child(words, stdout=sys.stderr)
    peak = watch_peak(process)
    if process.returncode:
        raise SystemExit(f"{name} ended with status {process.returncode}; the same command resumes.")
    result = json.loads(result_file(args, name).read_text())
    result |= {"seconds": time.perf_counter() - start, "peak": peak}
    result |= {"date": str(date.today()), "commit": find_commit()}
    temporary = result_file(args, name).with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2))
    temporary.rename(result_file(args, name))


def print_table(args: argparse.Namespace) -> None:
    results = {name: json.loads(file.read_text()) for name in STEPS if is_finished(file := result_file(args, name))}
    made = sorted({(result["date"], result["commit"]) for result in results.values()})
    days = ", ".join(f"{day} at {commit}" for day, commit in made)
    print(f"{name_processor()}, {args.threads} threads; {days};")
    options = f"--images {Path(args.images).name} --encoder {Path(args.encoder).name} --llm {Path(args.llm).name}"
    options += f" --divide {args.divide}" if args.divide > 1 else ""
    print(f"`python benchmarks/half_a_million.py {options}`\n")
    print(f"| {' | '.join(COLUMNS)} |")
    print("| --- | ---: | ---: | --- | ---: | ---: | --- |")
    for result in results.values():
        for row in result["rows"]:
            row = {"peak GiB": result["peak"]} | row
            print("| " + " | ".join(format_cell(row.get(column)) for column in COLUMNS) + " |")


def format_cell(value) -> str:
    if value is None:
        return ""
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 100
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )


if __name__ == "__main__":
    main()
