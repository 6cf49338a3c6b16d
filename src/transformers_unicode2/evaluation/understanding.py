"""The paper's understanding benchmarks by lmms-eval, with a score card.

    unicode2 evaluate understanding --model org/unicode2-7b --tasks paper --judge gpt-4o --output scores
    accelerate launch -m transformers_unicode2.evaluation.understanding --model org/unicode2-7b --tasks mmstar ...

`paper` stands for the ten of Table 1: SEED-Bench, MM-Vet, MMStar, GQA, TextVQA, AI2D, RealWorldQA, MMMU, MMBench and
MME. MMBench is given twice, circular and not. In circular evaluation a question counts as right only if it is answered
correctly for every order of its choices. The two may differ by more than ten points. MM-Vet is graded by a judge, whose
name and date are on the card: --judge NAME, with its key in OPENAI_API_KEY. MME's total is the sum of its two scores.

lmms-eval runs them, by our entry point; its data come from the Hub. `--include-path` adds a folder with tasks of your
own. Every question is answered alone, so batches change nothing. Answers are kept in OUTPUT/answers, and a run that was
killed resumes from there. Metrics with such names as `acc` and `exact_match` are shares, in percent; others are points.

lmms-eval pins other packages; benchmarks/paper.md says how to install it beside this one.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from ..checkpoints import check_checkpoint
from ..cli import at_least
from ..files import make_folders
from ..images_unicode2 import one_line
from ..processes import follow_launcher, join
from ..record import hash_files
from .card_files import check_foreign, check_replaced, check_same
from .intervals import mean_of
from .score_card import ScoreCard, describe_run, describe_subject, hash_content
from .task_files import find_judge, list_files, list_yaml, read_yaml

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
    # Letters are read by rules; `mmbench_en_dev` asks a judge, and guesses where that fails
    "MMBench": ("mmbench_en_dev_static",),
    "MME": ("mme",),
}
COMMAND = "evaluate understanding"
# What ends the names of tasks that read answers by rules, with a judge in their code for another task
STATIC = "_static"
# Words in the names of metrics that are shares, and tasks whose metrics all are: of each question, from 0 to 1
SHARES = {"acc", "accuracy", "exact", "match", "matches", "anls"}
OF_SHARES = ("seedbench", "mmstar", "mmvet")
# An index of MMBench is that of the question, and this times the number of the order of its choices
ORDER = 1_000_000


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 evaluate understanding", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="checkpoint or adapter: folder or Hub name")
    add("--tasks", nargs="+", required=True, help="paper, or names of tasks of lmms-eval")
    add("--output", required=True, help="folder for answers and the score card")
    add("--include-path", metavar="DIR", help="folder with own tasks of lmms-eval")
    add("--judge", metavar="NAME", help="model of OpenAI's interface that grades MM-Vet, and other tasks that ask one")
    add("--system-prompt", default="", metavar="TEXT", help="first turn of every chat, or a file of it (default: none)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of all weights (default: the checkpoint's)")
    add("--limit", type=at_least(1), help="questions of each task, for a trial (default: all)")
    return parser


def main(args: argparse.Namespace) -> ScoreCard | None:
    import torch

    follow_launcher()
    check_include(args.include_path)
    check_foreign(Path(args.output) / "card.json", COMMAND)
    check_checkpoint(args.model)
    state = join(cpu=not torch.cuda.is_available())
    try:
        return run(args, list_tasks(args))
    finally:
        # Gloo's threads can abort the process if they live until the interpreter ends.
        state.destroy_process_group()


def run(args: argparse.Namespace, tasks: list[str]) -> ScoreCard | None:
    """Asks all questions. Returns the card to the first of all processes."""
    start = time.perf_counter()
    # Before lmms-eval is imported, which reads them then
    os.environ |= {"MODEL_VERSION": args.judge} if args.judge else {}
    # First of all: it asks our entry point, which would wait for itself if our model were imported before
    import lmms_eval.models  # noqa: F401
    from accelerate.utils import gather_object
    from lmms_eval.tasks import TaskManager

    from .lmms_eval import UniCode2

    manager, output = TaskManager(include_path=args.include_path), Path(args.output)
    check_tasks(tasks, manager.all_tasks)
    files = {task: [*list_yaml(manager.task_index, task)] for task in tasks}
    check_types(files)
    check_judge(args, {task: set().union(*map(find_judge, files[task])) for task in tasks})
    make_folders(output)
    options = {"dtype": args.dtype or "auto", "system_prompt": args.system_prompt}
    model = UniCode2(args.model, answers=str(output / "answers"), **options)
    card = begin_card(args, files, model)
    check_same(output / "card.json", card)
    results = ask(args, tasks, manager, model)
    parts = gather_object([model.asked])
    if results is None:
        # Not the first of several processes
        return None
    asked = {task: {n: one for part in parts for n, one in part.get(task, {}).items()} for task in results["samples"]}
    check_graded(results["samples"], args)
    add_tasks(card, results, asked)
    card.run = describe_run(str(model.device), start, processes=model.world_size)
    card.run |= {"judge_date": str(date.today())} if args.judge else {}
    check_replaced(output / "card.json", card)
    check_same(output / "card.json", card)
    card.write(output / "card.json")
    print(card.make_page())
    return card


def ask(args: argparse.Namespace, tasks: list[str], manager, model) -> dict | None:
    """What lmms-eval makes of the answers of a model."""
    from lmms_eval import evaluator

    with explained_data():
        return evaluator.simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=manager,
            batch_size=1,
            limit=args.limit,
            cli_args=argparse.Namespace(process_with_media=False, output_path=str(args.output)),
        )


@contextmanager
def explained_data() -> Iterator[None]:
    """Raises `ValueError` when the data of a task cannot be loaded."""
    from datasets.exceptions import DatasetsError
    from tenacity import RetryError

    try:
        yield
    except (RetryError, ConnectionError, DatasetsError) as error:
        if isinstance(error, RetryError):
            error = error.last_attempt.exception() or error
        raise ValueError(
            f"The data of a task cannot be loaded ({one_line(str(error))}); they come from the Hub, from its cache, or "
            "from the files that the task names."
        ) from error


def list_tasks(args: argparse.Namespace) -> list[str]:
    """The tasks of lmms-eval that were asked for."""
    return [task for name in args.tasks for task in (sum(PAPER.values(), ()) if name == "paper" else (name,))]


def check_include(folder: str | None) -> None:
    """Raises `ValueError` when the folder with own tasks is none, or a file in it is no YAML of a task."""
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"--include-path {folder} is no folder; give one with tasks of lmms-eval.")
    for file in Path(folder).rglob("*.yaml") if folder is not None else ():
        read_yaml(file)


def check_types(files: dict[str, list[Path]]) -> None:
    """Raises `ValueError` on a task that is not answered in text. `files` are those of YAML by the tasks."""
    for task, ones in files.items():
        for file in ones:
            kind = read_yaml(file)[0].get("output_type", "generate_until")
            if kind != "generate_until":
                raise ValueError(
                    f"{task} is of the type {kind}; UniCode² takes tasks of the type generate_until alone."
                )


def check_judge(args: argparse.Namespace, keys: dict[str, set[str]]) -> None:
    """Raises `ValueError` when a task has no judge, or it no key. `keys` are the variables that may hold one."""
    judged = {task: names for task, names in keys.items() if names and not task.endswith(STATIC)}
    for task, names in judged.items():
        if not args.judge or not any(os.environ.get(name) for name in names):
            lacks = "--judge NAME" if not args.judge else f"a key in {' or '.join(sorted(names))}"
            raise ValueError(f"{task} is graded by a judge and needs {lacks}; without one, its score would be 0.")
    if args.judge and {*keys} <= {*sum(PAPER.values(), ())} - {*judged}:
        raise ValueError(f"--judge {args.judge}: none of the tasks has a judge.")


def check_tasks(tasks: list[str], known: list[str]) -> None:
    """Raises `ValueError` on a task that lmms-eval does not have."""
    unknown = [task for task in tasks if task not in known]
    if unknown:
        near = get_close_matches(unknown[0], known, 1)
        instead = f"did you mean {near[0]}?" if near else f"it has {len(known)} of them; --include-path adds others."
        raise ValueError(f"lmms-eval has no task {unknown[0]}; {instead}")


def check_graded(samples: dict[str, list[dict]], args: argparse.Namespace) -> None:
    """Raises `ValueError` on answers without a grade, which lmms-eval counts as wrong."""
    for task, ones in samples.items():
        grades = [value for sample in ones for value in sample.values() if isinstance(value, dict)]
        missing = sum(grade.get("eval_model") == "" for grade in grades)
        if missing:
            raise ValueError(
                f"{missing} of {len(ones)} answers of {task} got no grade from {args.judge}, and would count as wrong. "
                f"Answers are kept in {args.output}; run the command again."
            )


def begin_card(args: argparse.Namespace, files: dict[str, list[Path]], model) -> ScoreCard:
    """
    The card without its tasks.

    Args:
        args: options of the command.
        files: YAML files of each task.
        model: that of lmms-eval.
    """
    protocol = {"benchmark": "lmms-eval", "task_type": "image-text-to-text", "lmms_eval": find_version()}
    protocol |= {"limit": args.limit, "system_prompt": model.system_prompt, "dtype": str(model.dtype)}
    protocol |= {"judge": args.judge} if args.judge else {}
    if args.include_path:
        root = Path(args.include_path).resolve()
        own = {file: list_files(file, root) for file in sum(files.values(), [])}
        # Of groups, the tasks alone
        names = {file: read_yaml(file)[0].get("task") for file in own}
        hashes = {
            names[file]: hash_files(own[file], root) for file in own if own[file] and isinstance(names[file], str)
        }
        protocol |= {"include_path": hashes} if hashes else {}
    return ScoreCard(COMMAND, protocol, describe_subject(args.model))


def add_tasks(card: ScoreCard, results: dict, asked: dict[str, dict[int, str]]) -> None:
    """
    Adds the figures of each task, in percent where they are shares. Items are its questions.

    Args:
        card: see `begin_card`.
        results: of lmms-eval.
        asked: digests of what was asked, by task and number of the question.
    """
    card.protocol["tasks"] = {}
    for task, samples in results["samples"].items():
        card.protocol["tasks"][task] = describe_task(task, samples, results, asked.get(task, {}))
        if task.startswith("mmbench") and task.endswith(STATIC):
            add_mmbench(card, task, samples)
            continue
        totals = []
        for name, value in results["results"][task].items():
            metric, _, kind = name.partition(",")
            if isinstance(value, int | float) and "stderr" not in name and metric not in ("alias", "samples"):
                shown = f"{task}, {metric}" + (f" ({kind})" if kind not in ("", "none") else "")
                add_metric(card, shown, metric, float(value), samples, is_share(task, metric))
                totals += [float(value)] * metric.startswith("mme_")
        if task == "mme" and len(totals) == 2:
            card.add_figure("mme, total", sum(totals), len(samples), "points")


def is_share(task: str, metric: str) -> bool:
    """Whether a metric is a share by its name, so that its unit does not depend on what was scored."""
    return task.startswith(OF_SHARES) or bool({*re.split(r"[\W_]+", metric.lower())} & SHARES)


def add_metric(card: ScoreCard, name: str, metric: str, value: float, samples: list[dict], is_share: bool) -> None:
    """Adds a figure with its items, if lmms-eval made it of their mean or of the mean over strata, else alone.

    lmms-eval gives shares of 1 or of 100; here they are in percent.
    """
    given = {str(sample["doc_id"]): sample[metric] for sample in samples if metric in sample}
    items = {item: read_number(one) for item, one in given.items()}
    if items and None not in items.values() and not (is_share and max(items.values()) > 1):
        values = {item: 100 * number if is_share else number for item, number in items.items()}
        for strata in (None, read_strata(given)):
            mean = mean_of(values, strata)
            if np.isclose(mean, value) or is_share and np.isclose(mean / 100, value, atol=1e-5):
                if is_share and strata is None and {*values.values()} <= {0.0, 100.0}:
                    card.add_share(name, {item: bool(number) for item, number in values.items()})
                else:
                    card.add_mean(name, values, "%" if is_share else "points", strata)
                return
    card.add_figure(name, value, len(given), "points")


def read_number(one) -> float | None:
    """What a question got, of what a task of lmms-eval keeps of it; `None` if that is something else."""
    if isinstance(one, int | float | np.number):
        return float(one)
    if not isinstance(one, dict):
        return None
    if isinstance(one.get("score"), int | float):
        return float(one["score"])
    if {"pred", "answer"} <= {*one}:
        return float(str(one["pred"]).lower().strip() == str(one["answer"]).lower().strip())
    if "parsed_pred" in one:
        from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

        return float(evaluate_mmmu([one])[1]["acc"])
    return None


def read_strata(given: dict[str, dict]) -> dict[str, str] | None:
    """The finer category of each question, where a task has one and takes the mean over them."""
    has_strata = all(isinstance(one, dict) and "l2_category" in one for one in given.values())
    return {item: str(one["l2_category"]) for item, one in given.items()} if has_strata else None


def add_mmbench(card: ScoreCard, task: str, samples: list[dict]) -> None:
    """Adds the shares of questions that are right in every order of their choices, and in the first one."""
    import pandas as pd
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    rows = pd.DataFrame([sample["gpt_eval_score"] for sample in samples]).sort_values("index")
    rows = rows.rename(columns={name: name if name in "ABCD" else name.lower() for name in rows.columns})
    rows["prediction"] = rows["prediction"].astype(str)
    answers, evaluator = dict(zip(rows["index"], rows["answer"])), MMBench_Evaluator()
    circular, plain = {}, {}
    for index, orders in rows.groupby(rows["index"] % ORDER):
        first = orders[orders["index"] == index]
        if len(first):
            circular[str(index)] = bool(evaluator.eval_sub_data(orders, answers, static_only=True))
            plain[str(index)] = bool(evaluator.eval_sub_data(first, answers, static_only=True))
    card.add_share(f"{task}, circular", circular)
    card.add_share(f"{task}, not circular", plain)


def describe_task(task: str, samples: list[dict], results: dict, asked: dict[int, str]) -> dict:
    """What the scores of a task depend on: version, settings, and SHA-256 of what was asked and of its targets.

    What was asked holds the pictures, all texts around a question, and the settings of generation.
    """
    config = results.get("configs", {}).get(task, {})
    kept = {name: config.get(name) for name in ("dataset_path", "dataset_name", "test_split", "generation_kwargs")}
    kept |= {"version": results.get("versions", {}).get(task), "num_fewshot": config.get("num_fewshot")}
    targets = sorted((str(sample["doc_id"]), str(sample.get("target"))) for sample in samples)
    requests = sorted((str(number), one) for number, one in asked.items())
    return {**kept, "questions": len(samples), "requests": hash_content(requests), "targets": hash_content(targets)}


def find_version() -> str:
    from importlib.metadata import version

    return version("lmms_eval")


if __name__ == "__main__":
    from ..cli import main as run_command

    sys.argv[1:1] = ["evaluate", "understanding"]
    run_command()
