"""What tasks of lmms-eval are made of, by hand-made ones."""

import pytest

from transformers_unicode2.evaluation.task_files import find_judge, list_files, list_yaml, read_yaml

UTILS = """
import os

from .judge import ask
from .plain import same

KEY = os.getenv("OTHER_API_KEY", "YOUR_API_KEY")


def send(text):
    return KEY + text


def by_rules(doc, results):
    return {"exact": same(doc, results)}


def by_client(doc, results):
    return {"score": ask(results)}


def by_key(doc, results):
    return {"score": send(results)}


def by_import(doc, results):
    from openai import OpenAI

    return OpenAI()
"""

JUDGE = """
from lmms_eval.llm_judge import get_server

SERVER = get_server()


def ask(text):
    return SERVER(text)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "utils.py").write_text(UTILS)
    (tmp_path / "judge.py").write_text(JUDGE)
    (tmp_path / "plain.py").write_text("def same(one, other):\n    return one == other\n")
    (tmp_path / "unrelated.py").write_text("X = 1\n")
    (tmp_path / "base_yaml").write_text("output_type: loglikelihood\nmetric_list: [{aggregation: mean}]\n")
    for name in ("by_rules", "by_client", "by_key", "by_import"):
        text = f"task: {name}\ninclude: base_yaml\nprocess_results: !function utils.{name}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("by_rules", set()),
        ("by_client", {"OPENAI_API_KEY"}),
        ("by_key", {"OTHER_API_KEY"}),
        ("by_import", {"OPENAI_API_KEY"}),
    ],
)
def test_a_judge_is_known_by_the_code_that_the_task_uses(folder, name, keys):
    assert find_judge(folder / f"{name}.yaml") == keys


def test_files_of_a_task_are_those_that_it_uses(folder):
    names = {file.name for file in list_files(folder / "by_rules.yaml", folder)}
    assert names == {"by_rules.yaml", "base_yaml", "utils.py", "judge.py", "plain.py"}
    assert read_yaml(folder / "by_rules.yaml")[0]["output_type"] == "loglikelihood"


def test_groups_stand_for_their_tasks(folder):
    (folder / "group.yaml").write_text("group: both\ntask: [by_rules, {task: by_key}]\n")
    index = {name: {"yaml_path": str(folder / f"{name}.yaml"), "task": -1} for name in ("by_rules", "by_key")}
    index |= {"both": {"yaml_path": str(folder / "group.yaml"), "task": -1}}
    index |= {"tag": {"yaml_path": -1, "task": ["by_key", "by_rules"]}}
    assert [file.stem for file in list_yaml(index, "both")] == ["group", "by_rules", "by_key"]
    assert [file.stem for file in list_yaml(index, "tag")] == ["by_key", "by_rules"]


@pytest.mark.parametrize("text", ["task: [open\n", "", "- a\n", "a: !nothing b\n"])
def test_what_is_no_yaml_of_a_task_is_refused(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match="x.yaml is no YAML of a task") as error:
        read_yaml(tmp_path / "x.yaml")
    assert "\n" not in str(error.value)
