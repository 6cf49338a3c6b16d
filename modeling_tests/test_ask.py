"""Questions to a whole checkpoint and to an adapter, at a terminal and without one."""

import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from test_cli import run

from transformers_unicode2 import UniCode2ForConditionalGeneration, ask
from transformers_unicode2.checkpoints import load_model


@pytest.fixture
def small_model(tiny_checkpoint):
    """A random checkpoint with the tokenizer of the embedded one."""
    from transformers_unicode2 import UniCode2Config

    torch.manual_seed(0)
    config = UniCode2Config.from_pretrained(tiny_checkpoint).to_dict()
    config["text_config"] |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "layer_types": None}
    config["text_config"] |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    config["codebook_config"] |= {"codebook_size": 96, "num_cells": 4}
    return UniCode2ForConditionalGeneration(UniCode2Config(**config)).bfloat16().eval()


@pytest.fixture
def image(tiny_checkpoint):
    return tiny_checkpoint / "examples" / "scene.png"


def type_lines(monkeypatch, *lines):
    """What a person types at a terminal."""
    typed = iter(lines)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))


def test_answer_is_that_of_generate(monkeypatch, capsys, tiny_checkpoint, tiny_model, processor, image):
    code, printed = run(monkeypatch, capsys, "ask", tiny_checkpoint, "--image", image, "how many objects are there?")
    content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": "how many objects are there?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    written = tiny_model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    assert code == 0 and printed.out.strip() == processor.decode(written, skip_special_tokens=True).strip() != ""


def test_chat_goes_on_about_the_same_image_until_an_empty_line(monkeypatch, capsys, tiny_checkpoint, image):
    seen = []
    write_answer = ask.write_answer

    def remember(model, processor, messages, max_new_tokens):
        seen.append([(m["role"], [part["type"] for part in m["content"]]) for m in messages])
        return write_answer(model, processor, messages, max_new_tokens)

    monkeypatch.setattr(ask, "write_answer", remember)
    type_lines(monkeypatch, "what is this?", "how many objects are there?", "", "never asked")
    code, printed = run(monkeypatch, capsys, "ask", tiny_checkpoint, "--image", image, "--max-new-tokens", 4)
    assert code == 0 and len(printed.out.splitlines()) == 2
    first = ("user", ["image", "text"])
    assert seen == [[first], [first, ("assistant", ["text"]), ("user", ["text"])]]


def test_several_images_or_none_are_asked_about(monkeypatch, capsys, tiny_checkpoint, image):
    words = ("ask", tiny_checkpoint, "what is this?", "--max-new-tokens", 3)
    assert run(monkeypatch, capsys, *words)[0] == 0
    assert run(monkeypatch, capsys, *words, "--image", image, "--image", image)[0] == 0


def test_adapter_answers_as_on_its_base(monkeypatch, capsys, small_model, processor, tmp_path):
    small_model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    base = UniCode2ForConditionalGeneration.from_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.randint(20, 700, (1, 8))
    with torch.no_grad():
        expected, plain = adapted(input_ids=ids).logits, small_model(input_ids=ids).logits
        logits = load_model(str(tmp_path / "adapter"))[0](input_ids=ids).logits
    # Merged, in bfloat16
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)
    assert not torch.allclose(logits, plain, atol=0.2)
    words = ("ask", tmp_path / "adapter", "hello", "--max-new-tokens", 3)
    assert run(monkeypatch, capsys, *words)[0] == 0
    (tmp_path / "base").rename(tmp_path / "moved")
    code, printed = run(monkeypatch, capsys, *words)
    assert code == 2 and f"is an adapter of {tmp_path / 'base'}: There is no folder" in printed.err
    assert run(monkeypatch, capsys, *words, "--base", tmp_path / "moved")[0] == 0
    code, printed = run(monkeypatch, capsys, "ask", tmp_path / "moved", "hello", "--base", tmp_path / "moved")
    assert code == 2 and "is a whole checkpoint; leave --base" in printed.err


WORDS = ("--max-new-tokens", 3)


@pytest.fixture
def strict(small_model, processor, tmp_path):
    """A checkpoint whose chat template refuses system turns, and questions that hold `odd`."""
    from transformers_unicode2 import UniCode2Processor

    small_model.save_pretrained(tmp_path / "strict")
    processor.save_pretrained(tmp_path / "strict")
    processor = UniCode2Processor.from_pretrained(tmp_path / "strict")
    refusal = (
        "{% for m in messages %}{% if m.role == 'system' or 'odd' in m.content | string %}"
        "{{ raise_exception('No such turn.') }}{% endif %}{% endfor %}"
    )
    processor.chat_template = refusal + processor.chat_template
    processor.save_pretrained(tmp_path / "strict")
    return tmp_path / "strict"


def test_refusal_of_a_template_is_one_sentence(monkeypatch, capsys, strict):
    code, printed = run(monkeypatch, capsys, "ask", strict, "hello", "--system", "Be brief.", *WORDS)
    assert code == 2 and "The chat template of the model refuses this chat: No such turn." in printed.err


def test_question_that_fails_does_not_end_the_chat(monkeypatch, capsys, strict, image):
    seen = []
    write_answer = ask.write_answer

    def remember(model, processor, messages, max_new_tokens):
        answer = write_answer(model, processor, messages, max_new_tokens)
        seen.append([[part["type"] for part in turn["content"]] for turn in messages])
        return answer

    monkeypatch.setattr(ask, "write_answer", remember)
    type_lines(monkeypatch, "what is this?", "odd", "and now?", "")
    code, printed = run(monkeypatch, capsys, "ask", strict, "an odd one", "--image", image, *WORDS)
    assert code == 0 and printed.err.count("refuses this chat") == 2
    assert seen == [[["image", "text"]], [["image", "text"], ["text"], ["text"]]]


def interrupt(*args):
    raise KeyboardInterrupt


def test_interrupt_ends_the_chat(monkeypatch, capsys, strict):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", interrupt)
    assert run(monkeypatch, capsys, "ask", strict, "hello", *WORDS)[0] == 0
    monkeypatch.setattr(ask, "write_answer", interrupt)
    assert run(monkeypatch, capsys, "ask", strict, "hello", *WORDS)[0] == 130


def test_assembled_repository_draws(monkeypatch, capsys, tiny_checkpoint, tmp_path):
    words = ("ask", tiny_checkpoint, "a red circle", "--draw", tmp_path / "drawing.png", "--steps", 1)
    code, printed = run(monkeypatch, capsys, *words)
    assert code == 0 and f"wrote {tmp_path / 'drawing.png'}" in printed.out
    assert Image.open(tmp_path / "drawing.png").size == (64, 64)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("nowhere hello", "There is no folder nowhere; give the folder of a checkpoint, or its name on the Hub."),
        ("{} hello", "is no whole checkpoint: it has no config.json"),
        ("{}", "There is no question; write one behind the model's name."),
        ("{} hello --image {}/no.png", "There is no image file"),
        ("{tiny}/transformer hello", "is no UniCode² checkpoint, but of another kind"),
        ("{tiny} hello --draw x.psd", "--draw x.psd has no ending of an image file; .png is one."),
        ("{tiny} hello --draw {}/no/x.png", "there is no folder"),
        ("{tiny} hello --draw {}/x.png --image x.png", "--draw takes a text; leave --image out."),
        ("{tiny} hello --max-new-tokens 0", "--max-new-tokens: 0 is not allowed; it must be at least 1."),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(monkeypatch, capsys, tiny_checkpoint, tmp_path, words, sentence):
    words = words.replace("{tiny}", str(tiny_checkpoint)).replace("{}", str(tmp_path))
    code, printed = run(monkeypatch, capsys, "ask", *words.split())
    lines = [line for line in printed.err.splitlines() if not line.startswith(("usage: ", " "))]
    assert code == 2 and len(lines) == 1 and sentence in lines[0]
    assert not list(tmp_path.iterdir())


def test_checkpoint_without_a_decoder_does_not_draw(monkeypatch, capsys, small_model, processor, tmp_path):
    small_model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    code, printed = run(monkeypatch, capsys, "ask", tmp_path / "model", "a star", "--draw", tmp_path / "x.png")
    assert code == 2 and "has no decoder to draw with; `unicode2 assemble` adds one." in printed.err
    assert not (tmp_path / "x.png").exists()
