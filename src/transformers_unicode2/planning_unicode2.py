"""A plan before an image: text that the model writes until it begins the image by itself."""

import copy

import torch
from transformers import GenerationConfig, GenerationMixin

from .settings_unicode2 import find_option

# What a plan has in common with the image after it: the inputs, and how ids are drawn.
SHARED_WITH_PLAN = (
    *("pixel_values", "mm_encoder_outputs"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"),
)


def write_plan(
    model: GenerationMixin,
    prompt: dict,
    max_plan_tokens: int,
    generation_config: GenerationConfig | None,
    settings: dict,
) -> dict:
    """Prompts that end with the begin-of-image id, with a text in front of that id which the model writes; left-padded anew.

    Args:
        model (`UniCode2ForConditionalGeneration`): writes the plan.
        prompt: `input_ids` `(batch_size, num_tokens)` that end with the begin-of-image id, and perhaps their `attention_mask`.
        max_plan_tokens: length of the longest plan.
        generation_config: that of the call.
        settings: options of the call, see `SHARED_WITH_PLAN`.

    Raises:
        `ValueError`: on settings that are as long as the prompt, which a plan makes longer.
    """
    for name in ("inputs_embeds", "past_key_values", "cache", "position_ids"):
        if prompt.get(name) is not None or settings.get(name) is not None:
            raise ValueError(
                f"`{name}` does not go with a plan, which makes the prompt longer; `max_plan_tokens` is {max_plan_tokens}, "
                "and 0 is no plan."
            )
    input_ids, boi = prompt["input_ids"][:, :-1], model.config.boi_token_id
    ends, pad = (
        find_option(name, generation_config, model.generation_config) for name in ("eos_token_id", "pad_token_id")
    )
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    mask = prompt.get("attention_mask")
    if mask is not None:
        mask = mask[:, :-1]
    else:  # as stock `generate` has it
        mask = torch.ones_like(input_ids) if pad is None or pad in ends else (input_ids != pad).long()
    shared = {name: settings[name] for name in SHARED_WITH_PLAN if settings.get(name) is not None}
    if "mm_encoder_outputs" in shared:  # beams repeat what is in it, in place
        shared["mm_encoder_outputs"] = {k: copy.copy(v) for k, v in shared["mm_encoder_outputs"].items()}
    output = GenerationMixin.generate(
        model,
        input_ids,
        generation_config,
        attention_mask=mask,
        output_modality="plan",
        eos_token_id=[boi, *ends],
        max_new_tokens=max_plan_tokens,
        **dict.fromkeys(("max_length", "min_length", "min_new_tokens", "stop_strings", "guidance_scale")),
        num_return_sequences=1,
        return_dict_in_generate=False,
        **shared,
    )
    return begin_after(output, mask, [boi, *ends])


def begin_after(output: torch.LongTensor, mask: torch.Tensor, ends: list[int]) -> dict:
    """Puts the begin-of-image id, the first of `ends`, behind each plan; what is not seen goes to the left.

    Args:
        output: prompts and plans, `(batch_size, num_tokens)`, each up to one of `ends`.
        mask: 1 where a prompt is seen, `(batch_size, num_prompt_tokens)`.
        ends: ids that end a plan and are no part of it.
    """
    plan = output[:, mask.shape[1] :]
    ended = torch.isin(plan, torch.tensor(ends, device=plan.device)).cumsum(-1) > 0
    begin = torch.full_like(output[:, :1], ends[0])
    ids = torch.cat([output, begin], 1)
    seen = torch.cat([mask, (~ended).to(mask), torch.ones_like(begin).to(mask)], 1)
    order = seen.argsort(dim=-1, stable=True)
    ids, seen = ids.gather(1, order), seen.gather(1, order)
    first = (seen.sum(0) > 0).nonzero()[0].item()
    return {"input_ids": ids[:, first:], "attention_mask": seen[:, first:]}


__all__ = ["write_plan"]
