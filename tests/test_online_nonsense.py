"""Online calibration under whatever may arrive: values never raise and never spoil anything."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.calibration_streams import Workload
from vllm_dspark.calibration.online import OnlineCalibrator

GAMMA = 3
HONEST = Workload(slope=1, intercept=0, gamma=GAMMA)


def assert_sane(calibrator: OnlineCalibrator, confidence: np.ndarray, sampled: np.ndarray) -> None:
    calibrated = calibrator.calibrate(confidence, sampled)
    assert calibrated.dtype == np.float64
    assert ((calibrated > 0) & (calibrated < 1)).all()
    assert ((calibrated.astype(np.float32) > 0) & (calibrated.astype(np.float32) < 1)).all()
    slope, intercept = calibrator.affine()
    assert np.isfinite(intercept).all()
    assert ((slope > 0) & (slope <= 50.1)).all()
    for regime in (False, True):
        assert ((calibrator.prior(regime) > 0) & (calibrator.prior(regime) < 1)).all()
        assert (np.diff(calibrator.survival_prior(regime)) < 0).all()
    for positions in calibrator.metrics().values():
        for m in positions:
            assert 0 <= m.observations < math.inf
            if m.observations:
                assert m.gap is not None
                assert m.ece is not None
                assert abs(m.gap) - 1e-9 <= m.ece <= 1 + 1e-9


def rounds() -> st.SearchStrategy[tuple[np.ndarray, ...]]:
    number = st.integers(0, 5)

    def of(n: int) -> st.SearchStrategy[tuple[np.ndarray, ...]]:
        dtype = st.sampled_from([np.float16, np.float32, np.float64])
        drafts = arrays(np.int64, n) | arrays(np.int64, n, elements=st.integers(-1, GAMMA + 1))
        drafts |= arrays(np.uint64, n) | arrays(np.int8, n)
        wild = dtype.flatmap(lambda d: arrays(d, (n, GAMMA)))
        tame = arrays(
            np.float64, (n, GAMMA), elements=st.floats(0, 1) | st.sampled_from([0.0, 1.0])
        )
        flags = arrays(np.bool_, n)
        return st.tuples(wild | tame, drafts, drafts, flags, flags, arrays(np.int64, n))

    return number.flatmap(of)


@settings(max_examples=60, deadline=None)
@given(st.lists(rounds(), min_size=1, max_size=4), st.sampled_from([1, 40]))
def test_no_values_raise_or_leave_the_open_interval(
    steps: list[tuple[np.ndarray, ...]], repeats: int
) -> None:
    """NaN, infinities, subnormals, counts of −2^63 and 2^64 − 1, half precision, no requests;
    repeated, so that the learner gets to work on it. Nothing warns either."""
    calibrator = OnlineCalibrator(GAMMA)
    with np.errstate(all="raise", under="ignore"):
        for confidence, accepted, verified, sampled, learn, request in steps:
            for _ in range(repeats):
                calibrator.observe(confidence, accepted, verified, sampled, learn, request)
            assert_sane(calibrator, confidence, sampled)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("confidence", [0.0, 5e-324, 0.3, 1.0], ids=str)
@pytest.mark.parametrize("accept", [0, 1])
def test_a_certain_outcome_stays_uncertain(
    confidence: float, accept: int, temperature: float
) -> None:
    """Endless accepts of what was called impossible, and the reverse: the map comes round, the
    largest step it takes is finite, and nobody is believed for sure."""
    calibrator = OnlineCalibrator(1, [temperature])
    column, ones = np.full((64, 1), confidence), np.ones(64, int)
    with np.errstate(all="raise", under="ignore"):
        for step in range(200):
            calibrator.observe(column, accept * ones, ones, ones == 1, request=step * 64 + ones)
            assert_sane(calibrator, column, ones == 1)
    assert abs(calibrator.calibrate(column, ones == 1)[0, 0] - accept) < 0.05


def test_outcomes_against_the_confidence_keep_the_order() -> None:
    """Likely drafts are rejected, unlikely ones accepted: the slope goes to its bound, not below,
    and the mean is still right."""
    calibrator, random = OnlineCalibrator(1), np.random.default_rng(0)
    for _ in range(500):
        confidence = random.random((16, 1))
        accepted = (random.random(16) > confidence[:, 0]).astype(int)
        calibrator.observe(confidence, accepted, np.ones(16, int), np.full(16, False))
    assert calibrator.affine()[0][0, 0] == pytest.approx(0.1)
    calibrated = calibrator.calibrate(random.random((1000, 1)), np.full(1000, False))
    assert calibrated.mean() == pytest.approx(0.5, abs=0.03)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=20),
    st.floats(0.1, 10),
    st.integers(0, 2**32 - 1),
)
def test_order_is_preserved(column: list[float], temperature: float, seed: int) -> None:
    """Also of neighbouring floats, at any temperature, whatever was learned."""
    random = np.random.default_rng(seed)
    calibrator = OnlineCalibrator(1, [temperature])
    for _ in range(20):
        accepted = random.integers(0, 2, 32)
        calibrator.observe(random.random((32, 1)), accepted, np.ones(32, int), accepted > 1)
    assert calibrator.version > 0
    column = sorted([*column, *(math.nextafter(c, 2) for c in column if c < 1), 0.0, 1.0])
    rows = np.array(column)[:, None]
    assert (np.diff(calibrator.calibrate(rows, np.full(len(column), False))[:, 0]) >= 0).all()


def test_nonsense_is_skipped_and_counted() -> None:
    """Rows that make no sense between rows that do: the latter teach the same as alone. A NaN
    costs its own position only, and only if that was judged."""
    random = np.random.default_rng(1)
    ours, theirs = OnlineCalibrator(GAMMA), OnlineCalibrator(GAMMA)
    for _ in range(50):
        confidence = HONEST.confidence(random, 9)
        accepted = HONEST.accepted(random, confidence)
        every = np.full(9, GAMMA)
        theirs.observe(confidence, accepted, every, every == 0)
        bad = confidence.copy()
        bad[:5] = [[math.nan] * 3, [math.inf] * 3, [1.5] * 3, [0.5] * 3, [0.5] * 3]
        ours.observe(
            np.vstack([confidence, bad[:5]]),
            np.append(accepted, [0, 1, 2, -1, 3]),
            np.append(every, [3, 3, 3, 3, 2]),
            np.full(14, False),
        )
    assert [a.tolist() for a in ours.affine()] == [a.tolist() for a in theirs.affine()]
    assert ours.version == theirs.version > 0
    assert ours.ignored == 50 * (1 + 2 + 3 + 1 + 1)
    assert theirs.ignored == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.1, 1.1])
def test_what_is_no_probability_is_given_the_prior(value: float) -> None:
    calibrator, random = OnlineCalibrator(GAMMA), np.random.default_rng(2)
    for _ in range(50):
        confidence = HONEST.confidence(random, 9)
        accepted = HONEST.accepted(random, confidence)
        calibrator.observe(confidence, accepted, np.full(9, GAMMA), np.full(9, True))
    calibrated = calibrator.calibrate([[value, 0.5, value]] * 2, [True, False])
    for row, regime in zip(calibrated, (True, False), strict=True):
        np.testing.assert_array_equal(row[[0, 2]], calibrator.prior(regime)[[0, 2]])
    assert calibrator.prior(True)[0] != calibrator.prior(False)[0]


HALF = np.full((2, GAMMA), 0.5)
BAD: dict[str, list[Any]] = {
    "confidence": [
        [[0.5] * 2] * 2, [0.5] * 3, [[[0.5] * 3]] * 2, 0.5, [], [[0.5] * 3, [0.5]],
        [[True] * 3] * 2, [["a"] * 3] * 2,
    ],
    "accepted": [[1], [1, 1, 1], [[1, 1]], 1, [1.0, 1.0], [True, True], [], [2**70, 1]],
    "verified": [[1], [1, 1, 1], [[1, 1]], 1, [1.0, 1.0], [True, True], [], [2**70, 1]],
    "sampled": [[True], [[True, True]], True, [1, 0], [0.7, 0.0], [], None],
    "learn": [[True], [[True, True]], True, [1, 0], []],
    "request": [[1], [[1, 1]], 1, [1.0, 2.0], [True, True], ["a", "b"], []],
}  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_bad_shapes_and_types_are_named(argument: str, value: Any) -> None:
    """Those are faults of the caller, not of the values; [0.7, 0.0] are temperatures."""
    good: dict[str, Any] = {
        "confidence": HALF, "accepted": [1, 1], "verified": [2, 2], "sampled": [True, False],
        "learn": [True, True], "request": [1, 2],
    }  # fmt: skip
    calibrator: Any = OnlineCalibrator(GAMMA)
    calibrator.observe(**good)
    named = "(confidence|accepted) " if argument == "confidence" else f"{argument} "
    with pytest.raises(ValueError, match=f"^{named}"):
        calibrator.observe(**(good | {argument: value}))
    if argument in ("confidence", "sampled"):
        named = "(confidence|sampled) " if argument == "confidence" else f"{argument} "
        calibrator.calibrate(HALF, [True, False])
        with pytest.raises(ValueError, match=f"^{named}"):
            calibrator.calibrate(
                **({"confidence": HALF, "sampled": [True, False]} | {argument: value})
            )


@pytest.mark.parametrize("gamma", [0, -1, 2.0, True, None])
def test_bad_gamma_is_named(gamma: Any) -> None:
    with pytest.raises(ValueError, match=r"^gamma "):
        OnlineCalibrator(gamma)


@pytest.mark.parametrize(
    "temperatures",
    [[1.0], [1.0] * 4, [[1.0] * 3], [0.0, 1, 1], [math.nan, 1, 1], [0.09, 1, 1], [10.2, 1, 1]],
    ids=str,
)
def test_bad_temperatures_are_named(temperatures: Any) -> None:
    """Beyond the range that the fit searches there is nothing to trust, and squares overflow."""
    OnlineCalibrator(GAMMA, [0.1, 1.0, math.exp(math.log(10))])
    with pytest.raises(ValueError, match=r"^temperatures "):
        OnlineCalibrator(GAMMA, temperatures)


def test_a_step_without_requests_changes_nothing() -> None:
    calibrator = OnlineCalibrator(GAMMA)
    calibrator.observe(np.empty((0, GAMMA)), [], [], [], [], [])
    assert calibrator.calibrate(np.empty((0, GAMMA)), []).shape == (0, GAMMA)
    assert calibrator.version == calibrator.ignored == 0
