"""What the command refuses before lmms-eval is asked, and what its results become."""

import pytest

from transformers_unicode2.evaluation.score_card import ScoreCard
from transformers_unicode2.evaluation.understanding import (
    PAPER,
    add_metric,
    check_graded,
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
    assert len(PAPER) == 10 and len(tasks) == 10 and "mmbench_en_dev_static" in tasks
    assert list_tasks(parse("mmstar", "own")) == ["mmstar", "own"]


def test_a_judge_needs_a_name_and_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for words, message in (
        (("mmvet",), "mmvet is graded by a judge and needs --judge NAME; without one, its score would be 0"),
        (("mmvet", "--judge", "gpt"), "needs a key in OPENAI_API_KEY"),
        (("mmbench_en_dev", "--judge", "gpt"), "mmbench_en_dev is graded by a judge and needs a key"),
        (("mmstar", "--judge", "gpt"), "--judge gpt: none of the tasks has a judge"),
    ):
        args = parse(*words)
        with pytest.raises(ValueError, match=message):
            check_judge(args, list_tasks(args))
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    check_judge(parse("mmvet", "--judge", "gpt"), ["mmvet"])
    check_judge(parse("own", "--judge", "gpt"), ["own"])
    check_judge(parse("mmbench_en_dev_static"), ["mmbench_en_dev_static"])


def test_answers_without_a_grade_are_no_wrong_answers():
    samples = {"mmvet": [{"gpt_eval_score": {"score": 0.0, "eval_model": name}} for name in ("", "gpt", "")]}
    with pytest.raises(ValueError, match="2 of 3 answers of mmvet got no grade from gpt, .* Answers are kept in o"):
        check_graded(samples, parse("mmvet", "--judge", "gpt"))
    check_graded({"own": [{"exact": 1.0}]}, parse("own"))


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
    assert (exact.value, exact.interval, score.value, score.interval) == (50.0, "binomial", 37.5, "bootstrap")
    assert (other.value, other.interval, total.value, total.interval) == (62.5, "none", 1500.0, "none")


@pytest.mark.parametrize(
    ("given", "value", "figure"),
    [
        # SEED-Bench, and MMStar, whose score is the mean over its finer categories
        ([{"pred": "a ", "answer": "A"}, {"pred": "b", "answer": "A"}], 0.5, (50.0, "binomial", "%")),
        (
            [
                *[{"score": 1.0, "l2_category": "x"}] * 2,
                *[{"score": 0.0, "l2_category": "y"}] * 3,
            ],
            0.5,
            (50.0, "bootstrap", "%"),
        ),
        # MM-Vet gives percent, TextVQA shares, MME a sum that no mean gives
        ([{"score": 0.5}, {"score": 1.0}], 75.0, (75.0, "bootstrap", "%")),
        ([0.3, 1], 0.65, (65.0, "bootstrap", "%")),
        ([{"score": 1.0, "question_id": "q"}, {"score": 1.0, "question_id": "q"}], 200.0, (200.0, "none", "points")),
    ],
)
def test_scores_of_the_papers_tasks_have_items(given, value, figure):
    card = ScoreCard("evaluate understanding", {}, {"model": "m"})
    add_metric(card, "t, m", "m", value, [{"doc_id": i, "m": one} for i, one in enumerate(given)])
    (found,) = card.figures
    assert (pytest.approx(found.value), found.interval, found.unit) == figure
    assert (found.interval == "none") == ("t, m" not in card.items)


def test_a_task_is_described_by_its_questions():
    samples = [{"doc_id": i, "target": "a"} for i in range(3)]
    results = {"configs": {"t": {"dataset_path": "d", "num_fewshot": 0}}, "versions": {"t": 1.0}}
    one = describe_task("t", samples, results, {0: "x", 1: "y"})
    assert one == describe_task("t", samples[::-1], results, {1: "y", 0: "x"})
    assert one["questions"] == 3 and one["version"] == 1.0
    changed = describe_task("t", [*samples[:2], {"doc_id": 2, "target": "b"}], results, {0: "x", 1: "z"})
    assert one["targets"] != changed["targets"] and one["requests"] != changed["requests"]
