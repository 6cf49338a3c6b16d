"""What cannot be generated is refused in one sentence; what can is not."""

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor

ONLY_TEXT, ONLY_VISUAL = [5, 6], [771, 775]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"generation_mode": "image", "guidance_scale": "3"}, "`guidance_scale` is '3'"),
        ({"generation_mode": "image", "guidance_scale": -1.0}, "`guidance_scale` is -1.0"),
        ({"generation_mode": "image", "guidance_scale": float("nan")}, "`guidance_scale` is nan"),
        ({"generation_mode": "image", "max_plan_tokens": -1}, "`max_plan_tokens` is -1; it must be a whole number"),
        (
            {"generation_mode": "image", "max_plan_tokens": 4, "inputs": None, "inputs_embeds": torch.zeros(1, 2, 32)},
            "`inputs_embeds` does not go with a plan",
        ),
        ({"max_plan_tokens": 4}, "`max_plan_tokens` is 4 in text mode; it works in image mode only"),
        ({"generation_mode": "image", "max_time": 1e-9}, "ended the image after 1 of its 16 tokens"),
        ({"generation_mode": "image", "inputs": torch.zeros(1, 0, dtype=torch.long)}, r"has the shape \(1, 0\)"),
        ({"generation_mode": "image", "inputs": torch.tensor([20, 21])}, r"has the shape \(2,\)"),
        ({"generation_mode": "image", "inputs": torch.tensor([[20, 11], [20, 21]])}, "1 of 2 prompts end with"),
        (
            {"generation_mode": "image", "guidance_scale": 2.0, "prefill_chunk_size": 2},
            "`prefill_chunk_size` does not go",
        ),
        (
            {"generation_mode": "interleaved", "inputs": torch.tensor([[20, 11]]), "max_new_tokens": 5},
            "needs 17 more tokens",
        ),
        ({"inputs": torch.tensor([[20, 10, 10]])}, "2 image placeholders and no images"),
        ({"encoder_repetition_penalty": 1.2}, "`encoder_repetition_penalty` works on one vocabulary"),
        ({"negative_prompt_ids": torch.tensor([[20]])}, "`negative_prompt_ids` is not read by any mode: guidance"),
        (
            {"generation_mode": "image", "guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([[20]])},
            "`negative_prompt_ids` is not read by any mode: guidance compares with",
        ),
        (
            {"generation_mode": "image", "negative_prompt_attention_mask": torch.tensor([[1]])},
            "`negative_prompt_attention_mask` is not read",
        ),
        ({"generation_mode": "image", "output_modality": "text"}, "`output_modality` is not read"),
        ({"generation_mode": "interleaved", "visual_guidance_scale": 2.0}, "`visual_guidance_scale` is not read"),
        ({"generation_mode": "image", "max_new_tokens": 3}, "`max_new_tokens` is 3, and an image has 16 tokens, no"),
        ({"generation_mode": "image", "max_new_tokens": "3"}, "`max_new_tokens` is '3', and an image has"),
        ({"generation_mode": "image", "max_length": 18}, "`max_length` is 18, .* 16 tokens behind 3 of the prompt"),
        ({"generation_mode": "image", "min_new_tokens": 17}, "`min_new_tokens` is 17, and an image has 16"),
        ({"generation_mode": "image", "min_length": 20}, "`min_length` is 20, and an image has 16 tokens behind 3"),
        (
            {"generation_mode": "image", "generation_config": GenerationConfig(max_new_tokens=3)},
            "`max_new_tokens` is 3, and an image has 16 tokens",
        ),
        ({"forced_eos_token_id": 775}, "`forced_eos_token_id` is 775; text ends with one of the 768 text ids"),
        ({"generation_mode": "interleaved", "forced_eos_token_id": [1, 775]}, r"is \[1, 775\]; text ends with one"),
    ],
)
def test_what_cannot_be_generated_is_refused_in_one_sentence(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{"inputs": torch.tensor([[20, 21]]), **arguments})


@pytest.mark.parametrize("settings", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize(
    "mode, ids, message",
    [
        ("text", ONLY_VISUAL, "names an id beyond the 768 that this mode writes"),
        ("image", ONLY_TEXT, "leaves no id that this mode writes"),
        ("image", [5000], "names an id beyond the 864 that this mode writes"),
    ],
)
def test_functions_that_leave_no_id_of_a_mode_are_refused(model, settings, mode, ids, message):
    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor(ids), 0.0)

    prompt, options = torch.tensor([[20, 21]]), {"generation_mode": mode, **settings}
    options |= {"max_new_tokens": 4} if mode == "text" else {}
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, prefix_allowed_tokens_fn=lambda row, written: ids, **options)
    with pytest.raises(ValueError, match="names an id beyond|leaves no id that this mode writes there, or brings back"):
        model.generate(prompt, logits_processor=[Only()], **options)


def test_functions_that_leave_some_ids_of_a_mode_are_followed(model):
    prompt = torch.tensor([[20, 21]])
    allowed = {"prefix_allowed_tokens_fn": lambda row, written: [*ONLY_TEXT, *ONLY_VISUAL], "do_sample": True}
    image = model.generate(prompt, generation_mode="image", **allowed)
    assert set(image.flatten().tolist()) <= set(ONLY_VISUAL)
    text = {"prefix_allowed_tokens_fn": lambda row, written: ONLY_TEXT, "do_sample": True, "max_new_tokens": 8}
    for options in ({}, {"remove_invalid_values": True}):
        assert set(model.generate(prompt, **text, **options)[0, 2:].tolist()) <= set(ONLY_TEXT)


def test_limits_that_an_image_keeps_are_taken(model):
    options = {"generation_mode": "image", "do_sample": False}
    right = model.generate(torch.tensor([[20, 21]]), **options)
    for limits in ({"max_new_tokens": 16}, {"max_length": 19}, {"min_new_tokens": 16}, {"max_new_tokens": 500}):
        assert torch.equal(model.generate(torch.tensor([[20, 21]]), **options, **limits), right)
    model.generation_config.max_new_tokens = 3
    assert torch.equal(model.generate(torch.tensor([[20, 21]]), **options), right)


def test_batches_of_other_modes_are_refused(model):
    with pytest.raises(ValueError, match="`generate_batch` writes text only"):
        model.generate_batch([[20, 21]], generation_mode="image")
