"""The Newton step of Platt scaling against scipy's optimiser, and where it starts badly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit

from vllm_dspark.calibration.platt import (
    INTERCEPT_PULL,
    SLOPE_PULL,
    SLOPE_RANGE,
    newton_step,
    sigmoid,
)

Problem = tuple[np.ndarray, np.ndarray, np.ndarray]  # count, accepts, logit; [γ, bins] each


def problem(seed: int, gamma: int, bins: int, weight: float, limit: float) -> Problem:
    random = np.random.default_rng(seed)
    logit = random.uniform(-limit, limit, (gamma, bins))
    count = weight * random.random((gamma, bins)) * (random.random((gamma, bins)) < 0.7)
    slope, intercept = np.linspace(-1, 8, gamma)[:, None], random.normal(0, 1, (gamma, 1))
    return count, count * expit(slope * logit + intercept), logit


def loss(s: float, b: float, towards: tuple[float, float], data: Problem) -> float:
    count, accepts, logit = data
    u = s * logit + b
    pull = SLOPE_PULL * (s - towards[0]) ** 2 + INTERCEPT_PULL * (b - towards[1]) ** 2
    return float((count * np.logaddexp(0, u) - accepts * u).sum() + pull / 2)


@pytest.mark.parametrize("weight", [0.1, 10.0, 1000.0])
@pytest.mark.parametrize(("gamma", "bins"), [(1, 1), (7, 40), (3, 5)])
def test_steps_end_at_the_minimum(gamma: int, bins: int, weight: float) -> None:
    """True slopes go from −1 to 8, so that both ends of the range bind somewhere: there the
    intercept has to be the best for the slope at its end."""
    count, accepts, logit = problem(gamma + bins, gamma, bins, weight, limit=3)
    towards = np.linspace(0.5, 2, gamma), np.linspace(-1, 1, gamma)
    slope, intercept = np.ones(gamma), np.zeros(gamma)
    for _ in range(100):
        slope, intercept = newton_step(slope, intercept, towards, count, accepts, logit)
    for k in range(gamma):
        pull, data = (towards[0][k], towards[1][k]), (count[k], accepts[k], logit[k])
        best = minimize(
            lambda x, pull=pull, data=data: loss(x[0], x[1], pull, data),
            pull,
            bounds=[SLOPE_RANGE, (None, None)],
            options={"ftol": 1e-15, "gtol": 1e-9},
        )
        assert loss(slope[k], intercept[k], pull, data) <= best.fun * (1 + 1e-9) + 1e-9
    if gamma == 7 and weight == 1000:
        assert slope.min() == SLOPE_RANGE[0]
        assert slope.max() == SLOPE_RANGE[1]


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.1, 10.0, 1000.0]),
    st.floats(*SLOPE_RANGE),
    st.floats(-30, 30),
)
def test_no_step_goes_uphill(seed: int, weight: float, s: float, b: float) -> None:
    """Where all probabilities are 0 or 1 there is no curvature, and a whole Newton step of
    hundreds of logits overshoots; the shortened one never does."""
    data = problem(seed, 1, 8, weight, limit=10)
    towards = np.ones(1), np.zeros(1)
    slope, intercept = np.array([s]), np.array([b])
    before = loss(s, b, (1, 0), data)
    for _ in range(5):
        slope, intercept = newton_step(slope, intercept, towards, *data)
        after = loss(slope[0], intercept[0], (1, 0), data)
        assert after <= before + 1e-9 * (1 + abs(before))
        assert SLOPE_RANGE[0] <= slope[0] <= SLOPE_RANGE[1]
        before = after


def test_without_observations_the_map_is_what_it_is_pulled_towards() -> None:
    """In one step, because nothing limits it; and regimes and positions do not mix."""
    empty = np.zeros((2, 3, 4))
    to_slope, to_intercept = np.full((2, 3), 1.3), np.reshape([0.0, 1, 2, 3, 4, 5], (2, 3))
    slope, intercept = newton_step(
        np.full((2, 3), 0.4), np.full((2, 3), -2.0), (to_slope, to_intercept), empty, empty, empty
    )
    np.testing.assert_allclose(slope, to_slope, atol=1e-6)
    np.testing.assert_allclose(intercept, to_intercept, atol=1e-6)


def test_sigmoid() -> None:
    u = np.array([-600.0, -3.0, 0.0, 3.0, 600.0])
    with np.errstate(all="raise", under="ignore"):
        np.testing.assert_allclose(sigmoid(u), expit(u), rtol=1e-14)
