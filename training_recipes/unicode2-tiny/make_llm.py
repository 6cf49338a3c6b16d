"""Makes the stand-in for Qwen2.5: a byte-level BPE tokenizer learnt from the captions, and an untrained small Qwen2. With --start,
both are those of a UniCode² checkpoint, which goes on learning.

    python training_recipes/unicode2-tiny/make_llm.py --config training_recipes/unicode2-tiny/llm.yaml

The tokenizer keeps Qwen2.5's special tokens, so the same processor and chat template serve both.
"""

import argparse
import json
from pathlib import Path

import yaml

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]


def main(args: argparse.Namespace) -> None:
    from transformers_unicode2.files import whole_folder
    from transformers_unicode2.record import Record, hash_file, hash_source
    from transformers_unicode2.training.tokens import find_tables

    recipe = yaml.safe_load(Path(args.config).read_text())
    output = recipe.pop("output")
    if args.start:
        source = {"start": hash_source(args.start), "data": None}
    else:
        source = {"data": {file.name: hash_file(file) for file in find_tables(recipe["data"], "train", "`data`")}}
    with Record(output, {"command": "make_llm", **recipe, **source}).making() as finished:
        if not finished:
            with whole_folder(output) as folder:
                carry_on(args.start, folder) if args.start else begin(recipe, folder)
    print(f"{output} is finished")


def carry_on(start: str, folder: Path) -> None:
    """The language model and tokenizer of a checkpoint."""
    import torch
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    from transformers_unicode2 import UniCode2ForConditionalGeneration

    AutoTokenizer.from_pretrained(start).save_pretrained(folder)
    model = UniCode2ForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    llm = Qwen2ForCausalLM(model.config.text_config)
    llm.model.load_state_dict(model.model.language_model.state_dict())
    llm.save_pretrained(folder)


def begin(recipe: dict, folder: Path) -> None:
    """A tokenizer learnt from the texts of the data, and an untrained language model."""
    import torch
    from datasets import load_dataset
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    rows = load_dataset("parquet", data_files=f"{recipe['data']}/train-*.parquet", split="train").remove_columns(
        "image"
    )
    base = Qwen2Tokenizer(vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])
    texts = (
        text for row in rows for text in [row["caption"], row["dense_caption"], *row["questions"], *row["answers"]]
    )
    trained = base.train_new_from_iterator(texts, vocab_size=recipe["vocab_size"] - len(SPECIAL_TOKENS))
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
    torch.manual_seed(recipe["seed"])
    config = Qwen2Config(
        vocab_size=recipe["vocab_size"],
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **recipe["model"],
    )
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, more than the model's `vocab_size` of {config.vocab_size}."
        )
    tokenizer.save_pretrained(folder)
    Qwen2ForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--start", help="UniCode² checkpoint whose language model goes on learning")
    main(parser.parse_args())
