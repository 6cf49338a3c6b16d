"""lmms-eval runs a checkpoint on a task folder of our own, by its entry point. It is not in the test environment."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, Features, Image, Value

from transformers_unicode2.evaluation.card_files import read_card
from transformers_unicode2.evaluation.scenes import main, make_parser
from transformers_unicode2.evaluation.score_card import ScoreCard
from transformers_unicode2.scenes.sample import sample_scene
from transformers_unicode2.scenes.scene import SEEN_PAIRS, draw_scene
from transformers_unicode2.scenes.texts import questions

pytest.importorskip("lmms_eval")
from lmms_eval.tasks import TaskManager  # noqa: E402

from transformers_unicode2.evaluation.lmms_eval import KeptAnswers, UniCode2, hash_request  # noqa: E402
from transformers_unicode2.evaluation.task_files import find_judge, list_files, list_yaml  # noqa: E402
from transformers_unicode2.evaluation.understanding import PAPER, add_mmbench, read_number  # noqa: E402

TASK = """
task: {task}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.{visual}
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 16, do_sample: false}}
process_results: !function utils.process_results
metric_list: [{{metric: exact, aggregation: mean, higher_is_better: true}}]
"""
UTILS = """
def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]

def doc_to_nothing(doc):
    return []

def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def process_results(doc, results):
    return {"exact": float(results[0] == doc["answer"])}
"""
COUNT = 24


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The questions of `evaluate scenes` about new scenes, as a task of lmms-eval."""
    folder, rng = tmp_path_factory.mktemp("tasks"), np.random.default_rng([0, 0])
    scenes = [sample_scene(rng, "test", SEEN_PAIRS) for _ in range(COUNT)]
    images = [draw_scene(scene, 64) for scene in scenes]
    asked = [questions(scene, rng, SEEN_PAIRS)[0] for scene in scenes]
    columns = {"image": images, "question": [one.text for one in asked], "answer": [one.answer for one in asked]}
    features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    Dataset.from_dict(columns, features).to_parquet(folder / "test.parquet")
    # The same questions without their pictures can be drawn
    for task, visual in (("scenes", "doc_to_visual"), ("texts", "doc_to_nothing")):
        (folder / task).mkdir()
        (folder / f"{task}/{task}.yaml").write_text(TASK.format(file=folder / "test.parquet", task=task, visual=visual))
        (folder / f"{task}/utils.py").write_text(UTILS)
    return folder


def run(tasks: Path, model_args: str, output: Path, task: str = "scenes") -> tuple[dict, Path]:
    words = ["--model", "unicode2", "--model_args", model_args, "--tasks", task, "--include_path", str(tasks)]
    words += ["--batch_size", "1", "--output_path", str(output), "--log_samples"]
    environment = {**os.environ, "HF_HOME": str(output / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", "lmms_eval", *words], capture_output=True, text=True, env=environment)
    assert not done.returncode, done.stderr[-5000:]
    file = max(output.rglob("*_results.json"), key=lambda file: file.stat().st_mtime)
    return json.loads(file.read_text()), file


@pytest.mark.slow
def test_accuracy_is_that_of_the_scenes(tasks, tiny_checkpoint, tmp_path):
    results, _ = run(tasks, f"pretrained={tiny_checkpoint}", tmp_path / "out")
    words = f"--num-scenes {COUNT} --steps 1 --num-candidates 1 --true-cfg-scale 1 --utilization-images 50"
    words = ["--model", str(tiny_checkpoint), *words.split(), "--json", str(tmp_path / "card.json")]
    main(make_parser().parse_args(words))
    figures = {figure.name: figure.value for figure in read_card(tmp_path / "card.json").figures}
    assert 100 * results["results"]["scenes"]["exact,none"] == pytest.approx(figures["understanding, new scenes"])


@pytest.mark.slow
def test_drawings_are_files_that_the_answers_name(tasks, tiny_checkpoint, tmp_path):
    arguments = f"pretrained={tiny_checkpoint},mode=draw,output_dir={tmp_path / 'drawn'}"
    results, file = run(tasks, arguments, tmp_path / "out", "texts")
    (samples,) = file.parent.glob("*samples_texts.jsonl")
    answers = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    drawn = [json.loads(answer[0] if isinstance(answer, list) else answer) for answer in answers]
    assert len(drawn) == COUNT and all(Path(one["images"][0]).is_file() for one in drawn)


def write_mmbench(folder: Path) -> list[dict]:
    """Two questions in two orders each: the first is right in both, the second in one."""
    rows = []
    for index, order, prediction, answer in ((0, 0, "A", "A"), (0, 1, "B", "B"), (7, 0, "A. x", "A"), (7, 1, "A", "B")):
        row = {"index": index + order * 1_000_000, "prediction": prediction, "answer": answer, "question": "?"}
        row |= {"hint": "nan", "source": "", "split": "dev", "category": "c", "L2-category": "d"}
        rows.append({"gpt_eval_score": row | {"A": "x", "B": "y", "C": "nan", "D": "nan", "E": "nan"}})
    return rows


def test_mmbench_is_scored_circular_and_not(tmp_path):
    card = ScoreCard("evaluate understanding", {}, {"model": "m"})
    add_mmbench(card, "mmbench_en_dev_static", write_mmbench(tmp_path))
    assert {figure.name.split(", ")[1]: figure.value for figure in card.figures} == {
        "circular": 50,
        "not circular": 100,
    }


def test_answers_of_mmmu_are_read_by_its_own_rules():
    one = {"id": "v_Art_1", "question_type": "multiple-choice", "answer": "B", "parsed_pred": ["B"]}
    assert read_number(one) == 1.0 and read_number({**one, "parsed_pred": ["A"]}) == 0.0


def test_pictures_and_earlier_turns_are_not_drawn_over(tiny_checkpoint, tmp_path):
    model = UniCode2(str(tiny_checkpoint), mode="draw", output_dir=str(tmp_path))
    text = {"role": "user", "content": [{"type": "text", "text": "a cat"}]}
    picture = {"role": "user", "content": [{"type": "image", "url": PIL.Image.new("RGB", (8, 8))}, *text["content"]]}
    for messages, message in (([picture], "1 turns and 1 pictures"), ([text, text], "2 turns and 0 pictures")):
        with pytest.raises(ValueError, match=f"wise, request 3 has {message}; the mode draw takes one text"):
            model.draw(messages, "wise", 3)
    with pytest.raises(ValueError, match="`dtype` is float; it must be auto, float32"):
        UniCode2(str(tiny_checkpoint), dtype="float")


def test_answers_are_kept_for_what_was_asked_of_what_alone(tmp_path):
    first, second = PIL.Image.new("RGB", (8, 8), "red"), PIL.Image.new("RGB", (8, 8), "blue")
    assert hash_request([first]) == hash_request([first.copy()]) != hash_request([second])
    kept = KeptAnswers(tmp_path, 0)
    kept["a"] = "one\u2028line"
    kept.file.write('{"key": "b", "ans')
    kept.file.flush()
    again = KeptAnswers(tmp_path, 1)
    assert again == {"a": "one\u2028line"}
    again["b"] = "two"
    assert KeptAnswers(tmp_path, 0) == {"a": "one\u2028line", "b": "two"}


@pytest.mark.slow
def test_the_command_writes_a_card_and_resumes(tasks, tiny_checkpoint, tmp_path):
    """By one process, by two, and behind a kill: with equal answers, of which none is asked for twice."""
    words = ["--model", str(tiny_checkpoint), "--tasks", "scenes", "--include-path", str(tasks)]
    words += ["--system-prompt", "Answer briefly, please."]
    module = ["-m", "transformers_unicode2.evaluation.understanding", *words]
    alone, two = [sys.executable, *module], [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    two += ["--standalone", "--local-addr", "127.0.0.1", *module]
    cards = []
    for name, command in (("one", alone), ("two", two), ("killed", alone)):
        output = tmp_path / name
        if name == "killed":
            process = subprocess.Popen([*command, "--output", str(output)], stderr=subprocess.DEVNULL)
            while not count_answers(output):
                assert process.poll() is None
                time.sleep(0.01)
            process.kill()
            process.wait()
            assert count_answers(output) < COUNT
        done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True)
        assert not done.returncode, done.stderr[-3000:]
        cards.append(read_card(output / "card.json"))
        assert count_answers(output) == COUNT
    one = cards[0]
    for other in cards[1:]:
        assert other.protocol_hash == one.protocol_hash and other.items == one.items and other.figures == one.figures
    assert one.protocol["system_prompt"] == "Answer briefly, please." and one.protocol["dtype"] == "torch.bfloat16"
    # Another protocol does not take its place
    before = (tmp_path / "one/card.json").read_bytes()
    command = [*alone, "--dtype", "float32", "--output", str(tmp_path / "one")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and (tmp_path / "one/card.json").read_bytes() == before
    assert "protocol dtype was torch.bfloat16 and is torch.float32" in done.stderr
    assert "Failed to load model entry-point" not in done.stdout + done.stderr
    assert len(one.protocol["include_path"]["scenes"]) == 64
    (figure,) = one.figures
    assert figure.name == "scenes, exact" and figure.count == COUNT and figure.interval == "binomial"
    assert one.protocol["tasks"]["scenes"]["questions"] == COUNT


def count_answers(output: Path) -> int:
    return sum('"key"' in line for file in output.glob("answers/*.jsonl") for line in file.read_text().splitlines())


def test_files_of_a_task_are_those_of_its_own(tasks):
    index = TaskManager(include_path=str(tasks)).task_index
    files = {file for yaml in list_yaml(index, "scenes") for file in list_files(yaml, tasks)}
    assert files == {tasks / "scenes/scenes.yaml", tasks / "scenes/utils.py"}


def test_judges_of_the_papers_tasks_are_known():
    index = TaskManager().task_index
    asked = {task for tasks in PAPER.values() for task in tasks if any(map(find_judge, list_yaml(index, task)))}
    # The last by the code that it shares with `mmbench_en_dev`
    assert asked == {"mmvet", "mmbench_en_dev_static"}
    others = ("llava_in_the_wild", "mathvista_testmini_cot", "mmvetv2", "hallusion_bench_image")
    assert all(any(map(find_judge, list_yaml(index, task))) for task in others)
