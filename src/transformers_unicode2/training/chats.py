"""Tokenized chats to training sequences over the unified vocabulary."""

import json
from collections.abc import Iterator

import numpy as np

from ..control_tokens import find_control_tokens
from ..turns_unicode2 import clean_turns


def encode_chat(processor, messages: list[dict], visual_token_ids: list[list[int]]) -> tuple[list[int], list[int]]:
    """
    `UniCode2Processor.encode_chat` of what is learnt.

    Raises:
        `ValueError`: when a chat cannot become ids. Also when the chat template refuses it or does not write its tools,
            or a text has a control token: that would end the turn, or be taken for an image.
    """
    control = find_control_tokens(processor.tokenizer, len(processor.tokenizer))
    for number, turn in enumerate(messages, 1):
        texts = [part for part in list_parts(turn) if part.get("type") != "image"]
        rest = {name: value for name, value in turn.items() if name != "content"}
        found = control.search(json.dumps([texts, rest], ensure_ascii=False, default=str))
        if found:
            raise ValueError(
                f"turn {number} has {found.group()} in its text, which is a control token of the model; take it out"
            )
    encoded = processor.encode_chat(messages, visual_token_ids)
    check_tools(processor, messages)
    return encoded


def list_parts(turn: dict) -> list[dict]:
    """The parts of a message; a text stands for one part. Raises `ValueError` on a content that is neither."""
    content = turn.get("content")
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ValueError(f"the content of a message is {content!r:.60}, where a text or a list of parts must be")
    return content


def check_tools(processor, messages: list[dict]) -> None:
    """Raises `ValueError` when the chat template leaves out the calls of tools, what these return, or the thoughts of
    the last answer. Those of earlier answers are for many templates to leave out.
    """
    turns = [{**turn, "content": processor.join_parts(list_parts(turn))} for turn in clean_turns(messages)]
    calls = [call for turn in turns for call in turn.get("tool_calls") or []]
    said = [turn["content"].strip() for turn in turns if turn["role"] == "tool"]
    thoughts = [turn["reasoning_content"].strip() for turn in turns[-1:] if turn.get("reasoning_content")]
    if not calls and not said and not thoughts:
        return
    text = processor.tokenizer.apply_chat_template(turns, chat_template=processor.chat_template, tokenize=False)
    said += [str((call.get("function") or call).get("name")) for call in calls]
    said += thoughts
    # Some templates write what a tool returned as JSON
    lost = [words for words in said if not any(form in text for form in (words, *write_json(words)))]
    if lost:
        what = "the thoughts" if lost[0] in thoughts else "a tool"
        raise ValueError(
            f"the chat template of the model leaves out {lost[0]!r:.60}, of {what}, so nothing would be learnt of it"
        )


def write_json(words: str) -> list[str]:
    """The text as JSON has it inside of quotes, with and without escapes of other letters than ASCII."""
    return [json.dumps(words, ensure_ascii=ensure_ascii)[1:-1] for ensure_ascii in (True, False)]


class ExampleBuilder:
    """Makes training sequences of tokenized chats, see `build_examples`."""

    def __init__(self, processor, visual_token_offset: int, learn_all_images: bool, drop_prompt_share: float):
        self.processor, self.visual_token_offset = processor, visual_token_offset
        self.learn_all_images, self.drop_prompt_share = learn_all_images, drop_prompt_share

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        """The examples of rows with `messages` and `codes`, as `Dataset.map` gives them."""
        output = {"input_ids": [], "labels": [], "length": []}
        for messages, codes, index in zip(batch["messages"], batch["codes"], indices):
            try:
                if not messages:
                    raise ValueError("it has no messages")
                examples = list(self.encode_row(messages, codes or [], index))
            except ValueError as error:
                raise ValueError(f"Row {index} of the mixture: {error}") from error
            for ids, mask in examples:
                learnt = [
                    flag or (self.learn_all_images and id_ >= self.visual_token_offset) for id_, flag in zip(ids, mask)
                ]
                output["input_ids"].append(ids)
                output["labels"].append([id_ if flag else -100 for id_, flag in zip(ids, learnt)])
                output["length"].append(len(ids))
        return output

    def encode_row(
        self, messages: list[dict], codes: list[list[int]], index: int
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Ids of the examples of a row, and for each id whether it is in an answer."""
        visual = [[self.visual_token_offset + code for code in image] for image in codes]
        yield encode_chat(self.processor, messages, visual)
        roles = [turn["role"] for turn in messages for part in list_parts(turn) if part["type"] == "image"]
        if "assistant" in roles and np.random.default_rng(index).random() < self.drop_prompt_share:
            for role, image in zip(roles, visual):
                if role == "assistant":
                    yield [self.processor.boi_token_id, *image], [0] + [1] * len(image)


def build_examples(
    rows, processor, visual_token_offset: int, learn_all_images: bool = False, drop_prompt_share: float = 0.0
):
    """
    Tokenized chats to training sequences over the unified vocabulary.

    Args:
        rows: data set with `messages` and `codes`, as `open_mixture` gives it.
        processor: `UniCode2Processor` of the model, whose chat template says what an answer is.
        visual_token_offset: first visual token id.
        learn_all_images: images in questions are learnt, too, as without any condition.
        drop_prompt_share: share of the rows with an image in an answer whose image is learnt once more, behind nothing
            but the begin-of-image id. Classifier-free guidance compares with that. The number of a row in the mixture
            alone decides.

    Returns:
        Data set of `input_ids`, `labels` and their `length`. Labels outside of the answers are -100: nothing is learnt.

    Raises:
        `ValueError`: with the number of the row, when a chat cannot become ids, see `UniCode2Processor.encode_chat`.
    """
    build = ExampleBuilder(processor, visual_token_offset, learn_all_images, drop_prompt_share)
    return rows.map(build, batched=True, with_indices=True, remove_columns=rows.column_names, desc="building examples")
