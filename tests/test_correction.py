"""What the cost model learns from measured steps, against a truth that changes.

Measured times carry 3 % of noise, and one in a hundred takes 50 times as long, everywhere
unless said otherwise. Errors are of the prediction against the truth without noise.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from tests import step_cases
from tests.step_cases import CAPTURED, GAMMA, draft_ms, predicted, shape, step_ms, verify_ms
from vllm_dspark.scheduler.correction import Correction
from vllm_dspark.scheduler.cost_model import CostModel, StepShape
from vllm_dspark.scheduler.gate import REGIME_STEPS

Truth = Callable[[StepShape], float]


class Run:
    """A model that is shown steps of random shapes out of a mix."""

    def __init__(self, cost: CostModel, noise: float = 0.03, outliers: float = 0.01) -> None:
        self.cost, self.noise, self.outliers = cost, noise, outliers
        self.random = np.random.default_rng(0)

    def show(
        self,
        truth: Truth,
        steps: int,
        requests: Sequence[int] = (1, 16, 64, 256),
        depths: Sequence[int] = (0, 1, 3, 7),
        context: int = 600,
    ) -> np.ndarray:
        """Errors [steps], percent, each before its step was observed."""
        errors = []
        for _ in range(steps):
            step = shape(
                int(self.random.choice(requests)),
                int(self.random.choice(depths)),
                int(context * self.random.uniform(0.8, 1.2)),
            )
            errors.append(100 * abs(predicted(self.cost, step) / truth(step) - 1))
            measured = truth(step) * self.random.lognormal(0, self.noise)
            self.cost.observe(step, measured * (50 if self.random.random() < self.outliers else 1))
        return np.array(errors)


@functools.cache
def _settled() -> Run:
    run = Run(step_cases.model())
    run.show(step_ms, 300)
    return run


def settled() -> Run:
    """A copy of one that saw a true profile for a while."""
    return copy.deepcopy(_settled())


def test_a_true_profile_stays() -> None:
    """Noise and outliers alone: no wandering, and single outliers teach nothing at all."""
    errors = settled().show(step_ms, 1500)
    assert np.median(errors) < 1.5
    assert errors.max() < 8


CHANGES: dict[str, Truth] = {
    "slower": lambda s: 1.5 * step_ms(s),
    "faster": lambda s: 0.6 * step_ms(s),
    "slightly": lambda s: 1.08 * step_ms(s),
    "far slower": lambda s: 40 * step_ms(s),
    "draft": lambda s: verify_ms(s) + 2 * draft_ms(s),
    "tokens": lambda s: 5.5 + 2 * (verify_ms(s) - 5.5) + draft_ms(s),
    "host": lambda s: 3 + step_ms(s),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_is_learned(change: Truth) -> None:
    """In 300 steps of mixed shapes, whichever part it is that changed."""
    run = settled()
    before = run.show(change, 10).max()
    run.show(change, 290)
    errors = run.show(change, 300)
    assert np.median(errors) < 2.5
    assert np.percentile(errors, 95) < 8
    assert before > 3  # there was something to learn


@pytest.mark.parametrize("noise", [0.01, 0.1])
def test_one_shape_alone_is_learned_soon(noise: float) -> None:
    """A steady load runs one shape: a dozen steps to believe it, then a few to settle. At 10 %
    noise a factor of 1.5 hardly stands out, and takes some dozens."""
    run = Run(step_cases.model(), noise=noise)
    run.show(step_ms, 300, [16], [3])
    run.show(CHANGES["slower"], 40 if noise < 0.05 else 100, [16], [3])
    assert np.median(run.show(CHANGES["slower"], 200, [16], [3])) < 2.5


def test_a_change_of_all_sizes_is_believed_at_once() -> None:
    """Sixteen kinds of steps in turn: a dozen in all tell, not a dozen of each."""
    run = settled()
    run.show(CHANGES["slower"], 40)
    assert np.median(run.show(CHANGES["slower"], 60)) < 4


def test_a_change_within_the_noise_is_followed_after_a_long_calm() -> None:
    """8 % that no gate stops, after thousands of steps that agreed: never sure for good."""
    run = settled()
    run.show(step_ms, 2500, [16], [3])
    run.show(CHANGES["slightly"], 60, [16], [3])
    assert np.mean(run.show(CHANGES["slightly"], 100, [16], [3])) < 2


def test_a_shift_seen_at_one_size_holds_for_all() -> None:
    """Co-running load seen at 16 requests: the step at 256 is known to be slower too. Steps that do
    not draft must be among them: without, it could be the host."""
    run = settled()
    run.show(CHANGES["slower"], 100, [16], [0, 3])
    for step in (shape(256, 1), shape(1, 7)):
        assert predicted(run.cost, step) == pytest.approx(1.5 * step_ms(step), rel=0.05)


def test_longer_context_of_a_profiled_model_is_known_at_once() -> None:
    """The profile prices it: no relearning as contexts grow eightfold."""
    assert np.percentile(settled().show(step_ms, 20, context=4800), 95) < 8


@pytest.mark.parametrize("requests", [[64], [1, 16, 64, 256]], ids=["steady", "mixed"])
def test_longer_context_of_a_model_profiled_at_one_length(requests: list[int]) -> None:
    """Profiled at 300 for every shape, run at 600 and then at 4800: the rate is wrong or
    missing, the steps tell."""
    cost = CostModel(step_cases.samples(contexts=(300,), depths=(7,)), CAPTURED, GAMMA)
    run = Run(cost)
    run.show(step_ms, 300, requests, [1, 3])
    run.show(step_ms, 300, requests, [1, 3], context=4800)
    assert np.median(run.show(step_ms, 200, requests, [1, 3], context=4800)) < 3


@pytest.mark.parametrize("scale", [1.0, 300.0, 0.01])
def test_a_guess_finds_its_scale(scale: float) -> None:
    """No profile, and a machine that is not the one guessed."""
    run = Run(CostModel.default(GAMMA, CAPTURED))
    run.show(lambda s: scale * step_ms(s), 300)
    assert np.median(run.show(lambda s: scale * step_ms(s), 200)) < 4


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25])
def test_outliers_do_not_move_it(share: float) -> None:
    """Up to one step in four is a pause or a prefill that was not told apart."""
    run = settled()
    run.outliers = share
    assert np.percentile(run.show(step_ms, 600), 99) < 8


def test_steps_that_ran_otherwise_teach_nothing() -> None:
    """Half of the steps are prefills eight times as long, and are marked: not one prediction
    differs from a model that never heard of them, and no error counts them."""
    marked, alone = settled().cost, settled().cost
    random = np.random.default_rng(1)
    for _ in range(300):
        step = shape(16, 3)
        marked.observe(step, 8 * step_ms(step), graph=False)
        measured = step_ms(step) * random.lognormal(0, 0.03)
        marked.observe(step, measured)
        alone.observe(step, measured)
        assert predicted(marked, step) == predicted(alone, step)
    assert marked.error == alone.error


def test_a_burst_of_pauses_is_short_of_a_regime() -> None:
    """Eleven slow steps in a row leave no trace; a lasting change is believed at the twelfth."""
    run = settled()
    run.outliers = 0.0
    step = shape(16, 3)
    before = predicted(run.cost, step)
    for _ in range(REGIME_STEPS - 1):
        run.cost.observe(step, 3 * step_ms(step))
    assert predicted(run.cost, step) == before
    for _ in range(2):
        run.cost.observe(step, 3 * step_ms(step))
    assert predicted(run.cost, step) == pytest.approx(3 * step_ms(step), rel=0.05)


def test_load_that_comes_and_goes() -> None:
    """Every hundred steps, there and back: never stuck with what was."""
    run = settled()
    for _ in range(4):
        for truth in (CHANGES["slower"], step_ms):
            assert np.median(run.show(truth, 100, [16, 64], [3])[30:]) < 4


def test_a_change_at_a_rare_size_is_learned() -> None:
    """One step in eight is at 256 requests, and slower by half from now on; the seven others
    must neither outvote it nor be carried along."""
    run = settled()

    def truth(step: StepShape) -> float:
        return step_ms(step) * (1.5 if step.requests == 256 else 1.0)

    run.show(truth, 400, [1, 4, 8, 8, 16, 16, 32, 256], [1])
    rare, common = shape(256, 1, 600), shape(8, 1, 600)
    assert predicted(run.cost, rare) == pytest.approx(truth(rare), rel=0.08)
    assert predicted(run.cost, common) == pytest.approx(truth(common), rel=0.05)


def test_a_drafter_measured_apart_is_told_apart() -> None:
    """At one shape a sum alone cannot say that it is the drafter that takes twice as long. With
    its part measured, other depths are known as well."""
    apart, together = step_cases.model(), step_cases.model()
    step, other = shape(256, 7), shape(256, 0)
    for _ in range(60):
        total = verify_ms(step) + 2 * draft_ms(step)
        apart.observe(step, total, draft_ms=2 * draft_ms(step))
        together.observe(step, total)
    assert predicted(apart, step) == pytest.approx(verify_ms(step) + 2 * draft_ms(step), rel=0.02)
    assert predicted(together, step) == pytest.approx(predicted(apart, step), rel=0.02)
    error_apart = abs(predicted(apart, other) / step_ms(other) - 1)
    error_together = abs(predicted(together, other) / step_ms(other) - 1)
    assert error_apart < 0.03 < error_together


def test_error_is_the_median_of_predictions_before_their_observation() -> None:
    cost = step_cases.model()
    assert math.isnan(cost.error)
    step = shape(16, 3)
    first = predicted(cost, step)
    cost.observe(step, 1.25 * first)
    assert cost.error == pytest.approx(20)
    second = predicted(cost, step)
    assert second > first  # learned, after the error was noted
    cost.observe(step, second)
    cost.observe(step, 80 * first)
    assert cost.error == pytest.approx(20)  # the median of 20, 0 and nearly 100
    for _ in range(256):
        cost.observe(step, predicted(cost, step))
    assert cost.error == pytest.approx(0, abs=1e-9)  # the last 256 alone count


def test_what_is_not_seen_returns_to_the_profile() -> None:
    """Twice the time at 4 tokens; then thousands of steps elsewhere that agree with the profile.
    Doubt comes back as well, so that the size is learned afresh, and never without bound."""
    correction = Correction(GAMMA)

    def show(steps: int, **log_ratios: float) -> float:
        sizes = {"small": 4.0, "large": 4096.0}
        for _ in range(steps):
            for name, ratio in log_ratios.items():
                known = correction.whole + 0.9 * correction.at_tokens(np.array([sizes[name]]))[0]
                shares = correction.shares(int(sizes[name]), 0, 0.9, 0.0, 0.0)
                correction.learn(ratio - known, shares, (0,))
        return float(correction.at_tokens(np.array([4.0]))[0])

    learned = show(200, small=0.3, large=0.0)
    assert learned > 0.1
    assert abs(show(15000, large=0.0)) < 0.1 * learned
    doubt = np.diag(correction._doubt)
    assert (doubt > 0).all()
    assert (doubt[1:] <= np.diag(correction._prior)[1:] * 1.001).all()


def test_returns_for_all_steps_that_one_stands_for() -> None:
    """Every eighth of 800 is learned from, or each. Catches a return that counts those alone, and
    takes eight times as long."""
    left = []
    for stands in (1, 8):
        correction = Correction(GAMMA)
        shares = correction.shares(4, 0, 0.9, 0.0, 0.0)
        correction.learn(0.2, shares, (0,))
        for _ in range(800 // stands):  # of what says nothing about any part
            correction.learn(0.0, np.zeros_like(shares), (0,), stands=stands)
        left.append(correction.at_tokens(np.array([4.0]))[0])
    assert left[0] > 0
    assert left[1] == pytest.approx(left[0], rel=1e-6)


@pytest.mark.parametrize("tokens", [1, 3, 4, 100, 16384, 10**6])
def test_every_size_has_a_factor(tokens: int) -> None:
    """Also past the last node, and between two."""
    correction = Correction(1)
    assert correction.learn(0.2, correction.shares(tokens, 1, 1.0, 0.0, 0.0), (0,))
    assert correction.at_tokens(np.array([float(tokens)]))[0] > 0
    assert correction.whole > correction.at_tokens(np.array([float(tokens)]))[0]


def test_observe_is_quick() -> None:
    """It runs in every step, on the way to the next. The best of 200 calls, with slack for a slow
    machine."""
    run = settled()
    step = shape(16, 3)
    measured = step_ms(step)
    assert step_cases.best_ms(lambda: run.cost.observe(step, measured)) < 0.3
