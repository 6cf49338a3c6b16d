"""The tiny recipe learns the same ids and labels as before its data moved to chats.

`golden_examples.json.gz` was made at commit 9e8694c, by `build_examples` of each task of each stage alone, with `share`
1 (and `unconditional_share` 1, alone). It keeps the first 8 digits of the SHA-256 of `json.dumps([input_ids, labels])`
of each row. The rows are 556 scenes and 444 emoji of `scenes.write.render_row`, seed 0, in the order of `write_rows`.
Row `i` has the codes `numpy.random.default_rng([0, i]).integers(8192, size=64)`.
"""

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from transformers_unicode2.scenes import emoji, write
from transformers_unicode2.training.chats import build_examples
from transformers_unicode2.training.shards import write_shard
from transformers_unicode2.training.templates import build_chat, read_tasks

RECIPE = Path(__file__).parents[2] / "training_recipes/unicode2-tiny"
GOLDEN = json.loads(gzip.decompress(Path(__file__).with_name("golden_examples.json.gz").read_bytes()))
# What these tasks were called, whose image is learnt behind nothing but the begin-of-image id
DROPPED = "unconditional"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The texts of the rows, and their codes in the place of images."""
    folder = tmp_path_factory.mktemp("emoji")
    Image.new("RGBA", (8, 8), "red").save(folder / "x.png")
    (folder / "captions.tsv").write_text("".join(f"x.png\t{name}\n" for name in emoji.NAMES))
    kinds = ["scene"] * 556 + ["emoji"] * 444
    kinds = [kinds[i] for i in np.random.default_rng(0).permutation(len(kinds))]
    drawn = [write.render_row(index, kind, "train", 0, str(folder), 16) for index, kind in enumerate(kinds)]
    codes = [np.random.default_rng([0, index]).integers(8192, size=64).tolist() for index in range(len(drawn))]
    return drawn, codes


@pytest.fixture(scope="module")
def tokenized(rows, tmp_path_factory):
    """The chats that each task of the recipe makes of the rows, read from files as `tokenize` writes them."""
    from datasets import load_dataset

    folder, opened = tmp_path_factory.mktemp("tokens"), {}
    for name, task in read_tasks(str(RECIPE / "tasks.yaml")).items():
        chats = [
            {"source": 1, "row": number, "messages": build_chat(row, number, task), "codes": [codes]}
            for number, (row, codes) in enumerate(zip(*rows))
        ]
        write_shard(folder / f"{name}.parquet", chats, 8192, [], {})
        opened[name] = load_dataset("parquet", data_files=str(folder / f"{name}.parquet"), split="train")
    return opened


@pytest.mark.parametrize("name", GOLDEN)
def test_the_tiny_recipe_learns_what_it_learnt_before(name, tokenized, processor):
    stage, task = name.split()
    recipe = yaml.safe_load((RECIPE / f"{stage}.yaml").read_text())
    folder = "text_to_image" if task == DROPPED else task
    assert folder in [Path(part["path"]).name for part in recipe["datasets"]]
    examples = build_examples(
        tokenized[folder],
        processor,
        768,
        learn_all_images=recipe.get("learn_all_images", False),
        drop_prompt_share=1.0 if task == DROPPED else 0.0,
    )
    if task == DROPPED:
        assert recipe["drop_prompt_share"] > 0
        # Each row gives its chat, and then the image alone
        examples = examples.select(range(1, len(examples), 2))
    digests = [
        hashlib.sha256(json.dumps([ids, labels]).encode()).hexdigest()[:8]
        for ids, labels in zip(examples["input_ids"], examples["labels"])
    ]
    assert digests == GOLDEN[name].split()
