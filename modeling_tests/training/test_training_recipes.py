"""Every recipe parses. Every stage runs on small shapes, learns, and resumes to the same bytes after a kill."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from transformers_unicode2 import UniCode2ForConditionalGeneration

RECIPES = Path(__file__).parents[2] / "training_recipes"
NAMES = ("stage1", "stage1.5", "stage2", "sft", "draw")
STAGES = sorted(path for name in NAMES for path in RECIPES.glob(f"*/{name}.yaml"))


def mark(path: Path):
    """A recipe as a parameter; those of tiny stage 1 alone run by default."""
    name = f"{path.parent.name}/{path.stem}"
    return pytest.param(path, id=name, marks=() if name == "unicode2-tiny/stage1" else pytest.mark.slow)


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: str(path.relative_to(RECIPES)))
def test_recipe_parses(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


@pytest.mark.parametrize("recipe", [mark(path) for path in STAGES])
def test_stage_runs_two_steps(recipe, tiny_run, run_stage, tmp_path):
    # Masters of bfloat16 weights are float32 already
    has_masters = yaml.safe_load(recipe.read_text()).get("master_weights")
    dtype = () if has_masters else ("--dtype", "float32")
    run_stage(recipe, tmp_path / "out", "--max_steps", "2", *dtype)
    before = UniCode2ForConditionalGeneration.from_pretrained(tiny_run / "model").state_dict()
    after = UniCode2ForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    frozen = [name for name in before if ".quantizer." in name]
    assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)
    for module in ("projector", "language_model"):
        assert any(not torch.equal(before[name], after[name]) for name in before if module in name), module


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*/align.yaml")), ids=lambda path: path.parent.name)
def test_alignment_runs_two_steps(recipe, tiny_run, run_stage, tmp_path):
    run_stage(recipe, tmp_path / "out", "--max_steps", "2", stage="align")
    before = UniCode2ForConditionalGeneration.from_pretrained(tiny_run / "model").state_dict()
    after = UniCode2ForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".projector." in name or "visual_embeddings" in name for name in changed)


def test_killed_stage_resumes_to_the_same_bytes(run_stage, tmp_path):
    recipe = RECIPES / "unicode2-tiny/stage2.yaml"
    run_stage(recipe, tmp_path / "whole", "--max_steps", "4")
    # As a kill after step 2 leaves it
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "killed/checkpoint-2")
    run_stage(recipe, tmp_path / "killed", "--max_steps", "4")
    name = "model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_stage_learns_what_its_data_say(run_stage, tmp_path):
    from transformers import AutoProcessor

    recipe = RECIPES / "unicode2-tiny/stage2.yaml"
    run = run_stage(recipe, tmp_path / "out", "--max_steps", "60", "--learning_rate", "0.01", "--logging_steps", "10")
    losses = [
        eval(line.split("\r")[-1])["text_loss"]
        for line in (run.stdout + run.stderr).splitlines()
        if "'text_loss'" in line
    ]
    assert float(losses[-1]) < 0.5 * float(losses[0]), losses
    model = UniCode2ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.generation_config.image_generation["max_plan_tokens"] == 64
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    prompt = processor.apply_chat_template([{"role": "user", "content": "a red circle"}], add_generation_prompt=True)
    inputs = processor(text=prompt, return_tensors="pt")
    output = model.generate(**inputs, generation_mode="interleaved", max_new_tokens=140, do_sample=False)
    plan, image = processor.split_images(output[0, inputs["input_ids"].shape[1] :])[:2]
    assert plan["text"] == "a small red circle at c4, on a white ground"
    assert image["type"] == "image"


def test_stages_of_the_tiny_recipe_name_folders_of_its_tasks():
    """All that `unicode2 tokenize` writes is learnt, and no stage asks for more."""
    from transformers_unicode2.training.templates import read_tasks

    folder = RECIPES / "unicode2-tiny"
    recipes = [yaml.safe_load(path.read_text()) for path in STAGES if path.parent == folder]
    named = {part["path"] for recipe in recipes for part in recipe["datasets"]}
    tasks = read_tasks(str(folder / "tasks.yaml"))
    assert named == {f"outputs/unicode2-tiny/tokens/{name}" for name in tasks}
    assert "--output $out/tokens" in (folder / "run.sh").read_text()


def test_paper_settings_are_those_of_table_6():
    stages = {path.stem: yaml.safe_load(path.read_text()) for path in (RECIPES / "unicode2-7b").glob("stage*.yaml")}
    assert {name: recipe["learning_rate"] for name, recipe in stages.items()} == {
        "stage1": 1e-3,
        "stage1.5": 1e-5,
        "stage2": 1e-5,
    }
    for recipe in stages.values():
        assert (recipe["adam_beta1"], recipe["adam_beta2"], recipe["weight_decay"]) == (0.9, 0.95, 0.0)
        assert recipe["lr_scheduler_type"] == "cosine" and recipe["warmup_steps"] == 0.03 and recipe["bf16"]
    zero3 = yaml.safe_load((RECIPES / "accelerate/zero3.yaml").read_text())
    assert zero3["num_processes"] * stages["stage1"]["per_device_train_batch_size"] == 512
    assert zero3["deepspeed_config"]["zero_stage"] == 3


@pytest.mark.slow
def test_every_stage_of_the_tiny_recipe_runs_in_order(tmp_path):
    """Two steps of each command of run.sh, on 96 drawn scenes, up to an assembled repository that draws."""
    shutil.copytree(RECIPES, tmp_path / "training_recipes")
    folder = tmp_path / "training_recipes/unicode2-tiny"
    for path in folder.rglob("*.yaml"):
        recipe = yaml.safe_load(path.read_text())
        if "max_steps" in recipe:
            recipe |= {"max_steps": 2, "per_device_train_batch_size": 4, "warmup_steps": 1, "save_steps": 2}
            recipe |= {"table_size": 256} if "table_size" in recipe else {}
            path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    script = (folder / "run.sh").read_text()
    replacements = {
        "--num-scenes 50000 --num-emoji 40000": "--num-scenes 96",
        ' --emoji-dir "$emoji"': "",
        "--codebook-size 8192 --num-cells 64": "--codebook-size 128 --num-cells 4",
        "--num-images 20000": "--num-images 96",
        "unicode2 evaluate scenes": "unicode2 evaluate scenes --num-scenes 6 --steps 2 --utilization-images 100",
    }
    for old, new in replacements.items():
        assert old in script, old
        script = script.replace(old, new)
    (folder / "run.sh").write_text(script)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "training_recipes/unicode2-tiny/run.sh"]
    output = tmp_path / "outputs/unicode2-tiny"
    made = []
    # The second time, all stages are finished
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "redrawing | new scenes" in done.stdout
        weights = (file for file in output.rglob("*") if file.is_file() and file.stem != "scores")
        made.append({file: file.stat().st_mtime_ns for file in weights})
    assert made[0] == made[1]
    index = json.loads((output / "unicode2-tiny/model_index.json").read_text())
    assert (index["num_candidates"], index["true_cfg_scale"], index["num_inference_steps"]) == (4, 2.0, 8)
    defaults = json.loads((output / "unicode2-tiny/generation_config.json").read_text())["image_generation"]
    assert defaults["max_plan_tokens"] == 64 and defaults["guidance_scale"] == 2.0
    assert json.loads((output / "unicode2-tiny/config.json").read_text())["caption_prompt"] == "describe the image."
