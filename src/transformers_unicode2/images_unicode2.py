"""Any picture as RGB: the one reader of images. However a picture is stored, it has the same pixels, and so codes."""

import base64
import io
import os
import re
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import unquote_to_bytes

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

# Raster formats that Pillow decodes by itself, in the order in which they are tried. Not EPS, which starts Ghostscript,
# nor formats that Pillow knows by name only (WMF, PDF, MPEG, GRIB, HDF5). TGA comes last: it begins with no mark.
FORMATS = (
    *("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "AVIF", "JPEG2000", "PPM", "QOI"),
    *("ICO", "CUR", "ICNS", "DDS", "PSD", "SGI", "SUN", "PCX", "XBM", "XPM", "TGA"),
)
# Largest width x height of an image, as Pillow has it.
MAX_PIXELS = 89_478_485
# Seconds that a server may take.
TIMEOUT = 60.0
URLS = ("http://", "https://")
# Of an array: grey, grey and alpha, RGB, RGB and alpha.
CHANNELS = (1, 2, 3, 4)
# Entries of `Image.info` that may tell of the orientation.
ORIENTATION = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
# Tags of TIFF.
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339


def to_rgb(image: Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """
    A `PIL.Image` as RGB, as a viewer shows it: turned as its EXIF data say, what is transparent on white.

    Grey of more than 8 bits is scaled, never clipped:

    - 16 bits (`I;16` of either byte order): 65535 is white, so 8 bits that are stored in 16 stay as they are; in a TIFF
      of 12 bits 4095 is white.
    - 32-bit integers (`I`): up to 65535 as 16 bits; up to 255 as 8 bits, unless the file has 16 bits (PNG, PPM).
    - Floats (`F`): up to 1, 1 is white; from 2 up to 255, 255 is.
    - Other integers and floats, and any with negative values: the least value, or 0, is black and the largest white.

    Args:
        image (`PIL.Image.Image`): any mode; of several frames the one that it stands at. It stays as it is.
        max_pixels (`int`, *optional*, defaults to `MAX_PIXELS`): largest width x height.

    Raises:
        `ValueError`: when it is too large, damaged, cut short, an EPS, or holds values that are not finite.
    """
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels are more than the limit of {max_pixels}")
    if width * height == 0:
        raise ValueError(f"{width} x {height} pixels are none")
    if image.format == "EPS" or isinstance(image, ImageFile.StubImageFile):
        raise ValueError(f"{image.format} is no raster format; convert it to PNG")
    key = transparent_color(image)
    try:
        with whole_files_only():
            image.load()
        rgb = flatten(image, key)
    except ValueError:
        raise
    except Exception as error:
        # What a decoder raises on damaged files is not documented.
        raise ValueError(str(error) or type(error).__name__) from error
    rgb.info = {name: image.info[name] for name in ORIENTATION if name in image.info}
    try:
        ImageOps.exif_transpose(rgb, in_place=True)
    except Exception:
        # Damaged EXIF data turn nothing, as in viewers.
        pass
    rgb.info = {}
    return rgb


def transparent_color(image: Image.Image):
    """The color that a PNG declares transparent, as loaded pixels have it; Pillow leaves it as it is in the file."""
    key = image.info.get("transparency")
    tile = image.tile[0].args if isinstance(image, ImageFile.ImageFile) and image.tile else None
    if key is None or tile not in ("1", "L;2", "L;4", "RGB;16B"):
        return key
    if tile == "RGB;16B":
        return tuple(value >> 8 for value in key)
    return min(255, key * {"1": 255, "L;2": 85, "L;4": 17}[tile])


def flatten(image: Image.Image, key) -> Image.Image:
    """A loaded image as a new one in RGB, on white, not turned yet; `key` is its transparent color."""
    if image.mode.startswith("I") or image.mode == "F":
        return scale(image, key).convert("RGB")
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


def scale(image: Image.Image, key: int | None) -> Image.Image:
    """Grey of 16 or 32 bits or of floats as grey of 8 bits, see `to_rgb`; the transparent value `key` in white."""
    values = np.asarray(image)
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    if image.mode == "I" and tags.get(SAMPLE_FORMAT, (2,))[0] == 1:
        # Pillow has no mode for these.
        values = values.view(np.uint32)
    low, high = min(0, values.min().item()), max(0, values.max().item())
    if not np.isfinite([low, high]).all():
        raise ValueError("its values are not finite")
    white = high - low or 1
    if image.mode.startswith("I;16"):
        white = 4095 if tags.get(BITS_PER_SAMPLE) == (12,) else 65535
    elif image.mode == "I" and low == 0 and high <= 65535:
        white = 65535 if high > 255 or image.format in ("PNG", "PPM") else 255
    elif image.mode == "F" and low == 0 and (high <= 1 or 2 <= high <= 255):
        white = 1 if high <= 1 else 255
    grey = values.astype(np.float32)
    grey -= np.float32(low)
    grey *= np.float32(255 / white)
    grey = np.rint(grey, out=grey).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == 0:
        # 0 is white.
        grey = 255 - grey
    if isinstance(key, int):
        grey[values == key] = 255
    return Image.fromarray(grey)


def decode_image(content: bytes, max_pixels: int = MAX_PIXELS, name: str = "The file") -> Image.Image:
    """The content of an image file as RGB, see `to_rgb`; of several frames or pages the first.

    Raises `ValueError` with `name` when it is empty, no image of one of `FORMATS`, damaged, cut short or too large.
    """
    if not len(content):
        raise ValueError(f"{name} is empty (0 bytes); give an image file.")
    try:
        return to_rgb(open_content(content), max_pixels)
    except ValueError as error:
        raise ValueError(f"{name} ({len(content)} bytes) cannot be read as an image: {error}.") from error


def open_content(content: bytes) -> Image.Image:
    """`Image.open` of `FORMATS` alone, whatever limits and warning filters a process has. Raises `ValueError`."""
    Image.init()
    file = io.BytesIO(content)
    for name in FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        try:
            accepted = factory is not None and (accept is None or accept(content[:16]))
            # A string tells of a decoder that is not there.
            if accepted and not isinstance(accepted, str):
                with whole_files_only():
                    return factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):
            # It is of another format.
            pass
        except Exception as error:
            raise ValueError(str(error) or type(error).__name__) from error
        file.seek(0)
    raise ValueError(f"it is in none of the formats {', '.join(name for name in FORMATS if name in Image.OPEN)}")


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


def load_image(image) -> Image.Image:
    """One picture as RGB, see `read_images` for what it may be. Raises `ValueError` when it cannot be read."""
    (image,) = read_images(image)
    return image


def read_images(image, layout: str | None = None, timeout: float | None = None) -> list[Image.Image]:
    """
    A picture, or those of a batch in one array, as RGB.

    Args:
        image: a `PIL.Image`; a path; an address; base64, plain or as a data URI; the content of a file as bytes; an
            open binary file; an array or tensor, see `split_array`.
        layout (`str`, *optional*): `"channels_first"` or `"channels_last"`, of an array.
        timeout (`float`, *optional*, defaults to `TIMEOUT`): seconds that a server may take.

    Raises:
        `ValueError`: when it cannot be read.
    """
    if isinstance(image, Image.Image):
        try:
            return [to_rgb(image)]
        except ValueError as error:
            raise ValueError(f"The {image.format or 'PIL'} image cannot be read: {error}.") from error
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return [to_rgb(picture) for picture in split_array(image, layout)]
    if isinstance(image, (bytes, bytearray, memoryview)):
        return [decode_image(bytes(image))]
    if isinstance(image, os.PathLike) or (isinstance(image, str) and os.path.exists(image)):
        return [read_file(os.fspath(image))]
    if isinstance(image, str):
        content, name = fetch(image, timeout or TIMEOUT)
        return [decode_image(content, name=name)]
    # Files of `tempfile` are not `io.IOBase`.
    if hasattr(image, "read"):
        if image.seekable():
            image.seek(0)
        content = image.read()
        if isinstance(content, bytes):
            return [decode_image(content)]
    raise ValueError(
        f"{image!r:.80} is no image: give a PIL image, a path, an address, base64, bytes, an array or a tensor."
    )


def read_file(path: str | bytes) -> Image.Image:
    name = one_line(os.fsdecode(path))
    if os.path.isdir(path):
        raise ValueError(f"{name} is a folder; give an image file.")
    if not os.path.isfile(path):
        raise ValueError(f"There is no image file {name}.")
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({error.strerror}); give an image file.") from error
    return decode_image(content, name=name)


def fetch(text: str, timeout: float = TIMEOUT) -> tuple[bytes, str]:
    """Content and name of what an address, a data URI or base64 stands for. Raises `ValueError` on anything else."""
    if text.lower().startswith(URLS):
        return download(text, timeout), text
    name = one_line(text) if len(text) <= 60 else f"{one_line(text[:60])}..."
    header, comma, body = text.partition(",") if text[:5].lower() == "data:" else ("", "", text)
    if comma:
        content = unquote_to_bytes(body)
        if not header.endswith(";base64"):
            return content, name
        body = content.decode(errors="replace")
    body = re.sub(r"\s+", "", body).rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        content = base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
        open_content(content)
    except ValueError as error:
        if comma:
            raise ValueError(f"{name} is no data URI of an image: {error}.") from error
        raise ValueError(f"There is no image file {name}, and it is no base64 of an image either.") from error
    return content, name


def download(url: str, timeout: float) -> bytes:
    from huggingface_hub.utils import httpx

    try:
        return httpx.get(url, timeout=timeout, follow_redirects=True).raise_for_status().content
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"{url} cannot be fetched: {str(error) or type(error).__name__}.") from error


def split_array(array: np.ndarray | torch.Tensor, layout: str | None = None) -> list[Image.Image]:
    """
    The images of an array or tensor, in grey, grey and alpha, RGB, or RGB and alpha.

    Args:
        array: `(height, width)`; `(height, width, channels)` or `(channels, height, width)` with 1 to 4 channels; or a
            batch of either. Where both axes could be the channels, they are the last of a NumPy array and the first of
            a tensor. uint8; bool; uint16, where 65535 is white; other integers from 0 to 255; floats from 0 to 1.
        layout (`str`, *optional*): `"channels_first"` or `"channels_last"`.

    Raises:
        `ValueError`: on another shape, type or range.
    """
    last = not isinstance(array, torch.Tensor)
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    shape = array.shape
    if not 2 <= array.ndim <= 4 or 0 in shape:
        raise ValueError(f"An array of shape {shape} is no image; give (height, width, channels) or a batch of these.")
    if array.ndim > 2:
        places = {"channels_first": shape[-3], "channels_last": shape[-1]}
        possible = [name for name, size in places.items() if size in CHANNELS and layout in (None, name)]
        if not possible:
            raise ValueError(
                f"An array of shape {shape} is no image{f' that is {layout}' if layout else ''}: one has 1 to 4 "
                "channels, as its first or last axis."
            )
        if possible[-1 if last else 0] == "channels_first":
            array = np.moveaxis(array, -3, -1)
    array = to_uint8(array)
    pictures = array if array.ndim == 4 else array[None]
    return [Image.fromarray(np.squeeze(p, 2) if p.ndim == 3 and p.shape[2] == 1 else p) for p in pictures]


def to_uint8(array: np.ndarray) -> np.ndarray:
    """Values of an array as uint8, see `split_array`. Raises `ValueError` on another type or range."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"An array of {array.dtype} is no image; give uint8 or floats in [0, 1].")
    low, high = array.min().item(), array.max().item()
    white = 1 if array.dtype.kind == "f" else 255
    # This also holds where they are not numbers.
    if not (low >= 0 and high <= white):
        raise ValueError(
            f"The values of the {array.dtype} image run from {low:g} to {high:g}; they have to be in [0, {white}]. "
            "Bring them there, or give uint8."
        )
    return np.rint(array.astype(np.float32) * np.float32(255 / white)).astype(np.uint8)


def one_line(text: str) -> str:
    """A name as one line can show it: what is not printable, such as a line break, is escaped."""
    return text if text.isprintable() else ascii(text)[1:-1]


def open_images(images, layout: str | None = None, timeout: float | None = None) -> list:
    """Images as RGB, a list, nested as `images` are; the images of a batch take its place. See `read_images`."""
    if not isinstance(images, Sequence) or isinstance(images, (str, bytes, bytearray, memoryview)):
        return read_images(images, layout, timeout)
    output = []
    for image in images:
        nested = isinstance(image, (list, tuple))
        opened = open_images(image, layout, timeout)
        output += [opened] if nested else opened
    return output


__all__ = ["decode_image", "load_image", "open_images", "read_images", "to_rgb"]
