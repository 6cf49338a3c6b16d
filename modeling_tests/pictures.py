"""One picture in every common kind of file, each beside the RGB that a viewer shows, computed with NumPy alone."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, TiffImagePlugin

SIDE = 64
ORIENTATION = 0x0112
# By EXIF orientation: from the stored picture to the one that is shown.
TURNS: dict[int, Callable] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: lambda a: np.rot90(a),
}
# Content, RGB, tolerance in levels.
Picture = tuple[bytes, np.ndarray, int]


def ramp() -> np.ndarray:
    """Grey without symmetry, uint8 `(64, 64)`."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return (columns * 3 + rows).astype(np.uint8)


def colors() -> np.ndarray:
    """A smooth picture without symmetry, uint8 `(64, 64, 3)`."""
    grey = ramp()
    return np.stack([grey, 255 - grey[::-1], grey.T // 2], -1)


def alpha() -> np.ndarray:
    """From clear to solid, uint8 `(64, 64)`."""
    return np.tile(np.linspace(0, 255, SIDE).round().astype(np.uint8), (SIDE, 1))


def on_white(rgb: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    share = opacity[..., None].astype(float) / 255
    return np.rint(rgb * share + 255 * (1 - share)).astype(np.uint8)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, -1)


def save(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def png(depth: int, color: int, rows: list[bytes], *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that Pillow does not write. `color` is 0 grey, 2 RGB, 3 palette, 4 grey and alpha, or 6 RGB and alpha."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, depth, color, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*part) for part in chunks) + data + chunk(b"IEND", b"")


def tiff(
    values: np.ndarray, bits: int, sample_format: int = 1, photometric: int = 1, data: bytes | None = None
) -> bytes:
    """A grey TIFF that Pillow does not write, in the byte order of the array."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    data = values.tobytes() if data is None else data
    tags = {
        **{256: values.shape[1], 257: values.shape[0], 258: bits, 259: 1, 262: photometric, 273: 8 + 2 + 10 * 12 + 4},
        **{277: 1, 278: values.shape[0], 279: len(data), 339: sample_format},
    }
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags.items())
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "IH", 8, len(tags)) + entries + b"\0\0\0\0" + data


def tiff_of_channels(
    values: np.ndarray, photometric: int, extra: int | None = None, in_planes: bool = False, sample_format: int = 1
) -> bytes:
    """A TIFF of 3 or more channels by hand, `(height, width, channels)`, one pixel after another or one plane."""
    height, width, channels = values.shape
    planes = [plane.tobytes() for plane in values.transpose(2, 0, 1)] if in_planes else [values.tobytes()]
    tags = {
        **{256: [width], 257: [height], 258: [values.itemsize * 8] * channels, 259: [1], 262: [photometric]},
        **{273: [0] * len(planes), 277: [channels], 278: [height], 279: [len(plane) for plane in planes]},
        **{284: [2 if in_planes else 1], 339: [sample_format] * channels},
    }
    if extra is not None:
        tags[338] = [extra]
    place = 8 + 2 + 12 * len(tags) + 4
    end = place + sum(4 * len(numbers) for numbers in tags.values() if len(numbers) > 1)
    tags[273] = [end + sum(map(len, planes[:number])) for number in range(len(planes))]
    entries, lists = b"", b""
    for tag, numbers in sorted(tags.items()):
        is_list = len(numbers) > 1
        entries += struct.pack("<HHII", tag, 4, len(numbers), place + len(lists) if is_list else numbers[0])
        lists += struct.pack(f"<{len(numbers)}I", *numbers) if is_list else b""
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + b"\0" * 4 + lists + b"".join(planes)


def pack(values: np.ndarray, bits: int) -> list[bytes]:
    """Rows of values of 1, 2, 4 or 12 bits, the first in the highest bits."""
    digits = (values[..., None].astype(int) >> np.arange(bits)[::-1]) & 1
    return [np.packbits(row.ravel()).tobytes() for row in digits.astype(np.uint8)]


def reduce_colors(rgb: np.ndarray, count: int) -> tuple[Image.Image, np.ndarray]:
    """A palette image with `count` colors, and the RGB that it shows."""
    palette = Image.fromarray(rgb).quantize(count)
    return palette, np.array(palette.getpalette("RGB"), np.uint8).reshape(-1, 3)[np.asarray(palette)]


def make_pngs() -> dict[str, Picture]:
    rgb, opacity = colors(), alpha()
    wide_rgb, wide_alpha = rgb.astype(">u2") * 257, opacity.astype(">u2") * 257
    second = Image.fromarray(255 - rgb)
    corner = np.where((rgb == rgb[3, 3]).all(-1, keepdims=True), 255, rgb).astype(np.uint8)
    clear, clear_wide = tuple(rgb[3, 3].tolist()), (b"tRNS", wide_rgb[3, 3].tobytes())
    deep = list(map(bytes, wide_rgb))
    deep_alpha = list(map(bytes, np.dstack([wide_rgb, wide_alpha])))
    return {
        "png": (save(rgb, "PNG"), rgb, 0),
        "png alpha": (save(np.dstack([rgb, opacity]), "PNG"), on_white(rgb, opacity), 1),
        "png clear color": (save(rgb, "PNG", transparency=clear), corner, 0),
        "png rgb 16 bits": (png(16, 2, deep), rgb, 0),
        "png rgb 16 bits clear color": (png(16, 2, deep, clear_wide), corner, 0),
        "png rgb 16 bits alpha": (png(16, 6, deep_alpha), on_white(rgb, opacity), 1),
        "png turned": (save(rgb, "PNG", exif=turned(6)), TURNS[6](rgb), 0),
        "apng": (save(rgb, "PNG", save_all=True, append_images=[second]), rgb, 0),
    }


def make_grey_pngs() -> dict[str, Picture]:
    opacity, level = alpha(), ramp()
    wide = level.astype(np.uint16) * 257
    # Values from 0 to 3, from 0 to 15, and from 0 to 1.
    few, some, dots = level // 64, level // 16, level > 100
    without_100 = grey(np.where(level == 100, 255, level))
    deep, clear_wide = list(map(bytes, wide.astype(">u2"))), (b"tRNS", struct.pack(">H", 100 * 257))
    deep_alpha = list(map(bytes, np.dstack([wide.astype(">u2"), opacity.astype(">u2") * 257])))
    clear_dots = png(1, 0, pack(dots, 1), (b"tRNS", b"\0\0"))
    clear_few = png(2, 0, pack(few, 2), (b"tRNS", b"\0\1"))
    clear_some = png(4, 0, pack(some, 4), (b"tRNS", b"\0\3"))
    return {
        "png grey": (save(level, "PNG"), grey(level), 0),
        "png grey alpha": (save(np.dstack([level, opacity]), "PNG"), on_white(grey(level), opacity), 1),
        "png grey clear value": (save(level, "PNG", transparency=100), without_100, 0),
        "png 1 bit": (save(dots, "PNG"), grey(dots * 255), 0),
        "png 1 bit clear value": (clear_dots, grey(np.full_like(level, 255)), 0),
        "png 2 bits": (png(2, 0, pack(few, 2)), grey(few * 85), 0),
        "png 2 bits clear value": (clear_few, grey(np.where(few == 1, 255, few * 85)), 0),
        "png 4 bits": (png(4, 0, pack(some, 4)), grey(some * 17), 0),
        "png 4 bits clear value": (clear_some, grey(np.where(some == 3, 255, some * 17)), 0),
        "png 16 bits": (save(wide, "PNG"), grey(level), 0),
        "png 16 bits clear value": (png(16, 0, deep, clear_wide), without_100, 0),
        "png 16 bits alpha": (png(16, 4, deep_alpha), on_white(grey(level), opacity), 1),
        "png 16 bits turned": (save(wide, "PNG", exif=turned(5)), grey(TURNS[5](level)), 0),
    }


def make_palettes() -> dict[str, Picture]:
    palette, shown = reduce_colors(colors(), 200)
    second = Image.fromarray(255 - colors()).quantize(100)
    hole = np.where((np.asarray(palette) == 5)[..., None], 255, shown).astype(np.uint8)
    steps = np.linspace(255, 0, 200).round().astype(np.uint8)
    faded = on_white(shown, steps[np.asarray(palette)])
    few, few_shown = reduce_colors(colors(), 64)
    return {
        "png palette": (save(palette, "PNG"), shown, 0),
        "png palette clear entry": (save(palette, "PNG", transparency=5), hole, 0),
        "png palette alpha": (save(palette, "PNG", transparency=steps.tobytes()), faded, 1),
        "tiff palette": (save(few, "TIFF"), few_shown, 0),
        "gif": (save(palette, "GIF"), shown, 0),
        "gif clear entry": (save(palette, "GIF", transparency=5), hole, 0),
        "gif animated": (save(palette, "GIF", save_all=True, append_images=[second]), shown, 0),
        "bmp palette": (save(palette, "BMP"), shown, 0),
    }


def make_photos() -> dict[str, Picture]:
    rgb, opacity, level = colors(), alpha(), ramp()
    image, second = Image.fromarray(rgb), Image.fromarray(255 - rgb)
    clear = np.dstack([rgb, opacity])
    deep = Image.fromarray(level.astype(np.uint16) * 257)
    pictures = {f"jpeg turned {n}": (save(rgb, "JPEG", quality=95, exif=turned(n)), TURNS[n](rgb), 12) for n in TURNS}
    return pictures | {
        "jpeg grey": (save(level, "JPEG", quality=95), grey(level), 6),
        "jpeg progressive": (save(rgb, "JPEG", quality=95, progressive=True), rgb, 12),
        "jpeg cmyk": (save(image.convert("CMYK"), "JPEG", quality=95), rgb, 24),
        "jpeg of several": (save(rgb, "MPO", quality=95, save_all=True, append_images=[second]), rgb, 12),
        "webp": (save(rgb, "WEBP", lossless=True), rgb, 0),
        "webp alpha": (save(clear, "WEBP", lossless=True, exact=True), on_white(rgb, opacity), 1),
        "webp lossy": (save(rgb, "WEBP", quality=95), rgb, 16),
        "webp turned": (save(rgb, "WEBP", lossless=True, exif=turned(8)), TURNS[8](rgb), 0),
        "webp animated": (save(rgb, "WEBP", lossless=True, save_all=True, append_images=[second]), rgb, 0),
        "avif": (save(rgb, "AVIF", quality=95), rgb, 16),
        "avif alpha": (save(clear, "AVIF", quality=95), on_white(rgb, opacity), 16),
        "avif turned": (save(rgb, "AVIF", quality=95, exif=turned(3)), TURNS[3](rgb), 16),
        "jpeg 2000": (save(rgb, "JPEG2000"), rgb, 0),
        "jpeg 2000 alpha": (save(clear, "JPEG2000"), on_white(rgb, opacity), 1),
        "jpeg 2000 16 bits": (save(deep, "JPEG2000"), grey(level), 0),
    }


def make_tiffs() -> dict[str, Picture]:
    rgb, opacity, level = colors(), alpha(), ramp()
    image = Image.fromarray(rgb)
    turn = TiffImagePlugin.ImageFileDirectory_v2()
    turn[ORIENTATION] = 6
    return {
        "tiff": (save(rgb, "TIFF"), rgb, 0),
        "tiff lzw": (save(rgb, "TIFF", compression="tiff_lzw"), rgb, 0),
        "tiff alpha": (save(np.dstack([rgb, opacity]), "TIFF"), on_white(rgb, opacity), 1),
        "tiff turned": (save(rgb, "TIFF", tiffinfo=turn), TURNS[6](rgb), 0),
        "tiff in planes": (tiff_of_channels(rgb, 2, in_planes=True), rgb, 0),
        "tiff rgb 16 bits": (tiff_of_channels(rgb.astype("<u2") * 257, 2), rgb, 0),
        "tiff pages": (save(rgb, "TIFF", save_all=True, append_images=[Image.fromarray(255 - rgb)]), rgb, 0),
        "tiff cmyk": (save(image.convert("CMYK"), "TIFF"), rgb, 2),
        # Lab lacks some of the colors.
        "tiff lab": (save(image.convert("LAB"), "TIFF"), rgb, 24),
        "tiff 1 bit": (save(level > 100, "TIFF", compression="group4"), grey((level > 100) * 255), 0),
    }


def make_grey_tiffs() -> dict[str, Picture]:
    level = ramp()
    wide, stretched = level.astype(np.uint16) * 257, grey(np.rint(level * (255 / level.max())))
    # 255 becomes 2**32 - 1.
    whole = level.astype(np.uint32) * 16843009
    packed = tiff(level.astype("<u2") * 16, 12, data=b"".join(pack(level.astype(int) * 16, 12)))
    return {
        "tiff 12 bits": (packed, grey(np.rint(level * (16 * 255 / 4095))), 1),
        "tiff 16 bits": (tiff(wide.astype("<u2"), 16), grey(level), 0),
        "tiff 16 bits, largest byte first": (tiff(wide.astype(">u2"), 16), grey(level), 0),
        "tiff 16 bits, 0 is white": (tiff(wide.astype("<u2"), 16, photometric=0), grey(255 - level), 0),
        "tiff 32 bits of 8": (tiff(level.astype("<i4"), 32, 2), grey(level), 0),
        "tiff 32 bits of 16": (tiff(wide.astype("<i4"), 32, 2), grey(level), 0),
        "tiff 32 bits, largest byte first": (tiff(wide.astype(">i4"), 32, 2), grey(level), 0),
        "tiff 32 bits unsigned": (tiff(whole.astype("<u4"), 32), stretched, 1),
        "tiff 32 bits negative": (tiff(level.astype("<i4") * 1000 - 100_000, 32, 2), stretched, 1),
        "tiff floats to 1": (tiff((level / 255).astype("<f4"), 32, 3), grey(level), 0),
        "tiff floats to 255": (tiff(level.astype("<f4"), 32, 3), grey(level), 0),
        "tiff floats, largest byte first": (tiff((level / 255).astype(">f4"), 32, 3), grey(level), 0),
        "tiff floats beyond": (tiff(level.astype("<f4") * 9 - 300, 32, 3), stretched, 1),
    }


def make_others() -> dict[str, Picture]:
    rgb, opacity, level = colors(), alpha(), ramp()
    clear = np.dstack([rgb, opacity])
    wide = level.astype(np.uint16) * 257
    return {
        "bmp": (save(rgb, "BMP"), rgb, 0),
        "bmp 1 bit": (save(level > 100, "BMP"), grey((level > 100) * 255), 0),
        "tga": (save(rgb, "TGA"), rgb, 0),
        "tga alpha": (save(clear, "TGA", compression="tga_rle"), on_white(rgb, opacity), 1),
        "ico": (save(clear, "ICO", sizes=[(SIDE, SIDE)]), on_white(rgb, opacity), 1),
        "pcx": (save(rgb, "PCX"), rgb, 0),
        "ppm": (save(rgb, "PPM"), rgb, 0),
        "pgm": (save(level, "PPM"), grey(level), 0),
        "pbm": (save(level > 100, "PPM"), grey((level > 100) * 255), 0),
        "pgm 16 bits": (b"P5 64 64 65535\n" + wide.astype(">u2").tobytes(), grey(level), 0),
        "pgm 16 bits, dark": (b"P5 64 64 65535\n" + level.astype(">u2").tobytes(), grey(np.rint(level / 257)), 0),
        "ppm 16 bits": (b"P6 64 64 65535\n" + (rgb.astype(">u2") * 257).tobytes(), rgb, 0),
        "pfm": (b"Pf\n64 64\n-1.0\n" + (level / 255).astype("<f4")[::-1].tobytes(), grey(level), 0),
        "qoi": (save(rgb, "QOI"), rgb, 0),
        "qoi alpha": (save(clear, "QOI"), on_white(rgb, opacity), 1),
        "dds": (save(rgb, "DDS"), rgb, 0),
        "dds alpha": (save(clear, "DDS"), on_white(rgb, opacity), 1),
        "sgi": (save(rgb, "SGI"), rgb, 0),
    }


def make_pictures() -> dict[str, Picture]:
    parts = (make_pngs, make_grey_pngs, make_palettes, make_photos, make_tiffs, make_grey_tiffs, make_others)
    return {name: picture for make in parts for name, picture in make().items()}
