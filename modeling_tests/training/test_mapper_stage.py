"""The stage of the mapper on pictures of any size, with small random decoders of both kinds."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
import yaml
from decoders import make_stock_pipelines, write_captioned
from painters import POOLED, WIDTH
from PIL import Image
from safetensors import safe_open
from tokenizing import run as tokenize
from tokenizing import stop_at
from transformers import TrainingArguments

from transformers_unicode2 import UniCode2ConditionMapper
from transformers_unicode2.hub.assemble import assemble_pipeline
from transformers_unicode2.training import decoder_cache, mapper_data
from transformers_unicode2.training.checkpointing import find_last_checkpoint
from transformers_unicode2.training.mapper import MapperArguments, main
from transformers_unicode2.training.mapper_trainer import MapperTrainer
from transformers_unicode2.training.stage import StageTrainer

SIZES = {"visual_dim": 192, "hidden_dim": 32, "output_dim": WIDTH, "pooled_dim": POOLED, "num_visual_tokens": 64}
RECIPES = Path(__file__).parents[2] / "training_recipes"
CONTRASTIVE = {"flow_matching_weight": 0.0, "images": []}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_checkpoint):
    """Decoders, pictures with captions, and their codes."""
    folder = tmp_path_factory.mktemp("mapper")
    make_stock_pipelines(folder)
    for split, numbers in (("train", range(24)), ("test", range(24, 32))):
        write_captioned(folder / "data", split, numbers)
        tokenize(folder / "data", tiny_checkpoint, folder / "tokens", "--split", split, "--task", "draw")
    return folder


@pytest.fixture
def train(folder, tiny_checkpoint, tmp_path):
    """Runs the stage, and returns what it logged."""

    def run(output="out", decoder="flux", steps=2, held_out=False, training=None, **options) -> list[dict]:
        own = {"model": str(tiny_checkpoint), "datasets": [{"path": str(folder / "tokens")}], "mapper": SIZES}
        own |= {"images": [str(folder / "data")], "decoder": str(folder / decoder), "image_size": 32}
        if held_out:
            own |= {"eval_datasets": [{"path": str(folder / "tokens"), "split": "test"}], "eval_images": own["images"]}
        own |= {"cache_dir": str(tmp_path / f"cache-{decoder}")}
        settings = {"max_steps": steps, "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 4}
        settings |= {"logging_steps": 1, "learning_rate": 1e-3, "save_steps": 2} | (training or {})
        main(MapperArguments(**{**own, **options}), TrainingArguments(str(tmp_path / output), **settings))
        last = find_last_checkpoint(tmp_path / output)
        return json.loads(Path(last, "trainer_state.json").read_text())["log_history"]

    return run


def read(folder: Path) -> bytes:
    return (folder / "diffusion_pytorch_model.safetensors").read_bytes()


def read_tensors(file: Path) -> tuple[dict, dict]:
    """Metadata and tensors of a file."""
    with safe_open(file, framework="pt") as opened:
        metadata = {
            name: sorted(json.loads(value)) if "{" in value else value for name, value in opened.metadata().items()
        }
        return metadata, {name: opened.get_tensor(name) for name in opened.keys()}


@pytest.mark.parametrize("decoder", ["flux", "sdxl"])
def test_held_out_figures_pictures_and_a_resumed_run(train, tmp_path, decoder):
    """Each loss is logged by itself. A run that is killed ends with the same bytes, figures among them."""
    options = {"decoder": decoder, "steps": 4, "held_out": True, "num_validation_images": 3, "validation_steps": 1}
    options["training"] = {"eval_strategy": "steps", "eval_steps": 2}
    logged = train("whole", **options)
    assert all({"loss", "loss_contrastive", "loss_flow"} <= entry.keys() for entry in logged if "loss" in entry)
    figures = [entry for entry in logged if "eval_loss" in entry]
    names = ("contrastive", "flow", "flow_gap", "retrieval_accuracy", "pairs", "loss")
    assert [entry["step"] for entry in figures] == [2, 4] and figures[0]["eval_pairs"] == 8
    assert figures[0].keys() == {*(f"eval_{name}" for name in names), "step", "epoch"}
    assert figures[0]["eval_loss"] == pytest.approx(figures[0]["eval_contrastive"] + figures[0]["eval_flow"])
    sheet = Image.open(tmp_path / "whole/validation/step-000002.png")
    assert sheet.size == (3 * 32, 2 * 32)
    card = (tmp_path / "whole/README.md").read_text()
    kind = {"flux": "UniCode2FluxPipeline", "sdxl": "UniCode2StableDiffusionXLPipeline"}[decoder]
    assert f"pipe = {kind}.from_unicode2(" in card and f', "{decoder}", mapper="whole"' in card
    assert "eval_retrieval_accuracy" in card
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "killed/checkpoint-2")
    assert train("killed", **options)[-1]["eval_flow"] == figures[1]["eval_flow"]
    assert read(tmp_path / "killed") == read(tmp_path / "whole")


def test_an_offloaded_decoder_teaches_the_same(train, tmp_path):
    for offload in (False, True):
        train(f"offload-{offload}", steps=2, decoder="flux", decoder_offload=offload)
    assert read(tmp_path / "offload-True") == read(tmp_path / "offload-False")


@pytest.mark.parametrize("size", [1, 3, 7, 8])
def test_the_flow_gap_does_not_depend_on_the_size_of_a_batch(train, size):
    """8 held-out pairs: batches of one compare with the pair in front, and a last batch of one counts as one pair."""
    training = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": size, "learning_rate": 0.0}
    figures = [entry for entry in train(steps=1, held_out=True, training=training) if "eval_flow" in entry][-1]
    assert figures["eval_flow_gap"] != 0 and figures["eval_pairs"] == 8


def test_a_run_that_diverged_is_no_result(train, tmp_path):
    training = {"learning_rate": 1e30, "max_grad_norm": 0.0, "optim": "sgd"}
    with pytest.raises(ValueError, match=r"weights that have learnt are not finite, the first is mapper\..*diverged"):
        train("wild", steps=3, training=training)
    assert not (tmp_path / "wild/config.json").exists()
    # Nor when it is started again
    with pytest.raises(ValueError, match="are not finite"):
        train("wild", steps=3, training=training)


def test_paintings_have_the_shape_of_the_pictures(tiny_checkpoint, train, tmp_path):
    for split in ("train", "test"):
        write_captioned(tmp_path / "tall", split, range(8), (32, 48))
        tokenize(tmp_path / "tall", tiny_checkpoint, tmp_path / "tall-tokens", "--split", split, "--task", "draw")
    data = {"datasets": [{"path": str(tmp_path / "tall-tokens")}], "images": [str(tmp_path / "tall")]}
    data |= {"eval_datasets": [{**data["datasets"][0], "split": "test"}], "eval_images": data["images"]}
    train(image_size=None, num_validation_images=2, validation_steps=1, **data)
    assert Image.open(next((tmp_path / "out/validation").glob("*.png"))).size == (2 * 32, 2 * 48)


def test_a_resumed_run_may_look_at_other_pictures(train, tmp_path):
    """What changes no weights may change: the place of the cache, and the paintings."""
    options = {"held_out": True, "training": {"eval_strategy": "steps", "eval_steps": 2}}
    train("whole", steps=4, **options)
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "killed/checkpoint-2")
    changes = {"cache_dir": str(tmp_path / "moved"), "num_validation_images": 1, "validation_steps": 1}
    train("killed", steps=4, **options, **changes, decoder_offload=True)
    assert read(tmp_path / "killed") == read(tmp_path / "whole")


def test_captions_of_accumulated_batches_are_negatives(train, tmp_path):
    """A step of two batches of 4 is one of 8, to the rounding of float32."""
    settings = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "save_steps": 1}
    for name, size in (("one", 8), ("two", 4)):
        more = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        train(name, steps=1, training=settings | more, **CONTRASTIVE)
    one, two = (UniCode2ConditionMapper.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)
    log = json.loads((tmp_path / "two/checkpoint-1/trainer_state.json").read_text())["log_history"]
    # Among 8 captions, not 4
    assert log[0]["loss_contrastive"] > torch.tensor(6.0).log()


@pytest.mark.slow
def test_captions_of_other_processes_are_negatives(train, folder, tiny_checkpoint, tmp_path):
    settings = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "save_steps": 1}
    train("one", steps=1, training=settings | {"per_device_train_batch_size": 8}, **CONTRASTIVE)
    script = tmp_path / "run.py"
    own = {"model": str(tiny_checkpoint), "datasets": [{"path": str(folder / "tokens")}], "mapper": SIZES}
    own |= {"decoder": str(folder / "flux"), **CONTRASTIVE}
    more = {"max_steps": 1, "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 4, **settings}
    more |= {"output_dir": str(tmp_path / "two"), "ddp_backend": "gloo"}
    script.write_text(
        "from transformers import TrainingArguments\n"
        "from transformers_unicode2.training.mapper import MapperArguments, main\n"
        f"main(MapperArguments(**{own!r}), TrainingArguments(**{more!r}))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--local-addr", "127.0.0.1"]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    one, two = (UniCode2ConditionMapper.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("decoder", "how"),
    [
        ("flux", "lora"),
        ("sdxl", "whole"),
        pytest.param("flux", "whole", marks=pytest.mark.slow),
        pytest.param("sdxl", "lora", marks=pytest.mark.slow),
    ],
)
def test_a_decoder_learns_too(train, folder, tiny_checkpoint, tmp_path, decoder, how):
    """What it learnt is saved as Diffusers loads it; what it was stays; a run that is killed ends with the same."""
    alpha = {"lora_alpha": 6} if decoder == "flux" else {}
    options = {"train_decoder": True} if how == "whole" else {"decoder_lora": {"r": 2, **alpha}}
    options |= {"decoder": decoder, "steps": 4, "learning_rates": {"decoder": 1e-2}, "contrastive_weight": 0.0}
    before = diffusers.DiffusionPipeline.from_pretrained(folder / decoder)
    part = "transformer" if decoder == "flux" else "unet"
    train("whole", **options)
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "killed/checkpoint-2")
    train("killed", **options)
    file = f"{part}/diffusion_pytorch_model.safetensors" if how == "whole" else "pytorch_lora_weights.safetensors"
    # Of a LoRA safetensors writes two entries of metadata, in any order
    killed, whole = (read_tensors(tmp_path / name / file) for name in ("killed", "whole"))
    assert killed[0] == whole[0] and all(torch.equal(killed[1][name], value) for name, value in whole[1].items())
    assert read(tmp_path / "killed") == read(tmp_path / "whole")
    old = getattr(before, part)
    weight = next(name for name, _ in old.named_parameters() if name.endswith("to_q.weight"))
    before_weight = old.get_parameter(weight).clone()
    if how == "whole":
        new = type(old).from_pretrained(tmp_path / "whole" / part)
        assert not torch.equal(new.get_parameter(weight), old.get_parameter(weight))
    else:
        before.load_lora_weights(tmp_path / "whole")
        module = old.get_submodule(weight.removesuffix(".weight"))
        assert torch.equal(module.base_layer.weight, before_weight) and module.lora_B.default_0.weight.any()
        # As strong as it learnt
        assert module.scaling["default_0"] == options["decoder_lora"].get("lora_alpha", 2) / 2
        # Frozen weights are in no checkpoint
        assert (tmp_path / "whole/checkpoint-2/model.safetensors").stat().st_size < 400_000
    parts = [str(tiny_checkpoint), str(tmp_path / "whole")]
    assemble_pipeline(*parts, str(folder / decoder), str(tmp_path / "pipe"), dtype="float32")
    painter = type(old).from_pretrained(tmp_path / "pipe" / part)
    expected = new.get_parameter(weight) if how == "whole" else before_weight + module.get_delta_weight("default_0")
    torch.testing.assert_close(painter.get_parameter(weight), expected)
    assert not torch.allclose(painter.get_parameter(weight), before_weight, rtol=1e-3, atol=1e-4)
    card, pipe_card = ((tmp_path / name / "README.md").read_text() for name in ("whole", "pipe"))
    assert ("load_lora_weights" in card) == (how == "lora") and ", height=32, width=32).images[0].save(" in card
    said = f"A LoRA of its {part}" if how == "lora" else f"Its {part} was fine-tuned with the mapper"
    assert said in pipe_card and '"dtype": "float32"' in pipe_card and '"image_size": 32' in pipe_card
    # What learnt has no place in a decoder of another kind
    other = "sdxl" if decoder == "flux" else "flux"
    with pytest.raises(ValueError, match=f"Beside .*whole a {part} learnt, and the decoder given here paints by a"):
        assemble_pipeline(*parts, str(folder / other), str(tmp_path / "other"), 32)
    assert not (tmp_path / "other/model_index.json").exists()


def test_processes_paint_over_noise_of_their_own():
    """But all of them pass through the decoder, or none."""
    batches = []
    for rank in (0, 1):
        trainer = object.__new__(MapperTrainer)
        trainer.args, trainer.state = SimpleNamespace(seed=0, device="cpu"), SimpleNamespace(global_step=3)
        trainer.model = SimpleNamespace(args=SimpleNamespace(flow_matching_share=0.5))
        trainer.accelerator = SimpleNamespace(process_index=rank)
        with mock.patch.object(StageTrainer, "get_batch_samples", lambda *_: ([{} for _ in range(16)], 1)):
            batches.append(trainer.get_batch_samples(None, 16, "cpu")[0])
    first, second = ([batch["with_flow"] for batch in part] for part in batches)
    assert first == second and 0 < sum(first) < 16
    assert len({batch["seed"] for part in batches for batch in part}) == 32


@pytest.mark.parametrize("crop", [False, True])
def test_latents_show_what_the_codes_are_of(train, folder, tiny_checkpoint, tmp_path, monkeypatch, crop):
    """All of a picture, squeezed into a square as the codes were made, or its middle (`--center-crop`)."""
    (tmp_path / "data").mkdir()
    pixels = np.full((40, 80, 3), 255, np.uint8)
    pixels[:, :20] = 0
    for number in range(4):
        Image.fromarray(pixels).save(tmp_path / f"data/{number}.png")
    (tmp_path / "data/captions.tsv").write_text("".join(f"{number}.png\tnumber {number}\n" for number in range(4)))
    tokenize(tmp_path / "data", tiny_checkpoint, tmp_path / "tokens", "--task", "draw", *["--center-crop"] * crop)
    seen, stock = [], decoder_cache.decode_pictures
    monkeypatch.setattr(decoder_cache, "decode_pictures", lambda *args: seen.extend(stock(*args)) or stock(*args))
    train(datasets=[{"path": str(tmp_path / "tokens")}], images=[str(tmp_path / "data")], contrastive_weight=0.0)
    dark = [float((np.asarray(image) < 128).mean()) for image in seen]
    assert dark == pytest.approx([0.0 if crop else 0.25] * 4, abs=0.02)


def test_a_cache_is_filled_once(train, monkeypatch):
    """A run that is killed goes on, another with other losses takes it, and one with other pictures is refused."""
    monkeypatch.setattr(decoder_cache, "PAIRS_PER_SHARD", 8)
    monkeypatch.setattr(mapper_data, "encode_latents", stop_at(mapper_data.encode_latents, 2))
    with pytest.raises(KeyboardInterrupt):
        train("out")
    calls = []
    monkeypatch.setattr(mapper_data, "encode_latents", lambda *a: calls.append(1) or decoder_cache.encode_latents(*a))
    train("out")
    assert len(calls) == 2
    monkeypatch.setattr(mapper_data, "load_decoder", None)
    train("other", contrastive_weight=0.0)
    assert len(calls) == 2
    with pytest.raises(
        ValueError, match="cache-flux/latents was begun with something else .image_size was 32 and is 48"
    ):
        train("larger", image_size=48)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": None}, r"Images of one size are needed; these are \(40, 48\) and \(42, 48\) pixels"),
        ({"image_size": 33}, "Pictures are 33 pixels wide and 33 high; the decoder paints multiples of 2"),
        ({"images": []}, "The loss of flow matching needs the pictures; name in `images` what `unicode2 tokenize`"),
        ({"images": ["{data}", "{data}"]}, "was made of 1 sources, and `images` names 2; name those that"),
        ({"images": ["{other}"]}, "was not made of what source 1 of `images` holds now"),
        ({"decoder": "{data}"}, "The folder .*data has no model_index.json that can be read; give that of a whole"),
        ({"decoder_dtype": "float16"}, "`decoder_dtype` is float16, which needs a GPU; set bfloat16 or float32"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` is nan; it must be a finite number of at least 0"),
        ({"temperature": float("inf")}, "`temperature` is inf; it must be a finite number above 0"),
        (
            {"training": {"max_steps": 2, "per_device_train_batch_size": 23}},
            "The last step of an epoch has 1 of the 24 pairs, and no other caption to compare; set `dataloader_drop_",
        ),
        (
            {"mapper": SIZES | {"output_dim": 48, "visual_dim": 8}},
            "`visual_dim` of the mapper is 8, and the codes have 192; `output_dim` .* is 48, and the decoder reads 32",
        ),
        ({"regression_weight": 1.0}, "`regression_weight` is 1, and nothing makes image prompts; name their mapper in"),
        ({"mapper": SIZES | {"visual_dim": 48}}, "`visual_dim` of the mapper is 48, and the codes have 192"),
        ({"decoder_lora": {"rank": 2}}, "`decoder_lora` is {'rank': 2}: .*unexpected keyword argument 'rank'"),
        ({"train_decoder": True, "flow_matching_weight": 0.0}, "A decoder learns by its own loss"),
        ({"train_decoder": True, "decoder_offload": True}, "`decoder_offload` is of a decoder that is frozen"),
        ({"num_validation_images": 2}, "paintings need a `decoder` and `eval_datasets`"),
        (
            {"num_validation_images": -1},
            "`num_validation_images` is -1 and `validation_steps` 50; they must be at least",
        ),
        ({"validation_steps": 0}, "`validation_steps` 0; they must be at least 0 and 1"),
        ({"image_size": 0}, "`image_size` is 0; it must be at least 1"),
        ({"mapper": SIZES | {"foo": 1}}, "`mapper` has foo, which is no field of it; those are visual_dim"),
        ({"decoder_quantization": {"quant_backend": "x"}}, "`decoder_quantization` is .*'x'}: .*quant_kwargs"),
        ({"contrastive_weight": float("nan")}, "There is nothing to learn: `contrastive_weight` nan.*at least 0"),
        ({"training": {"per_device_train_batch_size": 1}}, "a step has 1, and the data 24 different ones. It needs 2"),
        ({"training": {"eval_strategy": "steps"}}, "this stage only trains|eval"),
    ],
)
def test_what_cannot_be_trained_is_refused(train, folder, tmp_path, options, message):
    write_captioned(tmp_path / "other", "train", range(40, 64))
    places = {"data": folder / "data", "other": tmp_path / "other"}
    options = {
        name: [text.format(**places) for text in value] if name == "images" else value
        for name, value in options.items()
    }
    options |= {"decoder": str(folder / "data")} if options.get("decoder") else {}
    with pytest.raises(ValueError, match=message):
        train(**options)


def test_a_decoder_without_text_encoders_is_refused(train, folder, tmp_path):
    texts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    diffusers.FluxPipeline.from_pretrained(folder / "flux", **texts).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="The decoder .*bare has no text_encoder, which the captions need; name the"):
        train(decoder=str(tmp_path / "bare"))


@pytest.mark.parametrize(
    "training",
    [
        {"max_steps": 1, "per_device_train_batch_size": 23},
        {"max_steps": 2, "per_device_train_batch_size": 23, "dataloader_drop_last": True},
    ],
)
def test_a_last_step_of_one_pair_may_stay_out(train, training):
    """A run that ends before it, or that drops it, compares captions in every step."""
    logged = train(training=training, **CONTRASTIVE)
    assert all(entry["loss_contrastive"] > 0 for entry in logged if "loss" in entry)


def test_widths_follow_from_model_and_decoder(train, tmp_path):
    train(mapper={"hidden_dim": 16}, **CONTRASTIVE)
    config = UniCode2ConditionMapper.load_config(tmp_path / "out")
    assert {name: config[name] for name in SIZES} == SIZES | {"hidden_dim": 16}


MAPPERS = sorted(RECIPES.glob("*/mapper-*.yaml"))


@pytest.mark.parametrize("recipe", MAPPERS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipes_train(train, recipe):
    """With small parts in the places of theirs: every option is one, and losses and pictures come of it."""
    content = yaml.safe_load(recipe.read_text())
    fields = {field.name for field in dataclasses.fields(MapperArguments)}
    training = {name: value for name, value in content.items() if name not in fields}
    own = {name: value for name, value in content.items() if name in fields}
    assert training.keys() <= {field.name for field in dataclasses.fields(TrainingArguments)}
    if recipe.parent.name == "unicode2-tiny":
        # Its command is run by the tests of its recipe
        return
    full = {"flux": ("FLUX.1-dev", 4096, 768), "sdxl": ("xl-base-1.0", 2048, 1280)}
    kind = recipe.stem.removeprefix("mapper-")
    name, output_dim, pooled_dim = full[kind]
    assert own["decoder"].endswith(name) and own["image_size"] == 512 and own["guidance_scale"] == 3.5
    assert (own["mapper"]["output_dim"], own["mapper"]["pooled_dim"]) == (output_dim, pooled_dim)
    quantized = own.pop("decoder_quantization", None)
    assert bool(quantized) == (recipe.parent.name == "unicode2-0.5b" and kind == "flux")
    small = {name: own[name] for name in ("contrastive_weight", "flow_matching_weight", "temperature", "decoder_dtype")}
    small |= {"decoder": kind, "held_out": True, "num_validation_images": 2, "validation_steps": 1}
    training |= {"save_steps": 1, "eval_steps": 1}
    del training["output_dir"]
    training["gradient_accumulation_steps"] = min(2, training.get("gradient_accumulation_steps", 1))
    logged = train(steps=1, training=training, **small)
    assert {"eval_retrieval_accuracy", "eval_flow"} <= {name for entry in logged for name in entry}
