"""A stage refuses options that it does not follow, and codes of another model."""

import json
import re
import shutil

import pytest
from commands import execute, train_on
from transformers import SiglipVisionModel

from transformers_unicode2.training.sft import StageArguments
from transformers_unicode2.training.stage import check_not_alone, check_types


def test_codes_and_a_codebook_of_others_are_refused(inputs, tmp_path):
    """In both stages, codes of another quantizer or image processor; and a codebook built with another encoder."""
    folder, commands = inputs
    shutil.copytree(folder / "model", tmp_path / "pixels")
    settings = tmp_path / "pixels" / "processor_config.json"
    content = json.loads(settings.read_text())
    content["image_processor"]["image_mean"] = [0.4, 0.4, 0.4]
    settings.write_text(json.dumps(content))
    others = {
        folder / "other_codes": "of another quantizer (SHA-256",
        tmp_path / "pixels": "of another image processor",
    }
    for other, sentence in others.items():
        for command in ("sft", "mapper"):
            words = commands[command].replace(f"--model {folder}/model", f"--model {other}")
            code, said = execute(command, words, tmp_path / "stage")
            assert code == 2 and sentence in said and "tokenize its data with" in said, said
    model = SiglipVisionModel.from_pretrained(folder / "encoder")
    model.embeddings.position_embedding.weight.data += 1
    model.save_pretrained(tmp_path / "encoder")
    shutil.copy(folder / "encoder" / "preprocessor_config.json", tmp_path / "encoder")
    words = commands["init"].replace(str(folder / "encoder"), str(tmp_path / "encoder"))
    code, said = execute("init", words, tmp_path / "output")
    assert code == 2 and "was built with another encoder (SHA-256" in said
    assert not (tmp_path / "stage").exists() and not (tmp_path / "output").exists()


def test_codes_that_are_none_of_the_model_are_refused(inputs, tmp_path):
    from datasets import Dataset

    answer = {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}
    messages = [{"role": "user", "content": [{"type": "image", "text": None}]}, answer]
    for codes, sentence in (
        ([[8192] * 64], "has codes from 8192 to 8192"),
        ([[-1] * 64], "has codes from -1 to -1"),
        ([[0] * 64, [0] * 63], "Row 0 of .* has an image of 63 codes; an image has 64"),
        ([[0.5] * 64], "a list of integers for each image"),
        ([0] * 64, "a list of integers for each image"),
        (None, "a list of integers for each image"),
    ):
        data = tmp_path / sentence[:3].strip()
        data.mkdir(exist_ok=True)
        Dataset.from_list([{"messages": messages, "codes": codes}]).to_parquet(str(data / "train-0.parquet"))
        code, said = execute("sft", train_on(data, inputs, tmp_path / "sft.yaml"), tmp_path / "output")
        assert code == 2
        assert re.search(sentence, said), said
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--push_to_hub true", "`push_to_hub` is not followed"),
        ("--resume_from_checkpoint x", "`resume_from_checkpoint` is not followed"),
        ("--use_liger_kernel true", "`use_liger_kernel` is not followed"),
        ("--eval_strategy steps", "there are no `eval_datasets`"),
        ("--report_to comet_ml", "`report_to` is comet_ml: "),
        ("--datasets tokens", "argument --datasets: invalid dict value: 'tokens'"),
    ],
)
def test_a_stage_refuses_what_it_does_not_follow(option, sentence, inputs, tmp_path):
    code, said = execute("sft", inputs[1]["sft"], tmp_path / "output", *option.split())
    assert code == 2 and sentence in said and not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"caption_prompt": ["a"]}, "`caption_prompt` is ['a']; it must be a text or null."),
        ({"text_weight": [1]}, "`text_weight` is [1]; it must be a number."),
        ({"codes_per_image": True}, "`codes_per_image` is True; it must be an integer or null."),
        ({"train_modules": "projector"}, "`train_modules` is 'projector'; it must be a list."),
        ({"datasets": {"path": "x"}}, "`datasets` is {'path': 'x'}; it must be a list."),
        ({"learning_rates": [1e-3]}, "`learning_rates` is [0.001]; it needs"),
        ({"lora": [8]}, "`lora` is [8]; it must be names and values, {name: value}."),
    ],
)
def test_values_of_other_types_are_refused_in_one_sentence(content, sentence, inputs, tmp_path):
    recipe = {**json.loads((inputs[0] / "sft.yaml").read_text()), **content}
    (tmp_path / "sft.yaml").write_text(json.dumps(recipe))
    words = inputs[1]["sft"].replace(f"{inputs[0]}/sft.yaml", str(tmp_path / "sft.yaml"))
    code, said = execute("sft", words, tmp_path / "output")
    assert code == 2 and sentence in said and not (tmp_path / "output").exists(), said


def test_a_whole_number_is_a_number_and_null_is_none():
    check_types(StageArguments("model", [{"path": "x"}], text_weight=2, caption_prompt=None, max_plan_tokens=3))


def test_processes_that_would_each_train_alone_are_refused(monkeypatch):
    """As Accelerate leaves those of `torchrun` with `deepspeed` in a recipe, on CPUs."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    # A node of a cluster, where that number is of something else
    check_not_alone()
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="2 processes were started.*leave `deepspeed` out of the recipe"):
        check_not_alone()


def test_an_adapter_is_no_checkpoint_to_continue_from(inputs, tmp_path):
    folder, commands = inputs
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    for command in ("sft", "mapper", "tokenize"):
        words = commands[command].replace(f"--model {folder}/model", f"--model {tmp_path}/adapter")
        code, said = execute(command, words, tmp_path / "output")
        assert code == 2 and f"`unicode2 merge {tmp_path}/adapter --output DIR` makes one" in said, said
        assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("max_step: 2", "The recipe has `max_step`, which is no option of this stage; did you mean `max_steps`?"),
        ("qwertyuiop: 2", "The recipe has `qwertyuiop`, which is no option of this stage; `--help` lists those"),
        ("model: [a", "The recipe is no YAML: while parsing a flow sequence"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_refused(tmp_path, text, sentence):
    (tmp_path / "recipe.yaml").write_text(text)
    code, said = execute("sft", f"--config {tmp_path}/recipe.yaml", tmp_path / "output")
    assert code == 2 and sentence in said
