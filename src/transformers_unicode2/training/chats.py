"""Tokenized chats to training sequences over the unified vocabulary."""

from collections.abc import Iterator

import numpy as np


class ExampleBuilder:
    """Makes training sequences of tokenized chats, see `build_examples`."""

    def __init__(self, processor, visual_token_offset: int, learn_all_images: bool, drop_prompt_share: float):
        self.processor, self.visual_token_offset = processor, visual_token_offset
        self.learn_all_images, self.drop_prompt_share = learn_all_images, drop_prompt_share

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        """The examples of rows with `messages` and `codes`, as `Dataset.map` gives them."""
        output = {"input_ids": [], "labels": [], "length": []}
        for messages, codes, index in zip(batch["messages"], batch["codes"], indices):
            try:
                examples = list(self.encode_row(messages, codes, index))
            except ValueError as error:
                raise ValueError(f"Row {index} of the mixture: {error}") from error
            for ids, mask in examples:
                learnt = [
                    flag or (self.learn_all_images and id_ >= self.visual_token_offset) for id_, flag in zip(ids, mask)
                ]
                output["input_ids"].append(ids)
                output["labels"].append([id_ if flag else -100 for id_, flag in zip(ids, learnt)])
                output["length"].append(len(ids))
        return output

    def encode_row(
        self, messages: list[dict], codes: list[list[int]], index: int
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Ids of the examples of a row, and for each id whether it is in an answer."""
        visual = [[self.visual_token_offset + code for code in image] for image in codes]
        yield self.processor.encode_chat(messages, visual)
        roles = [turn["role"] for turn in messages for part in turn["content"] if part["type"] == "image"]
        if "assistant" in roles and np.random.default_rng(index).random() < self.drop_prompt_share:
            for role, image in zip(roles, visual):
                if role == "assistant":
                    yield [self.processor.boi_token_id, *image], [0] + [1] * len(image)


def build_examples(
    rows, processor, visual_token_offset: int, learn_all_images: bool = False, drop_prompt_share: float = 0.0
):
    """
    Tokenized chats to training sequences over the unified vocabulary.

    Args:
        rows: data set with `messages` and `codes`, as `open_mixture` gives it.
        processor: `UniCode2Processor` of the model, whose chat template says what an answer is.
        visual_token_offset: first visual token id.
        learn_all_images: images in questions are learnt, too, as without any condition.
        drop_prompt_share: share of the rows with an image in an answer whose image is learnt once more, behind nothing
            but the begin-of-image id. Classifier-free guidance compares with that. The number of a row in the mixture
            alone decides.

    Returns:
        Data set of `input_ids`, `labels` and their `length`. Labels outside of the answers are -100: nothing is learnt.

    Raises:
        `ValueError`: with the number of the row, when a chat cannot become ids, see `UniCode2Processor.encode_chat`.
    """
    build = ExampleBuilder(processor, visual_token_offset, learn_all_images, drop_prompt_share)
    return rows.map(build, batched=True, with_indices=True, remove_columns=rows.column_names, desc="building examples")
