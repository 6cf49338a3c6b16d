"""Rows to chats and chats to examples, by templates over any columns."""

import pytest
import torch

from transformers_unicode2.training.chats import Task, build_chat, build_examples, read_tasks

GIVEN = {"image": "<image>", "caption_prompt": "describe the image."}
ROW = {"caption": "a {cat}", "asked": ["what?", "where?", "who?"], "said": ["a cat", "here", "me"], "codes": [1]}


def chat(task: Task, index: int = 0, row: dict = ROW, **options) -> list[str]:
    turns = build_chat(row, index, task, GIVEN, **options)
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
    return [turn["content"] for turn in turns]


def test_templates_are_filled_with_columns_of_any_name():
    task = Task("{image}{caption_prompt}", "{caption}")
    assert chat(task) == ["<image>describe the image.", "a {cat}"]


def test_lists_make_turns_and_the_image_is_in_the_first_one():
    task = Task("{image}{asked}", "{said}")
    assert chat(task) == ["<image>what?", "a cat", "where?", "here", "who?", "me"]
    assert chat(task, max_turns=1) == ["<image>what?", "a cat"]
    assert chat(task, row={**ROW, "asked": [], "said": []}) == []


def test_templates_take_turns_row_by_row():
    task = Task(["one", "two", "two"], "{image}")
    assert [chat(task, index)[0] for index in range(4)] == ["one", "two", "two", "one"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "said": ["a cat"]}, "The lists of row 7 differ in length: {'asked': 3, 'said': 1}"),
        ({**ROW, "said": [None] * 3}, "Row 7 has None in the column `said`; it must be a text"),
    ],
)
def test_rows_that_lack_texts_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        build_chat(row, 7, Task("{asked}", "{said}"), GIVEN)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (1.0, "The task `x` is 1.0; it needs `user` and `assistant`"),
        ({"user": "{image}"}, "it needs `user` and `assistant`"),
        ({"user": "a", "assistant": "b", "weight": 2}, "may have a `share`"),
        ({"user": "{question}", "assistant": "b"}, "The task `x` asks for {question}; there are caption, image"),
        (
            {"user": "a", "assistant": "{image}", "share": 1.5},
            r"The share of the task `x` is 1.5; it must be in \[0, 1\]",
        ),
    ],
)
def test_wrong_tasks_are_refused(task, message):
    with pytest.raises(ValueError, match=message):
        read_tasks({"x": task}, ["caption", "image"])


def test_a_usual_task_needs_a_share_alone():
    task = read_tasks({"caption": 0.25}, ["image", "caption", "caption_prompt"])[0]
    given = {"image": "<image>", "caption_prompt": "what?"}
    chat = build_chat({"caption": "a dog"}, 0, task, given)
    assert task.share == 0.25 and [turn["content"] for turn in chat] == ["<image>what?", "a dog"]


def test_row_and_place_of_a_task_decide_who_takes_part(processor):
    """The shares are met, the same rows take part again, and tasks choose their rows apart."""
    from datasets import Dataset

    rows = Dataset.from_list([{"codes": [0] * 64, "text": str(index)} for index in range(400)])
    half = {"user": "{text}", "assistant": "{image}", "share": 0.5}
    both = build_examples(rows, {"a": half, "b": half}, processor, 768, unconditional_share=0.25)
    again = build_examples(rows, {"a": half}, processor, 768)
    assert len(both) == pytest.approx(500, abs=50) and len(again) == pytest.approx(200, abs=30)
    assert sum(ids[0] == processor.boi_token_id for ids in both["input_ids"]) == pytest.approx(100, abs=25)
    first = {tuple(ids) for ids in again["input_ids"]}
    assert first < {tuple(ids) for ids in both["input_ids"]}


def test_planned_image_is_an_answer_of_text_and_image(tiny_run):
    from datasets import load_dataset
    from transformers import AutoProcessor

    rows = load_dataset("parquet", data_files=str(tiny_run / "tokens/train-00000.parquet"), split="train")
    processor = AutoProcessor.from_pretrained(tiny_run / "model")
    task = {"user": "{caption}", "assistant": "{dense_caption}{image}"}
    example = build_examples(rows, {"planned": task}, processor, 768)[0]
    learnt = [id_ for id_ in example["labels"] if id_ != -100]
    plan, image = processor.split_images(torch.tensor(learnt))
    assert plan["text"] == "a small red circle at c4, on a white ground"
    assert (image["visual_token_ids"] - 768).tolist() == rows[0]["codes"]
    asked = [id_ for id_, label in zip(example["input_ids"], example["labels"]) if label == -100]
    assert "a red circle" in processor.tokenizer.decode(asked) and "white" not in processor.tokenizer.decode(asked)
