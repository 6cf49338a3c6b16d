from pathlib import Path

import pytest
from datasets import Dataset

from transformers_unicode2 import UniCode2ForConditionalGeneration


def test_codes_of_two_codebooks_do_not_mix(tiny_checkpoint, tmp_path, photo):
    """The same model may write to a folder of codes again; one with another codebook is refused and changes nothing."""
    from transformers_unicode2.training import tokenize

    (tmp_path / "data").mkdir()
    Dataset.from_dict({"image": [photo] * 2}).to_parquet(str(tmp_path / "data/train-00000.parquet"))
    arguments = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "tokens"), "--model"]
    for _ in range(2):
        tokenize.main(tokenize.make_parser().parse_args([*arguments, str(tiny_checkpoint)]))
    before = {path.name: path.read_bytes() for path in (tmp_path / "tokens").rglob("*") if path.is_file()}
    assert sorted(before) == ["train-00000.parquet", "train.json"]
    model = UniCode2ForConditionalGeneration.from_pretrained(tiny_checkpoint)
    model.get_quantizer().codebook.codes[0] += 1
    model.save_pretrained(tmp_path / "other")
    (tmp_path / "other/processor_config.json").write_bytes(
        (Path(tiny_checkpoint) / "processor_config.json").read_bytes()
    )
    with pytest.raises(ValueError, match="was begun with something else .quantizer was .* and is "):
        tokenize.main(tokenize.make_parser().parse_args([*arguments, str(tmp_path / "other")]))
    after = {path.name: path.read_bytes() for path in (tmp_path / "tokens").rglob("*") if path.is_file()}
    assert before == after


def test_an_encoder_that_computes_something_else_is_another_quantizer(tiny_checkpoint, tmp_path):
    from transformers_unicode2.training.tokens import hash_quantizer

    def hash_with(**settings):
        model.config.vision_config.update(settings)
        model.save_pretrained(tmp_path)
        return hash_quantizer(str(tmp_path))

    model = UniCode2ForConditionalGeneration.from_pretrained(tiny_checkpoint)
    own = hash_quantizer(str(tiny_checkpoint))
    assert hash_with(attention_dropout=0.1) == own
    model.get_quantizer().save_pretrained(tmp_path / "quantizer")
    assert hash_quantizer(str(tmp_path / "quantizer")) == own
    assert (
        len({own, hash_with(layer_norm_eps=0.1), hash_with(num_attention_heads=6), hash_with(hidden_act="relu")}) == 4
    )
