"""lmms-eval runs a checkpoint on a task folder of our own, by its entry point. It is not in the test environment."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value

from transformers_unicode2.evaluation.scenes import main, make_parser
from transformers_unicode2.evaluation.score_card import read_card
from transformers_unicode2.scenes.sample import sample_scene
from transformers_unicode2.scenes.scene import SEEN_PAIRS, draw_scene
from transformers_unicode2.scenes.texts import questions

pytest.importorskip("lmms_eval")

TASK = """
task: scenes
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 16, do_sample: false}}
process_results: !function utils.process_results
metric_list: [{{metric: exact, aggregation: mean, higher_is_better: true}}]
"""
UTILS = """
def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]

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
    (folder / "scenes").mkdir()
    (folder / "scenes/scenes.yaml").write_text(TASK.format(file=folder / "test.parquet"))
    (folder / "scenes/utils.py").write_text(UTILS)
    return folder


def run(tasks: Path, model_args: str, output: Path) -> dict:
    words = ["--model", "unicode2", "--model_args", model_args, "--tasks", "scenes", "--include_path", str(tasks)]
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
    results, file = run(tasks, arguments, tmp_path / "out")
    (samples,) = file.parent.glob("*samples_scenes.jsonl")
    answers = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    drawn = [json.loads(answer[0] if isinstance(answer, list) else answer) for answer in answers]
    assert len(drawn) == COUNT and all(Path(one["images"][0]).is_file() for one in drawn)


@pytest.mark.slow
def test_the_command_writes_a_card_and_resumes(tasks, tiny_checkpoint, tmp_path):
    words = ["--model", str(tiny_checkpoint), "--tasks", "scenes", "--include-path", str(tasks)]
    command = [sys.executable, "-m", "transformers_unicode2.cli", "evaluate", "understanding", *words]
    cards = []
    for name in ("one", "two"):
        done = subprocess.run([*command, "--output", str(tmp_path / name)], capture_output=True, text=True)
        assert not done.returncode, done.stderr[-3000:]
        cards.append(read_card(tmp_path / name / "card.json"))
    one, two = cards
    assert one.protocol_hash == two.protocol_hash and one.items == two.items and one.figures == two.figures
    (figure,) = one.figures
    assert figure.name == "scenes, exact" and figure.count == COUNT and figure.interval == "binomial"
    assert one.protocol["tasks"]["scenes"]["questions"] == COUNT
