"""`unicode2 init`: a checkpoint from a language model, an encoder and a codebook, shard by shard."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from transformers_unicode2 import UniCode2ForConditionalGeneration, UniCode2Processor
from transformers_unicode2.cli import main
from transformers_unicode2.codebook.storage import codebook_from_arrays, save_codebook


@pytest.fixture
def parts(tmp_path, processor):
    """Folder of a small language model, an encoder and a codebook; a function that makes the first; the codebook."""

    def make_llm(tied):
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=768,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
        model = Qwen2ForCausalLM(config).eval()
        model.save_pretrained(tmp_path / "llm", max_shard_size="60KB")
        processor.tokenizer.save_pretrained(tmp_path / "llm")
        return model

    vision_config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    SiglipVisionModel(vision_config).save_pretrained(tmp_path / "vision")
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vision")
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(96, 16)).astype(np.float32), rng.normal(size=(4, 16)).astype(np.float32)
    previews = rng.integers(0, 256, (96, 8, 8, 3), dtype=np.uint8)
    codebook = codebook_from_arrays(*arrays, np.array([0, 20, 50, 60, 96]), previews)
    save_codebook(codebook, tmp_path / "codebook", {})
    return tmp_path, make_llm, codebook


@pytest.fixture
def run_init(monkeypatch):
    """Runs the command on the folders of `parts`."""

    def run(folder, *extra):
        paths = [word for name in ("llm", "vision", "codebook") for word in (f"--{name}", str(folder / name))]
        monkeypatch.setattr("sys.argv", ["unicode2", "init", *paths, "--output", str(folder / "output"), *extra])
        main()

    return run


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", ["flat", "two_level"])
def test_parts_are_there_as_they_were(parts, run_init, pixel_values, tied, head, capsys):
    folder, make_llm, codebook = parts
    llm = make_llm(tied)
    llm.model.norm.weight.data.fill_(5.0)
    llm.save_pretrained(folder / "llm")
    run_init(folder, "--visual-head", head)
    model = UniCode2ForConditionalGeneration.from_pretrained(folder / "output").eval()
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits[..., :768], llm(ids).logits)
        vision = SiglipVisionModel.from_pretrained(folder / "vision").eval()
        features = vision(pixel_values).last_hidden_state
    assert torch.equal(model.get_image_tokens(pixel_values) - 768, codebook.encode(features))
    assert torch.equal(model.model.visual_embeddings.weight, codebook.codes)
    assert torch.equal(model.get_quantizer().codebook.cell_offsets, codebook.cell_offsets)
    assert model.config.tie_word_embeddings == tied and model.config.visual_head == head
    if head == "two_level":
        assert torch.equal(model.visual_head.cell_offsets, codebook.cell_offsets)
    hidden = model.model.language_model.norm(torch.randn(64, 32))
    scores = (
        model.visual_head.linear(hidden)[:, : codebook.codes.shape[1]] @ (codebook.codes - codebook.codes.mean(0)).T
    )
    assert 0.5 < scores.std() < 2
    assert model.generate(ids, generation_mode="image").shape == (1, 16)
    assert UniCode2Processor.from_pretrained(folder / "output").num_image_tokens == 16
    printed = capsys.readouterr().out
    total = sum(value.numel() for value in model.state_dict().values()) - tied * 768 * 32
    assert f"all {total:>15,} parameters" in printed
    for part in ("language model", "vision encoder", "codebook C1", "C2", "projector", "visual head"):
        assert part in printed


def test_sampling_settings_are_written_by_option_alone(parts, run_init, capsys):
    folder, make_llm, _ = parts
    make_llm(True)
    image = {"do_sample": True, "temperature": 0.6, "guidance_scale": 2.0}
    for name, options in (("plain", []), ("sampling", ["--image-generation", json.dumps(image)])):
        run_init(folder, *options, "--output", str(folder / name))
        model = UniCode2ForConditionalGeneration.from_pretrained(folder / name)
        assert getattr(model.generation_config, "image_generation", None) == (image if options else None)
        assert not model.generation_config.do_sample
    for wrong, message in (("[1]", "is not a JSON object"), ("{", "is not JSON")):
        with pytest.raises(SystemExit, match="2"):
            run_init(folder, "--image-generation", wrong)
        assert message in capsys.readouterr().err


def test_parts_that_do_not_fit_are_refused(parts, run_init, capsys):
    folder, make_llm, _ = parts
    make_llm(True)
    next(folder.glob("llm/model-00002-*")).unlink()
    with pytest.raises(SystemExit, match="2"):
        run_init(folder)
    assert "must be in safetensors" in capsys.readouterr().err
    assert not list((folder / "output").glob("model*.safetensors"))


def set_up(parts, run_init, capsys, break_it, *extra) -> str:
    """Breaks a part, composes and returns the one sentence that comes of it; nothing is left of a checkpoint."""
    folder, make_llm, _ = parts
    make_llm(True)
    break_it(folder)
    with pytest.raises(SystemExit, match="2"):
        run_init(folder, *extra)
    assert not list((folder / "output").glob("model*.safetensors"))
    return capsys.readouterr().err


def small_vision(folder, **changes):
    settings = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    SiglipVisionModel(SiglipVisionConfig(**{**settings, "image_size": 32, "patch_size": 8, **changes})).save_pretrained(
        folder / "vision"
    )


def test_encoder_of_another_width_is_refused(parts, run_init, capsys):
    message = set_up(parts, run_init, capsys, lambda folder: small_vision(folder, hidden_size=32))
    assert "`hidden_size` is 32 and the codebook's `codebook_dim` is 16" in message


def test_image_processor_of_another_size_is_refused(parts, run_init, capsys):
    def break_it(folder):
        SiglipImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder / "vision")

    message = set_up(parts, run_init, capsys, break_it)
    assert "makes images of 64 x 64 pixels, and the encoder reads 32 x 32" in message


def test_codebook_whose_cells_are_wrong_is_refused(parts, run_init, capsys):
    def break_it(folder):
        rng = np.random.default_rng(0)
        arrays = rng.normal(size=(96, 16)).astype(np.float32), rng.normal(size=(4, 16)).astype(np.float32)
        save_codebook(codebook_from_arrays(*arrays, np.array([0, 20, 50, 60, 90])), folder / "codebook", {})

    assert "go from 0 to 90, not through codes 0 to 96" in set_up(parts, run_init, capsys, break_it)


def test_language_model_of_another_build_is_refused(parts, run_init, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    def break_it(folder):
        tiny = GPT2Config(vocab_size=768, n_embd=32, n_layer=1, n_head=2, n_positions=64)
        for file in folder.glob("llm/*.safetensors*"):
            file.unlink()
        GPT2LMHeadModel(tiny).save_pretrained(folder / "llm")

    assert "is a gpt2 model, whose weights begin with 'transformer'" in set_up(parts, run_init, capsys, break_it)


def test_a_whole_checkpoint_is_no_language_model(parts, run_init, capsys, tiny_checkpoint):
    def break_it(folder):
        for file in folder.glob("llm/*"):
            file.unlink()
        for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(tiny_checkpoint) / file, folder / "llm")

    message = set_up(parts, run_init, capsys, break_it)
    assert "llm is a unicode2 model; --llm must be a causal language model." in message


def test_nothing_of_a_part_is_overwritten(parts, run_init, capsys):
    folder, make_llm, _ = parts
    make_llm(True)
    before = {file.name: file.read_bytes() for file in (folder / "llm").iterdir()}
    with pytest.raises(SystemExit, match="2"):
        run_init(folder, "--output", str(folder / "llm"))
    assert "holds a part of the model" in capsys.readouterr().err
    assert before == {file.name: file.read_bytes() for file in (folder / "llm").iterdir()}
