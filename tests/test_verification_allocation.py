"""The ranking on tensors against the ranking in numpy, and its calibration likewise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.budget_cases import Case, cases, changed_behind
from vllm_dspark.calibration.online import OnlineCalibrator
from vllm_dspark.integration.verification.allocation import admit, calibrated_survival
from vllm_dspark.scheduler.budget import allocate
from vllm_dspark.scheduler.survival import prefix_survival


def on_tensors(survival: np.ndarray, lengths: np.ndarray, budget: int) -> list[int]:
    admitted = admit(torch.from_numpy(survival).float(), torch.from_numpy(lengths).int(), budget)
    assert admitted.dtype == torch.int32
    return admitted.tolist()


@settings(max_examples=1000, deadline=None)
@given(cases(), st.data())
def test_equals_the_numpy_allocation(case: Case, data: st.DataObject) -> None:
    """Sixteenths are exact in float32 and tie often. Catches ties that go to the higher row, or
    to an extension before its prefix, and positions beyond a row's drafts."""
    budget = data.draw(st.integers(0, int(case.lengths.sum())))
    expected = allocate(case.survival, case.lengths, budget).tolist()
    assert on_tensors(case.survival, case.lengths, budget) == expected


@settings(max_examples=500, deadline=None)
@given(cases(), st.data())
def test_admission_ignores_what_follows(case: Case, data: st.DataObject) -> None:
    """What losslessness rests on."""
    budget = data.draw(st.integers(0, int(case.lengths.sum())))
    row, position, changed = data.draw(changed_behind(case))
    before = on_tensors(case.survival, case.lengths, budget)[row] > position
    assert (on_tensors(changed, case.lengths, budget)[row] > position) == before


@pytest.mark.parametrize(("requests", "gamma"), [(1, 1), (1, 7), (37, 5), (300, 7)])
def test_many_ties(requests: int, gamma: int) -> None:
    """All equal: an unstable sort of many elements scatters them, one of few may not."""
    survival = np.full((requests, gamma), 0.5)
    lengths = np.full(requests, gamma)
    for budget in (0, 1, gamma, requests * gamma // 2 + 1, requests * gamma):
        expected = allocate(survival, lengths, budget).tolist()
        assert on_tensors(survival, lengths, budget) == expected


def taught(gamma: int) -> OnlineCalibrator:
    """A calibrator whose maps differ from position to position and regime to regime."""
    random = np.random.default_rng(0)
    calibrator = OnlineCalibrator(gamma)
    for _ in range(200):
        confidence = random.uniform(0, 1, (16, gamma))
        sampled = random.random(16) < 0.5
        rate = confidence ** (1 + np.arange(gamma)) * np.where(sampled, 0.7, 1.0)[:, None]
        accepted = np.cumprod(random.random((16, gamma)) < rate, axis=1).sum(axis=1)
        calibrator.observe(confidence, accepted, np.full(16, gamma), sampled)
    return calibrator


@pytest.mark.parametrize("gamma", [1, 5, 7])
def test_survival_equals_the_calibrators(gamma: int) -> None:
    """In float32, confidences of exactly 0 and 1 included."""
    calibrator = taught(gamma)
    slope, intercept = (torch.from_numpy(m).float() for m in calibrator.affine())
    assert (slope[0] != slope[1]).all()
    random = np.random.default_rng(1)
    confidence = random.uniform(0, 1, (50, gamma)).astype(np.float32)
    confidence[:4] = [[0.0], [1.0], [1e-7], [1 - 1e-7]]
    sampled = random.random(50) < 0.5
    expected = prefix_survival(calibrator.calibrate(confidence, sampled))
    regimes = torch.from_numpy(sampled.astype(np.int32))
    survival = calibrated_survival(torch.from_numpy(confidence), regimes, slope, intercept)
    # The logit of a float32 near 1 is good to a percent of a percent.
    np.testing.assert_allclose(survival.numpy(), expected, rtol=2e-3, atol=1e-6)


def test_survival_never_rises() -> None:
    """Not by rounding either, where a parallel product could: the ranking counts on it."""
    calibrator = OnlineCalibrator(7)
    slope, intercept = (torch.from_numpy(m).float() for m in calibrator.affine())
    confidence = 1 - torch.rand((5000, 7), generator=torch.Generator().manual_seed(0)) * 1e-3
    regimes = torch.zeros(5000, dtype=torch.int64)
    survival = calibrated_survival(confidence, regimes, slope, intercept)
    assert (survival.diff(dim=1) <= 0).all()
    assert survival.min() > 0.9


def test_garbage_does_not_spread() -> None:
    """A drafter that computes NaN for one request must not take the ranking of others along."""
    slope, intercept = torch.ones(2, 3), torch.zeros(2, 3)
    confidence = torch.tensor([[float("nan"), 0.9, 0.9], [0.9, 0.9, 0.9]])
    survival = calibrated_survival(confidence, torch.tensor([0, 1]), slope, intercept)
    assert survival.isfinite().all()
    assert admit(survival, torch.tensor([3, 3]), 3).tolist() == [0, 3]
