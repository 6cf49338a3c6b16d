"""A stage refuses options that it does not follow, and codes of another model."""

import json
import re
import shutil

import pytest
from commands import execute, train_on
from transformers import SiglipVisionModel


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
    ],
)
def test_a_stage_refuses_what_it_does_not_follow(option, sentence, inputs, tmp_path):
    code, said = execute("sft", inputs[1]["sft"], tmp_path / "output", *option.split())
    assert code == 2 and sentence in said and not (tmp_path / "output").exists()
