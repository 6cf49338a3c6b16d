"""A checkpoint with few weights, a small pre-tokenized data set, and what runs stages on them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from transformers_unicode2 import UniCode2Config, UniCode2ForConditionalGeneration

RECIPES = Path(__file__).parents[2] / "training_recipes"


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_checkpoint):
    """A checkpoint with few weights and a small pre-tokenized data set."""
    from transformers import AutoProcessor

    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    config = UniCode2Config.from_pretrained(tiny_checkpoint).to_dict()
    config["text_config"] |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "layer_types": None}
    config["text_config"] |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    UniCode2ForConditionalGeneration(UniCode2Config(**config)).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "codes": torch.randint(0, 8, (64,), generator=generator).tolist(),
            "caption": "a red circle",
            "dense_caption": "a small red circle at c4, on a white ground",
            "questions": ["what color is the circle?", "how many objects are there?"],
            "answers": ["red", "one"],
        }
        for _ in range(48)
    ]
    (folder / "tokens").mkdir()
    Dataset.from_list(rows).to_parquet(str(folder / "tokens" / "train-00000.parquet"))
    return folder


@pytest.fixture
def run_stage(tiny_run):
    """Runs a recipe of the stages 1 to 2 on the small data, as a command."""

    def run(recipe: Path, output: Path, *extra: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(RECIPES / "accelerate/cpu.yaml"), "-m", "transformers_unicode2.training.sft"]
        command += ["--config", str(recipe), "--use_cpu", "true", "--model", str(tiny_run / "model")]
        command += ["--data", str(tiny_run / "tokens"), "--output_dir", str(output)]
        command += ["--per_device_train_batch_size", "4", "--warmup_steps", "1", "--save_steps", "2", *extra]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        return run

    return run
