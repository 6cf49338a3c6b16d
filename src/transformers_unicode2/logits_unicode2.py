"""Processors of scores that keep text and images apart."""

import torch
from transformers import LogitsProcessor, LogitsProcessorList


class InterleavedLogitsProcessor(LogitsProcessor):
    r"""
    Keeps image blocks whole: after `boi_token_id` come exactly `num_image_tokens` visual ids, then `eoi_token_id`; visual ids
    occur nowhere else. A `boi_token_id` with text behind it, as in a question about that token, has begun no image.

    Args:
        visual_token_offset (`int`): first visual token id.
        num_image_tokens (`int`): visual ids per image.
        boi_token_id, eoi_token_id (`int`): ids in front of and behind an image.
        image_token_id (`int`): the placeholder id, which is never generated.
        max_length (`int`, *optional*): ids in all; an image that would not fit is not begun.
    """

    def __init__(
        self,
        visual_token_offset: int,
        num_image_tokens: int,
        boi_token_id: int,
        eoi_token_id: int,
        image_token_id: int,
        max_length: int | None = None,
    ):
        self.max_length, self.checked = max_length, False
        self.visual_token_offset, self.num_image_tokens = visual_token_offset, num_image_tokens
        self.boi_token_id, self.eoi_token_id, self.image_token_id = boi_token_id, eoi_token_id, image_token_id

    def written(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """Ids of patches between the last `boi_token_id` and the end of each row, `(batch_size,)`; -1 outside an image block."""
        if input_ids.shape[1] == 0:  # a prompt of embeddings
            return input_ids.new_full(input_ids.shape[:1], -1)
        tail = input_ids[:, -self.num_image_tokens - 1 :]  # (batch_size, at most num_image_tokens + 1)
        is_patch = (tail >= self.visual_token_offset) | (tail == self.image_token_id)
        run = is_patch.flip(-1).long().cumprod(-1).sum(-1, keepdim=True)  # patches at the end of each row
        begin = tail.gather(-1, (tail.shape[1] - 1 - run).clamp(min=0))  # what stands in front of them
        return torch.where(begin == self.boi_token_id, run, -1)[:, 0]

    def check_room(self, input_ids: torch.LongTensor, written: torch.LongTensor) -> None:
        """Raises `ValueError` when a prompt ends inside an image that `max_length` ids cannot finish."""
        self.checked = True
        missing = torch.where(written >= 0, self.num_image_tokens - written + 1, 0).amax().item()
        if self.max_length is not None and input_ids.shape[1] + missing > self.max_length:
            raise ValueError(
                f"The prompt ends inside an image that needs {missing} more tokens; `max_new_tokens` leaves "
                f"{self.max_length - input_ids.shape[1]}."
            )

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        written = self.written(input_ids)[:, None]
        if not self.checked:
            self.check_room(input_ids, written)
        ids = torch.arange(scores.shape[-1], device=scores.device)
        text = (ids < self.visual_token_offset) & (ids != self.eoi_token_id) & (ids != self.image_token_id)
        if self.max_length is not None and input_ids.shape[1] + self.num_image_tokens + 2 > self.max_length:
            text = text & (ids != self.boi_token_id)
        image = ids >= self.visual_token_offset
        allowed = torch.where((written >= 0) & (written < self.num_image_tokens), image, text)
        allowed = torch.where(written == self.num_image_tokens, ids == self.eoi_token_id, allowed)
        return torch.where(allowed, scores, -torch.inf).masked_fill(
            (written == self.num_image_tokens) & (ids == self.eoi_token_id), 0.0
        )


class TextLogitsProcessorList(LogitsProcessorList):
    """Processors of scores over the text ids alone: visual ids of the prompt look like one that is never written."""

    def __init__(self, processors: list, visual_token_offset: int, unwritten_id: int):
        super().__init__(processors)
        self.visual_token_offset, self.unwritten_id = visual_token_offset, unwritten_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.FloatTensor:
        text_ids = input_ids.masked_fill(input_ids >= self.visual_token_offset, self.unwritten_id)
        return super().__call__(text_ids, scores, **kwargs)


__all__ = ["InterleavedLogitsProcessor", "TextLogitsProcessorList"]
