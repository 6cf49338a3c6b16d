"""Makes the stand-in for Qwen2.5: a byte-level BPE tokenizer learnt from the texts, and an untrained small Qwen2.

    python training_recipes/unicode2-tiny/stand_ins/make_llm.py \\
      --config training_recipes/unicode2-tiny/stand_ins/llm.yaml

The tokenizer keeps Qwen2.5's special tokens, so the same processor and chat template serve both.
"""

import argparse
import json
from pathlib import Path

import yaml

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]


def main(args: argparse.Namespace) -> None:
    from transformers_unicode2.files import whole_folder
    from transformers_unicode2.record import Record, hash_file
    from transformers_unicode2.tokens import find_tables

    recipe = yaml.safe_load(Path(args.config).read_text())
    output = recipe.pop("output")
    data = {file.name: hash_file(file) for file in find_tables(recipe["data"], "train", "`data`")}
    with Record(output, {"command": "make_llm", **recipe, "data": data}).making() as finished:
        if not finished:
            with whole_folder(output) as folder:
                tokenizer = make_tokenizer(recipe["data"], recipe["vocab_size"])
                tokenizer.save_pretrained(folder)
                make_model(recipe, tokenizer).save_pretrained(folder)
    print(f"{output} is finished")


def make_tokenizer(data: str, vocab_size: int):
    """A `Qwen2Tokenizer` learnt from the texts of the data."""
    from datasets import load_dataset
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    rows = load_dataset("parquet", data_files=f"{data}/train-*.parquet", split="train").remove_columns("image")
    texts = (
        text for row in rows for text in [row["caption"], row["dense_caption"], *row["questions"], *row["answers"]]
    )
    base = Qwen2Tokenizer(vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])
    trained = base.train_new_from_iterator(texts, vocab_size=vocab_size - len(SPECIAL_TOKENS))
    bpe = json.loads(trained.backend_tokenizer.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(t for t in bpe["vocab"] if t not in SPECIAL_TOKENS)},
        merges=[tuple(pair) for pair in bpe["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS,
        padding_side="left",
        model_max_length=4096,
    )
    if len(tokenizer) > vocab_size:
        raise ValueError(f"The tokenizer has {len(tokenizer)} tokens, more than the `vocab_size` of {vocab_size}.")
    return tokenizer


def make_model(recipe: dict, tokenizer):
    """An untrained `Qwen2ForCausalLM`."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(recipe["seed"])
    config = Qwen2Config(
        vocab_size=recipe["vocab_size"],
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **recipe["model"],
    )
    return Qwen2ForCausalLM(config)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", required=True)
    main(parser.parse_args())
