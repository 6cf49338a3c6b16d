"""What `train_modules` name learns, and nothing else; what would not learn is refused."""

import re

import pytest
import torch
from torch import nn

from transformers_unicode2 import UniCode2ForConditionalGeneration
from transformers_unicode2.training.parameters import adapt, find_learning, freeze_all_but, make_lora_config


def make(make_config, tied: bool) -> UniCode2ForConditionalGeneration:
    text = {**make_config().text_config.to_dict(), "tie_word_embeddings": tied}
    return UniCode2ForConditionalGeneration(make_config(text_config=text))


@pytest.fixture
def tied(make_config):
    return make(make_config, True)


@pytest.fixture
def untied(make_config):
    return make(make_config, False)


@pytest.mark.parametrize(
    "modules, message",
    [
        (["encoder2"], "No parameter of the model lies in `encoder2`"),
        ([], "`train_modules` is empty"),
        (["lm_head"], "Nothing in `lm_head` would learn"),
        (["projector", "quantizer"], "Nothing in `quantizer` would learn"),
    ],
)
def test_modules_in_which_nothing_would_learn_are_refused(tied, modules, message):
    with pytest.raises(ValueError, match=message):
        freeze_all_but(tied, modules)


def test_a_tied_head_learns_with_the_embedding(tied, untied):
    freeze_all_but(tied, ["language_model.embed_tokens", "lm_head"])
    assert find_learning(tied, ["lm_head", "projector"]) == ["lm_head"]
    freeze_all_but(untied, ["lm_head"])
    assert [name for name, p in untied.named_parameters() if p.requires_grad] == ["lm_head.weight"]


def list_learning(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    "modules, layers, whole",
    [
        (["language_model", "lm_head"], ["layers"], []),
        (["language_model.layers", "projector"], ["layers"], ["projector"]),
        (["language_model.layers.1"], ["layers.1"], []),
        (["language_model.layers.0.mlp", "language_model.layers.1.self_attn.q_proj"], None, []),
        (["language_model.layers", "language_model.norm"], ["layers"], ["norm"]),
        (["language_model.layers", "language_model.embed_tokens"], ["layers"], ["embed_tokens"]),
    ],
)
def test_adapters_are_on_the_layers_that_are_named_and_the_rest_learns_whole(untied, modules, layers, whole):
    adapted = adapt(untied, {"r": 2}, modules)
    names = list_learning(adapted)
    on = {name for name in names if "lora_" in name}
    rest = names - on
    assert on and {part for part in whole if any(f"{part}.modules_to_save" in name for name in rest)} == set(whole)
    assert bool(rest) == bool(whole) and all("modules_to_save" in name for name in rest)
    if layers is None:
        assert all(".layers.0.mlp." in name or ".layers.1.self_attn.q_proj." in name for name in on)
        assert any(".layers.0.mlp." in name for name in on) and any("q_proj" in name for name in on)
    else:
        assert all(f".{layers[0]}." in name for name in on) and any("q_proj" in name for name in on)
        assert any("down_proj" in name for name in on)


def test_an_embedding_that_learns_beside_adapters_is_used_and_saved(untied, tmp_path):
    from peft import PeftModel

    ids = torch.arange(20, 40)[None]
    untied.eval()
    state = {name: value.clone() for name, value in untied.state_dict().items()}
    adapted = adapt(untied, {"r": 2}, ["language_model.layers", "language_model.embed_tokens"]).eval()
    before = adapted(ids).logits
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "embed_tokens.modules_to_save" in name:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        after = adapted(ids).logits
        adapted.save_pretrained(tmp_path)
        fresh = type(untied)(untied.config)
        fresh.load_state_dict(state)
        loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
        assert not torch.allclose(before, after) and torch.equal(loaded(ids).logits, after)


@pytest.mark.parametrize(
    "lora, modules, message",
    [
        (8, ["language_model"], "`lora` is 8; it needs fields of LoraConfig"),
        ({"foo": 1}, ["language_model"], r"`lora` is {'foo': 1}, which PEFT does not take: .*foo"),
        ({"r": "8"}, ["language_model"], r"`lora` is {'r': '8'}, which PEFT does not take: "),
        ({"r": 8}, ["language_model.norm"], "whose layers are not among `train_modules`: language_model.norm"),
        (
            {"r": 8},
            ["language_model", "language_model.embed_tokens"],
            "`language_model.embed_tokens` is tied to the text",
        ),
        ({"r": 8}, ["language_model", "quantizer"], "`modules_to_save` names quantizer"),
        ({"r": 8, "modules_to_save": []}, ["language_model", "projector"], "Nothing in `projector` would learn"),
        ({"r": 8}, [], "`train_modules` is empty"),
    ],
)
def test_adapters_that_would_not_learn_what_is_named_are_refused(tied, lora, modules, message):
    with pytest.raises(ValueError, match=message):
        adapt(tied, lora, modules)


def test_the_default_adapters_are_on_all_linear_layers(tied):
    config = make_lora_config(tied, {"r": 4}, ["projector", "language_model", "lm_head"])
    assert config.modules_to_save == ["projector"]
    layers = [n for n, module in tied.named_modules() if isinstance(module, nn.Linear) and ".layers." in n]
    texts = {name for name in layers if "language_model" in name}
    assert texts and {name for name in layers if re.fullmatch(config.target_modules, name)} == texts
    # Whatever a family calls them
    tied.model.language_model.layers[0].mlp.c_fc = nn.Linear(2, 2)
    config = make_lora_config(tied, {"r": 4}, ["language_model.layers.0"])
    assert re.fullmatch(config.target_modules, "model.language_model.layers.0.mlp.c_fc")
    assert not re.fullmatch(config.target_modules, "model.language_model.layers.1.mlp.c_fc")


@pytest.mark.parametrize(
    "lora, message",
    [
        ({"r": 4, "lora_bias": True}, "`lora_bias` gives .* a bias, which cannot be merged since the layer has none"),
        (
            {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
            "`lora` adapts the text embedding, which is tied",
        ),
    ],
)
def test_adapters_that_could_not_be_merged_are_refused(tied, lora, message):
    with pytest.raises(ValueError, match=message):
        adapt(tied, lora, ["language_model"])
