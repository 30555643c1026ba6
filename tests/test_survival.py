"""Prefix survival: the running product, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dspark.scheduler.survival import prefix_survival

BAD = {
    "nan": [[0.5, math.nan]],
    "above_one": [[0.5, 1.0000001]],
    "negative": [[-1e-9, 0.5]],
    "infinite": [[math.inf]],
    "one_dimension": [0.5, 0.5],
    "three_dimensions": [[[0.5]]],
    "scalar": 0.5,
    "no_requests": np.zeros((0, 7)),
    "no_positions": np.zeros((7, 0)),
    "bool": [[True, False]],
    "text": [["0.5"]],
    "ragged": [[0.5], [0.5, 0.5]],
    "complex": [[0.5j]],
    "none": None,
}


@pytest.mark.parametrize("confidence", BAD.values(), ids=BAD.keys())
def test_bad_confidence_is_named(confidence: Any) -> None:
    """Each would give a survival that is no probability, or of the wrong shape."""
    with pytest.raises(ValueError, match="confidence"):
        prefix_survival(confidence)


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_product_of_every_prefix(data: st.DataObject) -> None:
    """Against math.prod per prefix; never rising, not by a bit, since `budget` relies on it."""
    requests = data.draw(st.integers(1, 5))
    gamma = data.draw(st.integers(1, 9))
    row = st.lists(st.floats(0, 1), min_size=gamma, max_size=gamma)
    confidence = data.draw(st.lists(row, min_size=requests, max_size=requests))
    survival = prefix_survival(confidence)
    assert survival.shape == (requests, gamma)
    assert (np.diff(survival, axis=1) <= 0).all()
    expected = [[math.prod(row[: j + 1]) for j in range(gamma)] for row in confidence]
    np.testing.assert_allclose(survival, expected, rtol=1e-14)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_result_is_float64(dtype: Any) -> None:
    """A product in the input's precision would drift over γ positions, or truncate."""
    confidence = np.array([[1, 1, 0, 1]], dtype=dtype)
    survival = prefix_survival(confidence)
    assert survival.dtype == np.float64
    assert survival.tolist() == [[1, 1, 0, 0]]


def test_float32_is_multiplied_in_float64() -> None:
    confidence = np.full((1, 12), 0.9, dtype=np.float32)
    expected = float(np.float32(0.9)) ** 12
    assert prefix_survival(confidence)[0, -1] == pytest.approx(expected, rel=1e-14)


def test_input_is_left_alone() -> None:
    """The confidences are logged and calibrated after the decision."""
    confidence = np.full((2, 3), 0.5)
    prefix_survival(confidence)
    assert (confidence == 0.5).all()
