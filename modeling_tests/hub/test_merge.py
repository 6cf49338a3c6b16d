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
    adapted = get_peft_model(base, make_lora_config({"r": 4, "init_lora_weights": False}, MODULES))
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
