"""Rows of data sets that `datasets` loads, which no Hub is needed for; the rest is in `test_sources.py`."""

from datasets import Audio, Dataset, DatasetDict, Features, Image, List, Value, Video
from numbered import picture

from transformers_unicode2.training.hub_rows import flatten_sample, undecoded
from transformers_unicode2.training.sources import open_source


def test_sounds_and_films_are_not_decoded():
    """Decoding them needs packages that nothing here reads them with."""
    kinds = undecoded(Features({"a": Audio(), "b": List(Video()), "c": Image(), "d": Value("string")}))
    assert not (kinds["a"].decode or kinds["b"].feature.decode or kinds["c"].decode)


def test_a_sample_whose_json_is_no_object_is_refused():
    row = {"__key__": "0", "png": {"bytes": picture(0), "path": None}}
    assert str(flatten_sample({**row, "json": [1]})) == "its .json is list, where an object must be"
    assert flatten_sample({**row, "json": None})["images"] == [row["png"]]


def test_saved_data_sets_with_splits_are_read(tmp_path):
    kinds = Features({"image": Image(), "caption": Value("string")})
    rows = [{"image": {"bytes": picture(0), "path": None}, "caption": "a"}] * 2
    train, test = (Dataset.from_list(rows[:count], features=kinds) for count in (2, 1))
    DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path)
    assert [len(open_source(str(tmp_path), split=split)) for split in ("train", "test")] == [2, 1]
