"""Tokenized chats to examples: what is learnt of them, and what is refused."""

import copy

import pytest
import torch
from datasets import Dataset, load_dataset

from transformers_unicode2.training.chats import ExampleBuilder, build_examples, encode_chat
from transformers_unicode2.training.shards import make_features

OFFSET = 768


def part(text: str | None) -> dict:
    """A part of a message, an image if there is no text."""
    return {"type": "image" if text is None else "text", "text": text}


def make_rows(*chats: list[tuple]) -> Dataset:
    """Rows of chats, whose turns are `(role, text or None for an image, ...)`. Image `i` of a row has the codes `i`."""
    rows = []
    for chat in chats:
        messages = [{"role": role, "content": [part(text) for text in texts]} for role, *texts in chat]
        count = sum(text is None for _, *texts in chat for text in texts)
        rows.append({"messages": messages, "codes": [[image] * 64 for image in range(count)], "source": 1, "row": 0})
    return Dataset.from_list(rows, features=make_features(8192, []))


def test_images_of_answers_are_learnt_and_those_of_questions_are_not(processor):
    rows = make_rows([("user", None, "red?"), ("assistant", "a", None), ("user", None, None), ("assistant", "b")])
    (example,) = build_examples(rows, processor, OFFSET)
    (everything,) = build_examples(rows, processor, OFFSET, learn_all_images=True)
    for given, images in ((example, [1]), (everything, [0, 1, 2, 3])):
        assert given["input_ids"] == example["input_ids"] and given["length"] == len(given["labels"])
        learnt = [label - OFFSET for label in given["labels"] if label >= OFFSET]
        assert learnt == [image for image in images for _ in range(64)]
    for id_, label in zip(example["input_ids"], example["labels"]):
        assert label in (id_, -100)
    parts = processor.split_images(torch.tensor([label for label in example["labels"] if label != -100]))
    assert parts[0]["text"] == "a" and (parts[1]["visual_token_ids"] == OFFSET + 1).all()


def test_a_chat_without_images_and_one_with_a_system_turn_are_learnt(processor):
    rows = make_rows([("system", "be brief"), ("user", "hello"), ("assistant", "hi")])
    (example,) = build_examples(rows, processor, OFFSET, drop_prompt_share=1.0)
    assert processor.tokenizer.decode(example["input_ids"]).startswith("<|im_start|>system\nbe brief<|im_end|>")
    assert processor.tokenizer.decode([id_ for id_ in example["labels"] if id_ != -100]) == "hi<|im_end|>"


def test_the_share_of_answers_with_an_image_is_learnt_without_a_prompt(processor):
    """Other rows are not, the same rows are chosen again, and the image alone is learnt."""
    drawn = [[("user", str(number)), ("assistant", None)] for number in range(400)]
    read = [[("user", None), ("assistant", str(number))] for number in range(100)]
    rows = make_rows(*drawn, *read)
    examples = build_examples(rows, processor, OFFSET, drop_prompt_share=0.25)
    alone = [example for example in examples if example["length"] == 65]
    assert len(alone) == len(examples) - 500 == pytest.approx(100, abs=25)
    for example in alone:
        assert example["input_ids"][0] == processor.boi_token_id
        assert example["labels"] == [-100, *example["input_ids"][1:]]
    again = build_examples(rows, processor, OFFSET, drop_prompt_share=0.25)
    assert again["input_ids"][:] == examples["input_ids"][:]
    assert len(build_examples(rows, processor, OFFSET)) == 500


def test_a_chat_that_cannot_be_encoded_is_named(processor):
    rows = make_rows([("user", "hello"), ("assistant", "hi")], [("user", None), ("assistant", "hi")])
    short = rows.map(lambda row: {"codes": [image[:60] for image in row["codes"]]})
    with pytest.raises(ValueError, match="Row 1 of the mixture: Image 1 of the chat has 60 visual token ids"):
        build_examples(short, processor, OFFSET)


def test_a_planned_image_is_an_answer_of_text_and_image(tiny_run, processor):
    file = tiny_run / "tokens/planned_text_to_image/train-00000.parquet"
    rows = load_dataset("parquet", data_files=str(file), split="train")
    example = build_examples(rows, processor, OFFSET)[0]
    learnt = [id_ for id_ in example["labels"] if id_ != -100]
    plan, image = processor.split_images(torch.tensor(learnt))
    assert plan["text"] == "a small red circle at c4, on a white ground"
    assert (image["visual_token_ids"] - OFFSET).tolist() == rows[0]["codes"][0]
    asked = [id_ for id_, label in zip(example["input_ids"], example["labels"]) if label == -100]
    assert "a red circle" in processor.tokenizer.decode(asked) and "white" not in processor.tokenizer.decode(asked)


@pytest.mark.parametrize("where", ["user", "assistant", "system", "tool"])
@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>assistant\n", "<|image_pad|>", "<|vision_start|>"])
def test_a_control_token_in_a_text_is_refused(processor, where, token):
    """It would end what is learnt, or begin it."""
    turns = [("system", "be brief"), ("user", "hello"), ("assistant", "hi"), ("tool", "3"), ("assistant", "ho")]
    turns = [(role, f"a {token} b" if role == where else text) for role, text in turns]
    with pytest.raises(ValueError, match=r"Row 0 of the mixture: turn \d has <\|.*, which is a control token"):
        build_examples(make_rows(turns), processor, OFFSET)


CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "area", "arguments": {"side": 3}}}]}
TOOLS = [{"role": "user", "content": "how large?"}, CALL, {"role": "tool", "content": 'nine "cm"'}]
TOOLS += [{"role": "assistant", "content": "nine"}]
SAYS = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}.{% endgeneration %}"
SAYS += "{% else %}{{ m.role }}: CONTENT{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{{ m.content }}", "leaves out 'area', of a tool"),
        ("", "leaves out 'nine \"cm\"', of a tool"),
        ("{{ raise_exception('no tools here') }}", "of the model refuses the chat: no tools here"),
    ],
)
def test_a_template_that_does_not_write_tools_is_refused(processor, content, message):
    assert processor.tokenizer.decode(encode_chat(processor, TOOLS, [])[0]).count("area") == 1
    twin = copy.deepcopy(processor)
    twin.chat_template = SAYS.replace("CONTENT", content)
    with pytest.raises(ValueError, match=message):
        encode_chat(twin, TOOLS, [])


@pytest.mark.parametrize("words", ['température "20"', "a\\b"])
@pytest.mark.parametrize("write", ["{{ m.content | tojson }}", "{{ m.content }}"])
def test_what_tools_return_may_be_written_as_json(processor, write, words):
    twin = copy.deepcopy(processor)
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    twin.chat_template = SAYS.replace("CONTENT", write).replace("{{ m.content }}.", "{{ m.content }}." + calls)
    encode_chat(twin, [*TOOLS[:2], {"role": "tool", "content": words}, TOOLS[3]], [])


def test_thoughts_of_the_last_answer_are_written_or_refused(processor):
    twin = copy.deepcopy(processor)
    asked = {"role": "user", "content": "why?"}
    thinking = {"role": "assistant", "content": "so", "reasoning_content": "hm"}
    with pytest.raises(ValueError, match="leaves out 'hm', of the thoughts, so nothing would be learnt"):
        encode_chat(twin, [asked, thinking], [])
    # Many templates leave out those of earlier answers
    encode_chat(twin, [asked, thinking, asked, {"role": "assistant", "content": "so"}], [])
    twin.chat_template = SAYS.replace("{{ m.content }}.", "{{ m.reasoning_content }}{{ m.content }}.")
    assert "hmso." in twin.tokenizer.decode(encode_chat(twin, [asked, thinking], [])[0])


def test_arguments_in_json_are_learnt_as_objects(processor):
    call = {**CALL, "tool_calls": [{"function": {"name": "area", "arguments": '{"side": 3}'}}]}
    assert encode_chat(processor, [TOOLS[0], call, *TOOLS[2:]], []) == encode_chat(processor, TOOLS, [])


def test_what_tables_lack_is_left_out_or_named(processor):
    """`None` where a row has no codes, or a turn no content; arguments that are those of another call."""
    padded = [{**turn, "tool_calls": None, **turn} for turn in TOOLS]
    arguments = {"side": 3, "height": None}
    padded[1] = {**CALL, "content": None, "tool_calls": [{"function": {"name": "area", "arguments": arguments}}]}
    build = ExampleBuilder(processor, OFFSET, False, 0.0)
    made = build({"messages": [padded, TOOLS], "codes": [None, []]}, [0, 1])
    assert made["input_ids"][0] == made["input_ids"][1] and made["labels"][0] == made["labels"][1]
    with pytest.raises(ValueError, match="Row 1 of the mixture: it has no messages"):
        build({"messages": [TOOLS, None], "codes": [None, []]}, [0, 1])
    with pytest.raises(ValueError, match="Row 0 of the mixture: the content of a message is 3"):
        build({"messages": [[{"role": "user", "content": 3}]], "codes": [[]]}, [0])
