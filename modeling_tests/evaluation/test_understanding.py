"""What the command refuses before lmms-eval is asked, and what its results become."""

import pytest

from transformers_unicode2.evaluation.score_card import ScoreCard
from transformers_unicode2.evaluation.understanding import (
    PAPER,
    add_metric,
    check_judge,
    check_tasks,
    describe_task,
    list_tasks,
    make_parser,
)


def parse(*words):
    return make_parser().parse_args(["--model", "m", "--output", "o", "--tasks", *words])


def test_the_papers_tasks_are_those_of_table_1():
    tasks = list_tasks(parse("paper"))
    assert len(PAPER) == 10 and len(tasks) == 11 and {"mmbench_en_dev", "mmbench_en_dev_static"} <= set(tasks)
    assert list_tasks(parse("mmstar", "own")) == ["mmstar", "own"]


def test_a_judge_needs_a_name_and_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for words, message in (
        (("mmvet",), "mmvet is graded by a judge and needs --judge NAME; without one, its score would be 0"),
        (("mmvet", "--judge", "gpt"), "needs a key in OPENAI_API_KEY"),
        (("mmstar", "--judge", "gpt"), "--judge gpt: none of the tasks has a judge"),
    ):
        args = parse(*words)
        with pytest.raises(ValueError, match=message):
            check_judge(args, list_tasks(args))
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    check_judge(parse("mmvet", "--judge", "gpt"), ["mmvet"])


def test_unknown_tasks_are_named():
    with pytest.raises(ValueError, match="lmms-eval has no task mmstr; did you mean mmstar?"):
        check_tasks(["mmstr"], ["mmstar", "gqa"])
    with pytest.raises(ValueError, match="has no task qqq; it has 2 of them; --include-path adds others"):
        check_tasks(["qqq"], ["mmstar", "gqa"])


def test_metrics_keep_their_items_where_these_make_them_up():
    card = ScoreCard("evaluate understanding", {}, {"model": "m"})
    samples = [{"doc_id": i, "exact": float(i % 2), "score": i / 4, "other": {"a": 1}} for i in range(4)]
    add_metric(card, "t, exact", "exact", 0.5, samples)
    add_metric(card, "t, score", "score", 0.375, samples)
    add_metric(card, "t, other", "other", 62.5, samples)
    add_metric(card, "t, total", "score", 1500.0, samples)
    exact, score, other, total = card.figures
    assert (exact.value, exact.interval, score.value, score.interval) == (50.0, "binomial", 0.375, "bootstrap")
    assert (other.value, other.interval, total.value, total.interval) == (62.5, "none", 1500.0, "none")


def test_a_task_is_described_by_its_questions():
    samples = [{"doc_id": i, "target": "a"} for i in range(3)]
    results = {"configs": {"t": {"dataset_path": "d", "num_fewshot": 0}}, "versions": {"t": 1.0}}
    one = describe_task("t", samples, results)
    assert one == describe_task("t", samples[::-1], results) and one["questions"] == 3 and one["version"] == 1.0
    assert one["data"] != describe_task("t", [*samples[:2], {"doc_id": 2, "target": "b"}], results)["data"]
