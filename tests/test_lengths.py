"""Lengths of a sweep's requests."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.lengths import output_lengths


@pytest.mark.parametrize(
    ("most", "spread", "least"), [(256, 0.5, 128), (7, 1.0, 1), (1, 0.3, 1), (64, 0.0, 64)]
)
def test_lengths_fill_their_range(most: int, spread: float, least: int) -> None:
    """Both ends occur, and nothing beyond them; a spread of 0 is one length."""
    found = output_lengths(5000, most, spread, seed=0)
    assert (min(found), max(found)) == (least, most)
    assert np.mean(found) == pytest.approx((least + most) / 2, rel=0.02)


def test_a_larger_load_goes_on_where_a_smaller_one_ended() -> None:
    """Arms that are measured on different days see the same lengths; another seed, others."""
    assert output_lengths(600, 128, 0.5, seed=3)[:24] == output_lengths(24, 128, 0.5, seed=3)
    assert output_lengths(24, 128, 0.5, seed=4) != output_lengths(24, 128, 0.5, seed=3)
