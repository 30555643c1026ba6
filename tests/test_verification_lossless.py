"""The whole scheduler in the loop, by distribution: what is emitted is the target's.

First the two-word counterexample of `tests.test_budget_lossless`, through the policy's own state:
a budget that reads the block it is for emits A with 0.85 where the target says 0.7. Then random
targets and drafters, several requests that compete, an online calibrator that learns meanwhile,
and prices with stairs, by chi-square at 1e-3 for every mode and way of drafting.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from tests.simulation import Allocate, Simulation, on_host, on_host_of_a_gpu
from tests.verification_cases import LookAhead, PlainCalibrator, Prices, RandomLengths
from vllm_dspark.calibration.online import OnlineCalibrator
from vllm_dspark.integration.verification.allocation import admit, calibrated_survival
from vllm_dspark.scheduler.verification import VerificationPolicy

SIGNIFICANCE = 1e-3
SLOTS = np.zeros(1, dtype=np.int64)
DRAFTS = np.full(1, 2)


def share_of_a(policy: Any, rounds: int) -> tuple[float, set[int]]:
    """How often A is emitted first, and which lengths were verified, in `rounds` of one request:
    p = (0.7, 0.3), q = (0.5, 0.5), c_1 = 0.8, c_2 = 0.9 after A and 0 after B."""
    random = np.random.default_rng(7)
    draft_a = random.random(rounds) < 0.5
    accepts_b = random.random(rounds) < 0.3 / 0.5
    own_a = random.random(rounds) < 0.7
    confidence = np.array([[0.8, 0.0], [0.8, 0.9]], dtype=np.float32)
    policy.add_request(0, 0)
    count, lengths = 0, set()
    for step in range(rounds):
        policy.drafted(step, SLOTS, 2)
        policy.confidences_arrived(step, SLOTS, confidence[[int(draft_a[step])]])
        budget = policy.standing(SLOTS, DRAFTS)
        if budget is None:
            budget = policy.choose(SLOTS, DRAFTS, 1, 1, 0)
        length = int(policy.allocate(SLOTS, DRAFTS, budget)[0])
        lengths.add(length)
        # An accepted A is A; of p − q only A is left for a rejected B.
        count += (draft_a[step] or not accepts_b[step]) if length else own_a[step]
    return count / rounds, lengths


@pytest.mark.parametrize(
    ("cls", "rounds", "expected"),
    [(VerificationPolicy, 100_000, 0.70), (LookAhead, 20_000, 0.85)],
    ids=["ours", "leaking"],
)
def test_two_word_counterexample(cls: Any, rounds: int, expected: float) -> None:
    """The budget goes from 0 to 2 and back, so the policy has something to get wrong."""
    policy = cls(1, 2, PlainCalibrator(), Prices(1.0, 1 / 0.5, 1 / 0.45))
    share, lengths = share_of_a(policy, rounds)
    assert lengths == {0, 2}
    assert share == pytest.approx(expected, abs=0.01)


def on_device(
    policy: Any, slots: np.ndarray, drafts: np.ndarray, budget: int, confidence: np.ndarray
) -> np.ndarray:
    """Device mode: the tensor functions that serve, on CPU tensors."""
    slope, intercept = (torch.from_numpy(m).float() for m in policy.calibrator.affine())
    regimes = torch.from_numpy(policy.sampled[slots].astype(np.int64))
    survival = calibrated_survival(torch.from_numpy(confidence), regimes, slope, intercept)
    capacities = torch.from_numpy(policy.limits(slots, drafts))
    return admit(survival, capacities, budget).numpy()


MODES: dict[str, tuple[Allocate, int]] = {
    "host": (on_host, 0),
    "host of a GPU": (on_host_of_a_gpu, 1),
    "device": (on_device, 1),
}
WORDS, GAMMA, REQUESTS, STEPS = 3, 2, 3, 4000
# Up a stair with every other draft. Greedy drafts survive less often here, so they cost less.
DRAWN = 1.0, 1.6, 1.65, 2.1, 2.15, 2.6, 2.65
GREEDY = 1.0, 1.2, 1.22, 1.45, 1.47, 1.7, 1.72


def simulate(policy: Any, mode: str, greedy: bool, samples: bool = False) -> Simulation:
    """A drafter that knows the target after one word and guesses after the others, and says so:
    what it draws first tells how the next draft will fare."""
    random = np.random.default_rng(2)
    target, noise = random.dirichlet(np.ones(WORDS), (2, WORDS))
    knows = np.array([0.0, 0.95, 0.0])[:, None]
    drafter = knows * target + (1 - knows) * noise
    drafts = np.eye(WORDS)[drafter.argmax(axis=1)] if greedy else drafter
    survives = np.minimum(target, drafts).sum(axis=1, keepdims=True).clip(0.02, 0.98)
    allocate, lag = MODES[mode]
    confidence = survives.repeat(GAMMA, axis=1)
    simulation = Simulation(target, drafter, confidence, policy, allocate, greedy, lag, 9, samples)
    simulation.run(STEPS)
    return simulation


def make(cls: Any, greedy: bool, every: int = 1) -> Any:
    """Learns from `every` steps at once, and lets a choice stand that long."""
    prices = Prices(*(GREEDY if greedy else DRAWN))
    return cls(REQUESTS, GAMMA, OnlineCalibrator(GAMMA, steps=every), prices, every)


def p_value(simulation: Simulation) -> float:
    """Of words given the two words before, against the target's table: every context with enough
    words adds a chi-square of its own."""
    target = simulation.target
    statistic, freedom = 0.0, 0
    for counts in simulation.pairs:
        for row, probabilities in zip(counts, target, strict=True):
            expected = row.sum() * probabilities
            if expected.min() >= 5:
                statistic += float(((row - expected) ** 2 / expected).sum())
                freedom += len(row) - 1
    assert freedom >= 12
    return float(chi2.sf(statistic, freedom))


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy drafts", "drawn drafts"])
@pytest.mark.parametrize("mode", MODES)
def test_emitted_words_follow_the_target(mode: str, greedy: bool) -> None:
    """Requests compete, the calibrator learns, budgets jump over stairs."""
    policy = make(VerificationPolicy, greedy)
    simulation = simulate(policy, mode, greedy)
    lengths = simulation.lengths
    assert len(np.unique(lengths.sum(axis=1))) > 2  # budgets
    assert (lengths.std(axis=0) > 0.3).all()  # whose
    assert policy.calibrator.version > 0
    assert p_value(simulation) > SIGNIFICANCE


@pytest.mark.parametrize("mode", MODES)
def test_numbers_that_stand_are_lossless(mode: str) -> None:
    """As served: most steps take the number of a step before, and learning comes late."""
    policy = make(VerificationPolicy, greedy=False, every=8)
    simulation = simulate(policy, mode, greedy=False)
    assert len(policy.costs.asked) < 0.6 * STEPS
    assert (simulation.lengths.std(axis=0) > 0.3).all()
    assert policy.calibrator.version > 0
    assert p_value(simulation) > SIGNIFICANCE


def test_sampled_steps_are_lossless() -> None:
    """As served in device mode: half of the blocks never arrive, and older ones stand in."""
    policy = make(VerificationPolicy, greedy=False, every=8)
    simulation = simulate(policy, "device", greedy=False, samples=True)
    assert len(np.unique(simulation.lengths.sum(axis=1))) > 2
    assert policy.calibrator.version > 0
    assert p_value(simulation) > SIGNIFICANCE


def test_the_test_can_fail() -> None:
    """A budget that looks ahead is found out at this size. Greedy drafts are a function of the
    anchor, so there is nothing to look ahead to."""
    simulation = simulate(make(LookAhead, False), "host", False)
    assert p_value(simulation) < SIGNIFICANCE


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy drafts", "drawn drafts"])
def test_random_lengths_are_lossless(greedy: bool) -> None:
    """The adversarial policy of other tests is careless, but it does not look."""
    simulation = simulate(RandomLengths(REQUESTS, GAMMA), "host", greedy)
    assert p_value(simulation) > SIGNIFICANCE
