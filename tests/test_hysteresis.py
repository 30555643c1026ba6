"""When the depth policy changes its mind, and when noise must not make it."""

from __future__ import annotations

import numpy as np
import pytest

from tests import step_cases
from tests.depth_cases import choose, policy, rates
from tests.step_cases import ACCEPTANCE, CONTEXT, DEPTHS, GAMMA, SURVIVAL, shape
from vllm_dspark.scheduler.depth import DepthPolicy, Hysteresis


def test_drafts_that_stop_paying_are_left_at_once() -> None:
    """By 2 % only, at one load, just after a change: neither margin nor patience nor dwell keep
    a depth that is slower than none. The way back takes them all."""
    survival = SURVIVAL * 0.84
    by_depth = rates(256, survival)
    assert 0.95 < by_depth[1] / by_depth[0] < 1
    chosen = policy()
    assert [choose(chosen, 256, s) for s in (SURVIVAL, survival, SURVIVAL)] == [1, 0, 0]
    assert {choose(chosen, 256) for _ in range(25)} == {0}
    assert [choose(chosen, 256) for _ in range(20)][-1] == 1


def test_a_small_gain_needs_patience_and_a_large_one_does_not() -> None:
    """From full blocks to a load where 3 is 5 % better than 5, and one where 1 is far better
    than 7."""
    rules = Hysteresis(margin=0.03, patience=8, urgent=0.10, dwell=20)
    chosen = policy(hysteresis=rules, depths=(0, 3, 5))
    assert choose(chosen, 16) == 5
    by_depth = rates(36)
    assert 1.03 < by_depth[3] / by_depth[5] < 1.10
    # The load changed by more than two, so nothing but patience delays.
    depths = [choose(chosen, 36) for _ in range(12)]
    assert depths == [5] * 7 + [3] * 5
    deep = policy(hysteresis=rules)
    assert choose(deep, 1) == 7
    assert choose(deep, 250) == 1


def test_patience_is_with_consecutive_steps() -> None:
    """A step in which nothing is better starts it over. Catches a count of all steps that showed
    the gain, whenever that was."""
    rules = Hysteresis(margin=0.03, patience=8, regret=1000.0, dwell=0)
    chosen = policy(hysteresis=rules, depths=(0, 3, 5))
    assert choose(chosen, 16) == 5
    for _ in range(3):
        assert {choose(chosen, 36) for _ in range(7)} == {5}
        assert choose(chosen, 16) == 5
    assert [choose(chosen, 36) for _ in range(8)] == [5] * 7 + [3]


def test_a_gain_below_the_margin_is_not_worth_a_change() -> None:
    rules = Hysteresis(margin=0.2, urgent=0.3, regret=1000.0)
    chosen = policy(hysteresis=rules, depths=(0, 3, 5))
    assert choose(chosen, 16) == 5
    assert {choose(chosen, 36) for _ in range(100)} == {5}
    assert rates(36)[3] > rates(36)[5]


def test_a_small_gain_that_lasts_is_worth_a_change() -> None:
    """Once staying has cost as many steps as it may; any step in which nothing is better starts
    that over."""
    gain = 1 - rates(36)[5] / rates(36)[3]
    rules = Hysteresis(margin=0.2, urgent=0.3, regret=20.5 * gain, dwell=0)
    chosen = policy(hysteresis=rules, depths=(0, 3, 5))
    assert choose(chosen, 16) == 5
    assert {choose(chosen, 36) for _ in range(20)} == {5}
    assert choose(chosen, 16) == 5
    assert [choose(chosen, 36) for _ in range(22)] == [5] * 20 + [3] * 2


def test_a_small_gain_does_not_end_a_rest() -> None:
    """Nothing is seen of drafts that are not made: a gain of 2 % may be none."""
    acceptance = 1.02 * step_cases.step_ms(shape(256, 1)) / step_cases.step_ms(shape(256, 0)) - 1
    survival = np.cumprod(np.full(GAMMA, acceptance))
    assert 1.01 < rates(256, survival)[1] / rates(256, survival)[0] < 1.03
    chosen = policy()
    assert choose(chosen, 256, np.zeros(GAMMA)) == 0
    assert {choose(chosen, 256, survival) for _ in range(500)} == {0}


def test_a_choice_dwells() -> None:
    """Survival jumps to and fro at one load: one change per dwell at most."""
    chosen = policy(hysteresis=Hysteresis(dwell=50))
    depths = [
        choose(chosen, 64, SURVIVAL if step % 2 else np.full(GAMMA, 0.95)) for step in range(500)
    ]
    assert 1 <= chosen.switches <= 10
    assert np.count_nonzero(np.diff(depths)) == chosen.switches


def noisy_run(requests: int, acceptance: np.ndarray, steps: int) -> tuple[DepthPolicy, list[int]]:
    """Measured times with 5 % of noise and outliers correct the model, survival is an estimate
    with noise of its own."""
    random = np.random.default_rng(0)
    cost, chosen, depths = step_cases.model(), policy(), []
    for _ in range(steps):
        conditional = np.clip(acceptance + random.normal(0, 0.02, GAMMA), 0, 1)
        depth = choose(chosen, requests, np.cumprod(conditional), cost=cost)
        step = shape(requests, depth, int(CONTEXT * random.uniform(0.9, 1.1)))
        measured = step_cases.step_ms(step) * random.lognormal(0, 0.05)
        cost.observe(step, measured * (50 if random.random() < 0.01 else 1))
        depths.append(depth)
    return chosen, depths


@pytest.mark.parametrize("requests", [1, 20, 36, 100, 256])
def test_no_oscillation_under_a_noisy_clock(requests: int) -> None:
    """Some loads lie between two depths: noise must not be chased. A few changes while things
    settle are fine, and what is ended with is within 5 % of the best."""
    chosen, depths = noisy_run(requests, ACCEPTANCE, 1500)
    assert chosen.switches <= 4
    assert chosen.switches == np.count_nonzero(np.diff(depths))
    truth = {d: (1 + SURVIVAL[:d].sum()) / step_cases.step_ms(shape(requests, d)) for d in DEPTHS}
    assert truth[depths[-1]] >= 0.95 * max(truth.values())


def test_no_oscillation_where_drafting_breaks_even() -> None:
    """Acceptance at which one draft at 256 requests is worth exactly nothing: leaving it is
    immediate, so coming back must be hard. At most one round trip in any 300 steps."""
    ratio = step_cases.step_ms(shape(256, 1)) / step_cases.step_ms(shape(256, 0))
    acceptance = np.full(GAMMA, ratio - 1)
    chosen, depths = noisy_run(256, acceptance, 1500)
    changes = np.flatnonzero(np.diff(depths))
    assert (changes[2:] - changes[:-2] >= 300).all()
    assert changes.size == chosen.switches
    assert set(depths) <= {0, 1}


def test_learned_costs_change_the_choice() -> None:
    """Blocks of 5 turn out to take 3 ms more than profiled: 3 is better, and there is no way
    back as long as nobody profiles again."""
    cost, chosen, depths = step_cases.model(), policy(), []
    for _ in range(400):
        depths.append(choose(chosen, 16, cost=cost))
        step = shape(16, depths[-1])
        draft = step_cases.draft_ms(step) + (3 if step.depth == 5 else 0)
        cost.observe(step, step_cases.verify_ms(step) + draft, draft_ms=draft)
    assert depths[0] == 5
    assert set(depths[100:]) == {3}
    assert chosen.switches == 1
