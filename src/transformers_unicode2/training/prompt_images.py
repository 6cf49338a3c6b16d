"""The images that a model reads, as runs of visual ids in prompts: a part of them, or others in their place."""

import numpy as np
import torch
from datasets import Dataset
from torch.nn.functional import pad


def thin_images(
    inputs: dict[str, torch.Tensor], visual_token_offset: int, num_codes: int, seed: int
) -> dict[str, torch.Tensor]:
    """
    A batch in which each image that is read, not written, has at most `num_codes` of its codes, in their order.

    Which ones depends on `seed` and on the codes of the image alone, so not on how rows are batched.

    Args:
        inputs: `input_ids` and `labels` `(batch_size, num_tokens)`; `attention_mask` and `position_ids` if there are
            any, 0 at the start of each example.
        visual_token_offset: first visual id.
        num_codes: codes that are read.
        seed: such as the number of the step.

    Returns:
        The same tensors, shorter. What was right of the last token of each row, or left of the first, is on the right.
    """
    ids = inputs["input_ids"]
    read = (ids >= visual_token_offset) & (inputs["labels"] == -100)
    starts = read & ~pad(read[:, :-1], (1, 0))
    places, first = read.flatten().nonzero()[:, 0], starts.flatten().nonzero()[:, 0]  # (num_read,), (num_images,)
    image = starts.flatten().cumsum(0)[places] - 1
    within = places - first[image]
    content = torch.zeros_like(first).index_add_(0, image, mix(ids.flatten()[places] * 65537 + within))
    order = mix(content[image] + mix(within + (seed << 32))).argsort()
    # Within each image in the order of the scores
    order = order[image[order].argsort(stable=True)]
    counts = torch.zeros_like(first).index_add_(0, image, torch.ones_like(image))
    rank = torch.arange(len(places), device=ids.device) - (counts.cumsum(0) - counts)[image]
    kept = torch.ones_like(read).flatten()
    kept[places[order[rank >= num_codes]]] = False
    kept = kept.view_as(ids)
    if "attention_mask" in inputs:
        kept = kept & inputs["attention_mask"].bool()
    return compact(inputs, kept)


def compact(inputs: dict[str, torch.Tensor], kept: torch.BoolTensor) -> dict[str, torch.Tensor]:
    """A batch without the tokens that are not `kept`, `(batch_size, num_tokens)`, padded on the right."""
    order = (~kept).int().argsort(dim=1, stable=True)[:, : int(kept.sum(1).max())]
    output = {name: value.gather(1, order) for name, value in inputs.items()}
    there = kept.gather(1, order)
    output["labels"] = output["labels"].masked_fill(~there, -100)
    if "attention_mask" in inputs:
        output["attention_mask"] = there.to(inputs["attention_mask"].dtype)
    if "position_ids" in inputs:
        rank = kept.long().cumsum(1) - 1
        begins = torch.where(inputs["position_ids"] == 0, rank, 0).cummax(1).values
        output["position_ids"] = (rank - begins).gather(1, order)
    return output


def mix(numbers: torch.LongTensor) -> torch.LongTensor:
    """Integers to well mixed ones, as SplitMix64 does, the same on every device."""
    for factor, shift in ((-0x40A7B892E31B1A47, 30), (-0x6B2FB644ECCEEE15, 27)):
        numbers = (numbers ^ (numbers >> shift)) * factor
    return numbers ^ (numbers >> 31)


def find_images(ids: np.ndarray, labels: np.ndarray, visual_token_offset: int) -> list[tuple[int, int]]:
    """Where a row reads images, as starts and ends of runs of visual ids that are no targets."""
    read = np.concatenate([[False], (ids >= visual_token_offset) & (labels == -100), [False]])
    return np.flatnonzero(read[1:] != read[:-1]).reshape(-1, 2).tolist()


def swap_images(rows: Dataset, visual_token_offset: int, seed: int = 0) -> tuple[list[int], Dataset]:
    """
    Rows whose answers are texts about images, each with the images of another row.

    The other row has as many images of the same sizes, and not the same codes. Which one it is depends on the data and
    on `seed` alone.

    Args:
        rows: data set of `input_ids` and `labels`.
        visual_token_offset: first visual id.
        seed: of the order in which rows are paired.

    Returns:
        Indices of the rows that have images to swap, and these rows.
    """
    ids = [np.asarray(row) for row in rows["input_ids"]]
    labels = [np.asarray(row) for row in rows["labels"]]
    groups = {}
    for index, (own, targets) in enumerate(zip(ids, labels)):
        places = find_images(own, targets, visual_token_offset)
        answers = (targets >= 0) & (targets < visual_token_offset)
        if places and answers.any():
            codes = np.concatenate([own[start:end] for start, end in places])
            groups.setdefault(tuple(end - start for start, end in places), []).append((index, places, codes))
    swapped = {}
    for group in groups.values():
        order = np.random.default_rng(seed).permutation(len(group))
        for place, number in enumerate(order):
            index, places, codes = group[number]
            others = (group[order[(place + step) % len(group)]][2] for step in range(1, len(group)))
            other = next((other for other in others if not np.array_equal(other, codes)), None)
            if other is not None:
                new = ids[index].copy()
                new[np.concatenate([np.arange(start, end) for start, end in places])] = other
                swapped[index] = new.tolist()
    chosen = sorted(swapped)
    return chosen, Dataset.from_dict(
        {"input_ids": [swapped[i] for i in chosen], "labels": [labels[i].tolist() for i in chosen]}
    )
