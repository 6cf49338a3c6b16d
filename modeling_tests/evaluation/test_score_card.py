"""Figures, intervals and what makes two cards comparable."""

import numpy as np
import pytest

from transformers_unicode2.evaluation.card_files import read_card
from transformers_unicode2.evaluation.score_card import ScoreCard


def make_card(**changes) -> ScoreCard:
    protocol = {"benchmark": "scenes", "data": {"a.jsonl": "0" * 64}, "guidance_scale": 3.0}
    card = ScoreCard("evaluate scenes", {**protocol, **changes}, {"model": "/x/unicode2-tiny", "checkpoint": "1" * 64})
    card.add_share("right", {"0": True, "1": False, "2": True, "3": True})
    card.add_mean("score", {"0": 0.25, "1": 0.5, "2": 0.75}, "points")
    card.add_figure("fid", 12.5, 4, "")
    card.run = {"date": "2026-11-30", "batch_size": 4}
    return card


def test_a_mean_over_strata_keeps_their_sizes():
    """GenEval's tags: their mix is fixed, so it adds no noise. The spread is that of each stratum, by theory."""
    rng, sizes, shares = np.random.default_rng(0), {"a": 80, "b": 300}, {"a": 0.9, "b": 0.2}
    values, strata = {}, {}
    for tag, size in sizes.items():
        for i in range(size):
            strata[f"{tag}{i}"] = tag
            values |= {f"{tag}{i}/{j}": 100.0 * (rng.random() < shares[tag]) for j in range(4)}
    card = ScoreCard("c", {}, {})
    card.add_mean("overall", values, "%", strata)
    (figure,) = card.figures
    found = {tag: [value for item, value in values.items() if item.startswith(tag)] for tag in sizes}
    assert figure.value == pytest.approx(np.mean([np.mean(part) for part in found.values()]))
    by_theory = sum(np.var(part) / len(part) / 4 for part in found.values()) ** 0.5
    assert (figure.high - figure.low) / 2 == pytest.approx(1.96 * by_theory, rel=0.15)
    assert figure.high <= 100


def test_all_right_is_no_certainty():
    """Its interval is Wilson's of the 10 prompts, not of their 40 pictures."""
    for value, limits in ((100.0, (72.25, 100.0)), (0.0, (0.0, 27.75))):
        card = ScoreCard("c", {}, {})
        card.add_mean("overall", {f"{i}/{j}": value for i in range(10) for j in range(4)}, "%")
        assert (card.figures[0].low, card.figures[0].high) == pytest.approx(limits, abs=0.01)


def test_what_cannot_vary_has_no_interval():
    """One group of each stratum says nothing about how much it varies."""
    card = ScoreCard("evaluate geneval", {}, {"model": "m"})
    values = {"a/0": 100.0, "a/1": 0.0, "b/0": 100.0, "b/1": 100.0}
    card.add_mean("overall", values, "%", {"a": "x", "b": "y"})
    card.add_mean("one", {"a/0": 100.0, "a/1": 0.0}, "%")
    assert [(figure.low, figure.interval) for figure in card.figures] == [(None, "too few")] * 2
    assert "| overall | 75 % | too few | 4 in 2 groups |" in card.make_page()


def test_tasks_are_data_sets_of_their_own():
    card = ScoreCard("evaluate understanding", {"tasks": {"gqa": {}}}, {"model": "m"})
    card.add_share("gqa, exact_match", {"0": True})
    assert "name: gqa\n" in card.make_page() and "name: exact_match\n" in card.make_page()


def test_a_card_is_written_and_read(tmp_path):
    card = make_card()
    card.write(tmp_path / "card.json")
    again = read_card(tmp_path / "card.json")
    assert again.to_dict() == card.to_dict()
    right, score, fid = again.figures
    assert (right.value, right.count, right.interval) == (75.0, 4, "binomial") and right.low == pytest.approx(
        30.06, abs=0.01
    )
    assert score.value == 0.5 and score.interval == "bootstrap" and 0.25 <= score.low < 0.5 < score.high <= 0.75
    assert (fid.low, fid.interval) == (None, "none")
    page = (tmp_path / "card.md").read_text()
    assert "model-index:" in page and "name: unicode2-tiny" in page and "/x/" not in page
    assert "| right | 75 % | 30.06 to 95.44 (binomial) | 4 |" in page and card.protocol_hash[:12] in page


def test_the_protocol_alone_decides_about_the_hash():
    card = make_card()
    same = make_card()
    same.run, same.subject = {"date": "later", "batch_size": 8}, {"model": "other"}
    assert same.protocol_hash == card.protocol_hash != make_card(guidance_scale=4.0).protocol_hash


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_finite_score_is_refused(value):
    """JSON has no word for it."""
    card = ScoreCard("c", {}, {})
    for add in (lambda: card.add_mean("m", {"0": 1.0, "1": value}, "dB"), lambda: card.add_figure("m", value, 2, "")):
        with pytest.raises(ValueError, match=f"m(, item '1',)? got {value}, which is no finite score"):
            add()
    assert not card.figures


def test_two_figures_of_a_name_are_refused():
    card = make_card()
    with pytest.raises(ValueError, match="There are two figures 'right'"):
        card.add_share("right", {"0": True})


def test_texts_of_a_protocol_stay_in_their_row():
    page = make_card(ask="/no_think\nLook | say <b>: {question}").make_page()
    assert "| ask | /no_think<br>Look \\| say &lt;b&gt;: {question} |" in page
