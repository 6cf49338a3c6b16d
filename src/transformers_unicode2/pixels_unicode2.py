"""The pixels of a `PIL.Image` as RGB, whatever its mode, its depth and the state that it is in."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, PngImagePlugin, TiffImagePlugin

# Largest width x height of an image, as Pillow has it.
MAX_PIXELS = 89_478_485
# Modes of grey of more than 8 bits.
DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
# What one is of the values that a PNG has in its file, as loaded levels.
PNG_LEVELS = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 257}


class WholeFiles:
    """Refuses files that are cut short, also where a library told Pillow to fill them up: that is another picture."""

    def __init__(self):
        self.lock, self.depth, self.lenient = threading.Lock(), 0, False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if self.depth == 0 and not ImageFile.LOAD_TRUNCATED_IMAGES:
            yield
            return
        with self.lock:
            self.lenient = self.lenient or ImageFile.LOAD_TRUNCATED_IMAGES
            self.depth += 1
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            with self.lock:
                if self.depth == 1:
                    ImageFile.LOAD_TRUNCATED_IMAGES, self.lenient = self.lenient, False
                self.depth -= 1


whole_files_only = WholeFiles()


def to_rgb(image: Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """
    A `PIL.Image` as RGB, as a viewer shows it: turned as its EXIF data say, what is transparent on white.

    Grey of more than 8 bits is scaled, never clipped:

    - 16 bits (`I;16` of either byte order): 65535 is white, so 8 bits that are stored in 16 stay as they are; in a TIFF
      of 12 bits 4095 is white.
    - 32-bit integers (`I`): up to 65535 as 16 bits; in a TIFF up to 255 as 8 bits.
    - Floats (`F`): up to 1, 1 is white; from 2 up to 255, 255 is.
    - Other integers and floats, and any with negative values: the least value, or 0, is black and the largest white.

    Copies and crops have lost their file. They are refused where only the file says how to read them: grey of more
    than 8 bits from a TIFF, 32-bit integers up to 255, levels of 2 or 4 bits of which one is transparent. The
    transparent color of an RGB copy is that of its pixels, or of 16 bits where it is beyond 255.

    Args:
        image (`PIL.Image.Image`): any mode; of several frames the one that it stands at. It stays as it is.
        max_pixels (`int`, *optional*, defaults to `MAX_PIXELS`): largest width x height.

    Raises:
        `ValueError`: when it is too large, damaged, cut short, an EPS, or holds values that are not finite. Also on a
            copy that has lost what tells how to read it.
    """
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels are more than the limit of {max_pixels}")
    if width * height == 0:
        raise ValueError(f"{width} x {height} pixels are none")
    if image.format == "EPS" or isinstance(image, ImageFile.StubImageFile):
        raise ValueError(f"{image.format} is no raster format; convert it to PNG")
    tags = find_tags(image)
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, ())
    in_planes = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2 and len(bits) > 1
    # Of 8 bits Pillow can decode RGB and CMYK.
    if in_planes and (set(bits) != {8} or tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) not in (2, 5)):
        raise ValueError(f"Pillow cannot decode a TIFF of {image.mode} in {bits[0]} bits with each channel in a plane")
    try:
        with whole_files_only():
            image.load()
        rgb = flatten(image, find_transparent(image), tags)
    except ValueError:
        raise
    except Exception as error:
        # What a decoder raises on damaged files is not documented.
        raise ValueError(str(error) or type(error).__name__) from error
    rgb.info = {}
    try:
        rgb.getexif()[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, 1)
        ImageOps.exif_transpose(rgb, in_place=True)
    except Exception:
        # Damaged EXIF data turn nothing, as in viewers.
        pass
    rgb.info = {}
    return rgb


def open_again(image: Image.Image) -> Image.Image | None:
    """The file of an image that was loaded or pickled, for what Pillow forgets then; `None` where it is gone."""
    for source in (vars(image).get("_fp"), vars(image).get("filename")):
        try:
            with open(source, "rb") if isinstance(source, (str, bytes)) else nullcontext(source) as file:
                position = file.tell()
                file.seek(0)
                again = type(image)(file)
                file.seek(position)
                if sorted(again.size) == sorted(image.size):
                    return again
        except Exception:
            # It was closed, deleted or written anew.
            continue
    return None


def find_tags(image: Image.Image) -> dict:
    """The tags of a TIFF that tell how to read it, none of other images. Raises `ValueError` when they are lost."""
    if not isinstance(image.info.get("compression"), str) or image.mode not in DEEP:
        return vars(image).get("tag_v2", {})
    file = image if "tag_v2" in vars(image) else open_again(image)
    if file is None:
        raise ValueError(
            f"it is a copy of a TIFF in {image.mode}, and only the file tells which value is white; give the file, or "
            "an array of uint8, uint16 or floats in [0, 1]"
        )
    return vars(file).get("tag_v2", {})


def find_transparent(image: Image.Image):
    """The transparent color of a loaded image, as its pixels have it; Pillow leaves that of a PNG as it is in the file.

    Raises `ValueError` when it may be one of 2 or 4 bits.
    """
    key = image.info.get("transparency")
    if image.mode not in ("L", "RGB") or not isinstance(key, (int, tuple)):
        return key
    file = open_again(image) if isinstance(image, PngImagePlugin.PngImageFile) else None
    if file is not None:
        level = PNG_LEVELS.get(file.tile[0].args, 1)
        return int(key * level) if isinstance(key, int) else tuple(int(value * level) for value in key)
    if isinstance(key, tuple):
        return tuple(value >> 8 for value in key) if max(key) > 255 else key
    # An image of 2 or 4 bits has these levels alone, one of 8 bits hardly ever.
    if 0 < key < 16 and not (np.asarray(image) % 17).any():
        raise ValueError(
            f"it is a copy of a file of 2, 4 or 8 bits, and only the file tells which level is the transparent {key}; "
            "give the file, or convert it to RGBA"
        )
    return key


def flatten(image: Image.Image, key, tags: dict) -> Image.Image:
    """A loaded image as a new one in RGB, on white, not turned yet; `key` is its transparent color."""
    if image.mode in DEEP:
        return scale(image, key, tags).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if key != image.info.get("transparency"):
        image = image.copy()
        image.info["transparency"] = key
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def scale(image: Image.Image, key: int | None, tags: dict) -> Image.Image:
    """Grey of 16 or 32 bits or of floats as grey of 8 bits, see `to_rgb`; the transparent value `key` in white."""
    values = np.asarray(image)
    if image.mode == "I" and tags.get(TiffImagePlugin.SAMPLEFORMAT, (2,))[0] == 1:
        # Pillow has no mode for these.
        values = values.view(np.uint32)
    check_finite(values)
    low, high = min(0, values.min().item()), max(0, values.max().item())
    white = high - low or 1
    if image.mode.startswith("I;16"):
        white = 4095 if tags.get(TiffImagePlugin.BITSPERSAMPLE) == (12,) else 65535
    elif image.mode == "I" and low == 0 and high <= 65535:
        if 0 < high <= 255 and image.format is None:
            raise ValueError(f"its 32-bit integers up to {high} may be of 8 or of 16 bits; give uint8 or uint16")
        white = 255 if high <= 255 and tags else 65535
    elif image.mode == "F" and low == 0 and (high <= 1 or 2 <= high <= 255):
        white = 1 if high <= 1 else 255
    grey = values.astype(np.float32)
    grey -= np.float32(low)
    grey *= np.float32(255 / white)
    grey = np.rint(grey, out=grey).astype(np.uint8)
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
        # 0 is white.
        grey = 255 - grey
    if isinstance(key, int):
        grey[values == key] = 255
    return Image.fromarray(grey)


def check_finite(values: np.ndarray) -> None:
    """Raises `ValueError` when some values are infinite or not a number."""
    bad = values.size - np.count_nonzero(np.isfinite(values))
    if bad:
        raise ValueError(f"{bad} of its {values.size} values are not finite")


__all__ = ["MAX_PIXELS", "check_finite", "to_rgb", "whole_files_only"]


def crop_square(image: Image.Image) -> Image.Image:
    """The largest square in the middle of a picture."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
