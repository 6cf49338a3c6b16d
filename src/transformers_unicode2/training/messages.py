"""Turns as people write them, as messages of the data contract: roles, and contents that are lists of parts."""

import json
import re

from ..turns_unicode2 import drop_none, get_function

# A newline beside a marker parts it from the text, and is no text.
MARKER = re.compile(r"\n?<image>\n?")
ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"},
    **{"chatgpt": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "function": "tool"},
    **{"observation": "tool", "function_call": "assistant"},
}
# Who may speak after whom.
FOLLOWS = {
    **{None: ("system", "user"), "system": ("system", "user"), "user": ("assistant",)},
    **{"assistant": ("user", "tool"), "tool": ("tool", "assistant", "user")},
}
# Entries of a message that chat templates know beside its role and content.
KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content")
# Those that are not read: without them, a turn would say something else.
NOT_READ = ("video", "videos", "audio", "audios", "function_call", "thinking", "reasoning")
# Those that say how much is learnt of a turn.
WEIGHTS = ("weight", "loss_weight", "train")


def list_values(value: object) -> list:
    """A value that may be missing, one or a list, as a list."""
    if value is None or isinstance(value, (str, bytes, list, dict)) and not value:
        return []
    return value if isinstance(value, list) else [value]


def parse_cell(value: object) -> object:
    """A list or object that a table keeps as JSON in a text, or the value as it is.

    Raises `ValueError` on damaged JSON.
    """
    if not isinstance(value, str) or value.strip()[:1] + value.strip()[-1:] not in ("[]", "{}"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{value!r:.60} is no JSON ({error})") from error


def add_system(turns: list[dict] | str, system: str | None) -> list[dict] | str:
    """Turns behind the system turn that a row has in a column of its own, as ShareGPT does.

    Raises `ValueError` when another one is among the turns, or it is no text.
    """
    turns = parse_cell(turns)
    if system is None or system == "" or not isinstance(turns, list):
        return turns
    if not isinstance(system, str):
        raise ValueError(f"its system turn is {system!r:.60}, where a text must be")
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    if (first.get("role") or first.get("from")) != "system":
        return [{"role": "system", "content": system}, *turns]
    if first.get("content", first.get("value")) != system:
        raise ValueError("it has a system turn and another one in its column system")
    return turns


def read_messages(turns: list[dict] | str, images: list, typed: bool = False) -> tuple[list[dict], list]:
    """
    Turns as people write them to messages whose contents are lists of parts, and the images of the chat.

    Args:
        turns: of LLaVA (`from` and `value`) or TRL (`role` and `content`).
        images: of the row. They may be in turns or parts instead. In a chat of TRL's without places for them, they come
            first in the first turn of the user, as in TRL.
        typed: see `tables.FileTable`.

    Raises:
        `ValueError`: on a role or a content that is none.
    """
    turns = parse_cell(turns)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"its turns are {turns!r:.60}, where a list of messages must be")
    messages, carried = [], []
    for number, turn in enumerate(turns, 1):
        if (turn.get("role") or turn.get("from")) == "system" and not (turn.get("content") or turn.get("value")):
            continue
        role, content = turn.get("role") or turn.get("from"), turn.get("content", turn.get("value"))
        if str(role).lower() not in ROLES:
            raise ValueError(f"turn {number} is by {role!r:.40}, which is none of {', '.join(sorted(ROLES))}")
        try:
            check_entries(turn)
            parts = split_markers(content) if isinstance(content, str) else read_parts(content, carried)
            parts = place_images(turn, parts, carried)
            kept = {name: turn[name] for name in KEPT if turn.get(name)}
            if "tool_calls" in kept:
                kept["tool_calls"] = read_calls(drop_none(turn["tool_calls"]) if typed else turn["tool_calls"])
        except ValueError as error:
            raise ValueError(f"turn {number}: {error}") from error
        messages.append({"role": ROLES[str(role).lower()], "content": parts, **kept})
    if carried and images:
        raise ValueError(f"it has {len(images)} images in its column and {len(carried)} in its parts")
    strings = all(isinstance(turn.get("content"), str) for turn in turns)
    places = [part for message in messages for part in message["content"] if part["type"] == "image"]
    if images and not places and strings:
        asked = next((message for message in messages if message["role"] == "user"), None)
        if asked:
            asked["content"][:0] = [{"type": "image"} for _ in images]
    return messages, images or carried


def check_entries(turn: dict) -> None:
    """Raises `ValueError` when a turn has entries without which it would teach something else."""
    filled = [name for name in NOT_READ if list_values(turn.get(name))]
    if filled:
        raise ValueError(f"it has something in {filled[0]}, which is not read")
    for name in WEIGHTS:
        if turn.get(name) not in (None, 1):
            raise ValueError(f"its {name} is {turn[name]!r:.40}, and all answers are learnt alike")


def place_images(turn: dict, parts: list[dict], carried: list) -> list[dict]:
    """The parts with places for the images that a turn itself names, which are appended to `carried`."""
    own = list_values(turn.get("images")) or list_values(turn.get("image"))
    if not own:
        return parts
    carried += own
    places = sum(part["type"] == "image" for part in parts)
    if places not in (0, len(own)):
        raise ValueError(f"it has {places} places for images and {len(own)} images")
    return parts if places else [*({"type": "image"} for _ in own), *parts]


def read_calls(calls: list[dict]) -> list[dict]:
    """Calls of tools with their arguments as objects; as JSON where a `null` would else be lost.

    Raises `ValueError` on calls or arguments that are none.
    """
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"its tool_calls are {calls!r:.60}, where a list of calls must be")
    read = []
    for call in calls:
        arguments = get_function(call).get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                raise ValueError(f"the arguments of a tool are {arguments!r:.60}, which is no JSON") from None
        if arguments != drop_none(arguments):
            arguments = json.dumps(arguments, ensure_ascii=False)
        call = drop_none(call)
        if arguments is not None:
            get_function(call)["arguments"] = arguments
        read.append(call)
    return read


def split_markers(text: str) -> list[dict]:
    """The parts of a text with `<image>` where images are."""
    parts = []
    for number, piece in enumerate(MARKER.split(text)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def read_parts(content: list[dict] | None, carried: list) -> list[dict]:
    """The parts of a content that is a list; images that they carry are appended to `carried`."""
    content = [] if content is None else content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ValueError(f"its content is {content!r:.60}, where a text or a list of parts must be")
    parts = []
    for part in content:
        kind = part.get("type")
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise ValueError(f"a part of type text has {part.get('text')!r:.40}, which is no text")
            parts += [{"type": "text", "text": part["text"]}] if part["text"] else []
        elif kind in ("image", "image_url"):
            parts.append({"type": "image"})
            held = [part[name] for name in ("image", "image_url", "path", "url", "base64") if part.get(name)]
            held = [value["url"] if isinstance(value, dict) and "url" in value else value for value in held]
            carried += held[:1]
        else:
            raise ValueError(f"a part is of type {kind!r:.40}, where text or image must be")
    return parts


def check_messages(messages: list[dict], num_images: int) -> None:
    """Raises `ValueError` unless messages are a chat with an answer and a place for each image."""
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if places != num_images:
        raise ValueError(f"it has {places} places for images and {num_images} images")
    before = None
    for number, message in enumerate(messages, 1):
        role, parts = message["role"], message["content"]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        if not any(text.strip() for text in texts) and len(texts) == len(parts) and "tool_calls" not in message:
            raise ValueError(f"turn {number} of {len(messages)}, by {role}, is empty")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:
            raise ValueError(f"turn {number} has half a character, which UTF-8 cannot write") from None
        if role not in FOLLOWS[before]:
            raise ValueError(f"turn {number}, by {role}, follows {f'one by {before}' if before else 'nothing'}")
        before = role
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"it has {len(messages)} turns and none by the assistant, so there is nothing to learn")


def find_pair(messages: list[dict], images: list) -> tuple[object, str] | None:
    """
    The only image of a chat with the text about it: the first answer behind an image that is read, the question in
    front of one that is drawn.

    Args:
        messages: whose contents are lists of parts.
        images: of the chat, such as their codes.

    Returns:
        The image and the text; `None` when there are more images, or no such text.
    """
    places = [number for number, turn in enumerate(messages) for part in turn["content"] if part["type"] == "image"]
    if len(images) != 1 or len(places) != 1:
        return None
    (place,) = places
    if messages[place]["role"] == "user":
        # What was answered before the image is not about it
        about = [turn for turn in messages[place:] if turn["role"] == "assistant"]
    else:
        about = [turn for turn in messages[place::-1] if turn["role"] == "user"]
    texts = ("".join(part["text"] or "" for part in turn["content"] if part["type"] == "text") for turn in about)
    text = next(filter(None, map(str.strip, texts)), None)
    return (images[0], text) if text else None
