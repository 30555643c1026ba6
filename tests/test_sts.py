"""Sequential temperature scaling on rounds whose true temperatures are known."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from vllm_dspark.calibration.metrics import expected_calibration_error
from vllm_dspark.calibration.sts import MIN_OBSERVATIONS, apply_temperatures, fit_temperatures
from vllm_dspark.scheduler.survival import prefix_survival

TRUE = {
    "gamma_1": [2.0],
    "overconfident": [1.5, 2.0, 1.8],
    "mixed": [1.5, 0.7, 2.0, 1.2, 1.0],
    "gamma_7": [1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9],
}


class Rounds(NamedTuple):
    confidence: np.ndarray
    accepted: np.ndarray
    verified: np.ndarray


def simulate(temperatures: list[float], rounds: int, seed: int, ragged: bool = False) -> Rounds:
    """Honest probabilities decide, a head that is off by `temperatures` reports them."""
    random = np.random.default_rng(seed)
    gamma = len(temperatures)
    honest = random.beta(4, 1, (rounds, gamma))
    survived = np.cumprod(random.random((rounds, gamma)) < honest, axis=1).sum(axis=1)
    verified = random.integers(0, gamma + 1, rounds) if ragged else np.full(rounds, gamma)
    confidence = expit(logit(honest) * np.array(temperatures))
    return Rounds(confidence, np.minimum(survived, verified), verified)


def errors(rounds: Rounds, temperatures: np.ndarray) -> np.ndarray:
    """ECE of every prefix of fully verified rounds."""
    survival = prefix_survival(apply_temperatures(rounds.confidence, temperatures))
    return np.array(
        [expected_calibration_error(a, rounds.accepted > k) for k, a in enumerate(survival.T)]
    )


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("true", TRUE.values(), ids=TRUE.keys())
def test_known_temperatures_are_recovered(true: list[float], ragged: bool) -> None:
    """Ragged rounds catch rows counted as rejections where they were not verified. Deeper
    positions hold fewer accepts and a flatter error, hence 25 % there."""
    fitted = fit_temperatures(*simulate(true, 40_001, seed=1, ragged=ragged))
    np.testing.assert_allclose(fitted[:3], true[:3], rtol=0.15)
    np.testing.assert_allclose(fitted, true, rtol=0.25)
    held_out = simulate(true, 40_001, seed=2)
    assert (errors(held_out, fitted) < 0.02).all()
    assert errors(held_out, np.ones(len(true)))[0] > 0.03  # there was something to correct


@pytest.mark.parametrize(("rounds", "gamma"), [(MIN_OBSERVATIONS, 1), (257, 3), (1001, 7)])
def test_no_prefix_gets_worse(rounds: int, gamma: int) -> None:
    """T = 1 is among the candidates, so a position's own fit never loses to it."""
    data = simulate([1.5] * gamma, rounds, seed=3)
    fitted = fit_temperatures(*data)
    for k in range(gamma):
        without = fitted.copy()
        without[k] = 1
        assert errors(data, fitted)[k] <= errors(data, without)[k] + 1e-12


def test_each_temperature_is_the_best_given_the_earlier_ones() -> None:
    """Against a dense search by the public functions. The product is what is fitted: with the
    conditional acceptance as its target, position 2 would come out elsewhere."""
    data = simulate([3.0, 0.6], 3001, seed=4)
    fitted = fit_temperatures(*data)
    for k in (0, 1):
        dense = []
        for temperature in np.exp(np.linspace(np.log(0.1), np.log(10), 2001)):
            tried = fitted.copy()
            tried[k] = temperature
            dense.append(errors(data, tried)[k])
        # The two-level grid may miss the very best of a jagged curve, not by a tenth of a percent.
        assert errors(data, fitted)[k] <= min(dense) + 0.001


def test_later_positions_do_not_change_earlier_temperatures() -> None:
    data = simulate([1.5, 2.0, 0.7], 2003, seed=5)
    cut = Rounds(data.confidence[:, :2], np.minimum(data.accepted, 2), np.minimum(data.verified, 2))
    np.testing.assert_array_equal(fit_temperatures(*data)[:2], fit_temperatures(*cut))


def test_unverified_positions_are_not_read() -> None:
    """What the head said about drafts that nobody verified carries no outcome."""
    data = simulate([1.5, 1.5, 1.5], 2001, seed=6, ragged=True)
    noise = np.random.default_rng(7).random(data.confidence.shape)
    verified = np.arange(3) < data.verified[:, None]
    changed = data._replace(confidence=np.where(verified, data.confidence, noise))
    np.testing.assert_array_equal(fit_temperatures(*data), fit_temperatures(*changed))


@pytest.mark.parametrize("observations", [0, MIN_OBSERVATIONS - 1, MIN_OBSERVATIONS])
def test_too_few_observations_keep_one(observations: int) -> None:
    """Position 2 alone is short; a fit on a handful of rounds would be noise."""
    data = simulate([4.0, 4.0], 500, seed=8)
    verified = np.where(np.arange(500) < observations, 2, 1)
    accepted = np.minimum(data.accepted, verified)
    fitted = fit_temperatures(data.confidence, accepted, verified)
    assert fitted[0] > 2
    assert (fitted[1] == 1) == (observations < MIN_OBSERVATIONS)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_certain_head_keeps_one(value: float) -> None:
    """0 and 1 have infinite logits: no temperature helps, none is made up, none is NaN."""
    fitted = fit_temperatures(np.full((200, 3), value), np.full(200, 1), np.full(200, 3))
    assert fitted.tolist() == [1, 1, 1]


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=20),
    st.floats(0.01, 100) | st.sampled_from([5e-324, 1.7e308]),
)
def test_order_is_preserved(column: list[float], temperature: float) -> None:
    """Also of neighbouring floats, of subnormal ones and at absurd temperatures."""
    column = sorted([*column, *(math.nextafter(c, 2) for c in column if c < 1), 0.0, 1.0])
    scaled = apply_temperatures(np.array(column)[:, None], [temperature])[:, 0]
    assert not np.isnan(scaled).any()
    assert (np.diff(scaled) >= 0).all()
    assert scaled[0] == 0
    assert scaled[-1] == 1


def test_scaling_is_of_the_logit_column_by_column() -> None:
    random = np.random.default_rng(9)
    confidence = random.uniform(0.001, 0.999, (33, 5))
    temperatures = np.array([0.2, 0.9, 1.0, 1.7, 9.0])
    scaled = apply_temperatures(confidence, temperatures)
    np.testing.assert_allclose(scaled, expit(logit(confidence) / temperatures), rtol=1e-12)
    np.testing.assert_array_equal(scaled[:, 2], confidence[:, 2])  # T = 1, to the bit
    assert scaled.dtype == np.float64
    assert apply_temperatures(confidence.astype(np.float32), temperatures).dtype == np.float64


HALF = np.full((3, 2), 0.5)
BAD: dict[str, list[Any]] = {
    "confidence": [
        [[0.5, math.nan]] * 3, [[1.5, 0.5]] * 3, [[-0.5, 0.5]] * 3, [0.5] * 3, [[[0.5]]],
        np.zeros((0, 2)), np.zeros((3, 0)), [[True, True]] * 3, [["a", "b"]] * 3,
    ],
    "accepted": [
        [-1, 0, 0], [2, 2, 2], [3, 2, 0], [1, 1], [[1, 1, 0]], [], 1, [1.0, 1.0, 0.0],
        [True, True, False],
    ],
    "verified": [
        [-1, 2, 1], [3, 2, 1], [2, 2], [[2, 2, 1]], [], 2, [2.0, 2.0, 1.0], [True, True, True],
    ],
    "temperatures": [
        [0.0, 1.0], [-1.0, 1.0], [math.nan, 1.0], [math.inf, 1.0], [1.0], [1.0] * 3, [[1.0, 1.0]],
        [], 1.0, [True, True],
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_bad_input_is_named(argument: str, value: Any) -> None:
    """[2, 2, 2] accepted is in range, and more than the last round verified."""
    fit: dict[str, Any] = {"confidence": HALF, "accepted": [1, 1, 0], "verified": [2, 2, 1]}
    scale: dict[str, Any] = {"confidence": HALF, "temperatures": [1.0, 2.0]}
    for function, good in ((fit_temperatures, fit), (apply_temperatures, scale)):
        call: Any = function
        call(**good)
        if argument in good:
            with pytest.raises(ValueError, match=f"^{argument} "):
                call(**(good | {argument: value}))


def test_warnings_are_not_let_out() -> None:
    """Division by a confidence of 0 is meant; a log full of RuntimeWarning is not."""
    with np.errstate(all="raise"):
        apply_temperatures([[0.0, 1.0, 5e-324, 1e-300]], [0.1, 0.1, 0.1, 10])
        fit_temperatures(np.tile([[0.0, 1.0]], (200, 1)), [0] * 200, [2] * 200)
