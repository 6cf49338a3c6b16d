"""Turns of LLaVA and of TRL as messages, and chats that are refused."""

import json

import pytest

from transformers_unicode2.training.messages import add_system, check_messages, read_messages
from transformers_unicode2.turns_unicode2 import clean_turns

IMAGE = {"type": "image"}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def said(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("<image>\nWhat?", [IMAGE, text("What?")]),
        ("What?\n<image>", [text("What?"), IMAGE]),
        ("<image>\n<image>\nWhat?", [IMAGE, IMAGE, text("What?")]),
        ("from <image> to <image>.", [text("from "), IMAGE, text(" to "), IMAGE, text(".")]),
        ("a\n\nb", [text("a\n\nb")]),
    ],
)
def test_markers_become_parts_and_lose_the_line_break_beside_them(value, parts):
    messages, images = read_messages(said(value, "yes"), ["x"] * parts.count(IMAGE))
    assert messages[0]["content"] == parts and len(images) == parts.count(IMAGE)
    check_messages(messages, parts.count(IMAGE))


def test_roles_have_the_names_of_chat_templates_and_tool_calls_are_kept():
    calls = [{"type": "function", "function": {"name": "look", "arguments": {"x": 1}}}]
    turns = [
        {"from": "system", "value": "be brief"},
        {"from": "human", "value": "look"},
        {"role": "assistant", "content": None, "tool_calls": calls, "weight": 1},
        {"from": "function", "value": "seen", "tool_call_id": "7"},
        {"from": "gpt", "value": "done"},
    ]
    messages, _ = read_messages(turns, [])
    check_messages(messages, 0)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[2] == {"role": "assistant", "content": [], "tool_calls": calls}
    assert messages[3] == {"role": "tool", "content": [text("seen")], "tool_call_id": "7"}


def test_images_without_places_come_first_as_trl_has_them():
    """TRL itself is the reference."""
    from trl.data_utils import prepare_multimodal_messages

    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "compare them"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "so"},
    ]
    ours, _ = read_messages(turns, ["a", "b"])
    theirs = prepare_multimodal_messages(turns, images=["a", "b"])
    for message in theirs:
        message["content"] = [{k: v for k, v in part.items() if k != "image"} for part in message["content"]]
    assert ours == theirs


def test_parts_may_carry_their_images():
    turns = [
        {"role": "user", "content": [text("a"), {"type": "image", "image": "1.png", "text": None}]},
        {"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},
    ]
    messages, images = read_messages(turns, [])
    assert images == ["1.png", "data:,"] and messages[1]["content"] == [IMAGE]
    with pytest.raises(ValueError, match="it has 1 images in its column and 2 in its parts"):
        read_messages(turns, ["x.png"])


def test_turns_may_be_json_in_a_cell():
    messages, _ = read_messages('[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]', [])
    assert messages[1]["content"] == [text("b")]


@pytest.mark.parametrize(
    ("turns", "num_images", "message"),
    [
        (said("<image>a <image>", "b"), 1, "it has 2 places for images and 1 images"),
        (said("a", "b"), 1, "it has 0 places for images and 1 images"),
        (said("<image>a", "b"), 0, "it has 1 places for images and 0 images"),
        (said("a", ""), 0, "turn 2 of 2, by assistant, is empty"),
        (said(" \n", "b"), 0, "turn 1 of 2, by user, is empty"),
        (said("a"), 0, "it has 1 turns and none by the assistant"),
        ([], 0, "it has 0 turns"),
        (said("a", "b")[1:], 0, "turn 1, by assistant, follows nothing"),
        (said("a", "b") + said("x", "c")[1:], 0, "turn 3, by assistant, follows one by assistant"),
        (said("a")[:1] * 2, 0, "turn 2, by user, follows one by user"),
        ([{"from": "alien", "value": "a"}], 0, "turn 1 is by 'alien', which is none of assistant, bot"),
        ([{"from": "human", "value": 7}], 0, "turn 1: its content is 7, where a text or a list of parts must be"),
        ([{"role": "user", "content": [{"type": "video"}]}], 0, "turn 1: a part is of type 'video'"),
        ([{"role": "user", "content": [{"type": "text"}]}], 0, "a part of type text has None"),
        ("[broken]", 0, "is no JSON"),
        ("words", 0, "its turns are 'words'"),
        (None, 0, "its turns are None"),
        (said("\ud800", "b"), 0, "turn 1 has half a character"),
    ],
)
def test_chats_that_cannot_be_learnt_are_refused(turns, num_images, message):
    with pytest.raises(ValueError, match=message):
        check_messages(read_messages(turns, ["x.png"] * num_images)[0], num_images)


def test_calls_keep_their_own_arguments_alone():
    """A parquet file gives each call the arguments of all."""
    call = {"function": {"name": "a", "arguments": {"x": 1, "y": None, "z": [{"w": None}]}}, "id": None}
    turns = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    messages, _ = read_messages(turns, [], typed=True)
    assert messages[0]["tool_calls"] == [{"function": {"name": "a", "arguments": {"x": 1, "z": [{}]}}}]
    # Of JSON, a null is meant
    messages, _ = read_messages(turns, [])
    assert clean_turns(messages)[0]["tool_calls"] == [{"function": call["function"]}]


def test_arguments_may_be_json_as_servers_send_them():
    for written, arguments in (('{"a": 1}', {"a": 1}), ('{"a": null}', {"a": None}), ("[]", [])):
        turns = [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": written}]}]
        messages, _ = read_messages(turns, [], typed=True)
        assert clean_turns(messages)[0]["tool_calls"] == [{"name": "f", "arguments": arguments}]


@pytest.mark.parametrize(
    "turn, message",
    [
        (
            {"tool_calls": [{"name": "f", "arguments": "a=1"}]},
            "turn 1: the arguments of a tool are 'a=1', which is no JSON",
        ),
        ({"tool_calls": "f()"}, r"turn 1: its tool_calls are 'f\(\)', where a list of calls must be"),
        ({"weight": 0}, "turn 1: its weight is 0, and all answers are learnt alike"),
        ({"train": False}, "turn 1: its train is False"),
        ({"audio": {"id": "a"}}, "turn 1: it has something in audio, which is not read"),
        ({"thinking": "hm"}, "turn 1: it has something in thinking"),
        ({"content": "<image><image>", "images": ["x.png"]}, "turn 1: it has 2 places for images and 1 images"),
    ],
)
def test_entries_of_a_turn_that_would_be_lost_are_refused(turn, message):
    with pytest.raises(ValueError, match=message):
        read_messages([{"role": "assistant", "content": "yes", **turn}], [])


def test_turns_may_name_their_images():
    turns = [
        {"role": "user", "content": "two?", "images": ["a.png", "b.png"]},
        {"role": "assistant", "content": "two"},
        {"from": "human", "value": "and <image>?", "image": "c.png"},
    ]
    messages, images = read_messages(turns, [])
    assert images == ["a.png", "b.png", "c.png"]
    assert messages[0]["content"] == [IMAGE, IMAGE, text("two?")]
    assert messages[2]["content"] == [text("and "), IMAGE, text("?")]


def test_turns_of_llama_factory():
    """An empty system turn is none; what a function is asked, the assistant says."""
    turns = [("system", ""), ("human", "hi"), ("function_call", "f(1)"), ("observation", "2"), ("gpt", "two")]
    messages, _ = read_messages([{"from": role, "value": value} for role, value in turns], [])
    check_messages(messages, 0)
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize("name", ["from", "role"])
def test_a_system_turn_in_a_column_is_the_first(name):
    system, hello = {name: "system", "value" if name == "from" else "content": "be brief"}, {name: "user", "value": "x"}
    first = {"role": "system", "content": "be brief"}
    assert add_system([hello], "be brief") == add_system(json.dumps([hello]), "be brief") == [first, hello]
    assert add_system([system, hello], "be brief") == [system, hello]
    assert add_system([hello], None) == add_system([hello], "") == [hello]
    with pytest.raises(ValueError, match="has a system turn and another one in its column system"):
        add_system([system, hello], "be long")
    with pytest.raises(ValueError, match="its system turn is 3, where a text must be"):
        add_system([hello], 3)
