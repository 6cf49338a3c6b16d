import copy
from inspect import signature

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, ProcessorMixin

from transformers_unicode2 import UniCode2Processor, UniCode2Quantizer

ASK = "<|image_pad|>what is this?"


def test_image_becomes_one_block_of_placeholders(processor, photo):
    batch = processor(images=photo, text="<|image_pad|>what is this?", return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 64, 64)
    assert (batch["input_ids"] == processor.image_token_id).sum() == processor.num_image_tokens == 64
    assert batch["input_ids"][0, 0] == processor.boi_token_id
    assert batch["input_ids"][0, 65] == processor.eoi_token_id


def test_attached_quantizer_gives_the_ids_that_the_model_computes(processor, tiny_model, photo):
    text = ["<|image_pad|> and <|image_pad|>?", "no image"]
    plain = processor(images=[photo, photo.rotate(90)], text=text, padding=True, return_tensors="pt")
    try:
        offset = tiny_model.config.visual_token_offset
        processor.attach_quantizer(tiny_model.get_quantizer(), offset)
        ids = processor(images=[photo, photo.rotate(90)], text=text, padding=True, return_tensors="pt")
        assert "quantizer" not in processor.to_dict()
    finally:
        processor.quantizer = None
    expected = plain["input_ids"].clone()
    expected[expected == processor.image_token_id] = tiny_model.get_image_tokens(plain["pixel_values"]).flatten()
    assert torch.equal(ids["input_ids"], expected)
    assert "pixel_values" not in ids
    assert ids["input_ids"][1, 0] == processor.tokenizer.pad_token_id  # padded on the left


def test_load_after_save_gives_an_equal_processor(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert {**loaded.to_dict(), "auto_map": None} == {**processor.to_dict(), "auto_map": None}
    assert loaded.chat_template == processor.chat_template


def test_chat_template_marks_what_the_assistant_says(processor, photo):
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": "what is this?"}]},
        {"role": "assistant", "content": "noise"},
    ]
    batch = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    said = batch["input_ids"][batch["assistant_masks"].bool()]
    assert processor.decode(said) == "noise<|im_end|>"


def test_bad_prompts_are_refused(processor, photo):
    with pytest.raises(ValueError, match="Prompt 2 of 2 is empty"):
        processor(text=["a cat", " "])
    with pytest.raises(ValueError, match="places for 2 images, and 1 are given"):
        processor(images=photo, text="<|image_pad|><|image_pad|>")


def test_images_come_back_as_pictures(processor):
    pixels = torch.rand(2, 3, 8, 8)
    images = processor.post_process_multimodal_output(pixels, generation_mode="image")
    assert all(isinstance(image, Image.Image) and image.size == (8, 8) for image in images)


def test_package_template_has_the_tokens_of_the_processor(processor):
    parts = copy.deepcopy(processor.image_processor), processor.tokenizer
    own = UniCode2Processor(*parts, image_token="<|vision_end|>", eoi_token="<|image_pad|>")
    assert own.chat_template == processor.chat_template.replace("<|image_pad|>", "<|vision_end|>")
    assert "$" not in own.chat_template
    assert UniCode2Processor(*parts, chat_template="{{ messages }}").chat_template == "{{ messages }}"


def test_tools_are_written_as_qwen_reads_them(processor):
    fresh = UniCode2Processor(copy.deepcopy(processor.image_processor), processor.tokenizer)
    assert processor.chat_template == fresh.chat_template
    tool = {"type": "function", "function": {"name": "draw", "parameters": {"type": "object", "properties": {}}}}
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a cat"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "draw", "arguments": {"n": 1}}}]},
        {"role": "tool", "content": "done"},
        {"role": "tool", "content": "twice"},
    ]
    text = processor.apply_chat_template(chat, tools=[tool], add_generation_prompt=True, tokenize=False)
    assert text.startswith("<|im_start|>system\nbe brief\n\n# Tools\n\nYou may call one or more functions")
    assert text.count("be brief") == 1 and '<tools>\n{"type": "function", ' in text
    assert text.endswith(
        "<|im_start|>user\na cat<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "draw", "arguments": {"n": 1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\ndone\n</tool_response>\n<tool_response>\ntwice\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_sides(processor, photo, side):
    text = ["<|image_pad|>what?", "no image at all"]
    batch = processor(images=photo, text=text, padding=True, padding_side=side, return_tensors="pt")
    lengths = batch["attention_mask"].sum(-1).tolist()
    assert batch["input_ids"].shape[0] == 2 and lengths[0] > lengths[1]
    pad = batch["input_ids"][1] == processor.tokenizer.pad_token_id
    where = pad[: -lengths[1]] if side == "left" else pad[lengths[1] :]
    assert where.all() and pad.sum() == lengths[0] - lengths[1]


def test_text_alone_and_several_images_in_one_text(processor, photo):
    assert "pixel_values" not in processor(text="just words", return_tensors="pt")
    batch = processor(images=[photo] * 3, text=["<|image_pad|><|image_pad|>?", "<|image_pad|>"], padding=True)
    counts = [row.count(processor.image_token_id) for row in batch["input_ids"]]
    assert counts == [2 * processor.num_image_tokens, processor.num_image_tokens]


def test_text_of_a_generation(processor):
    ids = processor.tokenizer("a red star<|im_end|>", return_tensors="pt")["input_ids"]
    assert processor.post_process_image_text_to_text(ids) == ["a red star"]
    assert processor.post_process_multimodal_output(ids) == ["a red star"]


def test_codebook_is_never_copied(processor, tiny_model):
    processor.attach_quantizer(tiny_model.get_quantizer(), tiny_model.config.visual_token_offset)
    try:
        assert copy.deepcopy(processor).quantizer is processor.quantizer
        assert "quantizer" not in processor.to_dict()
    finally:
        processor.quantizer = None


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"text": []}, "`text` is an empty list"),
        ({"text": 3}, "`text` is 3; it must be a string"),
        (
            {"text": "<|image_pad|>", "images": Image.new("RGB", (9, 9)), "size": {"height": 32, "width": 32}},
            r"`size` is \{'height': 32, 'width': 32\}, which gives other codes",
        ),
        (
            {
                "text": ["<|image_pad|><|image_pad|>", "<|image_pad|>"],
                "images": [[Image.new("RGB", (9, 9))], [Image.new("RGB", (9, 9))] * 2],
            },
            r"places for \[2, 1\] images, and \[1, 2\] are given",
        ),
    ],
)
def test_input_that_does_not_fit_is_refused(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(return_tensors="pt", **arguments)


def test_chat_parts_that_cannot_be_read_are_refused(processor):
    chat = [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "what?"}]}]
    with pytest.raises(Exception, match="part of type video"):
        processor.apply_chat_template(chat, tokenize=False)


def test_written_images_are_split_from_the_text(processor):
    image = torch.arange(64) + 768
    words = processor.tokenizer("a red circle", return_tensors="pt")["input_ids"][0]
    boi, eoi = torch.tensor([processor.boi_token_id]), torch.tensor([processor.eoi_token_id])
    parts = processor.split_images(torch.cat([words, boi, image, eoi, words, boi, image + 1, eoi]))
    assert [part["type"] for part in parts] == ["text", "image", "text", "image"]
    assert parts[0]["text"] == parts[2]["text"] == "a red circle"
    assert torch.equal(parts[1]["visual_token_ids"], image) and torch.equal(parts[3]["visual_token_ids"], image + 1)


@pytest.fixture
def attached(processor, tiny_model):
    """A processor with a quantizer, and ids as in the model."""
    return copy.deepcopy(processor).attach_quantizer(tiny_model.get_quantizer(), tiny_model.config.visual_token_offset)


@pytest.mark.parametrize(
    ("images", "texts"), [([], "hello"), ([[]], "hello"), ([[], []], ["hello", "a cat"]), ((), ["hello"])]
)
def test_no_images_are_no_images(processor, attached, images, texts):
    for one in (processor, attached):
        batch = one(images=images, text=texts)
        assert batch["input_ids"] == processor(text=texts)["input_ids"] and "pixel_values" not in batch
    with pytest.raises(ValueError, match="at least one input"):
        processor(images=images)
    with pytest.raises(ValueError, match="places for 1 images, and 0 are given"):
        processor(images=[], text=ASK)


@pytest.mark.parametrize(("kind", "expected"), [("pt", torch.Tensor), ("np", np.ndarray), (None, list)])
def test_a_quantizer_keeps_the_kind_of_tensors(processor, attached, tiny_model, photo, kind, expected):
    images = [photo, photo.rotate(90)]
    tokens = tiny_model.get_image_tokens(processor(images=images, return_tensors="pt")["pixel_values"])
    alone = attached(images=images, return_tensors=kind)
    assert list(alone) == ["visual_token_ids"] and type(alone["visual_token_ids"]) is expected
    assert torch.equal(torch.as_tensor(alone["visual_token_ids"]), tokens)
    texts = [ASK, "<|image_pad|>" + "what? " * 20]
    batch = attached(images=images, text=texts, padding=True, return_tensors=kind)
    assert batch.pop("visual_token_offset") == 768 and "pixel_values" not in batch
    assert all(type(value) is expected for value in batch.values())
    ids = torch.as_tensor(batch["input_ids"])
    assert ids.dtype == torch.int64 and torch.equal(ids[ids >= 768].view(2, -1), tokens)
    ragged = attached(images=images, text=texts)["input_ids"]
    assert [len(row) for row in ragged] == torch.as_tensor(batch["attention_mask"]).sum(1).tolist()


def test_images_may_be_nested_or_one_array(processor, attached, photo):
    other, third = photo.rotate(90), photo.rotate(180)
    texts = ["<|image_pad|><|image_pad|>?", "no image", ASK]
    flat = processor(images=[photo, other, third], text=texts, padding=True, return_tensors="pt")
    same = [np.asarray(image.resize((64, 64))) for image in (photo, other, third)]
    as_batch = processor(images=np.stack(same), text=texts, padding=True, return_tensors="pt")
    as_list = processor(images=same, text=texts, padding=True, return_tensors="pt")
    assert torch.equal(as_batch["pixel_values"], as_list["pixel_values"])
    for images in ([[photo, other], [], [third]], ((photo, other), (), (third,)), [np.stack(same[:2]), same[2]]):
        batch = processor(images=images, text=texts, padding=True, return_tensors="pt")
        assert torch.equal(batch["input_ids"], flat["input_ids"]) and len(batch["pixel_values"]) == 3
        assert attached(images=images, text=texts, padding=True, return_tensors="pt")["input_ids"].max() >= 768
    with pytest.raises(ValueError, match=r"places for \[2, 0, 1\] images, and \[1, 1, 1\] are given"):
        processor(images=[[photo], [other], [third]], text=texts)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "max_length", "max_length": 100},
        {"padding": True, "padding_side": "right"},
        {"padding": True, "pad_to_multiple_of": 8},
        {"truncation": True, "max_length": 100},
        {"text_kwargs": {"padding": "max_length", "max_length": 90}},
        {"return_mm_token_type_ids": True},
        {"return_attention_mask": False},
    ],
)
def test_options_of_the_text_are_followed_with_a_quantizer(processor, attached, photo, options):
    plain = processor(images=photo, text=ASK, return_tensors="pt", **options)
    batch = attached(images=photo, text=ASK, return_tensors="pt", **options)
    assert set(plain) - {"pixel_values"} == set(batch) - {"visual_token_offset"}
    places = plain["input_ids"] == processor.image_token_id
    assert torch.equal(batch["input_ids"][~places], plain["input_ids"][~places])
    assert places.sum() == 64 and (batch["input_ids"][places] >= 768).all()


def test_truncation_through_an_image_is_refused(processor, attached, photo):
    for one in (processor, attached):
        with pytest.raises(ValueError, match="Mismatch in `image` token count"):
            one(images=photo, text=ASK, truncation=True, max_length=30)


@pytest.mark.parametrize("offset", [np.int64(768), np.int32(768), torch.tensor(768), np.array(768)])
def test_the_offset_may_be_a_scalar_of_any_library(processor, attached, tiny_model, photo, offset):
    other = copy.deepcopy(processor).attach_quantizer(tiny_model.get_quantizer(), offset)
    assert other(images=photo, text=ASK)["input_ids"] == attached(images=photo, text=ASK)["input_ids"]
    assert type(other.visual_token_offset) is int


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (768.5, "must be an integer"),
        (None, "must be an integer"),
        ("768", "must be an integer"),
        (700, "among the"),
        (770, "begin at 768"),
    ],
)
def test_offsets_that_are_not_those_of_the_model_are_refused(processor, tiny_model, offset, message):
    with pytest.raises(ValueError, match=message):
        copy.deepcopy(processor).attach_quantizer(tiny_model.get_quantizer(), offset)


def test_a_model_that_was_resized_is_noticed(processor, model, config, photo):
    """Its visual ids have moved; codes at the old ones would be text, or other codes."""
    processor = copy.deepcopy(processor)
    processor.patch_size, processor.image_processor.size = 8, {"height": 32, "width": 32}
    processor.attach_quantizer(model.get_quantizer(), config.visual_token_offset)
    before = torch.tensor(processor(images=photo, text=ASK)["input_ids"])
    model.resize_token_embeddings(800)
    with pytest.raises(ValueError, match="from 768 on are not those of the quantizer's model, which begin at 800"):
        processor(images=photo, text=ASK)
    processor.attach_quantizer(model.get_quantizer(), model.config.visual_token_offset)
    after = torch.tensor(processor(images=photo, text=ASK)["input_ids"])
    assert torch.equal(torch.where(before >= 768, before + 32, before), after)


def test_ids_of_a_processor_that_does_not_know_of_a_resize_are_refused(processor, model, config, photo, tmp_path):
    """A quantizer that was loaded alone knows no model, so the ids say where they begin."""
    model.get_quantizer().save_pretrained(tmp_path)
    processor = copy.deepcopy(processor)
    processor.patch_size, processor.image_processor.size = 8, {"height": 32, "width": 32}
    processor.attach_quantizer(UniCode2Quantizer.from_pretrained(tmp_path), config.visual_token_offset)

    def ask(images=photo):
        content = [{"type": "image", "image": images}, {"type": "text", "text": "what is it?"}]
        chat = [{"role": "user", "content": content}]
        return processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt").to("cpu")

    # The ids that frame images are the tokenizer's.
    for name in ("image_token_id", "boi_token_id", "eoi_token_id"):
        setattr(model.config, name, getattr(processor, name))
    model.generate(**ask(), max_new_tokens=2)
    model.resize_token_embeddings(800)
    calls = {
        "generate": lambda: model.generate(**ask(), max_new_tokens=2),
        "forward": lambda: model(**ask()),
        "base model": lambda: model.model(**ask()),
        "batch": lambda: model(**{**ask(), "visual_token_offset": [768, 768]}),
        "tensor": lambda: model(**{**ask(), "visual_token_offset": torch.tensor([768])}),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match="made visual token ids from 768 on, and those of this model begin at 800"):
            call()
    processor.attach_quantizer(processor.quantizer, model.config.visual_token_offset)
    model.generate(**ask(), max_new_tokens=2)


def test_a_tokenizer_that_grew_into_the_visual_ids_is_noticed(attached, photo):
    attached.tokenizer.add_tokens([f"<new {n}>" for n in range(100)])
    with pytest.raises(ValueError, match=f"from 768 on are among the {len(attached.tokenizer)} ids of the tokenizer"):
        attached(images=photo, text=ASK + "<new 99>")


@pytest.mark.skipif(
    "sanitize_control_tokens" not in signature(ProcessorMixin.apply_chat_template).parameters,
    reason="Transformers knows no such option before 5.23.",
)
def test_a_place_that_was_typed_is_text_where_that_is_asked_for(processor, photo):
    chat = [{"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": ASK}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    with pytest.raises(ValueError, match="places for 2 images, and 1 are given"):
        processor.apply_chat_template(chat, **options)
    batch = processor.apply_chat_template(chat, sanitize_control_tokens=True, **options)
    assert (batch["input_ids"] == processor.image_token_id).sum() == 64


def test_chat_of_several_images_becomes_ids(processor):
    """Images stand where their parts do, in any turn, and the assistant's turns alone are learnt, images included."""
    images = [[768 + index + 64 * number for index in range(64)] for number in range(3)]
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a red circle"}, {"type": "image"}]},
        {"role": "tool", "content": "done"},
        {"role": "assistant", "content": "two"},
    ]
    ids, mask = processor.encode_chat(chat, images)
    assert [id_ for id_ in ids if id_ >= 768] == sum(images, [])
    assert [images[0][0] in ids[:start] for start in (ids.index(768), ids.index(768) + 1)] == [False, True]
    learnt = [id_ for id_, flag in zip(ids, mask) if flag]
    assert [id_ for id_ in learnt if id_ >= 768] == images[2]
    text = processor.tokenizer.decode([id_ for id_ in learnt if id_ < 768])
    assert text == "a red circle<|vision_start|><|vision_end|><|im_end|>two<|im_end|>"
    rest = processor.tokenizer.decode([id_ for id_, flag in zip(ids, mask) if not flag and id_ < 768])
    assert "system\nbe brief" in rest and "<tool_response>\ndone" in rest and "red" not in rest
    flat = [{**turn, "content": processor.join_parts(turn["content"])} for turn in chat]
    assert processor.encode_chat(flat, images) == (ids, mask)
    plain = [turn for turn in chat if isinstance(turn["content"], str)]
    options = {"chat_template": processor.chat_template, "return_dict": True}
    assert processor.encode_chat(plain)[0] == processor.tokenizer.apply_chat_template(plain, **options)["input_ids"]


@pytest.mark.parametrize(
    ("content", "images", "message"),
    [
        ("<|image_pad|>a<|image_pad|>", [[768] * 64], "has places for 2 images, and 1 are given"),
        ("a", [[768] * 64], "has places for 0 images, and 1 are given"),
        ([{"type": "image"}] * 2, [[768] * 64, [768] * 63], "Image 2 of the chat has 63 visual token ids; one has 64"),
        ([{"type": "video"}], [], "a part of type video"),
    ],
)
def test_chat_that_does_not_fit_its_images_is_refused(processor, content, images, message):
    with pytest.raises(ValueError, match=message):
        processor.encode_chat([{"role": "user", "content": content}, {"role": "assistant", "content": "a"}], images)


def test_template_that_does_not_mark_each_answer_is_refused(processor):
    twin = copy.deepcopy(processor)
    chat = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    say = "{% for m in messages %}{% if CONDITION %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
    twin.chat_template = say.replace("CONDITION", "loop.last") + "{{ m.role + m.content }}{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="marks 1 of 2 answers"):
        twin.encode_chat(chat)
