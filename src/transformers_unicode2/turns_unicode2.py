"""Turns of a chat as chat templates read them."""

import json
from contextlib import suppress


def clean_turns(messages: list[dict]) -> list[dict]:
    """Messages without entries that are `None`, and with the arguments of tools as objects.

    Arguments may be JSON in a text, as servers send them. A `null` in that stays one.
    """
    turns = drop_none(messages)
    for turn in turns:
        for call in turn.get("tool_calls") or []:
            called = get_function(call)
            if isinstance(called.get("arguments"), str):
                with suppress(ValueError, RecursionError):
                    called["arguments"] = json.loads(called["arguments"])
    return turns


def get_function(call: dict) -> dict:
    """Name and arguments of a call of a tool, which has them itself or in `function`."""
    return call["function"] if isinstance(call.get("function"), dict) else call


def drop_none(value):
    """The value without the entries of dictionaries, at any depth, that are `None`."""
    if isinstance(value, dict):
        return {name: drop_none(entry) for name, entry in value.items() if entry is not None}
    return [drop_none(entry) for entry in value] if isinstance(value, list) else value


def get_entry(part, name: str):
    """An entry of a message or of a part of one, which are dictionaries or, since Transformers 5.24, objects."""
    return part.get(name) if isinstance(part, dict) else getattr(part, name, None)
