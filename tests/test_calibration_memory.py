"""What is remembered, against a memory that keeps every observation and reweighs them all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from vllm_dspark.calibration import shares
from vllm_dspark.calibration.memory import (
    BINS,
    CAPACITY,
    FADING,
    HALF_LIFE,
    LIMIT,
    Memory,
)
from vllm_dspark.calibration.shares import RequestShares


@dataclass
class Kept:
    cell: int
    request: int
    weight: float
    logit: float
    accepted: bool
    predicted: float


class NaiveMemory:
    """One object an observation, from the module's docstrings."""

    def __init__(self, regimes: int, gamma: int) -> None:
        self.regimes, self.gamma = regimes, gamma
        self.kept: list[Kept] = []

    def remember(self, observations: list[Kept]) -> None:
        held: dict[tuple[int, int], float] = {}
        for old in self.kept:
            key = old.cell, old.request
            held[key] = held.get(key, 0) + old.weight
        for new in observations:
            new.weight = min(1, max(0, LIMIT - held.get((new.cell, new.request), 0)))
        added = [
            sum(new.weight for new in observations if new.cell == cell)
            for cell in range(self.regimes * self.gamma)
        ]
        for new in observations:
            new.weight *= min(1, LIMIT / added[new.cell]) if added[new.cell] else 1
        added = [min(a, LIMIT) for a in added]
        for old in self.kept:
            first = old.cell // self.gamma * self.gamma
            old.weight *= 0.5 ** (max(added[old.cell], FADING * added[first]) / HALF_LIFE)
        self.kept += observations

    def total(self, cell: int, field: str | None = None) -> float:
        return sum(
            k.weight * (1 if field is None else getattr(k, field))
            for k in self.kept
            if k.cell == cell
        )


def draw(random: np.random.Generator, rounds: int, gamma: int, requests: np.ndarray) -> list[Kept]:
    """Two regimes by the request's parity, ragged depths."""
    observations = []
    for request in random.choice(requests, rounds, replace=False):
        for k in range(random.integers(1, gamma + 1)):
            p = random.random()
            cell = int(request) % 2 * gamma + k
            y = bool(random.random() < 0.7)
            observations.append(Kept(cell, int(request), 1, random.uniform(-10, 10), y, p))
    return observations


def feed(memory: Memory, observations: list[Kept]) -> None:
    requests, row = np.unique([o.request for o in observations], return_inverse=True)
    memory.remember(
        np.array([o.cell for o in observations]),
        np.array([o.logit for o in observations]),
        np.array([o.accepted for o in observations]),
        np.array([o.predicted for o in observations]),
        row,
        requests,
    )


@pytest.mark.parametrize(
    ("rounds", "requests", "steps"),
    [(3, 4, 400), (400, 1000, 4)],
    ids=["a_request_at_its_limit", "a_step_at_its_limit"],
)
def test_same_as_keeping_everything(rounds: int, requests: int, steps: int) -> None:
    random = np.random.default_rng(0)
    ours, naive = Memory(2, 3), NaiveMemory(2, 3)
    limited = False
    for _ in range(steps):
        observations = draw(random, rounds, 3, np.arange(requests))
        feed(ours, observations)
        naive.remember(observations)
        limited |= any(o.weight < 1 for o in observations)
    assert limited
    for sums, field in (
        (ours.count, None),
        (ours.accepts, "accepted"),
        (ours.logits, "logit"),
        (ours.predicted, "predicted"),
    ):
        expected = [naive.total(cell, field) for cell in range(6)]
        np.testing.assert_allclose(sums.sum(-1).ravel(), expected, rtol=1e-9)
    mean = ours.mean_logits()
    edges = np.linspace(-10, 10, BINS + 1)
    seen = ours.count > 0
    assert ((mean >= edges[:-1] - 1e-9) & (mean <= edges[1:] + 1e-9))[seen].all()
    assert (mean[~seen] == 0).all()


def test_steps_at_once_are_remembered_as_one_by_one() -> None:
    """Eight equal steps, told together: the first of them are half forgotten by the last, and the
    bound on a step is one on eight. Catches weights that grow with what is told at once."""
    random = np.random.default_rng(3)
    one, other = Memory(1, 2), Memory(1, 2)
    for _ in range(20):
        cell = np.tile([0, 0, 1], 100)
        logits = random.normal(0, 2, (8, 300)).clip(-10, 10)
        accepted = random.random((8, 300)) < 0.7
        row = np.repeat(np.arange(100), 3)
        for step in range(8):
            one.remember(cell, logits[step], accepted[step], np.full(300, 0.7), row, None)
        rows = (np.arange(8)[:, None] * 100 + row).ravel()
        later = np.arange(8)[::-1].repeat(100)
        other.remember(
            np.tile(cell, 8),
            logits.ravel(),
            accepted.ravel(),
            np.full(2400, 0.7),
            rows,
            None,
            later,
        )
    np.testing.assert_allclose(other.count, one.count, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(other.accepts, one.accepts, rtol=1e-9, atol=1e-9)
    assert other.count[0, 0].sum() < CAPACITY * 1.1


def test_capacity_and_half_life() -> None:
    """One observation a step for long: `CAPACITY` remain; `HALF_LIFE` later half of them are
    of before."""
    memory, zero = Memory(1, 1), np.zeros(1, int)

    def remember(accepted: bool, times: int) -> None:
        for _ in range(times):
            memory.remember(zero, np.zeros(1), np.array([accepted]), np.ones(1), zero, None)

    remember(True, 12_000)
    assert memory.count.sum() == pytest.approx(CAPACITY, rel=1e-3)
    remember(False, int(HALF_LIFE))
    assert memory.accepts.sum() == pytest.approx(CAPACITY / 2, rel=1e-3)


def test_what_has_faded_away_is_empty() -> None:
    """After millions of rounds that never reached position 2 its bins hold no remainders whose
    ratios are rounding."""
    memory = Memory(1, 2)
    both, one = np.array([0, 1]), np.zeros(500, int)
    memory.remember(both, np.array([3.0, 3.0]), both == 0, np.ones(2), both, None)
    for _ in range(800):
        memory.remember(one, np.zeros(500), one == 0, np.ones(500), one, None)
    assert memory.count[0, 1].sum() == 0
    assert memory.logits[0, 1].sum() == 0
    mean = memory.running_mean(0.8, 20)[0]
    assert mean[1] == pytest.approx(mean[0], rel=1e-12)


def test_logits_at_the_ends_have_a_bin() -> None:
    memory, cell = Memory(1, 1), np.zeros(2, int)
    memory.remember(cell, np.array([-10.0, 10.0]), cell == 0, np.ones(2), cell, None)
    assert np.flatnonzero(memory.count).tolist() == [0, BINS - 1]


def test_running_mean_by_hand() -> None:
    """7 of 10 at position 1, nothing at 2, 1 of 4 at 3; pulled by 10 towards 0.5 and onwards."""
    memory = Memory(1, 3)
    cell = np.repeat([0, 2], [10, 4])
    accepted = np.array([True] * 7 + [False] * 3 + [True] + [False] * 3)
    memory.remember(cell, np.zeros(14), accepted, np.ones(14), np.arange(14), None)
    mean = memory.running_mean(0.5, 10)
    np.testing.assert_allclose(mean, [[0.6, 0.6, 0.5]])


def test_metrics_by_hand() -> None:
    """Errors of opposite sign in one bin cancel in `ece`, in two bins only in `gap`."""
    memory, cell = Memory(1, 1), np.zeros(4, int)
    logit = np.array([0.1, 0.9, 3.1, 3.9])  # bins of one logit: [0, 1) and [3, 4)
    accepted = np.array([True, False, True, True])
    memory.remember(cell, logit, accepted, np.array([0.5, 0.7, 0.9, 0.8]), cell, None)
    [[metrics]] = memory.metrics(np.array([[0.6]]))
    assert metrics.observations == pytest.approx(4)
    assert metrics.gap == pytest.approx((0.2 - 0.3) / 4)
    assert metrics.ece == pytest.approx((0.2 + 0.3) / 4)
    assert metrics.prior == 0.6
    [[nothing]] = Memory(1, 1).metrics(np.array([[0.6]]))
    assert nothing == (0, None, None, 0.6)


def test_a_slot_is_handed_over_empty() -> None:
    """Requests `SLOTS` apart share one; also a negative number has one."""
    held = RequestShares(1, limit=2)
    cell, one = np.zeros(1, int), np.ones(1)
    for request in (5, 5 + shares.SLOTS, -1):
        slot = held.claim(np.array([request]))
        assert held.allowed(slot, cell) == 1
        held.add(slot, cell, 2 * one)
        assert held.claim(np.array([request])) == slot
        assert held.allowed(slot, cell) == 0
    assert held.allowed(held.claim(np.array([5])), cell) == 1


def test_shares_survive_their_change_of_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgetting is kept as an exponent, which has to be taken out before float64 overflows."""
    monkeypatch.setattr(shares, "RESCALE", 3.0)
    held = RequestShares(2, limit=100)
    cells = np.arange(2)
    slot = held.claim(np.array([1, 1]))
    expected = np.zeros(2)
    for step in range(20):
        half_lives, weight = np.array([0.7, 0.0]), np.array([1.0, 1.0])
        held.forget(half_lives)
        held.add(slot, cells, weight)
        expected = expected * 0.5**half_lives + weight
        np.testing.assert_allclose(held._held[slot, cells] * 2**-held._scale, expected)
        assert held._scale.max() <= 3.0
        assert (held._scale.max() == 0) == (step % 5 == 4)
    held.forget(np.array([0.0, 1.0]))
    np.testing.assert_allclose(held.allowed(slot, cells), np.clip(100 - expected, 0, 1))
