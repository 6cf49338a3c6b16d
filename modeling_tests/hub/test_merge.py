"""What an adapter and its checkpoint make together is a whole checkpoint of equal logits, and refused with another."""

import argparse
import json

import pytest
import torch

from transformers_unicode2 import UniCode2ForConditionalGeneration, UniCode2Processor
from transformers_unicode2.adapters import is_adapter, note_base
from transformers_unicode2.checkpoints import load_model
from transformers_unicode2.hub.merge import main, merge_adapter
from transformers_unicode2.record import hash_source
from transformers_unicode2.training.parameters import make_lora_config

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 768, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
FAMILIES = {
    "tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "untied": {"model_type": "llama", "tie_word_embeddings": False},
    "fused": {"model_type": "phi3", "tie_word_embeddings": False},
}
MODULES = ["visual_embeddings", "projector", "language_model", "lm_head", "visual_head"]


@pytest.fixture(params=FAMILIES)
def adapter(request, make_config, tiny_checkpoint, tmp_path):
    """Folder of a random adapter, beside its checkpoint `base` in bfloat16."""
    from peft import get_peft_model

    torch.manual_seed(0)
    config = make_config(text_config={**SIZES, **FAMILIES[request.param]})
    UniCode2ForConditionalGeneration(config).bfloat16().save_pretrained(tmp_path / "base")
    UniCode2Processor.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "base")
    base = UniCode2ForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = get_peft_model(base, make_lora_config(base, {"r": 4, "init_lora_weights": False}, MODULES))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    base.config.caption_prompt = "what is it?"
    digest = hash_source(str(tmp_path / "base"))
    note_base(tmp_path / "adapter", str(tmp_path / "base"), digest, base.config, base.generation_config)
    return tmp_path / "adapter"


def test_a_merged_adapter_is_a_whole_checkpoint_of_equal_logits(adapter, tmp_path):
    main(argparse.Namespace(adapter=str(adapter), base=None, output=str(tmp_path / "merged")))
    assert is_adapter(str(adapter)) and not is_adapter(str(tmp_path / "merged"))
    merged, _ = load_model(str(tmp_path / "merged"))
    assert merged.model.language_model.dtype == torch.bfloat16 and merged.config.caption_prompt == "what is it?"
    base = UniCode2ForConditionalGeneration.from_pretrained(tmp_path / "base")
    assert merged.state_dict().keys() == base.state_dict().keys()
    # In float32 the two ways of adding differ by rounding alone
    again = tmp_path / "again"
    base.float().save_pretrained(tmp_path / "float")
    UniCode2Processor.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "float")
    (adapter / "base_checkpoint.json").unlink()
    merge_adapter(str(adapter), str(again), base=str(tmp_path / "float"))
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(base, adapter).eval()
    whole = UniCode2ForConditionalGeneration.from_pretrained(again).eval()
    ids = torch.tensor([[20, 11, *range(768, 784), 12, 30, 31]])
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, adapted(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        with adapted.disable_adapter():
            assert not torch.allclose(whole(ids).logits, adapted(input_ids=ids).logits, atol=0.1)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(whole.generate(ids, **options), adapted.generate(input_ids=ids, **options))


def test_another_checkpoint_is_refused_and_nothing_is_written(adapter, tmp_path):
    other = UniCode2ForConditionalGeneration.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        other.model.projector.linear_1.bias += 1
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="was trained on another checkpoint"):
        merge_adapter(str(adapter), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()
    with pytest.raises(ValueError, match="is no adapter; it has no adapter_config.json"):
        merge_adapter(str(tmp_path / "base"), str(tmp_path / "merged"))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "no_where"}))
    with pytest.raises(ValueError, match="is an adapter of no_where"):
        merge_adapter(str(adapter), str(tmp_path / "merged"))


def save_adapter(folder, base, config):
    """Writes an adapter of random weights. Returns the adapted model."""
    from peft import get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(UniCode2ForConditionalGeneration.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return adapted.eval()


def copy_base(folder, adapter) -> str:
    """The checkpoint beside an adapter in float32."""
    UniCode2ForConditionalGeneration.from_pretrained(adapter.parent / "base").float().save_pretrained(folder)
    UniCode2Processor.from_pretrained(adapter.parent / "base").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("adapter", ["tied"], indirect=True)
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head", r".*language_model\.embed_tokens"])
def test_an_adapter_on_one_of_two_tied_modules_is_refused(adapter, tmp_path, module):
    from peft import LoraConfig

    target = module if "*" in module else ["q_proj", module]
    save_adapter(tmp_path / "new", tmp_path / "base", LoraConfig(target_modules=target, r=2))
    with pytest.raises(ValueError, match="which shares its weight with another module, so it cannot be merged"):
        merge_adapter(str(tmp_path / "new"), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("adapter", ["tied"], indirect=True)
@pytest.mark.parametrize(
    "kind",
    ["embedding of its own", "parts", "dora", "tokens", "tokens alone", "ia3", "vera", "norms", "bias"],
)
def test_adapters_of_all_kinds_merge_to_equal_logits(adapter, tmp_path, kind):
    import peft

    query = {"target_modules": ["q_proj", "v_proj"], "r": 2}
    config = {
        "embedding of its own": lambda: peft.LoraConfig(
            **query, modules_to_save=["embed_tokens"], ensure_weight_tying=True
        ),
        "parts": lambda: peft.LoraConfig(**query, modules_to_save=["projector", "visual_embeddings", "visual_head"]),
        "dora": lambda: peft.LoraConfig(**query, use_dora=True),
        "tokens": lambda: peft.LoraConfig(**query, trainable_token_indices=[20, 21]),
        "tokens alone": lambda: peft.TrainableTokensConfig(token_indices=[20, 21]),
        "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "vera": lambda: peft.VeraConfig(target_modules=["q_proj"], r=2),
        "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
        "bias": lambda: peft.LoraConfig(**query, bias="lora_only"),
    }[kind]()
    base = copy_base(tmp_path / "float", adapter)
    adapted = save_adapter(tmp_path / "new", base, config)
    merge_adapter(str(tmp_path / "new"), str(tmp_path / "merged"))
    merged = UniCode2ForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    ids = torch.tensor([[20, 11, *range(768, 784), 12, 30, 31]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapter", ["tied"], indirect=True)
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_prompts_are_not_merged(adapter, tmp_path, kind):
    import peft

    make = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
    config = make(
        task_type="CAUSAL_LM",
        num_virtual_tokens=3,
        **({"num_layers": 2, "token_dim": 32, "num_attention_heads": 2} if kind == "prefix" else {}),
    )
    config.base_model_name_or_path = str(tmp_path / "base")
    config.save_pretrained(tmp_path / "new")
    (tmp_path / "new" / "adapter_model.bin").touch()
    with pytest.raises(ValueError, match="learnt prompts .*, which are no part of the weights; load it with PEFT"):
        merge_adapter(str(tmp_path / "new"), str(tmp_path / "merged"))


@pytest.mark.parametrize("adapter", ["untied"], indirect=True)
def test_an_adapter_of_another_model_or_with_fewer_weights_is_refused(adapter, tmp_path):
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    language_model = LlamaForCausalLM(LlamaConfig(**SIZES))
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(language_model, config).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="has 4 weights for which .*base has no place.*It is an adapter of another"):
        merge_adapter(str(tmp_path / "text"), str(tmp_path / "merged"), base=str(tmp_path / "base"))
    state = load_file(adapter / "adapter_model.safetensors")
    for part, message in (("lora_B", "lacks 14 weights, which would be random"), ("projector", "lacks .*projector")):
        kept = {name: value for name, value in state.items() if part not in name}
        save_file(kept, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            merge_adapter(str(adapter), str(tmp_path / "merged"))
    other = {name: value[..., :-1].contiguous() if "lora_A" in name else value for name, value in state.items()}
    save_file(other, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not fit .*size mismatch"):
        merge_adapter(str(adapter), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("adapter", ["untied"], indirect=True)
def test_files_of_an_adapter_that_are_damaged_are_named(adapter, tmp_path):
    file = adapter / "adapter_config.json"
    settings = json.loads(file.read_text())

    def refuse(message):
        with pytest.raises(ValueError, match=message):
            merge_adapter(str(adapter), str(tmp_path / "merged"))

    for changed in ({**settings, "base_model_name_or_path": None}, {"peft_type": "LORA"}):
        file.write_text(json.dumps(changed))
        refuse("names no `base_model_name_or_path`; say with `--base` which checkpoint it is for")
    file.write_text("{")
    refuse("adapter_config.json is damaged")
    file.write_text(json.dumps({**settings, "peft_type": "NOPE"}))
    refuse("PEFT cannot read the adapter_config.json of .*NOPE")
    file.write_text(json.dumps(settings))
    (adapter / "adapter_model.safetensors").write_bytes(b"123")
    refuse("adapter_model.safetensors is damaged")
    (adapter / "adapter_model.safetensors").unlink()
    refuse("lacks adapter_model.safetensors")
