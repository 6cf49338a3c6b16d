"""Templates over any columns, filled to chats."""

import pytest

from transformers_unicode2.training.templates import Task, build_chat, read_tasks

ROW = {"caption": "a {cat} <image>", "asked": ["what?", "where?", "who?"], "said": ["a cat", "here", "me"]}
IMAGE = {"type": "image"}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def contents(task: Task, number: int = 0, row: dict = ROW, **options) -> list[list[dict]]:
    turns = build_chat(row, number, task, **options)
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
    return [turn["content"] for turn in turns]


def test_a_caption_is_text_whatever_stands_in_it():
    task = Task("{image}{caption_prompt}", "{caption}")
    assert contents(task, caption_prompt="what?") == [[IMAGE, text("what?")], [text("a {cat} <image>")]]


def test_images_stand_where_the_template_has_them():
    assert contents(Task("{{{image}}} and {image}", "{image}"))[0] == [text("{"), IMAGE, text("} and "), IMAGE]
    assert contents(Task("draw", "a plan: {caption} {image}"))[1] == [text("a plan: a {cat} <image> "), IMAGE]


def test_lists_make_turns_and_the_image_is_in_the_first_one():
    task = Task("{image}{asked}", "{said}")
    assert [part for content in contents(task) for part in content] == [
        *(IMAGE, text("what?"), text("a cat"), text("where?"), text("here"), text("who?"), text("me"))
    ]
    assert len(contents(Task("{image}{asked}", "{said}", max_turns=1))) == 2


def test_templates_take_turns_row_by_row():
    task = Task(["one", "two", "two"], "{image}")
    assert [contents(task, number)[0] for number in range(4)] == [[text(word)] for word in ("one", "two", "two", "one")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "said": ["a cat"]}, "its lists differ in length: {'asked': 3, 'said': 1}"),
        ({**ROW, "said": [None] * 3}, "it has None in the column `said`, which must be a text"),
        ({**ROW, "said": [], "asked": []}, "its lists are empty: asked, said"),
        ({"said": ["me"]}, "it has None in the column `asked`"),
        ({"said": 7, "asked": "what?"}, "it has 7 in the column `said`"),
    ],
)
def test_rows_that_lack_texts_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        build_chat(row, 7, Task("{asked}", "{said}"))


def test_the_usual_tasks_read_and_draw():
    assert contents(read_tasks("read")["read"]) == [[IMAGE, text("Describe the image.")], [text("a {cat} <image>")]]
    both = read_tasks("both")
    assert list(both) == ["read", "draw"] and contents(both["draw"]) == [[text("a {cat} <image>")], [IMAGE]]


def test_a_file_of_tasks_takes_the_place_of_the_usual_ones(tmp_path):
    (tmp_path / "t.yaml").write_text(
        '\ufeffplan: {user: ["{caption}", "{dense}"], assistant: "{dense}{image}"}\n'
        'ask: {user: "{image}{asked}", assistant: "{said}", max_turns: 2}\n',
        encoding="utf-8",
    )
    tasks = read_tasks(str(tmp_path / "t.yaml"))
    assert tasks["plan"].find_names() == {"caption", "dense", "image"} and len(contents(tasks["ask"])) == 4


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("x: 1.0", "The task `x` is 1.0; it needs `user` and `assistant`"),
        ('x: {user: "{image}"}', "it needs `user` and `assistant`"),
        ("x: {user: a, assistant: b, share: 2}", "may have `max_turns`"),
        ("x: {user: a, assistant: b, max_turns: 0}", "The task `x` cannot be used: `max_turns` is 0"),
        ("x: {user: 3, assistant: b}", "the template 3 is no text"),
        ("x: {user: [], assistant: b}", r"the template \[\] is no text"),
        ('x: {user: "a}", assistant: b}', "the braces of 'a}' are damaged"),
        ('x: {user: "{}", assistant: b}', "has braces with more or less than a name in them"),
        ('x: {user: "{a!r}", assistant: b}', "has braces with more or less than a name in them"),
        ("../x: {user: a, assistant: b}", "names a folder; use letters"),
        ("work-train: {user: a, assistant: b}", "`work-train` is named as a folder of unfinished work is"),
        ("- a", "has no tasks"),
        ("x: {", "is no YAML"),
    ],
)
def test_wrong_tasks_are_refused(tmp_path, yaml, message):
    (tmp_path / "t.yaml").write_text(yaml)
    with pytest.raises(ValueError, match=message):
        read_tasks(str(tmp_path / "t.yaml"))


def test_tasks_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--task is write; it must be read, draw, questions, both, or a file"):
        read_tasks("write")
    with pytest.raises(ValueError, match="none.yaml cannot be read: No such file"):
        read_tasks(str(tmp_path / "none.yaml"))
