"""Intervals beside their theory."""

import numpy as np
import pytest

from transformers_unicode2.evaluation.intervals import bootstrap, wilson


def test_wilson_is_the_published_interval():
    """R's binom.confint(x, n, method = "wilson")."""
    assert wilson(15, 20) == pytest.approx((0.5313, 0.8881), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_bootstrap_covers_the_mean_and_respects_groups():
    """Four equal images of a prompt say no more than one."""
    values = {str(i): float(v) for i, v in enumerate(np.random.default_rng(1).normal(size=200))}
    low, high = bootstrap(values)
    spread = np.std(list(values.values())) / 200**0.5
    assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.1)
    grouped = bootstrap({f"{i}/{j}": value for i, value in values.items() for j in range(4)})
    assert grouped[1] - grouped[0] == pytest.approx(high - low, rel=0.1)
    alone = bootstrap({f"{i}-{j}": value for i, value in values.items() for j in range(4)})
    assert alone[1] - alone[0] == pytest.approx((high - low) / 2, rel=0.1)
    assert bootstrap({"0": 1.0}) == (None, None) == bootstrap({"0/0": 1.0, "0/1": 2.0})
