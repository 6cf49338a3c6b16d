"""Weights written shard by shard are what the model expects, all of them, under final names."""

import json

import pytest
import torch
from safetensors.torch import load_file

from transformers_unicode2.hub.shards import ShardWriter

EXPECTED = {"a": torch.Size([2, 3]), "b": torch.Size([4]), "tied": torch.Size([1])}


def test_index_names_the_file_of_each_weight(tmp_path):
    writer = ShardWriter(tmp_path, EXPECTED)
    writer.write("first", {"a": torch.arange(6.0).view(2, 3)})
    writer.write("second", {"b": torch.ones(4, dtype=torch.bfloat16)})
    writer.finish(may_lack={"tied"})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 6 * 4 + 4 * 2
    assert set(index["weight_map"].values()) == {file.name for file in tmp_path.glob("*.safetensors")}
    assert load_file(tmp_path / index["weight_map"]["b"])["b"].dtype == torch.bfloat16
    assert writer.report == [
        {"part": "first", "parameters": 6, "bytes": 24},
        {"part": "second", "parameters": 4, "bytes": 8},
    ]


@pytest.mark.parametrize(
    "state, message",
    [({"c": torch.ones(1)}, "has a weight c that the model does not have"), ({"b": torch.ones(5)}, r"is \(5,\); the")],
)
def test_weights_that_the_model_does_not_have_are_refused(tmp_path, state, message):
    with pytest.raises(ValueError, match=message):
        ShardWriter(tmp_path, EXPECTED).write("first", state)


def test_missing_weights_are_refused(tmp_path):
    writer = ShardWriter(tmp_path, EXPECTED)
    writer.write("first", {"a": torch.ones(2, 3)})
    with pytest.raises(ValueError, match="2 of 3 weights are missing, the first is b"):
        writer.finish(may_lack=set())
