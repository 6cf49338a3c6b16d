"""Outputs are whole or absent, made from one set of inputs, by one run at a time: full disks, kills, folders in use."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import yaml
from kills import read
from PIL import Image
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel
from transformers import TrainingArguments as HFTrainingArguments

from transformers_unicode2 import UniCode2ConditionMapper, UniCode2Config, UniCode2ForConditionalGeneration, cli
from transformers_unicode2.files import NotWrittenError, explained, whole_file, whole_folder, write_file
from transformers_unicode2.record import Record, compare, held

RECIPES = Path(__file__).parents[1] / "training_recipes"
ENCODER = {"hidden_size": 16, "image_size": 32, "patch_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_checkpoint, processor):
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
    (folder / "mapper.yaml").write_text(json.dumps({"mapper": {**sizes_of_mapper, "num_layers": 1}}))
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
        "mapper": f"--config {folder}/mapper.yaml --data {folder}/scenes --tokens {folder}/tokenize "
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


def train_on(data: Path, place: tuple, recipe: Path) -> str:
    """The words of the stage with another data set, named in a new recipe."""
    folder, commands = place
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
    disk = tmp_path / "disk"
    disk.mkdir()

    def resize(size: int, option: str = "") -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"{option}size={size}", "tmpfs", str(disk)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no disk can be mounted here")
        return disk

    yield resize
    subprocess.run(["umount", "--lazy", str(disk)], capture_output=True)


@pytest.fixture(scope="module")
def wanted(place):
    """What each command writes when it is not disturbed, and the size of its output in bytes."""
    folder, commands = place
    known = {}

    def want(command: str) -> tuple[dict[str, bytes], int]:
        output = folder / command.replace(" ", "_")
        if command not in known:
            if not output.exists():
                assert execute(command, commands[command], output)[0] == 0
            known[command] = read(output), sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
        return known[command]

    return want


COMMANDS = ("scenes", "tokenize", "codebook build", "codebook grow", "init", "assemble", "sft", "mapper")
# Disk sizes as shares of the final output; the work of a build takes more room than its result.
SHARES = {"codebook build": (2, 3)}
SLOW = [pytest.param(command, marks=pytest.mark.slow) for command in ("assemble", "sft", "mapper")]


@pytest.mark.parametrize("command", [*COMMANDS[:5], *SLOW])
def test_a_full_disk_is_called_one_and_the_command_goes_on_once_there_is_room(command, place, wanted, small_disk):
    bytes_, size = wanted(command)
    for share in SHARES.get(command, (0.5,)):
        disk = small_disk(int(share * size) // 4096 * 4096)
        code, said = execute(command, place[1][command], disk / "output")
        assert code == 2 and "disk is full" in said, said
        assert not list(disk.rglob("*.tmp")) and not (disk / "output" / "config.json").exists()
        small_disk(2**28, "remount,")
        assert execute(command, place[1][command], disk / "output") == (0, "")
        assert read(disk / "output") == bytes_
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("writer", ["bytes", "safetensors", "torch", "parquet", "pillow", "json"])
def test_whatever_a_library_raises_a_full_disk_is_called_one(writer, small_disk):
    import pyarrow as pa
    from pyarrow import parquet

    disk, many = small_disk(2**16), 2**18
    writers = {
        "bytes": lambda file: file.write_bytes(bytes(many)),
        "safetensors": lambda file: save_file({"x": torch.zeros(many)}, file),
        "torch": lambda file: torch.save(torch.zeros(many), file),
        "parquet": lambda file: parquet.write_table(pa.table({"x": np.random.default_rng(0).random(many)}), file),
        "pillow": lambda file: Image.fromarray(np.zeros((512, 512), np.uint8)).save(file, "BMP"),
        "json": lambda file: json.dump(list(range(many)), open(file, "w")),
    }
    (disk / "x").write_bytes(b"before")
    with pytest.raises(NotWrittenError, match="^The disk is full: .*; make room and run") as error:
        with whole_file(disk / "x") as file:
            writers[writer](file)
    assert error.value.errno == errno.ENOSPC and (disk / "x").read_bytes() == b"before"
    assert sorted(path.name for path in disk.iterdir()) == ["x"]


def test_an_output_that_is_a_mount_point_is_filled_too(small_disk, place, wanted):
    disk = small_disk(2**28)
    (disk / "lost+found").mkdir()
    assert execute("init", place[1]["init"], disk) == (0, "")
    (disk / "lost+found").rmdir()
    assert read(disk) == wanted("init")[0]


@pytest.mark.parametrize("command", [*COMMANDS[:5], *SLOW])
def test_a_finished_output_is_left_alone_and_another_making_is_refused(command, place, wanted, capsys):
    bytes_, folder = wanted(command)[0], place[0] / command.replace(" ", "_")
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert execute(command, place[1][command], folder) == (0, "")
    assert "is finished; nothing to do" in capsys.readouterr().out
    changes = {
        "scenes": ("--seed", "7", "seed was 0 and is 7"),
        "codebook build": ("--seed", "7", "seed was 0 and is 7"),
        "codebook grow": ("--seed", "7", "seed was 0 and is 7"),
        "init": ("--visual-head", "two_level", "visual_head was flat and is two_level"),
        "assemble": ("--num-candidates", "4", "num_candidates was 1 and is 4"),
        "sft": ("--learning_rate", "0.5", "learning_rate was 0.001 and is 0.5"),
        "mapper": ("--seed", "7", "seed was 42 and is 7"),
        "tokenize": ("--model", str(place[0] / "other_codes"), "quantizer was"),
    }
    *more, sentence = changes[command]
    code, said = execute(command, place[1][command], folder, *more)
    assert code == 2 and sentence in said and "Traceback" not in said, said
    assert read(folder) == bytes_ and times == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "codebook build"])
def test_a_second_run_and_a_folder_of_someone_else_are_refused(command, place, tmp_path):
    with held(tmp_path / "held"):
        code, said = execute(command, place[1][command], tmp_path / "held")
    assert code == 2 and "Another run is writing to" in said
    names = {"scenes": "train-00000.parquet", "tokenize": "train-00000.parquet", "codebook grow": "codebook.json"}
    file = tmp_path / "mine" / names.get(command, "config.json")
    file.parent.mkdir()
    file.write_text("mine")
    code, said = execute(command, place[1][command], file.parent)
    assert code == 2 and (f"holds {file.name}, and nothing tells" in said or "holds a codebook already" in said), said
    assert [path.name for path in file.parent.iterdir()] == [file.name] and file.read_text() == "mine"


def test_a_lock_is_let_go_of_by_a_killed_run_and_leaves_nothing(tmp_path):
    script = "from transformers_unicode2.record import held; "
    script += f"held = held({str(tmp_path / 'out')!r}); held.__enter__(); print(1); input()"
    run = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert run.stdout.readline()
    with pytest.raises(ValueError, match="Another run is writing to"), held(tmp_path / "out"):
        pass
    run.kill()
    run.wait()
    with held(tmp_path / "out"), pytest.raises(ValueError, match="Another run"), held(tmp_path / "out"):
        pass
    with held(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists() and not list((tmp_path / "out").iterdir())


class Killed(BaseException):
    pass


def test_a_folder_that_was_half_moved_is_moved_again(tmp_path, monkeypatch):
    """Whenever the move is interrupted, the file that a loader reads first is missing, and the same command resumes."""

    def make(output, broken_off_after=100):
        moves = []

        def rename(self, target):
            if len(moves) == broken_off_after:
                raise Killed
            moves.append(os.rename(self, target))

        with Record(output, {"a": 1}).making() as finished, monkeypatch.context() as patch:
            if not finished:
                with whole_folder(output) as new:
                    for name in ("config.json", "model.safetensors", "tokenizer.json"):
                        (new / name).write_text(name)
                    (new / "vae").mkdir()
                    (new / "vae" / "config.json").write_text("vae")
                    patch.setattr(Path, "rename", rename)

    make(tmp_path / "whole")
    for count in range(4):
        with pytest.raises(Killed):
            make(tmp_path / str(count), count)
        assert not (tmp_path / str(count) / "config.json").exists()
        if count:
            with pytest.raises(ValueError, match="a was 1 and is 2"), Record(tmp_path / str(count), {"a": 2}).making():
                pass
        make(tmp_path / str(count))
        assert read(tmp_path / str(count)) == read(tmp_path / "whole")


def test_nothing_stays_of_a_making_that_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), Record(tmp_path / "new", {}).making(), whole_folder(tmp_path / "new") as new:
        (new / "config.json").write_text("{}")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with pytest.raises(NotWrittenError, match="/proc/out cannot be made"), Record("/proc/out", {}).making():
        pass


def test_what_was_changed_or_lost_afterwards_is_noticed(tmp_path):
    def make():
        with Record(tmp_path, {}).making() as finished:
            if not finished:
                with whole_folder(tmp_path) as new:
                    (new / "a").write_text("a")
                    (new / "b").write_text("b")
        return finished

    assert [make(), make()] == [False, True]
    (tmp_path / "a").unlink()
    assert [make(), make()] == [False, True] and (tmp_path / "a").read_text() == "a"
    (tmp_path / "b").write_text("longer")
    with pytest.raises(ValueError, match=r"b is not as it was written \(1 bytes .* then, 6 bytes .* now\); delete it"):
        make()
    (tmp_path / ".unicode2" / "record.json").write_text("{")
    with pytest.raises(ValueError, match="record.json is damaged"):
        make()


def test_differences_are_named_with_what_was_and_is():
    before = {"tasks": {"caption": 1.0, "questions": 1.0}, "data": {"a": "0" * 64}, "seed": 0}
    now = {"tasks": {"caption": 0.5}, "data": {"a": "0" * 64, "b": "1" * 64}, "seed": None}
    assert compare(before, now, growing=("data",)) == [
        "tasks caption was 1.0 and is 0.5",
        "tasks questions was 1.0 and is nothing",
        "seed was 0 and is None",
    ]
    assert compare(before, now)[2] == f"data b was nothing and is {'1' * 12}"


def test_files_can_be_read_by_whom_other_files_can(tmp_path):
    with whole_folder(tmp_path) as new:
        save_file({"x": torch.zeros(1)}, new / "x.safetensors")
    with whole_file(tmp_path / "y.safetensors") as file:
        save_file({"x": torch.zeros(1)}, file)
    (tmp_path / "plain").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir() if path.is_file()}) == 1


def test_a_disk_that_cannot_be_written_to_is_named_and_what_is_finished_there_is_known(small_disk, place, capsys):
    disk = small_disk(2**28)
    assert execute("init", place[1]["init"], disk / "output") == (0, "")
    small_disk(2**28, "remount,ro,")
    with pytest.raises(NotWrittenError, match="could not be written .Read-only file system.; choose another place"):
        write_file(disk / "x", b"")
    code, said = execute("scenes", place[1]["scenes"], disk / "scenes")
    assert code == 2 and "scenes cannot be made (Read-only file system); choose another --output" in said
    assert execute("init", place[1]["init"], disk / "output") == (0, "")
    assert "is finished; nothing to do" in capsys.readouterr().out


def test_data_that_changed_are_refused(place, wanted, tmp_path):
    folder, commands = place
    data, output = tmp_path / "data", tmp_path / "tokens"
    data.mkdir()
    shutil.copy(folder / "scenes" / "train-00000.parquet", data)
    words = commands["tokenize"].replace(str(folder / "scenes"), str(data))
    assert execute("tokenize", words, output) == (0, "")
    # The place of the data does not matter.
    assert read(output) == wanted("tokenize")[0]
    assert execute("scenes", "--num-scenes 4 --seed 3 --output {}", tmp_path / "more") == (0, "")
    for name in ("train-00001.parquet", "train-00000.parquet"):
        shutil.copy(tmp_path / "more" / "train-00000.parquet", data / name)
        code, said = execute("tokenize", words, output)
        assert code == 2 and "was begun with something else (data 1 was " in said
        assert read(output) == wanted("tokenize")[0]
    # As after a copy of the visible files. Each of them records what made it.
    shutil.rmtree(output / ".unicode2")
    assert execute("sft", train_on(output, place, tmp_path / "sft.yaml"), tmp_path / "stage") == (0, "")
    words = commands["mapper"].replace(str(folder / "tokenize"), str(output)).replace(str(folder / "scenes"), str(data))
    code, said = execute("mapper", words, tmp_path / "mapper")
    assert code == 2 and f"{output} was not made of what {data} holds now" in said


def test_codes_and_a_codebook_of_others_are_refused(place, tmp_path):
    """In both stages, codes of another quantizer or image processor; and a codebook built with another encoder."""
    folder, commands = place
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


def test_what_is_not_finished_is_no_input(place, tmp_path):
    """An unfinished data set or checkpoint is refused as an input."""
    folder, commands = place
    for name, command in (("scenes", "tokenize"), ("tokenize", "sft"), ("model", "sft"), ("codebook_build", "init")):
        copy = tmp_path / name
        shutil.copytree(folder / name, copy)
        part = "train" if name in ("scenes", "tokenize") else "record"
        record = {"made_of": {"command": "x y"}, "finished": False, "files": {}}
        (copy / ".unicode2").mkdir(exist_ok=True)
        (copy / ".unicode2" / f"{part}.json").write_text(json.dumps(record))
        words = commands[command].replace(str(folder / name), str(copy))
        words = train_on(copy, place, tmp_path / "sft.yaml") if name == "tokenize" else words
        code, said = execute(command, words, tmp_path / "output")
        assert code == 2 and "is not finished; run `x y` again" in said, said


def test_codes_that_are_none_of_the_model_are_refused(place, tmp_path):
    from datasets import Dataset

    messages = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": []}]
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
        code, said = execute("sft", train_on(data, place, tmp_path / "sft.yaml"), tmp_path / "output")
        assert code == 2
        assert re.search(sentence, said), said
    assert not (tmp_path / "output").exists()


@pytest.fixture(scope="module")
def stage_runs(place, wanted, tmp_path_factory):
    """The words of a stage of three steps, and its output with a checkpoint at each step."""
    folder, commands = place
    words = commands["sft"].replace("--save_total_limit 1", "--save_total_limit 9 --logging_steps 1")
    words = words.replace("steps 2", "steps 3")
    whole = tmp_path_factory.mktemp("stage") / "whole"
    assert execute("sft", words, whole)[0] == 0
    return words, whole


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def fill(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = {
    "empty folder": lambda last: [shutil.rmtree(last), last.mkdir()],
    "no trainer_state.json": lambda last: (last / "trainer_state.json").unlink(),
    "half an optimizer": lambda last: cut(last / "optimizer.pt"),
    "empty weights": lambda last: os.truncate(last / "model.safetensors", 0),
    "an optimizer of zeros": lambda last: fill(last / "optimizer.pt"),
    "random states of zeros": lambda last: fill(last / "rng_state.pth"),
    "a trainer_state.json of zeros": lambda last: fill(last / "trainer_state.json"),
}


FREQUENT = ("no trainer_state.json", "half an optimizer", "an optimizer of zeros")


@pytest.mark.parametrize(
    "damage", [name if name in FREQUENT else pytest.param(name, marks=pytest.mark.slow) for name in DAMAGES]
)
def test_a_stage_goes_on_from_its_newest_whole_checkpoint(damage, stage_runs, tmp_path, capsys):
    words, whole = stage_runs
    output = tmp_path / "output"
    for name in ("checkpoint-1", "checkpoint-2", "checkpoint-3"):
        shutil.copytree(whole / name, output / name)
    DAMAGES[damage](output / "checkpoint-3")
    DAMAGES["no trainer_state.json"](output / "checkpoint-2")
    kept = (output / "checkpoint-1" / "model.safetensors").stat().st_mtime_ns
    assert execute("sft", words, output) == (0, "")
    assert "checkpoint-3 is not whole; it is removed, and the stage resumes from" in capsys.readouterr().out
    assert read(output) == read(whole)
    assert (output / "checkpoint-1" / "model.safetensors").stat().st_mtime_ns == kept


def test_a_checkpoint_that_tells_nothing_is_left_alone(stage_runs, tmp_path):
    words, whole = stage_runs
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.copytree(whole / name, tmp_path / "output" / name)
    shutil.rmtree(tmp_path / "output" / "checkpoint-2" / ".unicode2")
    code, said = execute("sft", words, tmp_path / "output")
    assert code == 2 and "checkpoint-2 was not written by this stage; move it out of" in said
    assert (tmp_path / "output" / "checkpoint-2" / "model.safetensors").is_file()


def test_a_checkpoint_of_another_stage_is_refused(stage_runs, tmp_path):
    words, whole = stage_runs
    assert execute("sft", words, tmp_path / "other", "--seed", "7", "--max_steps", "2") == (0, "")
    shutil.copytree(whole / "checkpoint-3", tmp_path / "other" / "checkpoint-3")
    code, said = execute("sft", words, tmp_path / "other", "--seed", "7")
    assert code == 2 and "checkpoint-3 was begun with something else (seed was 0 and is 7)" in said
    shutil.copytree(whole / "checkpoint-3", tmp_path / "new" / "checkpoint-3")
    code, said = execute("sft", words, tmp_path / "new", "--seed", "7", "--learning_rate", "0.1")
    assert code == 2 and "(learning_rate was 0.001 and is 0.1; seed was 0 and is 7)" in said


def test_a_longer_stage_goes_on_and_a_shorter_one_is_refused(stage_runs, tmp_path):
    words, whole = stage_runs
    shutil.copytree(whole, tmp_path / "output")
    code, said = execute("sft", words, tmp_path / "output", "--max_steps", "2")
    assert code == 2 and "checkpoint-3 is at step 3 and `max_steps` is 2" in said
    longer = ("--max_steps", "4")
    assert execute("sft", words, tmp_path / "output", *longer) == (0, "")
    history = json.loads((tmp_path / "output" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    # One step of warm-up, then the third of three along a cosine.
    last = 0.001 * 0.5 * (1 + np.cos(np.pi * 2 / 3))
    assert history[-1]["step"] == 4 and history[-1]["learning_rate"] == pytest.approx(last)
    weights = [folder / "model.safetensors" for folder in (whole, tmp_path / "output")]
    assert weights[0].read_bytes() != weights[1].read_bytes()
    code, said = execute("sft", words, tmp_path / "output", *longer, "--per_device_train_batch_size", "4")
    assert code == 2 and "per_device_train_batch_size was 2 and is 4" in said
    spread = ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2")
    # The same sequences in each step.
    assert execute("sft", words, tmp_path / "output", *longer, *spread) == (0, "")


def test_a_stage_that_was_killed_after_its_last_step_takes_no_further_one(stage_runs, tmp_path):
    words, whole = stage_runs
    shutil.copytree(whole / "checkpoint-3", tmp_path / "output" / "checkpoint-3")
    shutil.copytree(whole / "checkpoint-2", tmp_path / "output" / ".unicode2" / "checkpoints" / "checkpoint-4")
    assert execute("sft", words, tmp_path / "output") == (0, "")
    assert not list((tmp_path / "output" / ".unicode2").glob("*/")) and read(tmp_path / "output") == read(whole)
    assert not (tmp_path / "output" / "checkpoint-4").exists()


@pytest.mark.slow
def test_checkpoints_without_an_optimizer_are_no_start(stage_runs, tmp_path, capsys):
    words, whole = stage_runs
    assert execute("sft", words, tmp_path, "--save_only_model", "true", "--max_steps", "2") == (0, "")
    assert execute("sft", words, tmp_path) == (0, "")
    assert "has no optimizer (`save_only_model`)" in capsys.readouterr().out
    assert read(tmp_path) == read(whole)


@pytest.mark.parametrize(
    "option", ["--push_to_hub true", "--resume_from_checkpoint x", "--use_liger_kernel true", "--eval_strategy steps"]
)
def test_a_stage_refuses_what_it_does_not_follow(option, place, tmp_path):
    code, said = execute("sft", place[1]["sft"], tmp_path / "output", *option.split())
    name = option.split()[0][2:].replace("eval_strategy", "do_eval")
    assert code == 2 and f"`{name}` is not followed" in said and not (tmp_path / "output").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sft", "mapper", "assemble", "init", "tokenize"])
def test_twenty_kills_while_a_command_writes_all_go_on_to_the_same_bytes(command, place, wanted, tmp_path):
    wanted("tokenize")
    script, environment = Path(__file__).with_name("kills.py"), {**os.environ, "OMP_NUM_THREADS": "1"}
    words = place[1][command].replace("--max_steps 2", "--max_steps 3").split()
    job = [sys.executable, str(script), command, "20", str(tmp_path), *words]
    environment["HF_DATASETS_CACHE"] = str(tmp_path / "cache")
    said = subprocess.run(job, env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-3000:]
    report = json.loads(said.stdout.splitlines()[-1])
    assert report["status"] == 0 and report["wrong"] == [] and report["kills"] == 20, report


LAUNCHERS = {
    "torchrun, build": (
        "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc_per_node 2",
        "codebook.build",
    ),
    "torchrun, sft": (
        "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc_per_node 2",
        "training.sft",
    ),
    "accelerate, sft": (f"-m accelerate.commands.launch --config_file {RECIPES}/accelerate/cpu.yaml", "training.sft"),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("seconds", [0.3, 8])
def test_workers_end_with_a_launcher_that_is_killed(launcher, seconds, place, tmp_path):
    """While they import, and while they work."""
    folder, commands = place
    start, module = LAUNCHERS[launcher]
    words = commands["sft" if "sft" in module else "codebook build"].replace("{}", str(tmp_path / "output"))
    more = ["--max_steps", "100000"] if "sft" in module else ["--polish", "20000"]
    job = subprocess.Popen(
        [sys.executable, *start.split(), "-m", f"transformers_unicode2.{module}", *words.split(), *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    num_workers = 1 if "accelerate" in launcher else 2
    while len(psutil.Process(job.pid).children(recursive=True)) < num_workers:
        assert job.poll() is None
        time.sleep(0.05)
    with pytest.raises(subprocess.TimeoutExpired):
        job.wait(seconds)
    workers = psutil.Process(job.pid).children(recursive=True)
    try:
        job.kill()
        job.wait()
        assert workers and psutil.wait_procs(workers, timeout=60)[1] == []
    finally:
        for worker in workers:
            if worker.is_running():
                worker.kill()


@pytest.mark.slow
def test_a_run_lives_on_when_the_shell_that_started_it_ends(place, tmp_path):
    words = place[1]["sft"].replace("{}", str(tmp_path / "output"))
    command = f"{sys.executable} -m transformers_unicode2.training.sft {words}"
    # A shell may have this variable.
    environment = {**os.environ, "ACCELERATE_MIXED_PRECISION": "no"}
    subprocess.run(["bash", "-c", f"nohup {command} > {tmp_path}/log 2>&1 & echo $! > {tmp_path}/pid"], env=environment)
    pid = int((tmp_path / "pid").read_text())
    psutil.wait_procs([psutil.Process(pid)], timeout=120)
    assert (tmp_path / "output" / "model.safetensors").is_file(), (tmp_path / "log").read_text()[-2000:]


@pytest.mark.slow
def test_processes_that_miss_a_peer_end_in_a_sentence(monkeypatch):
    from datetime import timedelta

    script = (
        "import transformers_unicode2.processes as p; from datetime import timedelta\n"
        "from transformers_unicode2.cli import sentences\n"
        "p.RENDEZVOUS = timedelta(seconds=3)\nwith sentences('x'): p.join(cpu=True)"
    )
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29671"}
    said = subprocess.run([sys.executable, "-c", script], env={**os.environ, **alone}, capture_output=True, text=True)
    assert said.returncode == 2 and "did not find each other (" in said.stderr.splitlines()[-1]
    from transformers_unicode2 import processes

    assert processes.RENDEZVOUS < timedelta(minutes=30) < processes.PATIENCE


def test_a_copy_that_cannot_be_written_is_named_by_where_it_was_going(tmp_path):
    with pytest.raises(NotWrittenError, match=f"The disk is full: {tmp_path / 'output' / 'b.py'} could not be written"):
        with explained(tmp_path / "output"):
            # As `shutil.copyfile` raises it.
            raise OSError(
                errno.ENOSPC, "No space left on device", "input/a.py", None, str(tmp_path / "output" / "b.py")
            )
