"""PEFT just works: the frozen quantizer is left out, adapters come back as they were saved, the rest is refused."""

import copy

import peft
import pytest
import torch
from adapters import needs_peft_of_transformers
from peft import LoraConfig, PeftModel, get_peft_model
from test_hub_unicode2 import WITHOUT_PACKAGE, run_python

from transformers_unicode2 import UniCode2ForConditionalGeneration

QV = ["q_proj", "v_proj"]
CONFIGS = {
    "names": LoraConfig(target_modules=QV, init_lora_weights=False),
    "all-linear": LoraConfig(target_modules="all-linear"),
    "regex": LoraConfig(target_modules=r".*\.(q_proj|v_proj)", use_rslora=True),
    "dora": LoraConfig(target_modules=QV, use_dora=True),
    "bias": LoraConfig(target_modules=QV, bias="all"),
    "layers": LoraConfig(target_modules=QV, layers_to_transform=[1]),
    "excluded": LoraConfig(target_modules=QV, exclude_modules=["layers.0.self_attn.q_proj"]),
    "excluded by regex": LoraConfig(target_modules="all-linear", exclude_modules=r".*(projector|visual_head).*"),
    "saved": LoraConfig(target_modules=QV, modules_to_save=["visual_embeddings", "projector", "visual_head"]),
    "saved in both": LoraConfig(target_modules=QV, modules_to_save=["mlp"]),  # the encoder has such, too
    "tokens": LoraConfig(target_modules=QV, trainable_token_indices=[20, 21]),
    "parameters": LoraConfig(target_modules=[], target_parameters=["q_proj.weight"]),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": peft.VeraConfig(target_modules=QV, r=4),
    "lokr": peft.LoKrConfig(target_modules=QV, r=4),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm", "layer_norm1"]),
    "tokens alone": peft.TrainableTokensConfig(token_indices=[20, 21]),
}


@pytest.fixture
def batch(prompt, pixel_values):
    labels = prompt["input_ids"].masked_fill(prompt["input_ids"] == 0, -100)
    return {**prompt, "pixel_values": pixel_values, "labels": labels}


def learn(model, batch):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(**batch).loss.backward()
        optimizer.step()
    return model.eval()


def logits(model, batch):
    with torch.no_grad():
        return model(**{name: value for name, value in batch.items() if name != "labels"}).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_leave_the_quantizer_out_and_come_back_as_saved(model, batch, tmp_path, name):
    base = copy.deepcopy(model)
    frozen = {key: value.clone() for key, value in model.get_quantizer().state_dict().items()}
    adapted = get_peft_model(model, copy.deepcopy(CONFIGS[name]))
    assert model.get_quantizer().state_dict().keys() == frozen.keys()
    expected = logits(learn(adapted, batch), batch)
    assert all(torch.equal(value, frozen[key]) for key, value in model.get_quantizer().state_dict().items())
    assert not torch.equal(expected, logits(base, batch))
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(logits(again, batch), expected)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), expected, rtol=1e-4, atol=1e-5)
    assert merged.state_dict().keys() == base.state_dict().keys()


@needs_peft_of_transformers
def test_an_adapter_of_transformers_integration_is_saved_and_loaded(model, batch, tmp_path):
    model.save_pretrained(tmp_path / "base")
    base = UniCode2ForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
    base.add_adapter(copy.deepcopy(CONFIGS["names"]))
    assert not any("lora" in name for name in base.get_quantizer().state_dict())
    expected = logits(learn(base, batch), batch)
    base.save_pretrained(tmp_path / "adapter")
    again = copy.deepcopy(model)
    again.load_adapter(tmp_path / "adapter")
    whole = UniCode2ForConditionalGeneration.from_pretrained(tmp_path / "adapter").eval()  # names its base
    for loaded in (again, whole):
        assert torch.equal(logits(loaded.eval(), batch), expected)
    again.disable_adapters()
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_second_adapters_parts_and_wrapped_models_leave_it_out_too(model):
    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=QV))
    adapted.add_adapter("second", LoraConfig(target_modules="all-linear"))
    others = [
        get_peft_model(part, LoraConfig(target_modules="all-linear"))
        for part in (Wrapper(copy.deepcopy(model)), model.model)
    ]
    for part in (adapted, *others):
        names = [name for name in part.state_dict() if "lora_" in name]
        assert names and not any("quantizer" in name for name in names)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_modules": ["visual_embeddings"]}, "`model.visual_embeddings` embeds codes and scores them"),
        ({"target_modules": r".*(embeddings|q_proj)"}, "`model.visual_embeddings` embeds codes and scores them"),
        (
            {"target_modules": QV, "trainable_token_indices": {"visual_embeddings": [1]}},
            "name it in `modules_to_save`, or leave it out",
        ),
        ({"target_modules": QV, "modules_to_save": ["quantizer"]}, "is in the frozen quantizer alone"),
        ({"target_modules": ["fc1"]}, "'fc1'.* not found"),
        ({"target_modules": QV, "trainable_token_indices": [20, 800]}, "Token 800 is to learn.*the 768 text ids can"),
        ({"target_modules": QV, "trainable_token_indices": {"embed_tokens": [768]}}, "Token 768 is to learn"),
    ],
)
def test_adapters_that_nothing_would_see_are_refused_before_any_change(model, options, message):
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, LoraConfig(**options))
    assert list(model.state_dict()) == before


def test_a_visual_id_is_no_trainable_token(model):
    with pytest.raises(ValueError, match="Token 800 is to learn by itself; only the 768 text ids can"):
        get_peft_model(model, peft.TrainableTokensConfig(token_indices=[800]))


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PromptEncoderConfig])
def test_prompts_are_learnt_in_front_of_visual_ids(model, batch, tmp_path, kind):
    base = copy.deepcopy(model)
    adapted = get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
    image_id, pixel_values = model.config.image_token_id, batch["pixel_values"]
    ids = batch["input_ids"].masked_scatter(
        batch["input_ids"] == image_id, model.get_image_tokens(pixel_values).flatten()
    )
    visual = {"input_ids": ids, "attention_mask": batch["attention_mask"], "labels": ids}
    written = {name: logits(adapted.eval(), inputs) for name, inputs in (("ids", visual), ("pixels", batch))}
    torch.testing.assert_close(written["ids"], written["pixels"])
    learn(adapted, visual)
    expected = logits(adapted, visual)
    assert not torch.equal(expected, written["ids"]) and torch.equal(logits(base, visual), logits(model, visual))
    prompt = {name: visual[name] for name in ("input_ids", "attention_mask")}
    answer = adapted.generate(**prompt, max_new_tokens=4, do_sample=False)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(logits(again, visual), expected)
    assert torch.equal(again.generate(**prompt, max_new_tokens=4, do_sample=False), answer)


def test_what_peft_would_not_save_does_not_learn(model, batch):
    adapted = get_peft_model(model, LoraConfig(target_modules=QV)).train()
    adapted(**batch)
    model.model.visual_embeddings.requires_grad_(True)
    with pytest.raises(ValueError, match="`visual_embeddings` is set to learn, but PEFT would not save it"):
        adapted(**batch)
    model.model.visual_embeddings.requires_grad_(False)
    model.get_quantizer().vision_model.requires_grad_(True)
    with pytest.raises(ValueError, match="parameters in the frozen quantizer are set to learn"):
        adapted(**batch)


def test_a_pipeline_draws_with_an_adapted_language_model(tiny_checkpoint, photo, tmp_path):
    from transformers_unicode2 import UniCode2FluxPipeline

    parts = UniCode2FluxPipeline.from_pretrained(tiny_checkpoint).components
    parts["vision_language_encoder"] = get_peft_model(parts["vision_language_encoder"], LoraConfig(target_modules=QV))
    pipe = UniCode2FluxPipeline(**parts, image_size=64)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(image=photo, num_inference_steps=1).images[0].size == (64, 64)
    with pytest.raises(ValueError, match="is a PeftModel.*; merge its adapter"):
        pipe.save_pretrained(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["peft", "model"])
def test_remote_code_leaves_the_quantizer_out(model, tmp_path, first):
    model.save_pretrained(tmp_path)
    code = """
first, folder = sys.argv[1:]
if first == "peft":
    import peft
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
assert first == "peft" or "peft" not in sys.modules
from peft import LoraConfig, get_peft_model
adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
names = [name for name in adapted.state_dict() if "lora_" in name]
assert names and not any("quantizer" in name for name in names)
"""
    run_python(WITHOUT_PACKAGE + code, first, tmp_path)
