"""A checkpoint with few weights, a small tokenized data set, and what runs stages on them."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import yaml
from pyarrow import parquet
from tokenizing import content, picture
from transformers import SiglipImageProcessor

from transformers_unicode2 import UniCode2Config, UniCode2ForConditionalGeneration
from transformers_unicode2.tokens import hash_image_processor, hash_quantizer
from transformers_unicode2.training.shards import write_shard
from transformers_unicode2.training.templates import build_chat, read_tasks

RECIPES = Path(__file__).parents[2] / "training_recipes"


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_checkpoint):
    """A checkpoint with few weights, and a small data set in a folder for each task of the tiny recipe."""
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
    row = {
        "caption": "a red circle",
        "dense_caption": "a small red circle at c4, on a white ground",
        "questions": ["what color is the circle?", "how many objects are there?"],
        "answers": ["red", "one"],
    }
    model = str(folder / "model")
    note = {"quantizer": hash_quantizer(model), "image processor": hash_image_processor(model)}
    codes = torch.randint(0, 8, (48, 64), generator=generator).tolist()
    for name, task in read_tasks(str(RECIPES / "unicode2-tiny/tasks.yaml")).items():
        rows = [
            {"messages": build_chat(row, number, task), "codes": [image], "source": 1, "row": number}
            for number, image in enumerate(codes)
        ]
        (folder / "tokens" / name).mkdir(parents=True)
        write_shard(folder / "tokens" / name / "train-00000.parquet", rows, 8192, [], note)
    return folder


def place_recipe(recipe: Path, tokens: Path, output: Path) -> Path:
    """Writes a copy of a recipe whose data sets are folders of `tokens`, of the same task where there is one.

    Folders that are there stay.
    """
    content = yaml.safe_load(recipe.read_text())
    for name in ("datasets", "eval_datasets"):
        for part in content.get(name, []):
            if Path(part["path"]).is_dir():
                continue
            task = Path(part["path"]).name
            task = "text_to_image" if task == "draw" else task
            part["path"] = str(tokens / (task if (tokens / task).is_dir() else "caption"))
    output.write_text(yaml.safe_dump(content, sort_keys=False))
    return output


@pytest.fixture
def run_stage(tiny_run):
    """Runs a recipe of a stage on the small data, as a command."""

    def run(recipe: Path, output: Path, *extra: str, stage: str = "sft") -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
        command += [str(RECIPES / "accelerate/cpu.yaml"), "-m", f"transformers_unicode2.training.{stage}"]
        placed = place_recipe(recipe, tiny_run / "tokens", output.with_suffix(".yaml"))
        command += ["--config", str(placed), "--use_cpu", "true", "--model", str(tiny_run / "model")]
        command += ["--output_dir", str(output)]
        command += ["--per_device_train_batch_size", "4", "--warmup_steps", "1", "--save_steps", "2", *extra]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        return run

    return run


@pytest.fixture(scope="session")
def quantizer_folder(make_config, tmp_path_factory):
    """Folder of a quantizer that is alone: a few thousand weights, 96 codes, images of 32 pixels and 16 tokens."""
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("quantizer"), UniCode2ForConditionalGeneration(make_config())
    codes = model.get_quantizer().codebook.codes
    codes.copy_(torch.randn_like(codes))
    model.get_quantizer().save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llava_data(tmp_path_factory):
    """A LLaVA file of 7 images by path, named up to 3 times, and a table of 5 images by content, of which 3 differ."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    for number in range(7):
        picture(number).save(folder / "images" / f"{number}.png")
    rows = []
    for number, images in enumerate(([0], [1], [0, 2], [], [3, 3], [4], [5], [6], [0])):
        turns = [{"from": "human", "value": "<image>" * len(images) + f"what is {number}?"}]
        turns += [{"from": "gpt", "value": f"it is {number}"}]
        row = {"id": number, "conversations": turns, "image": [f"images/{image}.png" for image in images]}
        rows.append(row if images else {"id": "text", "conversations": turns})
    (folder / "llava.json").write_text(json.dumps(rows))
    (folder / "table").mkdir()
    captions = [f"number {number}" for number in range(5)]
    table = pa.table({"image": [content(10 + number % 3) for number in range(5)], "caption": captions})
    parquet.write_table(table, folder / "table/train-0.parquet")
    return folder
