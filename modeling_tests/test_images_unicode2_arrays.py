"""Arrays and tensors are read as the images that they are, or refused."""

import numpy as np
import pytest
import torch
from pictures import SIDE, colors, ramp
from PIL import Image

from transformers_unicode2.images_unicode2 import load_image

ASK = "<|image_pad|>what is this?"


@pytest.mark.parametrize("kind", ["float32", "float64", "float16"])
def test_values_that_are_not_finite_are_counted(kind):
    values = np.tile(np.linspace(0, 1, SIDE), (SIDE, 1)).astype(kind)
    values[0, 0], values[3, 4] = np.nan, -np.inf
    images = [values, torch.from_numpy(values), np.dstack([values] * 3)]
    for image in images + ([Image.fromarray(values)] if kind == "float32" else []):
        count = 6 if image is images[2] else 2
        with pytest.raises(ValueError, match=f"image cannot be read: {count} of its .* values are not finite"):
            load_image(image)


@pytest.mark.parametrize("kind", ["u2", "i2", "u4", "i8", "f4", "f8", "f2"])
def test_arrays_of_either_byte_order_are_read_alike(kind):
    white = {"u2": 65535, "f4": 1, "f8": 1, "f2": 1}.get(kind, 255)
    values = ramp() * (white / 255)
    little, big = values.astype("<" + kind), values.astype(">" + kind)
    assert np.array_equal(load_image(little), load_image(big))
    assert np.array_equal(np.asarray(load_image(big))[..., 0], ramp())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rounding_errors_of_floats_are_clipped(kind):
    past = torch.tensor([[0.0, -1e-7], [1.0, 1.0]], dtype=kind)
    past[1, 1] = 1 + torch.finfo(kind).eps
    right = np.repeat(np.array([[0, 0], [255, 255]], np.uint8)[..., None], 3, -1)
    assert np.array_equal(load_image(past), right)
    for wrong in (1.02, -0.02):
        with pytest.raises(ValueError, match="have to be in"):
            load_image(torch.full((2, 2), wrong, dtype=kind))
    with pytest.raises(ValueError, match=r"run from 1.00200009 to 1.00200009"):
        load_image(np.full((2, 2), 1.0020001, np.float32))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(8, 8, 3, device="meta"),
        torch.rand(8, 8, 3).to_sparse(),
        torch.rand(8, 8).to_sparse_csr(),
        torch.nested.nested_tensor([torch.rand(8, 8)]),
    ],
    ids=["meta", "sparse", "csr", "nested"],
)
def test_tensors_without_values_in_a_row_are_refused(tensor, processor):
    with pytest.raises(ValueError, match="is no image; give a dense one"):
        load_image(tensor)
    with pytest.raises(ValueError, match="is no image; give a dense one"):
        processor(images=tensor, return_tensors="pt")


ARRAYS = {
    "uint8": lambda a: a,
    "uint8, channels first": lambda a: a.transpose(2, 0, 1),
    "float32": lambda a: a.astype(np.float32) / 255,
    "float64, channels first": lambda a: a.transpose(2, 0, 1) / 255,
    "int64": lambda a: a.astype(np.int64),
    "uint16": lambda a: a.astype(np.uint16) * 257,
    "not contiguous": lambda a: np.repeat(a, 2, 0)[::2],
    "alpha": lambda a: np.dstack([a, np.full((SIDE, SIDE), 255, np.uint8)]),
    "tensor": lambda a: torch.from_numpy(a).permute(2, 0, 1),
    "tensor, channels last": lambda a: torch.from_numpy(a),
    "float tensor": lambda a: torch.from_numpy(a).permute(2, 0, 1) / 255,
    "tensor with gradients": lambda a: (torch.from_numpy(a).permute(2, 0, 1) / 255).requires_grad_(),
    "batch": lambda a: a[None].astype(np.float32) / 255,
    "batch of tensors": lambda a: torch.from_numpy(a).permute(2, 0, 1)[None] / 255,
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_have_the_pixels_of_the_image(kind, processor):
    right = processor(images=Image.fromarray(colors()), return_tensors="pt")["pixel_values"]
    for images in (ARRAYS[kind](colors()), [ARRAYS[kind](colors())]):
        assert torch.equal(processor(images=images, return_tensors="pt")["pixel_values"], right)
        batch = processor(images=images, text=ASK, return_tensors="pt")
        assert torch.equal(batch["pixel_values"], right)


def test_grey_arrays_and_arrays_with_alpha():
    level = ramp()
    expected = np.repeat(level[..., None], 3, -1)
    for array in (level, level[..., None], level[None], torch.from_numpy(level)[None], level / 255):
        assert np.array_equal(load_image(array), expected)
    assert np.array_equal(load_image(level > 100), np.repeat((level > 100)[..., None] * np.uint8(255), 3, -1))
    clear = np.dstack([level, np.zeros_like(level)])
    for array in (clear, clear.transpose(2, 0, 1), np.dstack([level, level, level, np.zeros_like(level)])):
        assert np.array_equal(load_image(array), np.full((SIDE, SIDE, 3), 255))


def test_where_either_axis_may_be_the_channels_numpy_has_the_last_and_torch_the_first(processor):
    array = np.arange(3 * 7 * 3, dtype=np.uint8).reshape(3, 7, 3)
    assert np.array_equal(load_image(array), array)
    assert np.array_equal(load_image(torch.from_numpy(array)), array.transpose(1, 2, 0))
    said = processor(images=array, input_data_format="channels_first", return_tensors="pt")["pixel_values"]
    right = processor(images=Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0))), return_tensors="pt")
    assert torch.equal(said, right["pixel_values"])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), np.float32) - 1, r"run from -1 to -1; they have to be in \[0, 1\]"),
        (colors().astype(np.float32), r"float32 image run from 0 to 255; they have to be in \[0, 1\]"),
        (np.full((8, 8, 3), np.nan), "float64 image cannot be read: 192 of its 192 values are not finite"),
        (np.full((8, 8, 3), 300), r"int64 image run from 300 to 300; they have to be in \[0, 255\]"),
        (np.zeros((8, 8, 5)), r"shape \(8, 8, 5\) is no image"),
        (np.zeros(8), r"shape \(8,\) is no image"),
        (np.zeros((0, 8, 3)), r"shape \(0, 8, 3\) is no image"),
        (np.zeros((8, 8, 3), complex), "complex128 is no image"),
        (3, "3 is no image"),
        (None, "None is no image"),
        ({"bytes": b""}, "is no image"),
        (b"", r"The file is empty \(0 bytes\)"),
        (b"nothing", r"The file \(7 bytes\) cannot be read as an image: it is in none of the formats PNG"),
        ("nowhere.png", "There is no image file nowhere.png"),
        ("aGVsbG8=", "There is no image file aGVsbG8=, nor is it a base64-encoded image"),
        ("data:image/png;base64,aGVsbG8=", "is no data URI of an image"),
        ("/tmp", "/tmp is a folder; give an image file"),
        ("a\nb", r"There is no image file a\\nb"),
        ("file:///nowhere.png", "There is no image file /nowhere.png"),
        ("file://elsewhere/tmp/x.png", "There is no image file elsewhere/tmp/x.png"),
        ("data:image/png;base64,", "is no data URI of an image"),
        (Image.fromarray(np.full((4, 4), np.inf, np.float32)), "PIL image cannot be read: 16 of its 16 values are not"),
    ],
)
def test_what_is_no_image_is_refused_in_a_sentence(image, message):
    with pytest.raises(ValueError, match=message):
        load_image(image)
