"""Any picture as RGB: the one reader of images. However a picture is stored, it has the same pixels, and so codes."""

import asyncio
import base64
import io
import os
import re
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
import torch
from PIL import Image, TiffImagePlugin
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import SizeDict
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from .pixels_unicode2 import MAX_PIXELS, check_finite, to_rgb, whole_files_only

# Raster formats that Pillow decodes by itself, in the order in which they are tried. Not EPS, which starts Ghostscript,
# nor formats that Pillow knows by name only (WMF, PDF, MPEG, GRIB, HDF5). TGA comes last: it begins with no mark.
FORMATS = (
    *("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "AVIF", "JPEG2000", "PPM", "QOI"),
    *("ICO", "CUR", "ICNS", "DDS", "PSD", "SGI", "SUN", "PCX", "XBM", "XPM", "TGA"),
)
# Seconds that a server may take.
TIMEOUT = 60.0
URLS = ("http://", "https://")
DATA_URI = re.compile(r"data:(.*?;base64,(?P<base64>.*)|[^,]*,(?P<plain>.*))", re.IGNORECASE | re.DOTALL)
# Of an array: grey, grey and alpha, RGB, RGB and alpha.
CHANNELS = (1, 2, 3, 4)
# Settings of an image processor that decide about its pixels.
PIXEL_SETTINGS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize"),
    *("image_mean", "image_std", "do_pad", "pad_size"),
)
# How far floats may be out of [0, 1]: half a level, which is rounded away.
SLACK = 1 / 510


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
    file, reason = io.BytesIO(content), None
    for name in FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        try:
            accepted = factory is not None and (accept is None or accept(content[:16]))
            # A string tells of a decoder that is not there.
            if accepted and not isinstance(accepted, str):
                with whole_files_only():
                    return factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error) as error:
            # It is of another format, or of a kind of this one that Pillow does not know.
            if accept is not None and reason is None:
                kind = describe_tiff(content) if name == "TIFF" else str(error) or type(error).__name__
                reason = f"it begins as {name} does, but this one cannot be decoded ({kind})"
        except Exception as error:
            raise ValueError(str(error) or type(error).__name__) from error
        file.seek(0)
    known = ", ".join(name for name in FORMATS if name in Image.OPEN)
    raise ValueError(reason or f"it is in none of the formats {known}")


def describe_tiff(content: bytes) -> str:
    """Kind of samples of a TIFF that Pillow does not know."""
    try:
        file = io.BytesIO(content)
        tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(16 if content[2:4] in (b"+\0", b"\0+") else 8))
        file.seek(tags.next)
        tags.load(file)
        bits = " + ".join(str(count) for count in tags[TiffImagePlugin.BITSPERSAMPLE])
        kinds = {1: "unsigned integers", 2: "integers", 3: "floats", 5: "complex integers", 6: "complex floats"}
        kind = tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0]
        return f"{bits} bits, {kinds.get(kind, f'sample format {kind}')}, byte order {tags.prefix.decode()}"
    except Exception as error:
        # What is raised on damaged tags is not documented.
        return f"damaged: {error}"


def load_image(image) -> Image.Image:
    """One picture as RGB, see `read_images` for what it may be. Raises `ValueError` when it cannot be read."""
    (image,) = read_images(image)
    return image


def read_images(image, layout: str | None = None, timeout: float | None = None) -> list[Image.Image]:
    """
    A picture, or those of a batch in one array, as RGB.

    Args:
        image: a `PIL.Image`; a path; an address, of `file://` too; base64, plain or as a data URI; the content of a
            file as bytes; an open binary file; an array or tensor, see `split_array`.
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
    if isinstance(image, str) and image[:5].lower() == "file:":
        place = urlsplit(image)
        return [read_file(url2pathname(place.netloc.removeprefix("localhost") + place.path))]
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
    # A name among its parameters may hold a comma.
    uri = DATA_URI.match(text)
    body = text if uri is None else uri["plain"] if uri["base64"] is None else uri["base64"]
    if uri:
        content = unquote_to_bytes(body)
        if uri["base64"] is None:
            return content, name
        body = content.decode(errors="replace")
    body = re.sub(r"\s+", "", body).rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        content = base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
        open_content(content)
    except ValueError as error:
        if uri:
            raise ValueError(f"{name} is no data URI of an image: {error}.") from error
        raise ValueError(f"There is no image file {name}, nor is it a base64-encoded image.") from error
    return content, name


def download(url: str, timeout: float) -> bytes:
    """What is at an address, in `timeout` seconds altogether. Raises `ValueError` when it is not to be had."""
    from huggingface_hub.utils import httpx

    async def get() -> bytes:
        # `httpx` limits each read, so a server could go on for ever.
        async with asyncio.timeout(timeout), httpx.AsyncClient(timeout=timeout, follow_redirects=True) as client:
            return (await client.get(url)).raise_for_status().content

    try:
        # In a thread, since the caller may be in an event loop.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(asyncio.run, get()).result()
    except TimeoutError as error:
        raise ValueError(f"{url} cannot be fetched in {timeout:g} seconds.") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"{url} cannot be fetched: {str(error) or type(error).__name__}.") from error


def split_array(array: np.ndarray | torch.Tensor, layout: str | None = None) -> list[Image.Image]:
    """
    The images of an array or tensor, in grey, grey and alpha, RGB, or RGB and alpha.

    Args:
        array: `(height, width)`; `(height, width, channels)` or `(channels, height, width)` with 1 to 4 channels; or a
            batch of either. Where both axes could be the channels, they are the last of a NumPy array and the first of
            a tensor. uint8; bool; uint16, where 65535 is white; other integers from 0 to 255; floats from 0 to 1, but
            for rounding errors, which are clipped.
        layout (`str`, *optional*): `"channels_first"` or `"channels_last"`.

    Raises:
        `ValueError`: on another shape, type or range.
    """
    last, slack = not isinstance(array, torch.Tensor), SLACK
    if isinstance(array, torch.Tensor):
        slack = max(slack, torch.finfo(array.dtype).eps) if array.is_floating_point() else slack
        array = to_numpy(array)
    # `array` may have the byte order of another machine.
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
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
    array = to_uint8(array, slack)
    pictures = array if array.ndim == 4 else array[None]
    return [Image.fromarray(np.squeeze(p, 2) if p.ndim == 3 and p.shape[2] == 1 else p) for p in pictures]


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The values of a tensor, floats as float32. Raises `ValueError` when it has none, or not one after another."""
    try:
        tensor = tensor.detach().cpu()
        return (tensor.float() if tensor.is_floating_point() else tensor).resolve_conj().numpy()
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"A tensor of {tensor.dtype} ({tensor.layout}, on {tensor.device}) is no image; give a dense one."
        ) from error


def to_uint8(array: np.ndarray, slack: float = SLACK) -> np.ndarray:
    """Values of an array as uint8, see `split_array`. Raises `ValueError` on another type or range.

    Floats may leave their range by `slack`.
    """
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"An array of {array.dtype} is no image; give uint8 or floats in [0, 1].")
    try:
        check_finite(array)
    except ValueError as error:
        raise ValueError(f"The {array.dtype} image cannot be read: {error}.") from error
    low, high = array.min().item(), array.max().item()
    white, slack = (1, slack) if array.dtype.kind == "f" else (255, 0)
    if low < -slack or high > white + slack:
        raise ValueError(
            f"The values of the {array.dtype} image run from {low:.9g} to {high:.9g}; they have to be in [0, {white}]. "
            "Bring them there, or give uint8."
        )
    levels = np.rint(array.astype(np.float32) * np.float32(255 / white))
    return levels.clip(0, 255, out=levels).astype(np.uint8)


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


class UniCode2BatchFeature(BatchFeature):
    """A batch whose `pixel_values`, which define the codes, stay in float32 whatever `to` converts the rest to."""

    def to(self, *args, **kwargs) -> "UniCode2BatchFeature":
        pixel_values = self.get("pixel_values")
        super().to(*args, **kwargs)
        if isinstance(pixel_values, torch.Tensor):
            self["pixel_values"] = pixel_values.to(self["pixel_values"].device)
        elif pixel_values is not None:
            pairs = zip(pixel_values, self["pixel_values"])
            self["pixel_values"] = [
                before.to(now.device) if isinstance(before, torch.Tensor) else before for before, now in pairs
            ]
        return self


class UniCode2ImageProcessor(SiglipImageProcessorPil):
    """
    SigLIP's or CLIP's image processor over the one reader of images: whatever an image is, it has the same pixels, and
    so codes.

    It resizes with Pillow whether torchvision is installed or not, and crops where the settings say so, as CLIP's do.
    Its settings are those of the encoder. They come from the checkpoint and cannot be changed for one call; with other
    settings it makes other codes.
    """

    _auto_class = "AutoImageProcessor"

    @classmethod
    def adopt(cls, image_processor):
        """One with the settings of a stock image processor of SigLIP or CLIP; any other image processor as it is."""
        if type(image_processor).__name__.removesuffix("Pil") not in ("SiglipImageProcessor", "CLIPImageProcessor"):
            return image_processor
        return cls(**image_processor.to_dict())

    def preprocess(self, images, *args, **kwargs) -> UniCode2BatchFeature:
        """
        Args:
            images: an image, a list, or a nested list of them. An image is what `read_images` takes.
            input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"`, of arrays.

        Returns:
            `pixel_values` `(num_images, 3, height, width)`, which stay in float32 under `to`.

        Raises:
            `ValueError`: on an image that cannot be read or is too long and thin to be resized, or a setting that would
                give other codes.
        """
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        self.check_settings(kwargs)
        opened = open_images(images, kwargs.pop("input_data_format", None))
        flat = [image for item in opened for image in (item if isinstance(item, list) else [item])]
        for image in flat:
            self.check_length(image)
        return UniCode2BatchFeature(super().preprocess(flat, *args, **kwargs).data)

    def check_length(self, image: Image.Image) -> None:
        """Raises `ValueError` when an image whose shortest edge is resized would become too long to be held."""
        edge = self.size.get("shortest_edge")
        if not (self.do_resize and edge):
            return
        short, long = sorted(image.size)
        length = edge * long // short
        if edge * length > MAX_PIXELS:
            raise ValueError(
                f"An image of {image.width} x {image.height} pixels would be resized to {edge} x {length}, more than "
                f"{MAX_PIXELS} pixels; crop it."
            )

    def check_settings(self, options: dict) -> None:
        """Raises `ValueError` when images in RGB of 8 bits are not brought to [0, 1], or options change the pixels."""
        given = {name: options[name] for name in PIXEL_SETTINGS if name in options}
        asked = type(self)(**{**self.to_dict(), **given}) if given else self
        if not asked.do_rescale or abs(asked.rescale_factor * 255 - 1) > 1e-6:
            raise ValueError(
                f"`do_rescale` is {asked.do_rescale} and `rescale_factor` {asked.rescale_factor:g}, but images are "
                "read as RGB of 8 bits, whatever they come as; leave them at True and 1/255."
            )
        for name, value in given.items():
            own = getattr(self, name)
            if (own or None) != (getattr(asked, name) or None):
                own = dict(own) if isinstance(own, SizeDict) else own
                raise ValueError(f"`{name}` is {value}, which gives other codes than the model's own {own}; leave it.")


def read_pixels_of(pipeline_class: type) -> None:
    """Has a pipeline of a model of ours read its images with `UniCode2ImageProcessor`, in float32.

    The stock one opens them by itself, loses transparency and all beyond 8 bits, and rounds the pixels.
    """
    preprocess = pipeline_class.preprocess

    @wraps(preprocess)
    def read_first(self, image, timeout=None, **settings):
        if not self.model.config.model_type.startswith("unicode2"):
            return preprocess(self, image, timeout=timeout, **settings)
        image_processor = UniCode2ImageProcessor.adopt(self.image_processor)
        return image_processor(read_images(image, timeout=timeout), return_tensors="pt", **settings)

    pipeline_class.preprocess = read_first


__all__ = ["UniCode2ImageProcessor", "decode_image", "load_image", "open_images", "read_images", "to_rgb"]
