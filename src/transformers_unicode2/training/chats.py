"""Rows of a data set to chats, and chats to training sequences. The recipe says how: no column is known here.

A task is a question and its answer, as templates:

    caption: {share: 0.4, user: "{image}describe the image.", assistant: "{caption}"}
    questions: {user: "{image}{questions}", assistant: "{answers}"}

`{image}` stands for the image, `{caption_prompt}` for the question that captions answer, any other name for a column.
A column of lists makes one turn of each item; the image is in the first turn alone. A list of templates takes turns,
row by row. `share` is the share of the rows that take part, by default all. The tasks of `USUAL` may be given by their
share alone, as `caption: 0.4`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from string import Formatter

import numpy as np

# tasks that many data sets have the columns for
USUAL = {
    "caption": {"user": "{image}{caption_prompt}", "assistant": "{caption}"},
    "text_to_image": {"user": "{caption}", "assistant": "{image}"},
    "questions": {"user": "{image}{questions}", "assistant": "{answers}"},
}


@dataclass(frozen=True)
class Task:
    """Templates of a question and its answer, see above, and the share of the rows that take part."""

    user: str | list[str]
    assistant: str | list[str]
    share: float = 1.0

    def choose(self, index: int) -> tuple[str, str]:
        """The templates of the row of this index."""
        texts = [[text] if isinstance(text, str) else text for text in (self.user, self.assistant)]
        return tuple(choices[index % len(choices)] for choices in texts)

    def find_names(self) -> set[str]:
        """Names in braces of all templates."""
        listed = [[text] if isinstance(text, str) else text for text in (self.user, self.assistant)]
        return find_names(*listed[0], *listed[1])


def find_names(*templates: str) -> set[str]:
    """Names in braces."""
    parts = (part for template in templates for part in Formatter().parse(template))
    return {name for _, name, _, _ in parts if name is not None}


def read_tasks(tasks: dict[str, dict | float], names: list[str]) -> list[Task]:
    """The tasks of a recipe, whose templates may ask for `names`. Raises `ValueError` when one is not as it must be."""
    read = []
    for name, fields in tasks.items():
        if name in USUAL and isinstance(fields, int | float):
            fields = {**USUAL[name], "share": fields}
        if not isinstance(fields, dict) or not {"user", "assistant"} <= set(fields) <= {"user", "assistant", "share"}:
            raise ValueError(
                f"The task `{name}` is {fields}; it needs `user` and `assistant`, and may have a `share`. "
                f"A share alone is enough for {', '.join(USUAL)}."
            )
        read.append(Task(**fields))
        if not 0 <= read[-1].share <= 1:
            raise ValueError(f"The share of the task `{name}` is {read[-1].share:g}; it must be in [0, 1].")
        missing = sorted(read[-1].find_names() - set(names))
        if missing:
            raise ValueError(f"The task `{name}` asks for {{{missing[0]}}}; there are {', '.join(names)}.")
    return read


def build_chat(row: dict, index: int, task: Task, given: dict[str, str], max_turns: int = 4) -> list[dict]:
    """
    The chat of one row; empty when its lists are.

    Args:
        row: columns of the data set, texts or lists of texts.
        index: of the row.
        task: what to make of it.
        given: what `image` and `caption_prompt` stand for.
        max_turns: questions at most.

    Raises:
        `ValueError`: when a text is missing, or the lists of a row differ in length.
    """
    templates, chat = task.choose(index), []
    names = sorted(find_names(*templates) - set(given))
    lists = {name: row[name] for name in names if isinstance(row[name], list)}
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"The lists of row {index} differ in length: {lengths}.")
    for turn in range(min(max_turns, *lengths.values()) if lists else 1):
        texts = given if turn == 0 else {**given, "image": ""}
        texts = texts | {name: lists[name][turn] if name in lists else row[name] for name in names}
        missing = [name for name in names if not isinstance(texts[name], str)]
        if missing:
            raise ValueError(f"Row {index} has {texts[missing[0]]!r} in the column `{missing[0]}`; it must be a text.")
        for role, template in zip(("user", "assistant"), templates):
            chat.append({"role": role, "content": template.format_map(texts)})
    return chat


class ExampleBuilder:
    """Makes training sequences of rows, see `build_examples`."""

    def __init__(
        self,
        tasks: list[Task],
        processor,
        given: dict[str, str],
        visual_token_offset: int,
        max_turns: int,
        learn_all_images: bool,
        unconditional_share: float,
    ):
        self.tasks, self.processor, self.given = tasks, processor, given
        self.visual_token_offset, self.max_turns = visual_token_offset, max_turns
        self.learn_all_images, self.unconditional_share = learn_all_images, unconditional_share

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        """The examples of rows with `codes` and texts, as `Dataset.map` gives them."""
        output = {"input_ids": [], "labels": [], "length": []}
        for position, index in enumerate(indices):
            row = {name: values[position] for name, values in batch.items()}
            for ids, mask in self.encode_row(row, index):
                learnt = [
                    flag or (self.learn_all_images and id_ >= self.visual_token_offset) for id_, flag in zip(ids, mask)
                ]
                output["input_ids"].append(ids)
                output["labels"].append([id_ if flag else -100 for id_, flag in zip(ids, learnt)])
                output["length"].append(len(ids))
        return output

    def encode_row(self, row: dict, index: int) -> Iterator[tuple[list[int], list[int]]]:
        """Ids of the examples of a row, and for each id whether it is in an answer."""
        visual = [self.visual_token_offset + code for code in row["codes"]]
        for number, task in enumerate(self.tasks):
            if takes_part(index, number, task.share):
                chat = build_chat(row, index, task, self.given, self.max_turns)
                if chat:
                    yield self.processor.encode_turns(chat, visual)
        if takes_part(index, len(self.tasks), self.unconditional_share):
            yield [self.processor.boi_token_id, *visual], [0] + [1] * len(visual)


def takes_part(index: int, number: int, share: float) -> bool:
    """Whether a row takes part in the task of this number."""
    return np.random.default_rng([index, number]).random() < share


def build_examples(
    rows,
    tasks: dict[str, dict | float],
    processor,
    visual_token_offset: int,
    caption_prompt: str | None = None,
    max_turns: int = 4,
    learn_all_images: bool = False,
    unconditional_share: float = 0.0,
):
    """
    Pre-tokenized rows to training sequences over the unified vocabulary.

    Args:
        rows: data set with `codes` and texts, as `unicode2 tokenize` writes it.
        tasks: fields of `Task` by the names of the tasks; a row and the place of a task alone decide who takes part.
        caption_prompt: the question that captions answer.
        max_turns: questions asked about one image at most.
        learn_all_images: images in questions are learnt, too, as without any condition.
        unconditional_share: share of the images that are learnt behind nothing but the begin-of-image id, which is
            what classifier-free guidance compares with.

    Returns:
        Data set of `input_ids`, `labels` and their `length`. Labels outside of the answers are -100: nothing is learnt.
    """
    given = {"image": processor.image_token} | ({"caption_prompt": caption_prompt} if caption_prompt else {})
    read = read_tasks(tasks, [*rows.column_names, *given])
    build = ExampleBuilder(
        read, processor, given, visual_token_offset, max_turns, learn_all_images, unconditional_share
    )
    return rows.map(build, batched=True, with_indices=True, remove_columns=rows.column_names, desc="building examples")
