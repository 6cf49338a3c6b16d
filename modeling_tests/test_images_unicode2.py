"""One reader of images: the same pixels, whatever way an image comes in."""

import io
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from base64 import b64encode, encodebytes
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote_from_bytes

import pytest
import torch
from pictures import make_pictures
from PIL import EpsImagePlugin, Image
from transformers import AutoImageProcessor, pipeline
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from transformers_unicode2 import UniCode2AnyToAnyPipeline, UniCode2FluxPipeline, UniCode2ImageProcessor
from transformers_unicode2.images_unicode2 import decode_image, read_images

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


@pytest.mark.parametrize("part", ["header", "body"])
def test_a_server_has_so_long_altogether(part, slow_server):
    with pytest.raises(ValueError, match=f"/{part} cannot be fetched in 0.5 seconds"):
        read_images(f"{slow_server}/{part}", timeout=0.5)


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
