"""What is read as a card, and what a card may replace."""

import json

import pytest

from transformers_unicode2.evaluation.card_files import (
    begin_card,
    check_card_file,
    check_replaced,
    check_same,
    read_card,
)
from transformers_unicode2.evaluation.score_card import FORMAT, ScoreCard, hash_content


def make_card(right: int = 3, subject=("1" * 64,), **changes) -> ScoreCard:
    card = ScoreCard("evaluate scenes", {"seed": 0, **changes}, {"model": "/x/tiny", "checkpoint": subject[0]})
    card.add_share("a, right", {str(number): True for number in range(right)})
    return card


def test_a_card_takes_the_place_of_a_card_of_its_command_alone(tmp_path):
    make_card().write(tmp_path / "card.json")
    check_card_file(tmp_path / "card.json", "evaluate scenes")
    (tmp_path / "notes.md").write_text("# Notes")
    (tmp_path / "data.json").write_text("{}")
    for name, command, message in (
        ("card.md", "evaluate scenes", "must end in .json; the page of the card is written beside it"),
        ("notes.json", "evaluate scenes", "notes.md is there, and is no page of such a score card"),
        ("data.json", "evaluate scenes", "data.json is there, and is no score card; it is not replaced"),
        ("card.json", "evaluate dpg", "is a card of `unicode2 evaluate scenes`; it is not replaced"),
        ("generation.json", "evaluate dpg", "has the name of the card that tells how pictures were drawn"),
        ("no/card.json", "evaluate scenes", "there is no folder .*no"),
    ):
        with pytest.raises(ValueError, match=message):
            check_card_file(tmp_path / name, command)


def test_what_is_no_card_is_refused(tmp_path):
    card, file = make_card(), tmp_path / "card.json"
    with pytest.raises(ValueError, match="There is no file .*card.json"):
        read_card(file)
    file.write_text("{}")
    with pytest.raises(ValueError, match="is no score card .KeyError: 'figures'"):
        read_card(file)
    content = card.to_dict()
    content["protocol"]["seed"] = 4
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="was changed by hand, or is of another version"):
        read_card(file)


@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for name in ("protocol", "subject", "items", "strata", "run") for value in ([], None)),
        {"items": {"right": None}},
        {"items": {"right": {"0": "a"}}},
        {"figures": [1]},
        {"figures": [{"name": "right", "value": None, "low": None, "high": None, "count": 1}]},
    ],
    ids=str,
)
def test_parts_of_other_types_are_refused(tmp_path, changes):
    content = make_card().to_dict() | changes
    content["protocol_hash"] = hash_content([FORMAT, content["command"], content["protocol"]])
    (tmp_path / "card.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="card.json is no score card"):
        read_card(tmp_path / "card.json")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"figures": [{"value": NaN}]}', "[]", "12"])
def test_other_json_is_refused(tmp_path, text):
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(ValueError, match="card.json is no score card"):
        read_card(tmp_path / "card.json")
    with pytest.raises(ValueError, match="is no score card; it is not replaced"):
        check_card_file(tmp_path / "card.json", "evaluate scenes")


def test_a_scorers_card_does_not_tell_how_pictures_were_drawn(tmp_path):
    make_card().write(tmp_path / "generation.json")
    with pytest.raises(ValueError, match="generation.json is of `unicode2 evaluate scenes`, and does not tell how"):
        begin_card("evaluate dpg", "dpg_hf", {}, tmp_path, "0" * 64)


def test_a_card_of_something_else_stays(tmp_path):
    make_card(tasks={"a": 1}).write(tmp_path / "card.json")
    check_same(tmp_path / "card.json", make_card())
    check_same(tmp_path / "card.json", make_card(tasks={"a": 1, "b": 2}))
    for other, message in (
        (make_card(seed=1), "is of something else .protocol seed was 0 and is 1.; choose another --output"),
        (make_card(subject=("2" * 64,)), "subject checkpoint was 111111111111 and is 222222222222"),
        (make_card(tasks={"a": 2}), "protocol tasks a was 1 and is 2"),
    ):
        with pytest.raises(ValueError, match=message):
            check_same(tmp_path / "card.json", other)
    with pytest.raises(ValueError, match="has 'a, right' of 3 items, and this run gives 2"):
        check_replaced(tmp_path / "card.json", make_card(2))
