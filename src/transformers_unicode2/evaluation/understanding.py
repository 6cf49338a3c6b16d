"""The paper's understanding benchmarks by lmms-eval, with a score card.

    unicode2 evaluate understanding --model org/unicode2-7b --tasks paper --output scores
    accelerate launch -m transformers_unicode2.evaluation.understanding --model org/unicode2-7b --tasks mmstar ...

`paper` stands for the ten of Table 1: SEED-Bench, MM-Vet, MMStar, GQA, TextVQA, AI2D, RealWorldQA, MMMU, MMBench and
MME. MMBench is given twice, circular and not, since the two differ by more than ten points. MM-Vet is graded by a
judge, whose name and date are on the card: --judge NAME, with its key in OPENAI_API_KEY.

lmms-eval runs them, by our entry point; its data come from the Hub. `--include-path` adds a folder of own tasks. Every
question is answered alone, so batches change nothing. A run that was killed resumes from OUTPUT/answers.

lmms-eval needs packages that pin others, see benchmarks/paper.md for how to install it beside this one.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from datetime import date
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from ..checkpoints import check_checkpoint
from ..cli import at_least
from ..files import make_folders
from .score_card import ScoreCard, describe_run, describe_subject

# Tasks of lmms-eval for the columns of Table 1
PAPER = {
    "SEED-Bench": ("seedbench",),
    "MM-Vet": ("mmvet",),
    "MMStar": ("mmstar",),
    "GQA": ("gqa",),
    "TextVQA": ("textvqa_val",),
    "AI2D": ("ai2d",),
    "RealWorldQA": ("realworldqa",),
    "MMMU": ("mmmu_val",),
    "MMBench": ("mmbench_en_dev", "mmbench_en_dev_static"),
    "MME": ("mme",),
}
# Tasks whose answers a judge grades
JUDGED = ("mmvet",)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 evaluate understanding", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="checkpoint or adapter: folder or Hub name")
    add("--tasks", nargs="+", required=True, help="paper, or names of tasks of lmms-eval")
    add("--output", required=True, help="folder for answers and the score card")
    add("--include-path", metavar="DIR", help="folder with own tasks of lmms-eval")
    add("--judge", metavar="NAME", help="model of OpenAI's interface that grades MM-Vet")
    add("--system-prompt", default="", metavar="TEXT", help="first turn of every chat, or a file of it (default: none)")
    add("--limit", type=at_least(1), help="questions of each task, for a trial (default: all)")
    return parser


def main(args: argparse.Namespace) -> ScoreCard | None:
    start, tasks = time.perf_counter(), list_tasks(args)
    check_judge(args, tasks)
    check_checkpoint(args.model)
    # Before lmms-eval is imported, which reads them then
    os.environ |= {"MODEL_VERSION": args.judge} if args.judge else {}
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(include_path=args.include_path)
    check_tasks(tasks, manager.all_tasks)
    make_folders(Path(args.output))
    arguments = f"pretrained={args.model}" + (f",system_prompt={args.system_prompt}" if args.system_prompt else "")
    results = evaluator.simple_evaluate(
        model="unicode2",
        model_args=arguments,
        tasks=tasks,
        task_manager=manager,
        batch_size=1,
        limit=args.limit,
        use_cache=str(Path(args.output) / "answers"),
        cli_args=argparse.Namespace(process_with_media=False, output_path=str(args.output)),
    )
    if results is None:
        # Not the first of several processes
        return None
    card = make_card(args, results)
    card.run = describe_run("cuda" if has_gpu() else "cpu", start)
    card.write(Path(args.output) / "card.json")
    print(card.make_page())
    return card


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def list_tasks(args: argparse.Namespace) -> list[str]:
    """The tasks of lmms-eval that were asked for."""
    return [task for name in args.tasks for task in (sum(PAPER.values(), ()) if name == "paper" else (name,))]


def check_judge(args: argparse.Namespace, tasks: list[str]) -> None:
    """Raises `ValueError` when a task has no judge, or it no key."""
    judged = [task for task in tasks if task in JUDGED]
    if judged and not (args.judge and os.environ.get("OPENAI_API_KEY")):
        lacks = "--judge NAME" if not args.judge else "a key in OPENAI_API_KEY"
        raise ValueError(f"{judged[0]} is graded by a judge and needs {lacks}; without one, its score would be 0.")
    if args.judge and not judged:
        raise ValueError(f"--judge {args.judge}: none of the tasks has a judge.")


def check_tasks(tasks: list[str], known: list[str]) -> None:
    """Raises `ValueError` on a task that lmms-eval does not have."""
    unknown = [task for task in tasks if task not in known]
    if unknown:
        near = get_close_matches(unknown[0], known, 1)
        instead = f"did you mean {near[0]}?" if near else f"it has {len(known)} of them; --include-path adds others."
        raise ValueError(f"lmms-eval has no task {unknown[0]}; {instead}")


def make_card(args: argparse.Namespace, results: dict) -> ScoreCard:
    """Figures of each task. Items are its questions where a metric has a number for each."""
    protocol = {"benchmark": "lmms-eval", "lmms_eval": find_version(), "limit": args.limit}
    protocol |= {"system_prompt": args.system_prompt, "task_type": "image-text-to-text", "tasks": {}}
    if args.judge:
        protocol |= {"judge": args.judge, "judge_date": str(date.today())}
    card = ScoreCard("evaluate understanding", protocol, describe_subject(args.model))
    for task, samples in results["samples"].items():
        protocol["tasks"][task] = describe_task(task, samples, results)
        for name, value in results["results"][task].items():
            metric = name.split(",")[0]
            if isinstance(value, int | float) and "stderr" not in name and metric not in ("alias", "samples"):
                add_metric(card, f"{task}, {metric}", metric, float(value), samples)
    return card


def add_metric(card: ScoreCard, name: str, metric: str, value: float, samples: list[dict]) -> None:
    """Adds a figure with its items, if their mean is what lmms-eval made of them, else its value alone."""
    items = {str(sample["doc_id"]): sample.get(metric) for sample in samples}
    numeric = all(isinstance(item, int | float | np.number) for item in items.values())
    if not numeric or not np.isclose(np.mean(list(items.values())), value):
        card.add_figure(name, value, len(items), "")
    elif set(items.values()) <= {0, 1}:
        card.add_share(name, {item: bool(flag) for item, flag in items.items()})
    else:
        card.add_mean(name, {item: float(number) for item, number in items.items()}, "")


def describe_task(task: str, samples: list[dict], results: dict) -> dict:
    """What the scores of a task depend on: its version, its settings, and the SHA-256 of its questions."""
    config = results.get("configs", {}).get(task, {})
    kept = {name: config.get(name) for name in ("dataset_path", "dataset_name", "test_split", "generation_kwargs")}
    asked = [[sample["doc_id"], sample.get("doc_hash"), str(sample.get("target"))] for sample in samples]
    digest = hashlib.sha256(json.dumps(sorted(asked, key=lambda one: one[0]), default=str).encode()).hexdigest()
    return {**kept, "version": results.get("versions", {}).get(task), "num_fewshot": config.get("num_fewshot"),
            "questions": len(samples), "data": digest}  # fmt: skip


def find_version() -> str:
    from importlib.metadata import version

    return version("lmms_eval")


if __name__ == "__main__":
    from ..cli import main as run_command

    sys.argv[1:1] = ["evaluate", "understanding"]
    run_command()
