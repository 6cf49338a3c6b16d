"""The nearest other codes, from some cells and from all."""

import pytest
import torch
from memory import MadeTensors

from transformers_unicode2.search import neighbours
from transformers_unicode2.search.neighbours import find_neighbours


def find_all(codes, count):
    """The nearest of all other codes, by brute force in float64."""
    distances = torch.cdist(codes.double(), codes.double()).fill_diagonal_(torch.inf)
    return distances.topk(count, largest=False).indices.int()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_all_cells_give_the_nearest_of_all(offset, dtype):
    """Empty cells are none; far from zero, too, where float32 has few digits left."""
    torch.manual_seed(0)
    codes = (torch.randn(300, 24) + offset * (dtype == torch.float32)).to(dtype)
    offsets = torch.tensor([0, 0, 40, 150, 150, 299, 300, 300])
    assert torch.equal(find_neighbours(codes, offsets, 5, num_probes=7), find_all(codes, 5))


@pytest.mark.parametrize("num_cells", [1, 3, 100])
def test_memory_grows_neither_with_the_codes_of_a_cell_nor_with_the_cells(monkeypatch, num_cells):
    monkeypatch.setattr(neighbours, "ROWS", 32)
    monkeypatch.setattr(neighbours, "WORKSPACE", 64 * 1000)
    codes = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    with MadeTensors() as made:
        found = find_neighbours(codes, torch.arange(num_cells + 1) * 300 // num_cells, 5, num_cells)
    assert torch.equal(found, find_all(codes, 5)) and made.largest <= 300 * 5


def test_few_cells_give_most_of_the_nearest():
    """Of codes in clusters, which are what cells are made of; a code is never its own neighbour."""
    torch.manual_seed(0)
    centres = torch.randn(20, 16).repeat_interleave(50, 0)
    codes, offsets = centres + 0.4 * torch.randn(1000, 16), torch.arange(0, 1001, 50)
    found, expected = find_neighbours(codes, offsets, 5), find_all(codes, 5)
    share = (found[:, :, None] == expected[:, None]).any(2).float().mean().item()
    assert share > 0.95 and (found != torch.arange(1000)[:, None]).all()
    assert all(len(row.unique()) == 5 for row in found)


def test_cells_with_fewer_codes_leave_places_empty():
    codes, offsets = torch.tensor([[0.0, 1.0], [0.0, 2.0], [9.0, 9.0]]), torch.tensor([0, 2, 3])
    assert find_neighbours(codes, offsets, 3, num_probes=1).tolist() == [[1, -1, -1], [0, -1, -1], [-1, -1, -1]]
    assert find_neighbours(codes, offsets, 3, num_probes=9).tolist() == [[1, 2, -1], [0, 2, -1], [1, 0, -1]]


def test_equal_codes_are_neighbours_of_each_other():
    codes = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))[[0, 0, 1, 2]]
    assert find_neighbours(codes, torch.tensor([0, 4]), 1)[:2].tolist() == [[1], [0]]
