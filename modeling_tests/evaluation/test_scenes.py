"""The figures of an evaluation."""

import numpy as np
import pytest
import torch

from transformers_unicode2.evaluation.scenes import shares, shuffle


def test_shares_are_percentages_over_all_and_per_kind():
    assert shares(["a", "a", "b"], [True, False, True]) == {"all": pytest.approx(200 / 3), "a": 50.0, "b": 100.0}


def test_shuffled_codes_are_the_same_codes_elsewhere():
    tokens = torch.arange(12).reshape(3, 4)
    mixed = shuffle(tokens, np.random.default_rng(0))
    assert mixed.shape == tokens.shape and not torch.equal(mixed, tokens)
    assert torch.equal(mixed.flatten().sort().values, tokens.flatten())
