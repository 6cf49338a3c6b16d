"""Templates that make chats of rows with images and texts. A YAML file of the user's may replace them.

A task is a question and its answer, as templates over the columns of a row:

    read: {user: "{image}{caption_prompt}", assistant: "{caption}"}
    questions: {user: "{image}{questions}", assistant: "{answers}", max_turns: 3}
    draw: {user: ["{dense_caption}", "{caption}"], assistant: "{image}"}

`{image}` stands for the image, `{caption_prompt}` for the question that captions answer, any other name for a column. A
column of lists makes one turn of each item, `max_turns` at most; the image is in the first turn alone. A list of
templates takes turns, row by row. What stands in a column is text: an `<image>` or a `{name}` in it means nothing.
"""

from dataclasses import asdict, dataclass
from string import Formatter

USUAL = {
    "read": {"user": "{image}{caption_prompt}", "assistant": "{caption}"},
    "draw": {"user": "{caption}", "assistant": "{image}"},
    "questions": {"user": "{image}{questions}", "assistant": "{answers}"},
}
CAPTION_PROMPT = "Describe the image."


@dataclass(frozen=True)
class Task:
    r"""
    Templates of a question and its answer, see above.

    Args:
        user (`str` or `list[str]`): template of the question. Of a list, row `i` has the item `i % len(list)`.
        assistant (`str` or `list[str]`): template of the answer.
        max_turns (`int`, *optional*): most items of a column of lists that make turns; by default all.

    Raises:
        `ValueError`: when a template is no text, is empty or has damaged braces, or `max_turns` is below 1.
    """

    user: str | list[str]
    assistant: str | list[str]
    max_turns: int | None = None

    def __post_init__(self):
        for template in self.list_templates():
            if not isinstance(template, str) or not template:
                raise ValueError(f"the template {template!r} is no text")
            for _, name, form, conversion in parse(template):
                if name is not None and (not name or form or conversion):
                    raise ValueError(f"{template!r} has braces with more or less than a name in them")
        if self.max_turns is not None and (not isinstance(self.max_turns, int) or self.max_turns < 1):
            raise ValueError(f"`max_turns` is {self.max_turns}; it must be an integer of at least 1")

    def list_templates(self) -> list[str]:
        return [*as_list(self.user), *as_list(self.assistant)]

    def choose(self, number: int) -> tuple[str, str]:
        """The templates of the row of this number."""
        return tuple(choices[number % len(choices)] for choices in (as_list(self.user), as_list(self.assistant)))

    def find_names(self) -> set[str]:
        """Names in braces of all templates."""
        return find_names(*self.list_templates())

    def to_dict(self) -> dict:
        return asdict(self)


def as_list(text: str | list[str]) -> list[str]:
    return [text] if not isinstance(text, list) or not text else text


def parse(template: str) -> list[tuple]:
    """Pieces of a template as `Formatter.parse` gives them. Raises `ValueError` on damaged braces."""
    try:
        return list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"the braces of {template!r} are damaged ({error}); write {{{{ for a brace") from error


def find_names(*templates: str) -> set[str]:
    """Names in braces."""
    return {name for template in templates for _, name, _, _ in parse(template) if name is not None}


def read_tasks(task: str) -> dict[str, Task]:
    """
    The tasks that the option `--task` stands for, by their names.

    Args:
        task: `read`, `draw` or `questions`, of which `USUAL` has the templates; `both`, which is `read` and `draw`; or
            a YAML file of tasks, see above.

    Raises:
        `ValueError`: when there is no such task or file, or a task in it is not as it must be.
    """
    import yaml

    if task == "both" or task in USUAL:
        return {name: Task(**USUAL[name]) for name in (("read", "draw") if task == "both" else (task,))}
    if not task.lower().endswith((".yaml", ".yml")):
        raise ValueError(f"--task is {task}; it must be {', '.join(USUAL)}, both, or a file that ends in .yaml.")
    try:
        with open(task, encoding="utf-8-sig") as file:
            tasks = yaml.safe_load(file)
    except OSError as error:
        raise ValueError(f"--task {task} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--task {task} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(tasks, dict) or not tasks:
        raise ValueError(f"--task {task} has no tasks; write lines of the form `name: {{user: ..., assistant: ...}}`.")
    return {str(name): make_task(str(name), fields) for name, fields in tasks.items()}


def make_task(name: str, fields: dict) -> Task:
    """A task of its fields. Raises `ValueError` with its name when they are not as they must be."""
    if not isinstance(fields, dict) or not {"user", "assistant"} <= set(fields) <= {"user", "assistant", "max_turns"}:
        raise ValueError(f"The task `{name}` is {fields}; it needs `user` and `assistant`, and may have `max_turns`.")
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"The task `{name}` names a folder; use letters, digits, - and _ alone.")
    if name.startswith("work-"):
        raise ValueError(f"The task `{name}` is named as a folder of unfinished work is; give it another name.")
    try:
        return Task(**fields)
    except ValueError as error:
        raise ValueError(f"The task `{name}` cannot be used: {error}.") from error


def build_chat(row: dict, number: int, task: Task, caption_prompt: str = CAPTION_PROMPT) -> list[dict]:
    """
    The chat that a task makes of one row: messages whose contents are lists of parts.

    Args:
        row: columns of the data set, texts or lists of texts.
        number: of the row, which chooses the templates.
        task: what to make of it.
        caption_prompt: what `{caption_prompt}` stands for.

    Raises:
        `ValueError`: when a text is missing, or lists are empty or differ in length.
    """
    templates, chat = task.choose(number), []
    names = sorted(find_names(*templates) - {"image", "caption_prompt"})
    lists = {name: row[name] for name in names if isinstance(row.get(name), list)}
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"its lists differ in length: {lengths}")
    if 0 in lengths.values():
        raise ValueError(f"its lists are empty: {', '.join(lengths)}")
    length = next(iter(lengths.values()), 1)
    for turn in range(min(length, task.max_turns or length)):
        texts = {name: lists[name][turn] if name in lists else row.get(name) for name in names}
        missing = [name for name in names if not isinstance(texts[name], str)]
        if missing:
            raise ValueError(f"it has {texts[missing[0]]!r:.80} in the column `{missing[0]}`, which must be a text")
        texts["caption_prompt"] = caption_prompt
        for role, template in zip(("user", "assistant"), templates):
            chat.append({"role": role, "content": fill(template, texts, has_image=turn == 0)})
    return chat


def fill(template: str, texts: dict[str, str], has_image: bool) -> list[dict]:
    """The parts of a message: a template filled with texts, and an image part for each `{image}`, if there is one."""
    parts, text = [], ""
    for literal, name, _, _ in parse(template):
        text += literal
        if name == "image":
            parts += [{"type": "text", "text": text}] if text and has_image else []
            parts += [{"type": "image"}] if has_image else []
            text = "" if has_image else text
        elif name is not None:
            text += texts[name]
    return parts + ([{"type": "text", "text": text}] if text else [])
