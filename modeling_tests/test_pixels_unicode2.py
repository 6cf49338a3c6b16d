"""Every kind of file has the pixels that a viewer shows."""

import io
import pickle
import warnings
from copy import deepcopy

import numpy as np
import pytest
from pictures import SIDE, colors, make_pictures, ramp, save, tiff, tiff_of_channels, turned
from PIL import Image, ImageFile

from transformers_unicode2.images_unicode2 import MAX_PIXELS, decode_image, load_image, to_rgb

PICTURES = make_pictures()


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_read_as_it_is_seen(name):
    content, rgb, tolerance = PICTURES[name]
    image = decode_image(content)
    assert image.mode == "RGB" and np.asarray(image).shape == rgb.shape
    assert np.abs(np.asarray(image).astype(int) - rgb).max() <= tolerance
    assert np.array_equal(to_rgb(image), image)


def test_the_table_is_long_enough():
    assert len(PICTURES) >= 40


def load(image: Image.Image) -> Image.Image:
    image.load()
    return image


def row_of_a_data_set(file, content):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"image": [{"bytes": content, "path": None}]})
    return rows.cast_column("image", datasets.Image())[0]["image"]


STATES = {
    "loaded": lambda file, content: load(Image.open(io.BytesIO(content))),
    "loaded from a path": lambda file, content: load(Image.open(file)),
    "pickled": lambda file, content: pickle.loads(pickle.dumps(Image.open(io.BytesIO(content)))),
    "pickled from a path": lambda file, content: pickle.loads(pickle.dumps(Image.open(file))),
    "deep copy": lambda file, content: deepcopy(Image.open(io.BytesIO(content))),
    "copy": lambda file, content: Image.open(io.BytesIO(content)).copy(),
    "crop": lambda file, content: load(Image.open(io.BytesIO(content))).crop((0, 0, SIDE, SIDE)),
    "row of a data set": row_of_a_data_set,
}


# What a copy does not know any more.
LOST = (
    *("png 2 bits clear value", "png 4 bits clear value", "pgm 16 bits, dark"),
    *("tiff 12 bits", "tiff 16 bits", "tiff 32 bits", "tiff floats"),
)


@pytest.mark.parametrize("state", STATES)
def test_pil_images_have_the_pixels_of_their_file_or_are_refused(state, tmp_path):
    refused = []
    for number, (name, (content, _, _)) in enumerate(PICTURES.items()):
        (tmp_path / f"{number:03d}").write_bytes(content)
        image = STATES[state](tmp_path / f"{number:03d}", content)
        try:
            assert np.array_equal(load_image(image), decode_image(content)), name
        except ValueError as error:
            assert "it is a copy of a" in str(error) or "may be of 8 or of 16 bits" in str(error)
            refused.append(name)
    has_file = state.startswith("loaded") or state in ("pickled from a path", "row of a data set")
    assert refused == [] if has_file else refused and all(name.startswith(LOST) for name in refused)


def test_an_image_that_is_copied_by_a_data_set_is_read_alike():
    """Which it does where EXIF data turn it."""
    for name in ("jpeg turned 6", "png turned", "png 16 bits turned", "tiff turned"):
        content = PICTURES[name][0]
        assert np.array_equal(load_image(row_of_a_data_set(None, content)), decode_image(content)), name


def test_the_way_up_that_is_set_in_memory_is_followed(photo):
    for image in (
        photo.copy(),
        load(Image.open(io.BytesIO(save(photo, "PNG")))),
        Image.open(io.BytesIO(save(photo, "TIFF"))),
    ):
        image.getexif()[0x112] = 6
        assert np.array_equal(load_image(image), photo.transpose(Image.Transpose.ROTATE_270))


def test_channels_in_planes_are_read_or_refused():
    rng = np.random.default_rng(0)
    for photometric, channels, extra in ((2, 3, None), (2, 4, 2), (5, 4, None), (8, 3, None), (2, 4, 1), (6, 3, None)):
        for kind in ("u1", "<u2"):
            values = rng.integers(0, 256, (16, 16, channels)).astype(kind)
            content = tiff_of_channels(values, photometric, extra, in_planes=True)
            try:
                found = decode_image(content)
            except ValueError as error:
                assert kind == "<u2" or photometric in (6, 8) or extra == 1, error
            else:
                assert np.array_equal(found, decode_image(tiff_of_channels(values, photometric, extra)))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (tiff(ramp().astype("<f8"), 64, 3), "64 bits, floats"),
        (tiff(ramp().astype("<f2"), 16, 3), "16 bits, floats"),
        (tiff(ramp().astype(">u2"), 12), "12 bits, unsigned integers, byte order MM"),
        (tiff_of_channels(colors().astype("<f4"), 2, sample_format=3), r"32 \+ 32 \+ 32 bits, floats"),
        (tiff_of_channels(np.dstack([ramp(), ramp()]).astype("<u2"), 1, 2), r"16 \+ 16 bits, unsigned integers"),
        (b"II*\0\x08\0\0", "damaged"),
    ],
)
def test_tiffs_of_a_kind_that_pillow_does_not_know_are_named(content, kind):
    with pytest.raises(ValueError, match=rf"it begins as TIFF does, but this one cannot be decoded \({kind}"):
        decode_image(content)


def test_images_that_are_too_large_are_refused_with_the_numbers(monkeypatch):
    bomb = save(Image.new("1", (20_000, 20_000)), "PNG")
    for limit in (None, 89_478_485):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=f"20000 x 20000 pixels are more than the limit of {MAX_PIXELS}"):
            load_image(bomb)
    with pytest.raises(ValueError, match="64 x 64 pixels are more than the limit of 4095"):
        decode_image(PICTURES["png"][0], max_pixels=4095)


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize(
    "name", ["png", "jpeg progressive", "webp", "gif", "bmp", "tiff lzw", "jpeg 2000", "avif", "qoi", "tga"]
)
def test_files_that_are_cut_short_are_refused_whatever_the_process_says(name, lenient, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    content = PICTURES[name][0]
    for cut in (len(content) // 3, len(content) * 2 // 3):
        with pytest.raises(ValueError, match="cannot be read"):
            load_image(content[:cut])
    with pytest.raises(ValueError, match="JPEG image cannot be read"):
        load_image(Image.open(io.BytesIO(PICTURES["jpeg progressive"][0][:900])))
    assert ImageFile.LOAD_TRUNCATED_IMAGES == lenient


def test_reading_leaves_the_image_as_it_is(photo):
    image = Image.open(io.BytesIO(save(photo, "JPEG", exif=turned(6))))
    before = image.size, dict(image.info)
    assert to_rgb(image).size == image.size[::-1]
    assert (image.size, dict(image.info)) == before


def test_reading_does_not_depend_on_filters_of_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, (content, _, _) in PICTURES.items():
            assert decode_image(content).mode == "RGB", name
        with pytest.raises(ValueError, match="13000 x 7000 pixels"):  # which Pillow warns of
            decode_image(save(Image.new("1", (13_000, 7_000)), "PNG"))


def test_damaged_exif_data_turn_nothing(photo):
    content = save(photo, "JPEG", exif=b"Exif\0\0nonsense")
    assert decode_image(content).size == photo.size
