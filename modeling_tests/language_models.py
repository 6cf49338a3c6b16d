"""Small language models of many families, with tokenizers of two kinds and chat templates in their styles."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# With the tokens that each needs.
TEMPLATES = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "thinking": (
        "{% for m in messages %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ said + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
    ),
    "llama3": (
        "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
        " + m['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set text = bos_token + text %}{% endif %}"
        "{{ text }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "mistral": (
        "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
        "{%- set messages = messages[1:] %}{%- endif %}{{- bos_token }}{%- for m in messages %}"
        "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('Roles must alternate.') }}"
        "{%- endif %}{%- if m['role'] == 'user' %}{{- '[INST] ' }}{%- if loop.last and system is defined %}"
        "{{- system + '\n\n' }}{%- endif %}{{- m['content'] + '[/INST]' }}"
        "{%- else %}{{- ' ' + m['content'] + eos_token }}{%- endif %}{%- endfor %}",
        ["[INST]", "[/INST]"],
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role.') }}{% endif %}"
        "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
        ["<start_of_turn>", "<end_of_turn>"],
    ),
    "phi3": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + '<|end|>\n' }}"
        "{% elif m['role'] == 'system' %}{{ '<|system|>\n' + m['content'] + '<|end|>\n' }}"
        "{% else %}{{ '<|assistant|>\n' + m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ["<|user|>", "<|system|>", "<|assistant|>", "<|end|>"],
    ),
    "zephyr": (
        "{% for m in messages %}\n{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        [],
    ),
    "olmo2": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] != 'assistant' %}"
        "{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% elif loop.last %}"
        "{{ '<|assistant|>\n' + m['content'] + eos_token }}{% else %}"
        "{{ '<|assistant|>\n' + m['content'] + eos_token + '\n' }}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
        [],
    ),
    "marked": (
        "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}{%- if m.role == 'assistant' -%}"
        "{%- generation -%}{{- m.content + '<|im_end|>' -}}{%- endgeneration -%}"
        "{%- else -%}{{- m.content + '<|im_end|>' -}}{%- endif -%}{{- '\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}",
        ["<|im_start|>", "<|im_end|>"],
    ),
}
SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Settings of a family beside its sizes, the style of its chats and the kind of its tokenizer.
FAMILIES = {
    "qwen2": ({}, "chatml", "bytes"),
    "qwen3": ({"head_dim": 16, "tie_word_embeddings": True}, "thinking", "bytes"),
    "llama": ({"pad_token_id": None}, "llama3", "bytes"),
    "smollm3": ({"no_rope_layer_interval": 2, "tie_word_embeddings": True}, "marked", "bytes"),
    "mistral": ({"sliding_window": 24}, "mistral", "words"),
    "gemma": ({"head_dim": 16}, "gemma", "words"),
    "gemma2": ({"head_dim": 16, "sliding_window": 24, "final_logit_softcapping": 2.0}, "gemma", "words"),
    "gemma3_text": ({"head_dim": 16, "sliding_window": 24, "sliding_window_pattern": 2}, "gemma", "words"),
    "phi3": ({"vocab_size": 520}, "phi3", "words"),
    "olmo2": ({}, "olmo2", "bytes"),
}


def make_tokenizer(style: str, kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters, of bytes or of a text's letters with `▁` for spaces, with a chat template."""
    template, tokens = TEMPLATES[style]
    letters = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else [chr(n) for n in range(10, 127)] + ["▁"]
    vocabulary = {token: id_ for id_, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *sorted(letters)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    if kind == "bytes":
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme="never")
        # Such tokenizers begin each text by themselves.
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=tokens
    )
    tokenizer.chat_template = template
    return tokenizer


def make_language_model(family: str, dtype: torch.dtype = torch.float32, **changes):
    """A causal language model with seeded random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family][0], **changes})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
