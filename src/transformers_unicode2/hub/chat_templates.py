"""Teaches the chat template of a language model to carry images and to mark the answers of the assistant.

The template stays as it is, inside a macro of `taught_template.jinja`, which gives it texts alone: an image is the
image token in a text. Of what the macro writes, that file marks everything from the start of an answer to the end of
its turn. These two strings are found here, in chats that the template writes. Chats that must come out of both alike,
and whose marks are known, tell whether a template can be taught.
"""

import re
from os.path import commonprefix
from pathlib import Path
from string import Template

WRAPPER = Path(__file__).with_name("taught_template.jinja")
# Tags of Transformers that mark answers. The macro's output is marked as a whole.
MARK = re.compile(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})"), re.compile(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})")

ASKED, SAID = ("Which colour?", "And which shape?"), ("It is green.", "It is square.")
TURNS = [
    {"role": role, "content": text} for pair in zip(ASKED, SAID) for role, text in zip(("user", "assistant"), pair)
]
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {
    "type": "function",
    "function": {
        "name": "measure",
        "description": "Measures.",
        "parameters": {"type": "object", "properties": {"side": {"type": "integer", "description": "Which."}}},
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {"name": "measure", "arguments": {"side": 1}}}],
}
RESULT = {"role": "tool", "name": "measure", "tool_call_id": "abcdefghi", "content": "7"}
# Chats with and without all that a template may know, and the tools that are given with them.
PROBES = (
    (TURNS[:1], None),
    (TURNS[:2], None),
    (TURNS[:3], None),
    (TURNS, None),
    ([SYSTEM, *TURNS], None),
    ([SYSTEM, *TURNS[:1]], None),
    ([*TURNS[:3], {"role": "assistant", "content": " \n It is\n\nred. \n"}], None),
    (TURNS[:3], [TOOL]),
    ([SYSTEM, *TURNS[:1], CALL, RESULT, TURNS[1]], [TOOL]),
)


def teach_template(tokenizer, image_token: str) -> tuple[str, str]:
    """The chat template of a tokenizer, taught to carry images and to mark answers, and the token that ends an answer.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): has the template and knows the image token.
        image_token (`str`): what stands in the place of an image.

    Raises:
        `ValueError`: when the template does not say where answers begin and end, or comes out otherwise when taught.
    """
    own = tokenizer.get_chat_template()
    start, end = find_answer(tokenizer)
    for mark, no_op in zip(MARK, ("if true", "endif")):
        own = mark.sub(rf"\1{no_op}\2", own)
    taught = Template(WRAPPER.read_text(encoding="utf-8")).substitute(
        own_template=own.removesuffix("\n"), image_token=quote(image_token), start=quote(start), end=quote(end)
    )
    check_texts(tokenizer, taught)
    check_marks(tokenizer, taught, end)
    check_images(tokenizer, taught, image_token)
    return taught, end


def find_answer(tokenizer) -> tuple[str, str]:
    """The texts that begin an answer and end it in the chats of a tokenizer.

    Raises `ValueError` when there are none, or the end is not one token.
    """
    whole, asked, open_ = (render(tokenizer, *chat) for chat in ((TURNS,), (TURNS[:3],), (TURNS[:3], None, True)))
    texts = [*ASKED, *SAID]
    if whole is None or asked is None or open_ is None or any(whole.count(text) != 1 for text in texts):
        raise ValueError("it does not write a chat of two questions and two answers")
    # What stands between a question and its answer, and behind a question that waits for one.
    between = [whole.split(ask)[1].split(say)[0] for ask, say in zip(ASKED, SAID)]
    waiting = open_.split(ASKED[1])[1] if ASKED[1] in open_ else ""
    common = commonprefix([*between, waiting])
    closed = commonprefix([common, asked.split(ASKED[1])[1]])
    start = common[len(closed) :]
    # A prefix may end inside of a token, such as `<|` of two that begin alike.
    start = re.search(r"[^\s>\]]*$", closed).group() + start if start else common.strip()
    behind = [whole.split(SAID[0])[1].split(ASKED[1])[0], whole.split(SAID[1])[1]]
    end = commonprefix(behind).split()
    if not start or not end:
        raise ValueError("it does not write where an answer begins and where it ends")
    if len(tokenizer.encode(end[0], add_special_tokens=False)) != 1:
        raise ValueError(f"its answers end with {end[0]!r}, which is not one token")
    return start, end[0]


def check_texts(tokenizer, taught: str) -> None:
    """Raises `ValueError` unless chats without images come out of a taught template as of the tokenizer's own."""
    for chat, tools in PROBES:
        for is_open in (False, True):
            before = render(tokenizer, chat, tools, is_open)
            if before is not None and before != render(tokenizer, chat, tools, is_open, taught):
                roles = ", ".join(turn["role"] for turn in chat)
                raise ValueError(f"it writes another text of a chat of {roles} when it is taught")


def check_marks(tokenizer, taught: str, end: str) -> None:
    """Raises `ValueError` unless a taught template marks what the assistant says, and nothing else."""
    for chat, _ in PROBES:
        if render(tokenizer, chat) is None or any(turn["role"] == "tool" for turn in chat):
            continue
        encoded = tokenizer.apply_chat_template(
            chat, chat_template=taught, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = encoded["assistant_masks"]
        runs = "".join(map(str, mask)).split("0")
        said = [turn["content"].strip() for turn in chat if turn["role"] == "assistant"]
        marked = tokenizer.decode([id_ for id_, flag in zip(encoded["input_ids"], mask) if flag]).split(end)
        fits = len(marked) == len(said) + 1 and all(say in text for say, text in zip(said, marked))
        if not fits or any(ask in text for ask in ASKED for text in marked) or sum(map(bool, runs)) != len(said):
            if sum(map(bool, runs)) != len(said):
                raise ValueError(f"{sum(map(bool, runs))} of {len(said)} answers are marked as they should be")
            raise ValueError("the tokens that it marks do not hold what was said, letter by letter, and only that")


def check_images(tokenizer, taught: str, image_token: str) -> None:
    """Raises `ValueError` unless a taught template writes images at their places, in questions and in answers."""
    image, places = {"type": "image"}, image_token + "{}" + image_token
    parts = [{**turn, "content": [image, {"type": "text", "text": turn["content"]}, image]} for turn in TURNS]
    texts = [{**turn, "content": places.format(turn["content"])} for turn in TURNS]
    if render(tokenizer, parts, chat_template=taught) != render(tokenizer, texts):
        raise ValueError("it does not write images at their places")
    if any(places.format(turn["content"]) not in render(tokenizer, texts) for turn in TURNS):
        raise ValueError("it changes texts that hold images")


def render(
    tokenizer,
    chat: list[dict],
    tools: list[dict] | None = None,
    is_open: bool = False,
    chat_template: str | None = None,
) -> str | None:
    """What a chat template writes of a chat; `None` if it refuses the chat."""
    try:
        return tokenizer.apply_chat_template(
            chat, tools=tools, chat_template=chat_template, add_generation_prompt=is_open, tokenize=False
        )
    except Exception:
        # A template is a program of others, which may raise anything.
        return None


def quote(text: str) -> str:
    """A text as a string of Jinja."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


__all__ = ["teach_template"]
