"""What is missing, damaged, rounded or of another codebook is one sentence in every loader."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from transformers_unicode2 import (
    UniCode2ForConditionalGeneration,
    UniCode2Model,
    UniCode2Quantizer,
    UniCode2QuantizerConfig,
)
from transformers_unicode2.codebook.grow import grow_checkpoint
from transformers_unicode2.codebook.storage import codebook_from_arrays, load_codebook, save_codebook
from transformers_unicode2.encoders_unicode2 import check_encoder_keys
from transformers_unicode2.loading_unicode2 import find_digests

WHOLE = (UniCode2ForConditionalGeneration, UniCode2Model, AutoModel, AutoModelForImageTextToText)
ALL = (*WHOLE, UniCode2Quantizer)
ENCODER, CODEBOOK = "model.quantizer.vision_model.", "model.quantizer.codebook."


@pytest.fixture
def change(model, tmp_path):
    """Saves a checkpoint, changes its weights and its configuration, and gives back its folder."""

    def run(weights=None, config=None):
        model.save_pretrained(tmp_path)
        state, settings = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
        if weights:
            weights(state)
        if config:
            config(settings)
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(settings))
        return tmp_path

    return run


def forget_digests(settings):
    for name in [name for name in settings["codebook_config"] if name.endswith("_sha256")]:
        settings["codebook_config"].pop(name)


def add_layer(state):
    state |= {
        n.replace("layers.1", "layers.2"): v.clone() for n, v in state.items() if f"{ENCODER}encoder.layers.1" in n
    }


DAMAGED = {
    "go from 0 to 90, not through codes 0 to 96": lambda state: state[CODEBOOK + "cell_offsets"][-1].fill_(90),
    "go from -1 to 96": lambda state: state[CODEBOOK + "cell_offsets"][0].fill_(-1),
    "1 of 4 cells of .* end before they begin, the first is 1": lambda state: state[CODEBOOK + "cell_offsets"][2].fill_(
        5
    ),
    "2 of 96 codes of .* are not finite; the first is number 7": lambda state: state[CODEBOOK + "codes"][7:9].fill_(
        torch.nan
    ),
    "1 of 4 cell centroids of .* are not finite; the first is number 2": lambda state: state[
        CODEBOOK + "cell_centroids"
    ][2, 0].fill_(torch.inf),
    "1 weights are missing, which would be random; the first is .*vision_model.embeddings.patch_embedding.bias": (
        lambda state: state.pop(ENCODER + "embeddings.patch_embedding.bias")
    ),
    "1 weights are missing.* the first is .*codebook.cell_centroids": lambda state: state.pop(
        CODEBOOK + "cell_centroids"
    ),
    "16 weights of the frozen quantizer that its configuration has no place for; the first is .*layers.2": add_layer,
    "no codebook: .*codebook.codes": lambda state: state.pop(CODEBOOK + "codes"),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_a_damaged_quantizer_is_one_sentence_in_every_loader(change, message):
    folder = change(DAMAGED[message], forget_digests)
    for loader in ALL:
        with pytest.raises(ValueError, match=message):
            loader.from_pretrained(folder)


@pytest.mark.parametrize("name", ["visual_embeddings.weight", "projector.linear_1", "language_model.layers.1.mlp"])
def test_what_would_be_random_is_refused_where_it_is_used(change, name):
    folder = change(lambda state: state.pop(next(key for key in state if name in key)))
    for loader in WHOLE:
        with pytest.raises(ValueError, match=f"1 weights are missing, which would be random; the first is .*{name}"):
            loader.from_pretrained(folder)
    UniCode2Quantizer.from_pretrained(folder)
    _, info = UniCode2Model.from_pretrained(folder, output_loading_info=True)
    assert len(info["missing_keys"]) == 1


def test_a_tied_head_is_not_missing_and_a_base_model_has_no_heads(make_config, tmp_path):
    text = {**make_config().text_config.to_dict(), "tie_word_embeddings": True}
    UniCode2ForConditionalGeneration(make_config(text_config=text)).save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    UniCode2ForConditionalGeneration.from_pretrained(tmp_path / "tied")
    UniCode2Model.from_pretrained(tmp_path / "tied").save_pretrained(tmp_path / "base")
    UniCode2Model.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="2 weights are missing.* the first is visual_head.linear.bias"):
        UniCode2ForConditionalGeneration.from_pretrained(tmp_path / "base")


def test_no_option_ignores_another_size_of_the_quantizer(model, tmp_path):
    model.save_pretrained(tmp_path)
    for name, value in (("codebook_size", 48), ("num_cells", 3)):
        for loader, config_class in ((UniCode2Model, AutoConfig), (UniCode2Quantizer, UniCode2QuantizerConfig)):
            config = config_class.from_pretrained(tmp_path)
            setattr(config.codebook_config, name, value)
            with pytest.raises(
                ValueError, match="of the frozen quantizer in .* have another size.* no option may ignore"
            ):
                loader.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
    config = AutoConfig.from_pretrained(tmp_path)
    config.text_config.vocab_size = 800
    UniCode2Model.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)


def test_a_two_level_head_has_the_cells_of_the_codebook(make_config, tmp_path):
    model = UniCode2ForConditionalGeneration(make_config(visual_head="two_level"))
    model.visual_head.cell_offsets[1] += 1
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="1 of 5 cell offsets of the visual head of .* are not the codebook's"):
        UniCode2ForConditionalGeneration.from_pretrained(tmp_path)
    UniCode2Model.from_pretrained(tmp_path)


FLIPPED = {
    "codes": CODEBOOK + "codes",
    "cells": CODEBOOK + "cell_centroids",
    "weights of the encoder": ENCODER + "encoder.layers.0.mlp.fc1.weight",
    "thumbnails": CODEBOOK + "previews",
}


@pytest.mark.parametrize("part", FLIPPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_flipped_bit_is_noticed_however_it_is_stored(change, part, dtype):
    def flip(state):
        rounded = state[FLIPPED[part]] if part == "thumbnails" else state[FLIPPED[part]].to(dtype)
        rounded.view(torch.uint8 if part == "thumbnails" else torch.int16)[3, 1] ^= 1
        state[FLIPPED[part]] = rounded

    folder = change(flip)
    for loader in ALL:
        with pytest.raises(ValueError, match=f"The {part} in .* are not those that its configuration names"):
            loader.from_pretrained(folder)


@pytest.mark.parametrize("part", ["cell_offsets", "vision_model"])
def test_rounding_all_tensors_of_a_file_is_noticed(change, part):
    def round_all(state):
        state |= {name: value.bfloat16() for name, value in state.items() if part in name}

    folder = change(round_all)
    if part == "cell_offsets":  # 20, 50, 60 and 96 are the same in bfloat16
        UniCode2Quantizer.from_pretrained(folder)
    else:
        with pytest.raises(ValueError, match="weights of the encoder in .* damaged, rounded or others"):
            UniCode2Quantizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "settings", [{"layer_norm_eps": 0.1}, {"hidden_act": "relu"}, {"num_attention_heads": 4}, {"hidden_act": "gelu"}]
)
def test_an_encoder_that_computes_something_else_is_noticed(change, settings):
    folder = change(config=lambda config: config["vision_config"].update(settings))
    for loader in ALL:
        with pytest.raises(ValueError, match="The `vision_config` of .* is not that which its codebook was saved with"):
            loader.from_pretrained(folder)


def test_settings_that_no_feature_depends_on_are_free(change):
    others = {"dtype": "float16", "attention_dropout": 0.5, "transformers_version": "5.20.0", "initializer_range": 1.0}
    others |= {"output_hidden_states": True, "_attn_implementation": "eager", "architectures": ["SiglipModel"]}

    def write_otherwise(config):
        config["vision_config"].update(others)
        for usual in ("layer_norm_eps", "num_channels", "chunk_size_feed_forward"):
            config["vision_config"].pop(usual, None)

    for loader in ALL:
        loader.from_pretrained(change(config=write_otherwise))


def cut(file, share):
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", ""),
        ("config.json", "[]"),
        ("config.json", '{"model_type": '),
        ("model.safetensors.index.json", ""),
        ("model.safetensors.index.json", "{}"),
        ("model.safetensors", ""),
        ("model.safetensors", 0.5),
        ("model-00002-of-00005.safetensors", 0.99),
    ],
)
def test_a_file_that_cannot_be_read_is_named_by_every_loader(model, tmp_path, name, content):
    model.save_pretrained(tmp_path, max_shard_size="1GB" if name == "model.safetensors" else "100KB")
    if isinstance(content, float):
        cut(tmp_path / name, content)
    else:
        (tmp_path / name).write_text(content)
    for loader in (UniCode2ForConditionalGeneration, UniCode2Model, UniCode2Quantizer):
        with pytest.raises(ValueError, match=f"{tmp_path / name} is damaged") as caught:
            loader.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_checkpoint_without_one_of_its_parts_says_so(change):
    folder = change(config=lambda config: config.pop("codebook_config"))
    with pytest.raises(ValueError, match="config.json of .* lacks `codebook_config`"):
        UniCode2Quantizer.from_pretrained(folder)


def test_weights_of_another_size_are_named_with_both_sizes(change):
    folder = change(config=lambda config: config["codebook_config"].update(codebook_size=48))
    for loader in ALL:
        with pytest.raises(ValueError, match=r"codebook.codes, \(96, 16\) there and \(48, 16\) in the configuration"):
            loader.from_pretrained(folder)
    folder = change(config=lambda config: config["text_config"].update(vocab_size=800))
    for loader in WHOLE:
        with pytest.raises(ValueError, match=r"weight, \(768, 32\) there and \(800, 32\)"):
            loader.from_pretrained(folder)
        with pytest.raises(ValueError, match="another size"):
            loader.from_pretrained(folder, output_loading_info=True)
    UniCode2Quantizer.from_pretrained(folder)


def test_digests_are_of_what_is_saved(model, tmp_path):
    codes = model.get_quantizer().codebook.codes
    model.save_pretrained(tmp_path / "before")
    before = UniCode2Model.from_pretrained(tmp_path / "before")
    codes[3] = codes[3] + 1
    model.save_pretrained(tmp_path / "changed")
    assert torch.equal(UniCode2Quantizer.from_pretrained(tmp_path / "changed").codebook.codes, codes)
    model.get_quantizer().save_pretrained(tmp_path / "quantizer")
    assert torch.equal(UniCode2Quantizer.from_pretrained(tmp_path / "quantizer").codebook.codes, codes)
    state = {f"model.{name}": value for name, value in before.state_dict().items()}
    rounded = {name: v.bfloat16() if name.endswith("codebook.codes") else v for name, v in state.items()}
    model.save_pretrained(tmp_path / "state", state_dict={**model.state_dict(), **rounded})
    again = UniCode2Quantizer.from_pretrained(tmp_path / "state")
    assert torch.equal(again.codebook.codes, before.get_quantizer().codebook.codes)
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="20KB")
    for loader in ALL:
        loader.from_pretrained(sharded)
    config = json.loads((tmp_path / "before" / "config.json").read_text())
    assert config["codebook_config"]["codes_sha256"] == find_digests(before.state_dict())["codes_sha256"]
    (sharded / "config.json").write_text(json.dumps(config))
    for loader in ALL:
        with pytest.raises(ValueError, match="The codes in .* are not those"):
            loader.from_pretrained(sharded)


def test_checkpoints_without_digests_load(change):
    folder = change(config=forget_digests)
    for loader in ALL:
        loader.from_pretrained(folder)


@pytest.mark.parametrize(
    "setting, value, message",
    [
        ("codebook_size", "96", "`codebook_size` of the codebook is '96'; it must be a whole number from 1"),
        ("codebook_dim", 16.0, "`codebook_dim` of the codebook is 16.0"),
        ("num_cells", -4, "`num_cells` of the codebook is -4"),
        ("codebook_size", 10**12, "whole number from 1 to 2147483647"),
        ("probe_recall", [0.5], "it must map numbers of cells to shares"),
        ("probe_recall", {"1": 1.5}, r"has 1.5 for '1' cells; it must map numbers of cells to shares in \[0, 1\]"),
        ("probe_recall", {"half": 0.5}, "has 0.5 for 'half' cells"),
        ("codes_sha256", 5, "`codes_sha256` of the codebook is 5; it must be 64 hexadecimal digits"),
    ],
)
def test_odd_settings_of_a_codebook_are_refused(change, codebook_folder, setting, value, message):
    folder = change(config=lambda settings: settings["codebook_config"].update({setting: value}))
    for loader in ALL:
        with pytest.raises(ValueError, match=message):
            loader.from_pretrained(folder)
    edit_json(codebook_folder, lambda description: description["config"].update({setting: value}))
    with pytest.raises(ValueError, match=f"codebook.json is damaged: .*{message}"):
        load_codebook(codebook_folder)


@pytest.fixture
def codebook_folder(tmp_path):
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(96, 16)).astype(np.float32), rng.normal(size=(4, 16)).astype(np.float32)
    previews = rng.integers(0, 256, (96, 4, 4, 3), dtype=np.uint8)
    provenance = {"command": {"encoder_sha256": "0" * 64}}
    save_codebook(codebook_from_arrays(*arrays, np.array([0, 20, 50, 60, 96]), previews), tmp_path / "c", provenance)
    return tmp_path / "c"


def edit_json(folder, edit):
    description = json.loads((folder / "codebook.json").read_text())
    description = edit(description) or description
    (folder / "codebook.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda d: [d], "it has no config"),
        (lambda d: d.update(config=["codes"]), "it has no config"),
        (lambda d: d["config"].pop("num_cells") and None, "its config lacks num_cells"),
        (lambda d: d["config"].update(colour=3), "its config has 'colour', which is not known here"),
        (lambda d: d["config"].update(num_cells=97), "`num_cells` is 97, more than the `codebook_size` of 96"),
        (
            lambda d: d["config"].update(codebook_size=2**31 - 1),
            r"F32 \(96, 16\); codebook.json makes it F32 \(2147483647",
        ),
        (lambda d: d["config"].update(preview_size=0), "also holds previews, which contradicts codebook.json"),
        (lambda d: d["config"].update(codes_sha256="1" * 64), "The codes in .* are not those"),
    ],
)
def test_an_odd_description_of_a_codebook_is_refused(codebook_folder, edit, message):
    assert load_codebook(codebook_folder).encoder_sha256 == "0" * 64
    edit_json(codebook_folder, edit)
    with pytest.raises(ValueError, match=message):
        load_codebook(codebook_folder)


@pytest.mark.parametrize(
    "change_tensors, message",
    [
        (lambda t: t["codes"][5].fill_(torch.nan), "1 of 96 codes of .* are not finite; the first is number 5"),
        (lambda t: t["codes"].view(torch.int32)[5].bitwise_xor_(1), "The codes in .* are not those"),
        (lambda t: t["cell_offsets"][1].add_(1), "The cells in .* are not those"),
        (lambda t: t["cell_offsets"].neg_(), "go from 0 to -96"),
        (lambda t: t.update(cell_offsets=t["cell_offsets"].float()), r"is F32 \(5,\); codebook.json makes it I64"),
        (lambda t: t.update(codes=t["codes"].double()), r"is F64 \(96, 16\); codebook.json makes it F32"),
        (lambda t: t.pop("cell_centroids"), "lacks cell_centroids"),
    ],
)
def test_odd_tensors_of_a_codebook_are_refused(codebook_folder, change_tensors, message):
    tensors = load_file(codebook_folder / "codebook.safetensors")
    change_tensors(tensors)
    save_file(tensors, codebook_folder / "codebook.safetensors")
    with pytest.raises(ValueError, match=message):
        load_codebook(codebook_folder)


def test_a_codebook_that_is_stored_in_bfloat16_has_the_same_digest(codebook_folder):
    codebook = load_codebook(codebook_folder)
    codebook.codes.copy_(codebook.codes.bfloat16())
    save_codebook(codebook, codebook_folder, {})
    tensors = load_file(codebook_folder / "codebook.safetensors")
    save_file({**tensors, "codes": tensors["codes"].bfloat16()}, codebook_folder / "codebook.safetensors")
    again = load_codebook(codebook_folder)
    assert again.codes.dtype == torch.float32 and torch.equal(again.codes, codebook.codes)
    assert again.describe()["codes_sha256"] == codebook.describe()["codes_sha256"]


def test_an_encoder_by_itself_is_whole_and_has_no_more_layers_than_its_configuration():
    surplus = {"text_model.encoder.layers.0.a", "head.probe", "logit_scale"}  # of what is not loaded
    usual = {"missing_keys": set(), "mismatched_keys": set(), "unexpected_keys": surplus}
    check_encoder_keys(usual, "siglip")
    with pytest.raises(ValueError, match="The encoder siglip lacks 1 weights, which would be random; the first is b"):
        check_encoder_keys({**usual, "missing_keys": {"b"}}, "siglip")
    with pytest.raises(ValueError, match="siglip holds 1 weights .*no place for; the first is encoder.layers.3.a"):
        check_encoder_keys({**usual, "unexpected_keys": {*surplus, "encoder.layers.3.a"}}, "siglip")


def test_a_grown_checkpoint_has_new_digests_and_the_code_that_travels(model, codebook_folder, tmp_path):
    before = load_codebook(codebook_folder)
    model.get_quantizer().codebook.load_state_dict(before.state_dict())
    model.save_pretrained(tmp_path / "model")
    for file in (tmp_path / "model").glob("*.py"):
        file.unlink()
    offsets = torch.cat([before.cell_offsets, torch.tensor([98])])
    arrays = (
        torch.cat([x, x[:extra] + 1])
        for x, extra in ((before.codes, 2), (before.cell_centroids, 1), (before.previews, 2))
    )
    codes, centroids, previews = arrays
    after = codebook_from_arrays(codes, centroids, offsets, previews)
    (tmp_path / "grown").mkdir()
    grow_checkpoint(str(tmp_path / "model"), tmp_path / "grown", before, after, np.array([0, 1]))
    grown = UniCode2ForConditionalGeneration.from_pretrained(tmp_path / "grown")
    settings = grown.config.codebook_config
    assert settings.codes_sha256 == after.describe()["codes_sha256"] != before.describe()["codes_sha256"]
    assert settings.encoder_sha256 == "0" * 64 and (tmp_path / "grown" / "loading_unicode2.py").is_file()


def test_a_quantizer_is_read_from_the_single_file_beside_an_old_index(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.get_quantizer().codebook.codes.mul_(2)
    model.save_pretrained(tmp_path / "old", max_shard_size="20KB")
    for file in (tmp_path / "old").glob("model*"):
        shutil.copy(file, tmp_path / "model")
    quantizer = UniCode2Quantizer.from_pretrained(tmp_path / "model")
    assert torch.equal(2 * quantizer.codebook.codes, model.get_quantizer().codebook.codes)
