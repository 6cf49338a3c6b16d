"""What the command refuses before lmms-eval is asked, and what its results become."""

import pytest

from transformers_unicode2.evaluation.score_card import ScoreCard
from transformers_unicode2.evaluation.understanding import (
    PAPER,
    add_metric,
    check_graded,
    check_include,
    check_judge,
    check_tasks,
    check_types,
    describe_task,
    is_share,
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
    for name in ("OPENAI_API_KEY", "AZURE_API_KEY", "REKA_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    own, either = {"OPENAI_API_KEY"}, {"OPENAI_API_KEY", "AZURE_API_KEY"}
    for words, keys, message in (
        (("mmvet",), own, "mmvet is graded by a judge and needs --judge NAME; without one, its score would be 0"),
        (("mmvet", "--judge", "gpt"), own, "needs a key in OPENAI_API_KEY; without"),
        (("own", "--judge", "gpt"), either, "own is graded by a judge and needs a key in AZURE_API_KEY or OPENAI_API"),
        (("vibe_eval", "--judge", "reka"), {"REKA_API_KEY"}, "needs a key in REKA_API_KEY"),
        (("mmstar", "--judge", "gpt"), set(), "--judge gpt: none of the tasks has a judge"),
    ):
        args = parse(*words)
        with pytest.raises(ValueError, match=message):
            check_judge(args, {task: keys for task in list_tasks(args)})
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    check_judge(parse("mmvet", "--judge", "gpt"), {"mmvet": either})
    check_judge(parse("own", "--judge", "gpt"), {"own": set()})
    check_judge(parse("mmbench_en_dev_static"), {"mmbench_en_dev_static": own})


def test_tasks_that_are_not_answered_in_text_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("task: a\noutput_type: loglikelihood\n")
    with pytest.raises(ValueError, match="a is of the type loglikelihood; UniCode² takes tasks of the type generate"):
        check_types({"a": [tmp_path / "a.yaml"]})
    with pytest.raises(ValueError, match="--include-path .*nope is no folder"):
        check_include(str(tmp_path / "nope"))
    check_include(None)
    check_include(str(tmp_path))


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


def add(metric, value, given, task="t"):
    """The figure of a metric; it has items, or no interval."""
    card = ScoreCard("evaluate understanding", {}, {"model": "m"})
    samples = [{"doc_id": i, metric: one} for i, one in enumerate(given)]
    add_metric(card, f"{task}, {metric}", metric, value, samples, is_share(task, metric))
    (found,) = card.figures
    assert (found.interval == "none") == (not card.items)
    return pytest.approx(found.value), found.interval, found.unit


def test_metrics_keep_their_items_where_these_make_them_up():
    assert add("exact", 0.5, [0.0, 1.0, 0.0, 1.0]) == (50.0, "binomial", "%")
    assert add("acc", 0.375, [0.0, 0.25, 0.5, 0.75]) == (37.5, "bootstrap", "%")
    assert add("acc", 62.5, [{"a": 1}] * 4) == (62.5, "none", "points")
    assert add("score", 1500.0, [0.0, 0.25, 0.5, 0.75]) == (1500.0, "none", "points")


@pytest.mark.parametrize("given", [[0.0, 0.0], [0.0, 1.0], [0.5, 1.0], [7.0, 43.0], [-1.0, 1.0]])
def test_the_unit_does_not_depend_on_the_scores(given):
    """A BLEU of 0 is no share."""
    mean = sum(given) / 2
    assert add("bleu", mean, given) == (mean, "bootstrap", "points")
    assert add("mmmu_acc", 0.0, [0.0, 0.0])[2] == add("mmmu_acc", 0.5, [0.0, 1.0])[2] == "%"


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="t, acc got nan, which is no finite score"):
        add("acc", float("nan"), [0.0, float("nan")])


@pytest.mark.parametrize(
    ("task", "metric", "given", "value", "figure"),
    [
        # MMStar's score is the mean over its finer categories
        ("seedbench", "seed_all", [{"pred": "a ", "answer": "A"}, {"pred": "b", "answer": "A"}], 0.5,
         (50.0, "binomial", "%")),
        ("mmstar", "average", [*[{"score": 1.0, "l2_category": "x"}] * 2, *[{"score": 0.0, "l2_category": "y"}] * 3],
         0.5, (50.0, "bootstrap", "%")),
        # MM-Vet gives percent, TextVQA shares, MME a sum that no mean gives
        ("mmvet", "gpt_eval_score", [{"score": 0.5}, {"score": 1.0}], 75.0, (75.0, "bootstrap", "%")),
        ("textvqa_val", "exact_match", [0.3, 1], 0.65, (65.0, "bootstrap", "%")),
        ("mme", "mme_perception_score", [{"score": 1.0, "question_id": "q"}] * 2, 200.0, (200.0, "none", "points")),
    ],
)  # fmt: skip
def test_scores_of_the_papers_tasks_have_items(task, metric, given, value, figure):
    assert add(metric, value, given, task) == figure


def test_a_task_is_described_by_its_questions():
    samples = [{"doc_id": i, "target": "a"} for i in range(3)]
    results = {"configs": {"t": {"dataset_path": "d", "num_fewshot": 0}}, "versions": {"t": 1.0}}
    one = describe_task("t", samples, results, {0: "x", 1: "y"})
    assert one == describe_task("t", samples[::-1], results, {1: "y", 0: "x"})
    assert one["questions"] == 3 and one["version"] == 1.0
    changed = describe_task("t", [*samples[:2], {"doc_id": 2, "target": "b"}], results, {0: "x", 1: "z"})
    assert one["targets"] != changed["targets"] and one["requests"] != changed["requests"]
