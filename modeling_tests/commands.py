"""Small inputs for all commands, what each writes of them, and disks that are full."""

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from kills import read
from PIL import Image
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel
from transformers import TrainingArguments as HFTrainingArguments

from transformers_unicode2 import UniCode2ConditionMapper, UniCode2Config, UniCode2ForConditionalGeneration, cli

RECIPES = Path(__file__).parents[1] / "training_recipes"


ENCODER = {"hidden_size": 16, "image_size": 32, "patch_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, tiny_checkpoint, processor):
    """Small inputs for all commands, and the words of each command; `{}` stands for the output."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(8):
        image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        image.resize((32, 32), Image.Resampling.BICUBIC).save(folder / "images" / f"{i}.png")
    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**ENCODER, intermediate_size=16)).save_pretrained(folder / "encoder")
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "encoder")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    llm = Qwen2ForCausalLM(Qwen2Config(vocab_size=768, num_key_value_heads=2, **sizes))
    llm.save_pretrained(folder / "llm", max_shard_size="60KB")
    processor.tokenizer.save_pretrained(folder / "llm")
    tiny = UniCode2ConditionMapper.from_pretrained(tiny_checkpoint, subfolder="condition_mapper").config
    names = ("visual_dim", "output_dim", "pooled_dim", "num_visual_tokens")
    sizes_of_mapper = {**{name: tiny[name] for name in names}, "hidden_dim": 32, "num_attention_heads": 3}
    UniCode2ConditionMapper(**sizes_of_mapper).save_pretrained(folder / "image_prompts")
    data = {"datasets": [{"path": str(folder / "tokenize")}], "images": [str(folder / "scenes")]}
    (folder / "mapper.yaml").write_text(json.dumps({**data, "mapper": {**sizes_of_mapper, "num_layers": 1}}))
    config = UniCode2Config.from_pretrained(tiny_checkpoint).to_dict()
    config["text_config"] |= {**sizes, "num_key_value_heads": 2, "layer_types": None, "head_dim": 16}
    model = UniCode2ForConditionalGeneration(UniCode2Config(**config))
    quantizer = UniCode2ForConditionalGeneration.from_pretrained(tiny_checkpoint).get_quantizer()
    model.get_quantizer().load_state_dict(quantizer.state_dict())
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    training = (
        "--use_cpu true --bf16 false --report_to none --max_steps 2 --save_steps 1 --save_total_limit 1 --output_dir {}"
    )
    commands = {
        "scenes": "--num-scenes 16 --output {}",
        "tokenize": f"--data {folder}/scenes --model {folder}/model --rows-per-shard 6 --output {{}}",
        "codebook build": f"--images {folder}/images --encoder {folder}/encoder --codebook-size 24 --num-cells 2 "
        "--iterations 2 --images-per-shard 2 --output {}",
        "codebook grow": f"{folder}/codebook_build --images {folder}/images --add 8 --output {{}}",
        "init": f"--llm {folder}/llm --vision {folder}/encoder --codebook {folder}/codebook_build --output {{}}",
        "assemble": f"--model {tiny_checkpoint} --mapper {tiny_checkpoint}/condition_mapper "
        f"--decoder {tiny_checkpoint} --image-size 64 --output {{}}",
        "sft": f"--config {folder}/sft.yaml --model {folder}/model "
        f"--per_device_train_batch_size 2 --warmup_steps 1 {training}",
        "mapper": f"--config {folder}/mapper.yaml "
        f"--model {folder}/model --image_prompts {folder}/image_prompts "
        "--contrastive_weight 0 --flow_matching_weight 0 --regression_weight 1 "
        f"--per_device_train_batch_size 2 {training}",
    }
    recipe = yaml.safe_load((RECIPES / "unicode2-tiny/stage2.yaml").read_text())
    recipe["datasets"] = [{"path": str(folder / "tokenize")}]
    (folder / "sft.yaml").write_text(json.dumps(recipe))
    change_codes(folder / "model", folder / "other_codes")
    for command in ("scenes", "tokenize", "codebook build"):
        assert execute(command, commands[command], folder / command.replace(" ", "_"))[0] == 0
    return folder, commands


def train_on(data: Path, inputs: tuple, recipe: Path) -> str:
    """The words of the stage with another data set, named in a new recipe."""
    folder, commands = inputs
    recipe.write_text((folder / "sft.yaml").read_text().replace(str(folder / "tokenize"), str(data)))
    return commands["sft"].replace(f"{folder}/sft.yaml", str(recipe))


def change_codes(model: Path, output: Path) -> None:
    """Writes a copy of a checkpoint whose codebook has its codes in another order."""
    changed = UniCode2ForConditionalGeneration.from_pretrained(model)
    codes = changed.get_quantizer().codebook.codes
    codes.copy_(codes.flip(0))
    changed.save_pretrained(output)
    for file in model.glob("*"):
        if file.is_file() and not (output / file.name).exists():
            shutil.copy(file, output)


def execute(command: str, words: str, output, *more: str) -> tuple[int, str]:
    """Runs a command in this process; returns its exit status and, if it fails, its last line on stderr."""
    from transformers_unicode2.training import mapper, sft
    from transformers_unicode2.training.stage import run

    parts = [word.replace("{}", str(output)) for word in words.split()] + list(more)
    said = SimpleNamespace(text="", flush=lambda: None)
    said.write = lambda text: setattr(said, "text", said.text + text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", said)
        try:
            if command in ("sft", "mapper"):
                patch.setattr("sys.argv", [command, *parts])
                classes = {
                    "sft": (sft.StageArguments, sft.SFTConfig),
                    "mapper": (mapper.MapperArguments, HFTrainingArguments),
                }
                run({"sft": sft.main, "mapper": mapper.main}[command], *classes[command])
            else:
                patch.setattr("sys.argv", ["unicode2", *command.split(), *parts])
                cli.main()
        except SystemExit as stop:
            return stop.code, said.text.strip().splitlines()[-1]
    return 0, ""


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of a given size in bytes, or resizes it. Skips the test where nothing can be mounted."""
    disk = tmp_path / "output"
    disk.mkdir()

    def resize(size: int, option: str = "") -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"{option}size={size}", "tmpfs", str(disk)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no disk can be mounted here")
        return disk

    yield resize
    subprocess.run(["umount", "--lazy", str(disk)], capture_output=True)


@pytest.fixture(scope="session")
def wanted(inputs):
    """What each command writes when it is not disturbed, the size of its output in bytes, and the output."""
    folder, commands = inputs
    known = {}

    def want(command: str) -> tuple[dict[str, bytes], int, Path]:
        output = folder / command.replace(" ", "_")
        if command not in known:
            if not output.exists():
                # Cards name their folders, so all outputs that are compared have one name
                output = output.with_name(f"{output.name}-wanted") / "output"
                assert execute(command, commands[command], output)[0] == 0
            size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
            known[command] = read(output), size, output
        return known[command]

    return want


COMMANDS = ("scenes", "tokenize", "codebook build", "codebook grow", "init", "assemble", "sft", "mapper")


SLOW = [pytest.param(command, marks=pytest.mark.slow) for command in ("assemble", "sft", "mapper")]


@pytest.fixture(scope="session")
def stage_runs(inputs, wanted, tmp_path_factory):
    """The words of a stage of three steps, and its output with a checkpoint at each step."""
    folder, commands = inputs
    words = commands["sft"].replace("--save_total_limit 1", "--save_total_limit 9 --logging_steps 1")
    words = words.replace("steps 2", "steps 3")
    whole = tmp_path_factory.mktemp("stage") / "output"
    assert execute("sft", words, whole)[0] == 0
    return words, whole
