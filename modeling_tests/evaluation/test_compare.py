"""Paired tests of two cards, and cards that must not be compared."""

import numpy as np
import pytest

from transformers_unicode2 import cli
from transformers_unicode2.evaluation.card_files import begin_card
from transformers_unicode2.evaluation.compare import compute_p, main, make_parser
from transformers_unicode2.evaluation.score_card import ScoreCard


def write_card(file, right, scores=(), command="evaluate scenes", **protocol) -> None:
    card = ScoreCard(command, {"benchmark": "x", "seed": 0, **protocol}, {"model": "m"})
    card.add_share("right", {str(i): bool(flag) for i, flag in enumerate(right)})
    if len(scores):
        card.add_mean("score", {str(i): float(value) for i, value in enumerate(scores)}, "points")
    card.write(file)


def compare(*words):
    return main(make_parser().parse_args(list(map(str, words))))


def test_tests_of_pairs_are_exact():
    """McNemar's exact p of 2 lost and 10 gained is 2 P(X <= 2), X of Binomial(12, 1/2)."""
    one, other = [1.0] * 2 + [0.0] * 10 + [1.0] * 30, [0.0] * 2 + [1.0] * 10 + [1.0] * 30
    one, other = (dict(enumerate_items(part)) for part in (one, other))
    assert compute_p(one, other) == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert compute_p(one, one) == 1.0
    rng = np.random.default_rng(0)
    values = rng.normal(size=100)
    shifted, same = (values + rng.normal(scale=0.1, size=100) + shift for shift in (0.1, 0.0))
    assert compute_p(enumerate_items(values), enumerate_items(shifted)) < 0.001
    assert compute_p(enumerate_items(values), enumerate_items(same)) > 0.05


def enumerate_items(values) -> dict[str, float]:
    return {str(number): float(value) for number, value in enumerate(values)}


def test_pictures_of_a_prompt_are_one_witness(tmp_path):
    """Where both models do as well, 5 % of the p are below 0.05, though the four pictures of a prompt go together."""
    rng, below = np.random.default_rng(0), 0
    for _ in range(200):
        cards = [
            {
                f"{i}/{j}": 100.0 * (effect + rng.normal() > 0)
                for i, effect in enumerate(rng.normal(size=60))
                for j in range(4)
            }
            for _ in range(2)
        ]
        below += compute_p(*cards) < 0.05
    assert below <= 20


def test_the_difference_is_that_of_the_items_that_both_have(tmp_path):
    write_card(tmp_path / "a.json", [0, 1])
    write_card(tmp_path / "b.json", [0, 1, 1, 1])
    (row,) = compare(tmp_path / "a.json", tmp_path / "b.json")
    assert (row["A"], row["B"], row["B - A"], row["p"], row["items"]) == (50.0, 50.0, 0.0, 1.0, 2)


def test_cards_of_one_protocol_are_compared_item_by_item(tmp_path, capsys):
    write_card(tmp_path / "a.json", [0, 0, 1, 1] * 10, np.zeros(40))
    write_card(tmp_path / "b.json", [0, 1, 1, 1] * 10, np.ones(40))
    right, score = compare(tmp_path / "a.json", tmp_path / "b.json", "--json", tmp_path / "out.json")
    assert (right["A"], right["B"], right["B - A"], right["items"]) == (50.0, 75.0, 25.0, 40)
    assert right["p"] == pytest.approx(2 / 2**10) and score["p"] < 0.001
    low, high = map(float, right["95 %"].split(" to "))
    assert 10 < low < 25 < high <= 40 and (tmp_path / "out.json").is_file()
    assert "| right | 50 | 75 | 25 |" in capsys.readouterr().out


def test_cards_of_other_protocols_are_refused(tmp_path):
    write_card(tmp_path / "a.json", [0, 1])
    write_card(tmp_path / "b.json", [0, 1], seed=1)
    write_card(tmp_path / "c.json", [0, 1], command="evaluate generation")
    with pytest.raises(ValueError, match=r"different protocols \(seed is 0 in A and 1 in B\); --ignore NAME lets"):
        compare(tmp_path / "a.json", tmp_path / "b.json")
    assert compare(tmp_path / "a.json", tmp_path / "b.json", "--ignore", "seed")[0]["p"] == 1.0
    with pytest.raises(ValueError, match="--ignore sead is no entry of the protocol; those are benchmark, seed"):
        compare(tmp_path / "a.json", tmp_path / "b.json", "--ignore", "sead")
    with pytest.raises(ValueError, match="is of `evaluate scenes`, and .* of `evaluate generation`"):
        compare(tmp_path / "a.json", tmp_path / "c.json")
    assert cli.COMMANDS["evaluate compare"][0] == "evaluation.compare"


def test_items_of_other_names_are_not_paired(tmp_path):
    cards = [ScoreCard("evaluate scenes", {}, {"model": "m"}) for _ in range(2)]
    for seed, card in enumerate(cards):
        card.add_share("drawing", {f"{seed}-{number}": True for number in range(4)})
        card.write(tmp_path / f"{seed}.json")
    with pytest.raises(ValueError, match="have no figure, or no item of a figure, in common"):
        compare(tmp_path / "0.json", tmp_path / "1.json")


def test_pictures_of_an_unknown_making_are_compared_with_none(tmp_path):
    for name, digest in (("a", "0" * 64), ("b", "1" * 64)):
        card = begin_card("evaluate geneval", "geneval_hf", {}, tmp_path, digest)
        card.add_share("overall", {"0": True, "1": False})
        card.write(tmp_path / f"{name}.json")
    with pytest.raises(ValueError, match="a.json does not say how its pictures were drawn"):
        compare(tmp_path / "a.json", tmp_path / "b.json")
    assert compare(tmp_path / "a.json", tmp_path / "a.json")[0]["B - A"] == 0.0


@pytest.mark.parametrize(("one", "other"), [({"a": 0}, {"a": False}), ({"a": None}, {}), ({"a": 0}, {})])
def test_entries_that_are_equal_in_python_alone_differ(tmp_path, one, other):
    write_card(tmp_path / "a.json", [0, 1], **one)
    write_card(tmp_path / "b.json", [0, 1], **other)
    with pytest.raises(ValueError, match=r"different protocols \(a is (0|None) in A and (False|not given) in B\)"):
        compare(tmp_path / "a.json", tmp_path / "b.json")
    assert compare(tmp_path / "a.json", tmp_path / "b.json", "--ignore", "a")[0]["p"] == 1.0


def test_a_comparison_takes_the_place_of_one_alone(tmp_path):
    write_card(tmp_path / "a.json", [0, 1])
    before = (tmp_path / "a.json").read_bytes()
    for name, message in (("a.json", "is there, and is no comparison; it is not"), ("no/x.json", "there is no folder")):
        with pytest.raises(ValueError, match=message):
            compare(tmp_path / "a.json", tmp_path / "a.json", "--json", tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == before
    for _ in range(2):
        compare(tmp_path / "a.json", tmp_path / "a.json", "--json", tmp_path / "x.json")
