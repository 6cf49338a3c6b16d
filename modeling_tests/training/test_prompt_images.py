"""Images in prompts lose codes, never answers, text or order; others take their place, never the same."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from transformers_unicode2.training.prompt_images import swap_images, thin_images

OFFSET, PAD = 100, 0


def make_row(*images: list[int], answer: tuple[int, ...] = (7, 8), drawn: tuple[int, ...] = ()) -> dict:
    """Text, images between frames 11 and 12, and an answer with text and perhaps an image."""
    ids = [5]
    for image in images:
        ids += [11, *(OFFSET + code for code in image), 12, 6]
    labels = [-100] * len(ids) + [*answer, *(OFFSET + code for code in drawn)]
    return {"input_ids": ids + labels[len(ids) :], "labels": labels}


def make_batch(rows: list[dict], left: bool = False) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)

    def stack(values: list[list[int]], fill: int) -> torch.Tensor:
        gaps = [[fill] * (length - len(value)) for value in values]
        return torch.tensor([gap + v if left else v + gap for v, gap in zip(values, gaps)])

    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": stack(ids, PAD),
        "labels": stack([row["labels"] for row in rows], -100),
        "attention_mask": stack([[1] * len(row) for row in ids], 0),
    }


def read_rows(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    masks = batch["attention_mask"].bool()
    return [(ids[m].tolist(), labels[m].tolist()) for ids, labels, m in zip(batch["input_ids"], batch["labels"], masks)]


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 50, (4, 16)).tolist()
    return [
        make_row(images[0]),
        make_row(images[1], images[2], answer=(9,)),
        make_row(answer=(7,), drawn=tuple(images[3])),
        make_row(images[3][:3]),
    ]


@pytest.mark.parametrize("left", [False, True])
def test_each_image_keeps_some_of_its_codes_in_their_order(rows, left):
    thinned = read_rows(thin_images(make_batch(rows, left), OFFSET, 5, seed=3))
    for row, (ids, labels) in zip(rows, thinned):
        assert [i for i in ids if i < OFFSET] == [i for i in row["input_ids"] if i < OFFSET]
        assert [i for i in labels if i != -100] == [i for i in row["labels"] if i != -100]
        # A subsequence of the row, with labels beside their ids
        rest = iter(zip(row["input_ids"], row["labels"]))
        assert all(pair in rest for pair in zip(ids, labels))
    counts = [sum(i >= OFFSET for i in ids) for ids, _ in thinned]
    assert counts == [5, 10, 16, 3]


def test_which_codes_depends_on_the_step_and_the_image_alone(rows):
    one = read_rows(thin_images(make_batch(rows), OFFSET, 5, seed=3))
    assert one == read_rows(thin_images(make_batch(rows, left=True), OFFSET, 5, seed=3))
    assert one[::-1] == read_rows(thin_images(make_batch(rows[::-1]), OFFSET, 5, seed=3))
    alone = [read_rows(thin_images(make_batch([row]), OFFSET, 5, seed=3))[0] for row in rows]
    assert one == alone
    assert one != read_rows(thin_images(make_batch(rows), OFFSET, 5, seed=4))
    assert read_rows(thin_images(make_batch(rows), OFFSET, 16, seed=3)) == read_rows(make_batch(rows))


def test_all_codes_are_read_equally_often():
    batch, seen = make_batch([make_row(list(range(16)))]), np.zeros(16)
    for step in range(2000):
        ids = thin_images(batch, OFFSET, 4, seed=step)["input_ids"][0]
        seen[(ids[ids >= OFFSET] - OFFSET).numpy()] += 1
    # 500 each, by a binomial distribution with a standard deviation of 19
    assert abs(seen - 500).max() < 90


def test_positions_of_joined_examples_begin_anew(rows):
    joined = {name: torch.tensor([[i for row in rows for i in row[name]]]) for name in ("input_ids", "labels")}
    joined["position_ids"] = torch.cat([torch.arange(len(row["labels"])) for row in rows])[None]
    thinned = thin_images(joined, OFFSET, 5, seed=3)
    alone = read_rows(thin_images(make_batch(rows), OFFSET, 5, seed=3))
    assert thinned["input_ids"][0].tolist() == [i for ids, _ in alone for i in ids]
    assert thinned["position_ids"][0].tolist() == [i for ids, _ in alone for i in range(len(ids))]


def test_swapped_rows_have_the_images_of_others_and_all_else(rows):
    rng = np.random.default_rng(1)
    many = [make_row(rng.integers(0, 50, 16).tolist(), answer=(n,)) for n in range(20)]
    # None of these can be swapped: no image, no text in the answer, a size of its own
    data = Dataset.from_list([*many, make_row(), rows[2], rows[3], make_row(rows[0]["input_ids"][2:18], answer=())])
    chosen, swapped = swap_images(data, OFFSET)
    assert chosen == list(range(20))
    images = {tuple(row["input_ids"][2:18]) for row in many}
    for row, other in zip(many, swapped):
        assert other["labels"] == row["labels"]
        assert other["input_ids"][:2] + other["input_ids"][18:] == row["input_ids"][:2] + row["input_ids"][18:]
        assert tuple(other["input_ids"][2:18]) in images - {tuple(row["input_ids"][2:18])}
    assert swap_images(data, OFFSET)[1].to_list() == swapped.to_list()


def test_equal_images_are_never_swapped():
    image, other = list(range(4)), list(range(4, 8))
    chosen, swapped = swap_images(Dataset.from_list([make_row(image)] * 5 + [make_row(other)]), OFFSET)
    assert chosen == list(range(6)) and swapped[0]["input_ids"] == make_row(other)["input_ids"]
    assert swap_images(Dataset.from_list([make_row(image)] * 5), OFFSET)[0] == []
