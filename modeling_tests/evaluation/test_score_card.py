"""Figures, intervals and what makes two cards comparable."""

import json

import numpy as np
import pytest

from transformers_unicode2.evaluation.score_card import ScoreCard, bootstrap, read_card, wilson


def make_card(**changes) -> ScoreCard:
    protocol = {"benchmark": "scenes", "data": {"a.jsonl": "0" * 64}, "guidance_scale": 3.0}
    card = ScoreCard("evaluate scenes", {**protocol, **changes}, {"model": "/x/unicode2-tiny", "checkpoint": "1" * 64})
    card.add_share("right", {"0": True, "1": False, "2": True, "3": True})
    card.add_mean("score", {"0": 0.25, "1": 0.5, "2": 0.75}, "points")
    card.add_figure("fid", 12.5, 4, "")
    card.run = {"date": "2026-11-30", "batch_size": 4}
    return card


def test_wilson_is_the_published_interval():
    """R's binom.confint(x, n, method = "wilson")."""
    assert wilson(15, 20) == pytest.approx((0.5313, 0.8881), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_bootstrap_covers_the_mean_and_respects_groups():
    """Four equal images of a prompt say no more than one."""
    values = {str(i): float(v) for i, v in enumerate(np.random.default_rng(1).normal(size=200))}
    low, high = bootstrap(values)
    spread = np.std(list(values.values())) / 200**0.5
    assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.1)
    copied = {f"{i}-{j}": value for i, value in values.items() for j in range(4)}
    grouped = bootstrap(copied, {item: item.split("-")[0] for item in copied})
    assert grouped[1] - grouped[0] == pytest.approx(high - low, rel=0.1)
    alone = bootstrap(copied)
    assert alone[1] - alone[0] == pytest.approx((high - low) / 2, rel=0.1)
    assert bootstrap({"0": 1.0}) == (None, None)


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


def test_what_is_no_card_is_refused(tmp_path):
    card, file = make_card(), tmp_path / "card.json"
    with pytest.raises(ValueError, match="card.json is no score card .FileNotFoundError"):
        read_card(file)
    file.write_text("{}")
    with pytest.raises(ValueError, match="is no score card .KeyError: 'figures'"):
        read_card(file)
    content = card.to_dict()
    content["protocol"]["guidance_scale"] = 4.0
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="was changed by hand, or is of another version"):
        read_card(file)
