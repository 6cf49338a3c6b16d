from base64 import b64encode

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, pipeline

from transformers_unicode2 import UniCode2AnyToAnyPipeline
from transformers_unicode2.demo import load_image


def write_odd_images(folder):
    """One file for each of the formats that people bring."""
    base = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    base.save(folder / "exif.jpg", exif=exif)
    base.convert("CMYK").save(folder / "cmyk.jpg")
    base_with_alpha = Image.new("RGBA", base.size)  # black where nothing is seen
    base_with_alpha.paste(
        base, mask=Image.linear_gradient("L").resize(base.size).point(lambda value: value // 128 * 255)
    )
    base_with_alpha.save(folder / "rgba.png")
    base.convert("P").save(folder / "palette.png")
    Image.fromarray(np.asarray(Image.linear_gradient("L")).astype(np.uint16) * 257).save(folder / "grey16.png")
    base.save(folder / "photo.webp")
    base.resize((4000, 50)).save(folder / "panorama.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_odd_images(tmp_path_factory.mktemp("images"))


def chat(file, text):
    return [{"role": "user", "content": [{"type": "image", "image": str(file)}, {"type": "text", "text": text}]}]


def test_image_text_to_text_reads_every_format(tiny_checkpoint, files):
    pipe = pipeline("image-text-to-text", model=str(tiny_checkpoint))
    for file in files:
        result = pipe(text=chat(file, "what color is the ground?"), max_new_tokens=8, return_full_text=False)
        assert isinstance(result[0]["generated_text"], str) and result[0]["generated_text"], file.name


def test_any_to_any_reads_and_draws(tiny_checkpoint, files):
    pipe = pipeline("any-to-any", model=str(tiny_checkpoint), pipeline_class=UniCode2AnyToAnyPipeline)
    for file in files:
        question = chat(file, "what color is the ground?")
        assert isinstance(pipe(text=question, max_new_tokens=8, return_full_text=False)[0]["generated_text"], str)
        image = pipe(text=chat(file, "draw it again"), generation_mode="image")[0]["generated_image"]
        assert isinstance(image, Image.Image) and image.size == (64, 64), file.name
    image = pipe(text=[{"role": "user", "content": "a red circle"}], generation_mode="image")[0]["generated_image"]
    assert image.size == (64, 64)


def test_saved_any_to_any_pipeline_keeps_the_processor(tiny_checkpoint, tmp_path):
    pipe = pipeline("any-to-any", model=str(tiny_checkpoint), pipeline_class=UniCode2AnyToAnyPipeline)
    pipe.save_pretrained(tmp_path)
    again = pipeline("any-to-any", model=str(tmp_path), pipeline_class=UniCode2AnyToAnyPipeline)
    assert {**again.processor.to_dict(), "auto_map": None} == {**pipe.processor.to_dict(), "auto_map": None}


def test_any_to_any_writes_text_and_images_in_turn(tiny_checkpoint):
    pipe = pipeline("any-to-any", model=str(tiny_checkpoint), pipeline_class=UniCode2AnyToAnyPipeline)
    boi = pipe.processor.boi_token_id
    begin = pipe.processor.tokenizer.decode([boi])
    options = {"do_sample": False, "sequence_bias": {(boi,): 1e4}, "max_new_tokens": 140}
    result = pipe(
        text=[{"role": "user", "content": "a red circle"}], generation_mode="interleaved", generate_kwargs=options
    )
    parts = result[0]["generated_interleaved"]
    assert [part["type"] for part in parts].count("image") == 2  # of 66 tokens each
    for part in parts:
        if part["type"] == "image":
            assert part["image"].size == (64, 64)
        else:
            assert begin not in part["text"]


def test_any_to_any_shows_what_was_written_wherever_the_mode_is_named(tiny_checkpoint):
    pipe = pipeline("any-to-any", model=str(tiny_checkpoint), pipeline_class=UniCode2AnyToAnyPipeline)
    parts = {"model": pipe.model, "processor": pipe.processor, "pipeline_class": UniCode2AnyToAnyPipeline}
    drawn = pipeline("any-to-any", **parts, generation_mode="image")
    message = [{"role": "user", "content": "a red circle"}]
    quick = {"max_plan_tokens": 0, "guidance_scale": 1.0}
    config = GenerationConfig(generation_mode="interleaved", max_new_tokens=np.int64(4))

    def ask(pipe, **kwargs):
        return next(name for name in pipe(text=message, **kwargs)[0] if name.startswith("generated_"))

    assert ask(drawn, generate_kwargs=quick) == "generated_image"
    assert ask(drawn, generation_mode="text", max_new_tokens=np.int64(4)) == "generated_text"
    assert ask(pipe, generate_kwargs={**quick, "generation_mode": "image"}) == "generated_image"
    assert ask(pipe, generate_kwargs={"generation_config": config}) == "generated_interleaved"
    assert ask(pipe, max_new_tokens=4) == "generated_text"
    with pytest.raises(ValueError, match="`generation_mode` is 'video'"):
        ask(pipe, generation_mode="video")


def test_pixels_of_a_picture_do_not_depend_on_how_it_is_handed_over(processor, files):
    for file in files:
        pixels = processor(images=load_image(file), return_tensors="pt")["pixel_values"]
        with Image.open(file) as raw:
            assert torch.equal(processor(images=raw, return_tensors="pt")["pixel_values"], pixels), file
        assert torch.equal(processor(images=str(file), return_tensors="pt")["pixel_values"], pixels), file
        inputs = processor.apply_chat_template(
            chat(file, "what is this?"), tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert torch.equal(inputs["pixel_values"], pixels), file


def test_images_that_are_no_files_are_read_or_named(processor, files):
    base64 = b64encode(files[0].read_bytes()).decode()
    for image in (base64, f"data:image/jpeg;base64,{base64}", np.zeros((64, 64, 3), np.uint8)):
        assert processor(images=image, return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="There is no image file missing.png"):
        processor(images="missing.png", return_tensors="pt")


def test_saved_stock_pipeline_reads_images(tiny_checkpoint, files, tmp_path):
    pipe = pipeline("image-text-to-text", model=str(tiny_checkpoint))
    pipe.save_pretrained(tmp_path)
    again = pipeline("image-text-to-text", model=str(tmp_path))
    messages = chat(str(files[0]), "what is this?")
    assert again(text=messages, max_new_tokens=4) == pipe(text=messages, max_new_tokens=4)


def test_message_that_says_nothing_is_refused(processor):
    with pytest.raises(ValueError, match="Message 1 of 1 is empty"):
        processor.apply_chat_template([{"role": "user", "content": " "}])
