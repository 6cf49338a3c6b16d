"""One reader of images: every kind of file has the pixels that a viewer shows, whatever way it comes in."""

import io
import os
import pickle
import socket
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from base64 import b64encode, encodebytes
from copy import deepcopy
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote_from_bytes

import numpy as np
import pytest
import torch
from pictures import SIDE, colors, make_pictures, ramp, save, tiff, tiff_of_channels, turned
from PIL import EpsImagePlugin, Image, ImageFile
from transformers import AutoImageProcessor, pipeline
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from transformers_unicode2 import UniCode2AnyToAnyPipeline, UniCode2FluxPipeline, UniCode2ImageProcessor
from transformers_unicode2.images_unicode2 import MAX_PIXELS, decode_image, load_image, read_images, to_rgb

PICTURES = make_pictures()
ASK = "<|image_pad|>what is this?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every picture as a file whose suffix says nothing, and as one without a suffix."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, (content, _, _) in enumerate(PICTURES.values()):
        (folder / f"{number:03d}.png").write_bytes(content)
        (folder / f"{number:03d}").write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def pixels(tiny_checkpoint):
    """What the image processor makes of the RGB of every picture: float32 `(num_pictures, 3, 64, 64)`."""
    images = [decode_image(content) for content, _, _ in PICTURES.values()]
    return AutoImageProcessor.from_pretrained(tiny_checkpoint)(images, return_tensors="pt")["pixel_values"]


@pytest.fixture
def server(folder):
    """Address of a server on this machine that has the files."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    handler.func.log_message = lambda *args: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def slow_server():
    """Address of a server that sends a byte every tenth of a second and never ends, in its header or in its body."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = listener.accept()
        in_header = b"/header" in connection.recv(4096)
        try:
            connection.sendall(b"HTTP/1.1 200 OK\r\n" + b"Content-Length: 1000\r\n\r\n" * (not in_header))
            while True:
                connection.sendall(b"X: 1\r\n" if in_header else b"X")
                time.sleep(0.1)
        except OSError:
            connection.close()

    threading.Thread(target=answer, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()


def chat(**part) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": "what is this?"}]}]


def names(equal: torch.Tensor) -> list[str]:
    """Pictures whose pixels are others."""
    return [name for name, same in zip(PICTURES, equal.flatten(1).all(1).tolist()) if not same]


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_read_as_it_is_seen(name):
    content, rgb, tolerance = PICTURES[name]
    image = decode_image(content)
    assert image.mode == "RGB" and np.asarray(image).shape == rgb.shape
    assert np.abs(np.asarray(image).astype(int) - rgb).max() <= tolerance
    assert np.array_equal(to_rgb(image), image)


def test_the_table_is_long_enough():
    assert len(PICTURES) >= 40


def read_to_the_end(file: io.BytesIO) -> io.BytesIO:
    file.read()
    return file


WAYS = {
    "path": lambda file, content: str(file.with_suffix(".png")),
    "path without suffix": lambda file, content: str(file),
    "Path": lambda file, content: file,
    "PIL": lambda file, content: Image.open(io.BytesIO(content)),
    "PIL of a path": lambda file, content: Image.open(file),
    "bytes": lambda file, content: content,
    "bytearray": lambda file, content: bytearray(content),
    "memoryview": lambda file, content: memoryview(content),
    "open file": lambda file, content: io.BytesIO(content),
    "open file, at its end": lambda file, content: read_to_the_end(io.BytesIO(content)),
    "base64": lambda file, content: b64encode(content).decode(),
    "base64 in lines": lambda file, content: encodebytes(content).decode(),
    "data URI": lambda file, content: f"data:image/png;base64,{b64encode(content).decode()}",
    "data URI in capitals": lambda file, content: f"DATA:image/png;Base64,{b64encode(content).decode()}",
    "data URI with a name": lambda file, content: f"data:image/png;name=a,b.png;base64,{b64encode(content).decode()}",
    "data URI without base64": lambda file, content: f"data:image/png,{quote_from_bytes(content)}",
    "address of a file": lambda file, content: file.as_uri(),
    "address of a file on this machine": lambda file, content: file.as_uri().replace("file:///", "FILE://localhost/"),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_processor_makes_the_same_pixels_of_every_form(way, processor, folder, pixels):
    images = [WAYS[way](folder / f"{n:03d}", content) for n, (content, _, _) in enumerate(PICTURES.values())]
    found = processor(images=images, return_tensors="pt")["pixel_values"]
    assert names(found == pixels) == []


def test_the_processor_makes_the_same_pixels_of_addresses(processor, server, pixels):
    images = [f"{server}/{n:03d}" for n in range(len(PICTURES))]
    assert names(processor(images=images, return_tensors="pt")["pixel_values"] == pixels) == []
    with pytest.raises(ValueError, match="/missing cannot be fetched: .*404"):
        processor(images=f"{server}/missing", return_tensors="pt")


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
def test_pil_images_have_the_pixels_of_their_file_or_are_refused(state, folder):
    refused = []
    for number, (name, (content, _, _)) in enumerate(PICTURES.items()):
        image = STATES[state](folder / f"{number:03d}", content)
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


@pytest.mark.parametrize("part", ["header", "body"])
def test_a_server_has_so_long_altogether(part, slow_server):
    with pytest.raises(ValueError, match=f"/{part} cannot be fetched in 0.5 seconds"):
        read_images(f"{slow_server}/{part}", timeout=0.5)


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


@pytest.mark.parametrize("way", ["image", "path", "url", "base64", "bytes", "image_url"])
def test_chats_have_the_same_pixels(way, processor, folder, pixels):
    found = []
    for number, (content, _, _) in enumerate(PICTURES.values()):
        text, file = b64encode(content).decode(), str(folder / f"{number:03d}")
        uri = f"data:image/png;base64,{text}"
        part = {
            "image": {"image": Image.open(io.BytesIO(content))},
            "path": {"path": file},
            "url": {"url": uri},
            "base64": {"base64": text},
            "bytes": {"image": content},
            "image_url": {"type": "image_url", "image_url": {"url": uri}},
        }[way]
        inputs = processor.apply_chat_template(chat(**part), tokenize=True, return_dict=True, return_tensors="pt")
        found.append(inputs["pixel_values"])
    assert names(torch.cat(found) == pixels) == []


@pytest.fixture(scope="module", params=["image-text-to-text", "any-to-any"])
def half_pipeline(request, tiny_checkpoint):
    options = {"pipeline_class": UniCode2AnyToAnyPipeline} if request.param == "any-to-any" else {}
    return pipeline(request.param, model=str(tiny_checkpoint), dtype=torch.bfloat16, **options)


@pytest.mark.parametrize("way", ["chat", "image", "file"])
def test_pipelines_in_half_precision_give_the_quantizer_the_same_pixels(
    way, half_pipeline, folder, pixels, monkeypatch
):
    read = []
    monkeypatch.setattr(
        half_pipeline.model, "generate", lambda **inputs: read.append(inputs["pixel_values"]) or inputs["input_ids"]
    )
    for number, (content, _, _) in enumerate(PICTURES.values()):
        file = str(folder / f"{number:03d}")
        if way == "chat":
            half_pipeline(text=chat(path=file))
        else:
            half_pipeline(text=ASK, images=file if way == "file" else Image.open(io.BytesIO(content)))
    assert names(torch.cat(read) == pixels) == []


@pytest.mark.parametrize("way", ["image", "file", "bytes"])
def test_the_image_processor_alone_makes_the_same_pixels(way, tiny_checkpoint, processor, folder, pixels):
    for image_processor in (AutoImageProcessor.from_pretrained(tiny_checkpoint), processor.image_processor):
        images = [
            {"image": Image.open(io.BytesIO(content)), "file": str(folder / f"{n:03d}"), "bytes": content}[way]
            for n, (content, _, _) in enumerate(PICTURES.values())
        ]
        found = image_processor(images, return_tensors="pt").to(torch.bfloat16)["pixel_values"]
        assert names(found == pixels) == []


@pytest.fixture(scope="module")
def quantizer_folder(tiny_model, tiny_checkpoint, tmp_path_factory):
    """A quantizer that was saved alone, with its image processor."""
    folder = tmp_path_factory.mktemp("quantizer")
    tiny_model.get_quantizer().save_pretrained(folder)
    AutoImageProcessor.from_pretrained(tiny_checkpoint).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("image_processor", "way"), [("its own", "file"), ("stock", "image")])
def test_pipelines_of_a_quantizer_make_the_same_codes(
    image_processor, way, quantizer_folder, tiny_model, folder, pixels
):
    options = {} if image_processor == "its own" else {"image_processor": stock_image_processor()}
    pipe = pipeline(
        "image-feature-extraction",
        model=str(quantizer_folder),
        dtype=torch.bfloat16,
        trust_remote_code=False,
        **options,
    )
    kinds = ("png alpha", "png palette alpha", "png 16 bits", "jpeg turned 6", "tiff floats to 1", "pgm 16 bits, dark")
    chosen = [list(PICTURES).index(name) for name in kinds]
    images = [
        str(folder / f"{n:03d}") if way == "file" else Image.open(io.BytesIO(PICTURES[name][0]))
        for n, name in zip(chosen, kinds)
    ]
    codes = torch.tensor(pipe(images)).flatten(1)
    assert torch.equal(codes, tiny_model.get_quantizer().encode_images(pixels[chosen]))


def stock_image_processor() -> SiglipImageProcessorPil:
    """That of unicode2-tiny as older checkpoints have it."""
    return SiglipImageProcessorPil(size={"height": 64, "width": 64})


def test_a_stock_image_processor_becomes_one_that_reads_alike(processor, tmp_path, pixels):
    old = type(processor)(stock_image_processor(), processor.tokenizer, patch_size=8)
    assert isinstance(old.image_processor, UniCode2ImageProcessor)
    old.save_pretrained(tmp_path / "new")
    new = AutoImageProcessor.from_pretrained(tmp_path / "new")
    assert new.to_dict() == processor.image_processor.to_dict()
    images = [content for content, _, _ in PICTURES.values()]
    assert names(new(images, return_tensors="pt")["pixel_values"] == pixels) == []


def test_flux_redraws_the_same_codes(tiny_checkpoint, tiny_model, folder, pixels):
    pipe = UniCode2FluxPipeline.from_pretrained(tiny_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    chosen = [list(PICTURES).index(name) for name in ("png alpha", "tiff 16 bits", "jpeg turned 6")]
    images = [str(folder / f"{n:03d}") for n in chosen]
    options = {"num_inference_steps": 1, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    tokens = tiny_model.get_image_tokens(pixels[chosen])
    assert torch.equal(pipe(image=images, **options).visual_token_ids, tokens)
    pipe.processor.attach_quantizer(tiny_model.get_quantizer(), tiny_model.config.visual_token_offset)
    assert torch.equal(pipe(image=images, **options).visual_token_ids, tokens)


@pytest.mark.parametrize("by_path", [False, True])
def test_tokenize_makes_the_codes_of_the_model(by_path, tiny_checkpoint, tiny_model, folder, pixels, tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    from transformers_unicode2.training import data, tokenize

    images = [
        {"bytes": None if by_path else content, "path": f"{n:03d}" if by_path else None}
        for n, (content, _, _) in enumerate(PICTURES.values())
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    (folder / "tables").mkdir(exist_ok=True)
    table = folder / "train-0.parquet"
    parquet.write_table(pa.table({"image": pa.array(images, kind), "caption": list(PICTURES)}), table)
    words = ["--data", str(folder), "--model", str(tiny_checkpoint), "--output", str(tmp_path)]
    tokenize.main(tokenize.make_parser().parse_args([*words, "--batch-size", str(len(images))]))
    codes = torch.tensor(parquet.read_table(tmp_path / "train-00000.parquet")["codes"].to_pylist()).squeeze(1)
    assert torch.equal(codes, tiny_model.get_quantizer().encode_images(pixels))
    rows = data.load_images(str(folder))
    collated = data.pixel_collator([rows[n] for n in range(len(images))])["pixel_values"]
    assert torch.allclose(collated, pixels, atol=1e-6)
    table.unlink()


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet", "paths", "arrow"])
def test_codebook_sources_have_the_same_pixels(kind, tiny_model, tiny_checkpoint, folder, pixels, tmp_path):
    import tarfile

    import pyarrow as pa
    from pyarrow import parquet

    from transformers_unicode2.codebook.features import Encoder, read_batches
    from transformers_unicode2.codebook.images import ImageSource

    contents = [content for content, _, _ in PICTURES.values()]
    path = tmp_path / f"images.{kind}"
    if kind == "folder":
        path = folder / "*.png"
    elif kind == "tar":
        with tarfile.open(path, "w") as tar:
            for file in sorted(folder.glob("*.png")):
                tar.add(file, file.name)
    elif kind == "arrow":
        table = pa.table({"image": contents})
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        path = tmp_path / "images.parquet" if kind == "parquet" else folder / "paths.parquet"
        images = contents if kind == "parquet" else [f"{n:03d}" for n in range(len(contents))]
        parquet.write_table(pa.table({"image": images}), path, row_group_size=7)
    tiny_model.get_quantizer().vision_model.save_pretrained(tmp_path / "encoder")
    AutoImageProcessor.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "encoder")
    source = ImageSource(str(path))
    (_, found, skipped), *_ = read_batches(source, Encoder(str(tmp_path / "encoder")), 0, len(source), len(source))
    assert skipped == [] and names(torch.stack(found) == pixels) == []


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


@pytest.fixture
def eps(tmp_path, monkeypatch):
    """An EPS under the name of a PNG, where a Ghostscript is that notes that it was started."""
    (tmp_path / "gs").write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "$@" >> {tmp_path}/ran\nexit 1\n')
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    file = tmp_path / "x.png"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) run\n%%EOF\n")
    yield file
    assert not (tmp_path / "ran").exists()


def test_ghostscript_is_never_started(eps, processor):
    content = eps.read_bytes()
    for image in (content, str(eps), b64encode(content).decode(), Image.open(io.BytesIO(content))):
        with pytest.raises(ValueError, match="no raster format|none of the formats|no image file"):
            processor(images=image, return_tensors="pt")
        with pytest.raises(ValueError):
            processor.apply_chat_template(chat(image=image), tokenize=True, return_dict=True, return_tensors="pt")


def test_pipelines_never_start_ghostscript(eps, half_pipeline):
    for words in ({"text": chat(path=str(eps))}, {"text": ASK, "images": str(eps)}):
        with pytest.raises(ValueError, match="none of the formats"):
            half_pipeline(**words)


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


def test_half_pixels_are_warned_of(tiny_model, pixels, caplog):
    from transformers.utils import logging

    logging.get_logger("transformers_unicode2.quantization_unicode2").propagate = True
    tiny_model.get_quantizer().encode_images(pixels[:1].bfloat16())
    assert "rounded pixels get other codes" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("is_stock", [False, True])
def test_code_of_a_quantizer_reads_alike(is_stock, quantizer_folder, tiny_model, folder, pixels, tmp_path):
    """Without the package: a quantizer alone, with its image processor or with a stock one."""
    torch.save(tiny_model.get_quantizer().encode_images(pixels), tmp_path / "codes.pt")
    stock_image_processor().save_pretrained(tmp_path / "stock")
    options = f"image_processor={str(tmp_path / 'stock')!r}, " if is_stock else ""
    script = f"""
        import sys, torch
        sys.modules["transformers_unicode2"] = None
        from transformers import pipeline
        folder, right = {str(quantizer_folder)!r}, torch.load({str(tmp_path / "codes.pt")!r})
        pipe = pipeline("image-feature-extraction", model=folder, {options}trust_remote_code=True, dtype=torch.bfloat16)
        codes = pipe([{str(folder)!r} + f"/{{number:03d}}" for number in range(len(right))])
        assert torch.equal(torch.tensor(codes).flatten(1), right)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=300)


@pytest.mark.slow
def test_code_that_travels_reads_alike_in_half_precision(tiny_model, processor, folder, pixels, tmp_path):
    """Without the package: chats and files in a stock pipeline."""
    tiny_model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    torch.save(pixels, tmp_path / "pixels.pt")
    script = f"""
        import sys, torch
        sys.modules["transformers_unicode2"] = None
        from transformers import pipeline
        folder = {str(tmp_path / "model")!r}
        pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True, dtype=torch.bfloat16)
        read, right = [], torch.load({str(tmp_path / "pixels.pt")!r})
        pipe.model.generate = lambda **inputs: read.append(inputs["pixel_values"]) or inputs["input_ids"]
        for number in range(len(right)):
            file = {str(folder)!r} + f"/{{number:03d}}"
            content = [{{"type": "image", "path": file}}, {{"type": "text", "text": "what?"}}]
            pipe(text=[{{"role": "user", "content": content}}])
            pipe(text={ASK!r}, images=file)
        assert torch.equal(torch.cat(read[::2]), right) and torch.equal(torch.cat(read[1::2]), right)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=300)
