"""A stage follows its options, resumes to the same bytes, and says what learnt."""

import json
import shutil

import pytest
from datasets import Dataset
from trl import SFTConfig

from transformers_unicode2.checkpoints import load_model
from transformers_unicode2.training.mixtures import MixturePart, find_parts
from transformers_unicode2.training.sft import StageArguments, check_best_metric, keep_settings, main, name_parts


def test_text_tokens_weigh_as_the_recipe_says(tiny_run, tmp_path):
    logs = []
    for weight in (1.0, 3.0):
        output = tmp_path / str(weight)
        parts = [{"path": str(tiny_run / "tokens" / name)} for name in ("questions", "text_to_image")]
        stage = StageArguments(str(tiny_run / "model"), parts, text_weight=weight)
        options = {"max_steps": 1, "logging_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none"}
        options |= {
            "remove_unused_columns": False,
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "max_length": None,
        }
        main(stage, SFTConfig(str(output), per_device_train_batch_size=16, save_steps=1, **options))
        logs.append(json.loads((output / "checkpoint-1" / "trainer_state.json").read_text())["log_history"][0])
    even, heavy = logs
    assert even["text_loss"] == heavy["text_loss"]
    # of the targets that are text
    share = (even["loss"] - even["visual_loss"]) / (even["text_loss"] - even["visual_loss"])
    assert 0 < share < 0.5
    assert heavy["loss"] == pytest.approx(even["loss"] + 2 * share * even["text_loss"], rel=1e-3)


def test_what_a_stage_teaches_is_kept_in_the_configs_of_the_model(model):
    args = StageArguments("model", [], caption_prompt="what is it?", max_plan_tokens=9)
    model.generation_config.image_generation = {"temperature": 0.5}
    keep_settings(model, args)
    assert model.config.caption_prompt == "what is it?"
    assert model.generation_config.image_generation == {"temperature": 0.5, "max_plan_tokens": 9}
    keep_settings(model, StageArguments("model", []))
    assert model.config.caption_prompt == "what is it?"


STAGE = {
    "masters": {
        "dtype": "bfloat16",
        "master_weights": True,
        "codes_per_image": 16,
        "learning_rates": {"projector": 1e-2},
    },
    "lora": {"lora": {"r": 4, "lora_dropout": 0.1}, "learning_rates": {"projector": 1e-2, "language_model": 1e-3}},
    "muon": {"muon": True, "learning_rates": {"visual_embeddings": 1e-2}, "codes_per_image": 8},
}


def run_main(tiny_run, output, options: dict, **settings) -> None:
    data = [{"path": str(tiny_run / "tokens" / name)} for name in ("caption", "text_to_image")]
    args = StageArguments(str(tiny_run / "model"), data, eval_datasets=data, **options)
    fixed = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none"}
    fixed |= {"max_length": None, "per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 2}
    fixed |= {"gradient_checkpointing": False, "disable_tqdm": True, "learning_rate": 1e-3}
    main(args, SFTConfig(str(output), **{**fixed, **settings}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", STAGE)
def test_a_killed_stage_resumes_to_the_same_bytes(tiny_run, tmp_path, kind):
    """With evaluation, rates of parts, a part of the codes, masters, adapters and Muon."""
    run_main(tiny_run, tmp_path / "whole", STAGE[kind])
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "killed/checkpoint-2")
    run_main(tiny_run, tmp_path / "killed", STAGE[kind])
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    one, other = (tmp_path / run / name for run in ("whole", "killed"))
    assert one.read_bytes() == other.read_bytes()
    assert load_model(str(tmp_path / "killed/checkpoint-4"))[1].image_token_id
    history = json.loads((tmp_path / "killed/checkpoint-4/trainer_state.json").read_text())["log_history"]
    assert {f"learning_rate_{part}" for part in STAGE[kind]["learning_rates"]} <= history[0].keys()
    assert {"eval_caption_image_gap", "eval_text_to_image_visual_loss"} <= set().union(*history)
    card = (tmp_path / "killed/README.md").read_text()
    assert "eval_caption_image_gap" in card and "| caption | train | 48 |" in card and str(tiny_run) not in card


@pytest.mark.slow
def test_a_stage_ends_with_its_best_checkpoint_if_told_so(tiny_run, tmp_path):
    best = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_caption_text_loss",
        "greater_is_better": True,
    }
    run_main(tiny_run, tmp_path / "out", {}, learning_rate=1e-2, **best)
    one, other = (tmp_path / f"out/{name}model.safetensors" for name in ("", "checkpoint-2/"))
    assert one.read_bytes() == other.read_bytes()


def test_evaluation_without_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there are no `eval_datasets`"):
        main(StageArguments("model", [{"path": "x"}]), SFTConfig(str(tmp_path), use_cpu=True, eval_strategy="epoch"))


@pytest.mark.parametrize(
    "options, settings, message",
    [
        ({"codes_per_image": 4}, {"packing": True}, "`codes_per_image` is not for rows that are joined"),
        ({"codes_per_image": 4, "learn_all_images": True}, {}, "learns every code of every image"),
    ],
)
def test_options_that_exclude_each_other_are_refused(tmp_path, options, settings, message):
    args = StageArguments("model", [{"path": "x"}], **options)
    with pytest.raises(ValueError, match=message):
        main(args, SFTConfig(str(tmp_path / "out"), use_cpu=True, **settings))
    assert not list(tmp_path.iterdir())


def make_part(path: str, split: str = "train", fraction: float | None = None) -> MixturePart:
    return MixturePart(path, split, fraction, ())


def test_evaluation_data_sets_have_names_that_tell_them_apart():
    paths = ["/data/a/read", "/data/b/read", "draw"]
    assert list(name_parts([make_part(path) for path in paths])) == ["a_read", "b_read", "draw"]
    assert list(name_parts([make_part("/data/read", split) for split in ("val", "test")])) == ["read-val", "read-test"]
    assert name_parts([]) == {}
    with pytest.raises(ValueError, match="each data set and split may be there once"):
        name_parts([make_part("/data/read")] * 2)
    with pytest.raises(ValueError, match="evaluation reads all rows of each"):
        name_parts([make_part("/data/read", fraction=0.5)])


def test_folders_within_a_data_set_are_parts_of_their_own(tiny_run):
    folders = [{"path": str(tiny_run / "tokens"), "data_dir": name} for name in ("caption", "questions")]
    assert list(name_parts(find_parts(folders, "`eval_datasets`"))) == ["caption", "questions"]


@pytest.mark.parametrize("metric", ["read_image_gap", "eval_draw_loss", "loss", "image_gap"])
def test_a_best_metric_that_the_evaluation_lacks_is_refused(tmp_path, metric):
    read = [{"input_ids": [20, 800, 801 + n, 30], "labels": [-100, -100, -100, 30]} for n in range(2)]
    draw = [{"input_ids": [20, 800], "labels": [-100, 800]}]
    held = {"read": Dataset.from_list(read), "draw": Dataset.from_list(draw)}
    arguments = SFTConfig(str(tmp_path), use_cpu=True, eval_strategy="steps", metric_for_best_model=metric)
    known = ["eval_read_loss", "eval_read_text_loss", "eval_read_text_accuracy", "eval_read_image_gap"]
    known += ["eval_draw_loss", "eval_draw_visual_loss", "eval_draw_visual_accuracy"]
    if f"eval_{metric.removeprefix('eval_')}" in known:
        check_best_metric(arguments, held, 768)
    else:
        with pytest.raises(ValueError, match=f"is {metric}, and the evaluation has {', '.join(known)}; name one"):
            check_best_metric(arguments, held, 768)
    if metric == "image_gap":
        check_best_metric(arguments, {"read": held["read"]}, 768)
        arguments.packing = True
        with pytest.raises(ValueError, match="the evaluation has eval_loss, eval_text_loss, eval_text_accuracy; name"):
            check_best_metric(arguments, {"read": held["read"]}, 768)
