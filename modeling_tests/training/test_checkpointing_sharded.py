"""Stages whose model is shared by two processes, on CPUs: by DeepSpeed ZeRO-3, as in the paper, and by FSDP2."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from encoders import save_encoder
from language_models import make_language_model, make_tokenizer
from safetensors.torch import load_file
from tokenizing import content, run

from transformers_unicode2.hub.compose import compose_checkpoint
from transformers_unicode2.training.checkpointing import check_sharding

# A hundredth of the paper's codebook.
SIZE = 5000
STEPS = 6
RECIPE = {
    "train_modules": ["visual_embeddings", "projector", "visual_head"],
    "learning_rate": 1e-3,
    # Where gradients are near zero, Adam follows the sign of what is rounded.
    "adam_epsilon": 1e-4,
    "max_steps": STEPS,
    "max_length": None,
    "remove_unused_columns": False,
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "gradient_checkpointing": False,
    "bf16": False,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 1,
    "report_to": "none",
    "ddp_backend": "gloo",
    "seed": 0,
}
ZERO_3 = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}
# Accelerate shards on accelerators alone, so it is told that the CPUs are some.
RUN_FSDP2 = """
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers_unicode2.training import sft
from transformers_unicode2.training.stage import run

def start(self, *args, init=PartialState.__init__, **kwargs):
    init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

PartialState.__init__ = start
run(sft.main, sft.StageArguments, sft.SFTConfig)
"""


@pytest.fixture(scope="module", params=["flat", "two_level"])
def parts(request, tmp_path_factory):
    """A checkpoint of 5,000 codes, with tokens of 16 captioned pictures."""
    folder = tmp_path_factory.mktemp(request.param)
    make_language_model("qwen2").save_pretrained(folder / "llm")
    make_tokenizer("chatml", "bytes").save_pretrained(folder / "llm")
    save_encoder(folder / "encoder", "siglip")
    options = {"visual_head": request.param}
    compose_checkpoint(str(folder / "llm"), str(folder / "encoder"), SIZE, str(folder / "model"), **options)
    (folder / "pictures").mkdir()
    for number in range(16):
        (folder / "pictures" / f"{number}.png").write_bytes(content(number))
    lines = [f"{number}.png\tpicture {'abcdefghijklmnop'[number]}" for number in range(16)]
    (folder / "pictures" / "captions.tsv").write_text("\n".join(lines) + "\n")
    run(folder / "pictures", folder / "model", folder / "tokens", "--task", "both")
    return folder


def start(parts: Path, name: str, processes: int, extra: dict, script: Path | None = None) -> subprocess.Popen:
    """Starts a stage by `torchrun`, with 4 rows a step in all."""
    recipe = {
        "model": str(parts / "model"),
        "datasets": [{"path": str(parts / "tokens" / task)} for task in ("read", "draw")],
        "output_dir": str(parts / name),
        "per_device_train_batch_size": 4 // processes,
        **RECIPE,
        **extra,
    }
    file = parts / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += [str(script)] if script else ["-m", "transformers_unicode2.training.sft"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if name.startswith("zero3"):
        # What `accelerate launch` sets
        environment["ACCELERATE_USE_DEEPSPEED"] = "true"
        environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(parts / "zero3.json")
    log = open(parts / f"{name}.log", "ab")
    options = {"stdout": log, "stderr": log, "env": environment, "start_new_session": True}
    return subprocess.Popen([*command, "--config", str(file)], **options)


def finish(parts: Path, name: str, process: subprocess.Popen) -> dict:
    """The weights of a stage that ends well."""
    assert process.wait(600) == 0, (parts / f"{name}.log").read_text()[-5000:]
    return read_weights(parts / name)


def read_weights(folder: Path) -> dict:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


@pytest.fixture(scope="module")
def alone(parts):
    """What one process learns."""
    return finish(parts, "alone", start(parts, "alone", 1, {"use_cpu": True}))


def compare(parts: Path, alone: dict, name: str, extra: dict, script: Path | None = None) -> None:
    """Two processes learn what one does, also when they are killed behind their first checkpoint."""
    weights = finish(parts, name, start(parts, name, 2, extra, script))
    before = read_weights(parts / "model")
    assert weights.keys() == alone.keys()
    c2 = "model.visual_embeddings.weight"
    # Far beyond the tolerance, so that a wrong gradient would show itself
    assert (alone[c2].float() - before[c2].float()).abs().max() > 1e-3
    for key in alone:
        # Two processes add float32 in another order.
        assert (weights[key].float() - alone[key].float()).abs().max() < 2e-5, key
    killed = start(parts, f"{name}-killed", 2, extra, script)
    while killed.poll() is None and not (parts / f"{name}-killed" / "checkpoint-2").exists():
        time.sleep(0.01)
    # With its workers
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (parts / f"{name}-killed" / "config.json").exists()
    again = finish(parts, f"{name}-killed", start(parts, f"{name}-killed", 2, extra, script))
    assert all(again[key].equal(weights[key]) for key in weights)
    configs = [json.loads((parts / run / "config.json").read_text()) for run in ("alone", name)]
    assert configs[0]["auto_map"] == configs[1]["auto_map"]
    assert all("_unicode2" in file.name for file in (parts / name).glob("*.py"))


@pytest.mark.slow
def test_zero_3_learns_what_one_process_does(parts, alone):
    """C2 is sharded, and saved whole."""
    pytest.importorskip("deepspeed")
    (parts / "zero3.json").write_text(json.dumps(ZERO_3))
    compare(parts, alone, "zero3", {"use_cpu": False})


@pytest.mark.slow
def test_fsdp2_learns_what_one_process_does(parts, alone, tmp_path):
    """C2 is sharded, and saved whole."""
    (tmp_path / "run.py").write_text(RUN_FSDP2)
    settings = {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer", "UniCode2VisualEmbeddings"],
        "state_dict_type": "FULL_STATE_DICT",
    }
    extra = {"fsdp": True, "fsdp_config": settings, "use_cpu": True}
    compare(parts, alone, "fsdp2", extra, tmp_path / "run.py")


@pytest.mark.parametrize("option, advice", [("deepspeed", "start by `accelerate launch`"), ("fsdp", "leave FSDP out")])
def test_sharding_that_accelerate_passes_over_is_refused(option, advice):
    """One process has nothing to share."""
    kind = SimpleNamespace(value="MULTI_CPU")
    accelerator = SimpleNamespace(num_processes=2, distributed_type=kind, device=SimpleNamespace(type="cpu"))
    args = SimpleNamespace(**{"deepspeed": None, "fsdp": None, option: "x"})
    with pytest.raises(ValueError, match=f"passes it over on CPU: each of 2 processes.*{advice}"):
        check_sharding(accelerator, args)
    accelerator.num_processes = 1
    check_sharding(accelerator, args)
