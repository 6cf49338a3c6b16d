"""Chats with pixels: both heads learn by our trainer, and a stock one stops where it would learn placeholders."""

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig

from transformers_unicode2.training.parameters import freeze_all_but
from transformers_unicode2.training.trainer import UniCode2SFTTrainer


def test_an_image_in_an_answer_is_learnt_as_the_codes_of_its_pixels(tiny_run, photo, tmp_path):
    """Chats with pixels and the same chats with codes give the same losses, of which one is the visual head's."""
    from transformers import AutoProcessor

    from transformers_unicode2 import UniCode2ForConditionalGeneration

    model = UniCode2ForConditionalGeneration.from_pretrained(tiny_run / "model")
    processor = AutoProcessor.from_pretrained(tiny_run / "model")
    image, text = {"type": "image"}, {"type": "text", "text": "a red circle"}
    drawing = [{"role": "user", "content": [text]}, {"role": "assistant", "content": [image]}]
    reading = [{"role": "user", "content": [image]}, {"role": "assistant", "content": [text]}]
    chats = Dataset.from_list([{"messages": chat, "images": [photo]} for chat in (drawing, reading)])
    with torch.no_grad():
        ids = model.get_image_tokens(processor(images=photo, return_tensors="pt")["pixel_values"])[0].tolist()
    coded = [processor.encode_chat(chat, [ids]) for chat in (drawing, reading)]
    coded = [{"input_ids": i, "labels": [a if m else -100 for a, m in zip(i, mask)]} for i, mask in coded]
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1, "logging_steps": 1}
    settings |= {"max_length": None, "per_device_train_batch_size": 2, "learning_rate": 0.1, "disable_tqdm": True}
    settings |= {"save_strategy": "no", "gradient_checkpointing": False}
    logs, head = [], model.visual_head.linear.weight.detach().clone()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for data, options in ((chats, {"assistant_only_loss": True}), (Dataset.from_list(coded), {})):
        model.load_state_dict(start)
        freeze_all_but(model, ["projector", "visual_embeddings", "language_model", "lm_head", "visual_head"])
        arguments = SFTConfig(str(tmp_path), **settings, **options)
        given = processor if "images" in data.column_names else processor.tokenizer
        trainer = UniCode2SFTTrainer(model, arguments, train_dataset=data, processing_class=given)
        if given is processor:
            trainer.codes_per_image = 4
            with pytest.raises(ValueError, match="`codes_per_image` is for tokenized rows"):
                trainer.train()
            trainer.codes_per_image = None
        trainer.train()
        logs.append(trainer.state.log_history[0])
        assert not torch.equal(model.visual_head.linear.weight, head)
    for name in ("loss", "text_loss", "visual_loss"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-4) and logs[0][name] > 0


@pytest.mark.parametrize("adapted", [False, True])
def test_a_stock_trainer_stops_at_images_in_answers_and_trains_texts(tiny_run, photo, tmp_path, adapted):
    from peft import LoraConfig
    from transformers import AutoProcessor
    from trl import SFTTrainer

    from transformers_unicode2 import UniCode2ForConditionalGeneration

    processor = AutoProcessor.from_pretrained(tiny_run / "model")
    image, text = {"type": "image"}, {"type": "text", "text": "a red circle"}
    drawing = [{"role": "user", "content": [text]}, {"role": "assistant", "content": [image]}]
    reading = [{"role": "user", "content": [image]}, {"role": "assistant", "content": [text]}]
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1, "disable_tqdm": True}
    settings |= {"max_length": None, "save_strategy": "no", "gradient_checkpointing": False}

    def train(chat: list[dict], **options) -> None:
        model = UniCode2ForConditionalGeneration.from_pretrained(tiny_run / "model")
        data = Dataset.from_list([{"messages": chat, "images": [photo]}] * 2)
        lora = LoraConfig(target_modules=["q_proj"]) if adapted else None
        arguments = SFTConfig(str(tmp_path), **settings, **options)
        SFTTrainer(model, arguments, train_dataset=data, processing_class=processor, peft_config=lora).train()

    for chat, options in ((drawing, {"assistant_only_loss": True}), (reading, {})):
        with pytest.raises(ValueError, match="targets of this batch are of images, and the trainers of TRL learn text"):
            train(chat, **options)
    train(reading, assistant_only_loss=True)
