"""Settings that would give other codes are refused, and pixels stay in float32."""

from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch

ASK = "<|image_pad|>what is this?"


SETTINGS = {
    "do_rescale": False,
    "rescale_factor": 1.0,
    "do_normalize": False,
    "image_mean": [0.0, 0.0, 0.0],
    "image_std": [1.0, 1.0, 1.0],
    "do_resize": False,
    "resample": 2,
    "size": {"height": 32, "width": 32},
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "do_pad": True,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_would_give_other_codes_are_refused(name, processor, photo):
    options = {name: SETTINGS[name]}
    for wrong in (options, {"images_kwargs": options}):
        with pytest.raises(ValueError, match=f"`{name}` .*leave (it|them)"):
            processor(images=photo, return_tensors="pt", **wrong)
    with pytest.raises(ValueError, match=f"`{name}` .*leave (it|them)"):
        processor.image_processor(photo, return_tensors="pt", **options)


def test_settings_that_the_image_processor_has_anyway_are_taken(processor, photo):
    plain = processor(images=photo, return_tensors="pt")["pixel_values"]
    for same in ({"do_convert_rgb": False}, {"size": {"height": 64, "width": 64}}, {"image_mean": [0.5, 0.5, 0.5]}):
        assert torch.equal(processor(images=photo, return_tensors="pt", **same)["pixel_values"], plain)
    assert torch.equal(processor.image_processor(photo, do_rescale=None, return_tensors="pt")["pixel_values"], plain)


@pytest.mark.parametrize("change", [{"do_rescale": False}, {"rescale_factor": 1.0}])
def test_an_image_processor_that_does_not_rescale_is_refused(change, processor, photo):
    changed = deepcopy(processor)
    vars(changed.image_processor).update(change)
    for call in (partial(changed, images=photo), partial(changed.image_processor, photo)):
        with pytest.raises(ValueError, match="but images are read as RGB of 8 bits"):
            call(return_tensors="pt")


def test_pixels_stay_in_float32(processor, photo):
    batch = processor(images=photo, text=ASK, return_tensors="pt")
    before = batch["pixel_values"].clone()
    for arguments in ((torch.bfloat16,), ("cpu", torch.float16)):
        moved = batch.to(*arguments)
        assert moved is batch and torch.equal(batch["pixel_values"], before) and batch["input_ids"].dtype == torch.int64
    batch["attention_mask"] = batch["attention_mask"].float()
    assert batch.to(dtype=torch.bfloat16)["attention_mask"].dtype == torch.bfloat16
    listed = processor(images=[photo, photo], text=ASK * 2).to(torch.bfloat16)
    assert listed["pixel_values"][0].dtype == np.float32
