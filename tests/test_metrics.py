"""Calibration metrics against straightforward loops, and scipy's Mann-Whitney U."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from vllm_dspark.calibration.metrics import brier_score, expected_calibration_error, roc_auc

METRICS = {"ece": expected_calibration_error, "brier": brier_score, "auc": roc_auc}


@st.composite
def outcomes(draw: st.DrawFn) -> tuple[list[float], list[int]]:
    """Predictions, many of them tied, with their outcomes."""
    probability = st.floats(0, 1) | st.sampled_from([0.0, 0.25, 0.5, 1.0])
    pairs = draw(st.lists(st.tuples(probability, st.integers(0, 1)), min_size=1, max_size=60))
    return [p for p, _ in pairs], [y for _, y in pairs]


@settings(max_examples=1000, deadline=None)
@given(outcomes(), st.sampled_from([1, 2, 4, 16]))
def test_ece_bin_by_bin(pairs: tuple[list[float], list[int]], bins: int) -> None:
    """Powers of two have exact edges, so every prediction belongs to one bin beyond doubt."""
    predicted, observed = map(np.array, pairs)
    expected = 0.0
    for b in range(bins):
        low, high = b / bins, (b + 1) / bins
        inside = (predicted >= low) & ((predicted < high) | (b == bins - 1))
        if inside.any():
            gap = abs(predicted[inside].mean() - observed[inside].mean())
            expected += inside.mean() * gap
    assert expected_calibration_error(predicted, observed, bins) == pytest.approx(
        expected, abs=1e-12
    )


@pytest.mark.parametrize(
    ("predicted", "observed", "bins", "ece"),
    [
        ([0.9], [1], 15, 0.1),  # one observation
        ([0.0, 1.0], [0, 1], 15, 0.0),  # both ends have a bin
        ([1.0, 1.0], [0, 1], 15, 0.5),
        ([0.2, 0.4], [0, 1], 1, 0.2),  # errors of opposite sign cancel within a bin
        ([0.2, 0.6], [0, 1], 2, 0.3),  # and do not between bins
        ([0.25, 0.25, 0.25, 0.9], [0, 0, 0, 1], 4, (0.75 + 0.1) / 4),  # weighted by count
    ],
)
def test_ece_by_hand(predicted: Any, observed: Any, bins: int, ece: float) -> None:
    assert expected_calibration_error(predicted, observed, bins) == pytest.approx(ece, abs=1e-12)


def test_ece_has_fifteen_bins_by_default() -> None:
    random = np.random.default_rng(0)
    predicted = random.random(500)
    observed = random.random(500) < 0.5
    default = expected_calibration_error(predicted, observed)
    assert default == expected_calibration_error(predicted, observed, bins=15)
    assert default != expected_calibration_error(predicted, observed, bins=14)


def test_ece_of_honest_predictions_is_small() -> None:
    """And grows to what is added: 1/4 · mean p when a quarter of the accepts is lost."""
    random = np.random.default_rng(1)
    predicted = random.random(200_000)
    observed = random.random(200_000) < predicted
    assert expected_calibration_error(predicted, observed) < 0.005
    lost = observed & (random.random(200_000) < 0.75)
    assert expected_calibration_error(predicted, lost) == pytest.approx(0.125, abs=0.005)


@settings(max_examples=300, deadline=None)
@given(outcomes())
def test_brier_by_loop(pairs: tuple[list[float], list[int]]) -> None:
    expected = sum((p - y) ** 2 for p, y in zip(*pairs, strict=True)) / len(pairs[0])
    assert brier_score(*pairs) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=1000, deadline=None)
@given(outcomes())
def test_auc_by_counting_pairs(pairs: tuple[list[float], list[int]]) -> None:
    """Every accepted against every rejected one, a tie is half a win; one class is refused."""
    accepted = [p for p, y in zip(*pairs, strict=True) if y]
    rejected = [p for p, y in zip(*pairs, strict=True) if not y]
    if not accepted or not rejected:
        with pytest.raises(ValueError, match="observed"):
            roc_auc(*pairs)
        return
    wins = sum((a > b) + 0.5 * (a == b) for a in accepted for b in rejected)
    expected = wins / len(accepted) / len(rejected)
    assert roc_auc(*pairs) == pytest.approx(expected, abs=1e-12)
    statistic = mannwhitneyu(accepted, rejected, method="asymptotic").statistic
    assert roc_auc(*pairs) == pytest.approx(statistic / len(accepted) / len(rejected), abs=1e-12)


@pytest.mark.parametrize(
    ("predicted", "auc"),
    [([0.1, 0.2, 0.8, 0.9], 1.0), ([0.9, 0.8, 0.2, 0.1], 0.0), ([0.5] * 4, 0.5)],
)
def test_auc_at_its_ends(predicted: list[float], auc: float) -> None:
    """Perfect, reversed and silent; a constant prediction is no NaN."""
    assert roc_auc(predicted, [0, 0, 1, 1]) == auc


@pytest.mark.parametrize(
    "observed", [[False, True, True], [0.0, 1.0, 1.0], np.array([0, 1, 1], dtype=np.uint8)]
)
@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS.keys())
def test_outcomes_of_any_dtype(metric: Any, observed: Any) -> None:
    """Unsigned and boolean outcomes must not wrap around in a difference."""
    predicted = np.array([0.25, 0.5, 0.25], dtype=np.float32)
    assert metric(predicted, observed) == metric(predicted.astype(np.float64), [0, 1, 1])
    assert type(metric(predicted, observed)) is float


BAD: list[tuple[str, Any]] = [
    *(("predicted", bad) for bad in (
        [0.5, math.nan], [0.5, 1.5], [-0.1, 0.5], [[0.5, 0.5]], [], 0.5, [True, False], ["a", "b"]
    )),
    *(("observed", bad) for bad in (
        [0, 2], [0, -1], [0.5, 1], [0, math.nan], [0], [0, 1, 1], [[0, 1]], [], 1, ["0", "1"]
    )),
]  # fmt: skip


@pytest.mark.parametrize(("argument", "value"), BAD)
@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS.keys())
def test_bad_input_is_named(metric: Any, argument: str, value: Any) -> None:
    good = {"predicted": [0.2, 0.7], "observed": [0, 1]}
    metric(**good)
    with pytest.raises(ValueError, match=f"^{argument} "):
        metric(**(good | {argument: value}))


@pytest.mark.parametrize("bins", [0, -1, 1.0, True, None, "15"])
def test_bad_bins_are_named(bins: Any) -> None:
    with pytest.raises(ValueError, match=r"^bins "):
        expected_calibration_error([0.5], [1], bins)
