"""Predictions of the cost model: fit, stairs, monotony, extrapolation, cache.

What it learns from measured steps is in test_correction.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import step_cases
from tests.step_cases import CAPTURED, GAMMA, best_ms, predicted, shape
from vllm_dspark.scheduler.budget import choose_budget
from vllm_dspark.scheduler.cost_model import CostModel, StepSample, StepShape

MODEL = step_cases.model()
ALL_DEPTHS = np.arange(GAMMA + 1)


@pytest.mark.parametrize("requests", [1, 5, 16, 64, 100, 256])
@pytest.mark.parametrize("depth", [0, 1, 3, 4, 7])
@pytest.mark.parametrize("context", [100, 1000, 8000])
def test_profile_predicts_other_steps(requests: int, depth: int, context: int) -> None:
    """Requests, depths and contexts between and beyond those profiled, to 5 %: a part that is
    missing, a stair at the wrong size or a rate that ended up in another part miss by more."""
    step = shape(requests, depth, context)
    assert predicted(MODEL, step) == pytest.approx(step_cases.step_ms(step), rel=0.05)


def test_profiled_steps_are_exact() -> None:
    """Target and drafter, each of its own."""
    for sample in step_cases.samples():
        step = sample.shape
        verify = MODEL.verify_ms(step.tokens, step.requests, step.context_tokens, step.logits_rows)
        draft = MODEL.draft_ms(step.requests, step.depth, step.context_tokens, step.tokens)
        assert float(verify) == pytest.approx(sample.verify_ms, rel=2e-3)
        assert float(draft) == pytest.approx(sample.draft_ms, rel=5e-3, abs=0.01)


def test_context_is_priced_by_itself() -> None:
    """Profiled at 300 and 4000, asked for 32000: twice the rate would be 20 % off."""
    extra = predicted(MODEL, shape(64, 1, 32000)) - predicted(MODEL, shape(64, 1, 300))
    assert extra == pytest.approx(64 * 31700 * 5e-5, rel=0.05)


def test_drafter_reads_no_context_where_it_does_not_draft() -> None:
    """Its attention takes 10 µs for a token of context. Catches that price put on steps of depth 0,
    which only write their own context."""
    steps = [shape(r, d, c) for r in (1, 4) for d in (0, 1) for c in (100, 1000)]
    draft_ms = [1 + 0.01 * step.context_tokens if step.depth else 0.0 for step in steps]
    cost = CostModel([StepSample(s, 5.0, ms) for s, ms in zip(steps, draft_ms, strict=True)], (), 1)
    longer = cost.draft_ms(1, np.array([0, 1]), 1000, 1) - cost.draft_ms(1, np.array([0, 1]), 0, 1)
    assert longer == pytest.approx([0.0, 10.0], rel=0.01, abs=1e-9)


def test_the_median_of_repeats_counts() -> None:
    """One replay of five that took 50 times as long, in every shape."""
    spoilt = [
        StepSample(s.shape, s.verify_ms * (50 if i % 5 == 2 else 1), s.draft_ms)
        for i, s in enumerate(step_cases.samples(noise=0.01, repeats=5))
    ]
    cost = CostModel(spoilt, CAPTURED, GAMMA)
    step = shape(100, 3)
    assert predicted(cost, step) == pytest.approx(step_cases.step_ms(step), rel=0.05)


def test_target_pads_tokens_and_drafter_requests() -> None:
    """Graphs of 8 and 16 tokens. A block of 4 is captured for 2 and 4 requests; depth 0 runs
    outside of graphs; 17 tokens and 5 requests are past them."""
    targets = {10: 21.0, 20: 25.0, 30: 35.0, 40: 45.0}
    samples = [StepSample(shape(t // 5, 4), ms, 1 + 0.1 * t) for t, ms in targets.items()]
    samples += [StepSample(shape(r, 0), 13.0, 0.01 * r) for r in (1, 2, 3, 4, 6, 8)]
    cost = CostModel(samples, [16, 8, 8], 4)
    verify = cost.verify_ms(np.arange(1, 17), 4, 0, 4)
    assert np.unique(verify[:8]).size == 1
    assert np.unique(verify[8:]).size == 1
    assert verify[7] < verify[8] < cost.verify_ms(20, 4, 0, 4)
    draft = cost.draft_ms(np.arange(1, 7), 4, 0, 0)
    assert draft[0] == draft[1] < draft[2] == draft[3] < draft[4] < draft[5]
    assert (np.diff(cost.draft_ms(np.array([1, 2, 3, 4]), 0, 0, 0)) > 0).all()


def test_depths_that_were_not_profiled() -> None:
    """4 and 6 lie between their neighbours. Profiled at 7 alone, shallower blocks cost what as
    many query tokens do there, and drafting nothing costs no time."""
    cost = CostModel(step_cases.samples(), (), GAMMA)
    for depth in (4, 6):
        low, middle, high = cost.draft_ms(100, np.array([depth - 1, depth, depth + 1]), 30000, 400)
        assert middle == pytest.approx((low + high) / 2)
        assert low < middle < high
    alone = CostModel(step_cases.samples(depths=(7,)), (), GAMMA)
    for requests, depth in ((224, 1), (112, 2), (70, 5)):
        as_many = alone.draft_ms(requests * depth // 7, 7, 0, 0)
        assert float(alone.draft_ms(requests, depth, 0, 0)) == pytest.approx(float(as_many))
    nothing = float(alone.draft_ms(256, 0, 30000, 256))
    assert nothing == pytest.approx(0, abs=1e-9)  # a fit: rounding may leave a rate of 1e-18
    shallow = CostModel(step_cases.samples(depths=(0, 2)), (), GAMMA)
    assert float(shallow.draft_ms(56, 7, 0, 0)) == pytest.approx(
        float(shallow.draft_ms(196, 2, 0, 0))
    )


@pytest.mark.parametrize("requests", [512, 2048])
def test_extrapolation_past_the_profile(requests: int) -> None:
    """Up to eight times the requests: within 10 % of a truth that goes on as it ended."""
    for depth in (0, 1, 7):
        step = shape(requests, depth)
        assert predicted(MODEL, step) == pytest.approx(step_cases.step_ms(step), rel=0.10)


@functools.cache
def corrected(seed: int) -> CostModel:
    """A model that learned from steps that took anything between a third and thrice the time."""
    random = np.random.default_rng(seed)
    cost = step_cases.model() if seed % 2 else CostModel.default(GAMMA, CAPTURED)
    for _ in range(150):
        step = shape(int(random.integers(1, 300)), int(random.integers(0, 8)))
        cost.observe(step, step_cases.step_ms(step) * float(np.exp(random.uniform(-1, 1))))
    return cost


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("axis", ["tokens", "requests", "context_tokens", "logits_rows", "depth"])
def test_nothing_falls_as_a_step_grows(axis: str, seed: int) -> None:
    """Factors that differ between sizes or depths must not turn the order around."""
    cost = corrected(seed)
    grow = ALL_DEPTHS if axis == "depth" else np.arange(0, 3000)
    for requests in (1, 16, 256):
        sizes: dict[str, Any] = {
            "tokens": 4 * requests, "requests": requests, "context_tokens": 300 * requests,
            "logits_rows": 4 * requests, "depth": 3,
        }  # fmt: skip
        times = cost.step_ms(**(sizes | {axis: grow}))
        assert times.shape == grow.shape
        assert (np.diff(times) >= -1e-9).all()
        assert (times > 0).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3), st.floats(0.1, 9),
       st.floats(0, 9)), min_size=1, max_size=20),
       st.lists(st.integers(1, 99), max_size=5))  # fmt: skip
def test_any_profile_gives_a_monotone_model(
    points: list[tuple[int, int, float, float]], captured: list[int]
) -> None:
    """Of few, contradicting and falling samples."""
    steps = [StepSample(shape(r, d), v, w) for r, d, v, w in [*points, (3, 2, 4.0, 1.0)]]
    cost = CostModel(steps, captured, 3)
    grow = np.arange(0, 400)
    assert (np.diff(cost.verify_ms(grow, 5, 100, 5)) >= -1e-9).all()
    by_depth = cost.draft_ms(grow, np.arange(4)[:, None], 100, 5)
    assert by_depth.shape == (4, 400)
    assert (np.diff(by_depth, axis=0) >= -1e-9).all()
    assert (np.diff(by_depth, axis=1) >= -1e-9).all()


def test_step_is_the_sum_of_its_parts_and_broadcasts() -> None:
    """Where the host does not bind."""
    cost = step_cases.model()
    for _ in range(100):  # of full blocks for 256 requests, which say little of the host
        cost.observe(shape(256, 7), 1.2 * step_cases.step_ms(shape(256, 7)))
    requests = np.array([[1], [64]])
    tokens = requests * (1 + ALL_DEPTHS)
    step = cost.step_ms(tokens, requests, 1000, tokens, ALL_DEPTHS)
    parts = cost.verify_ms(tokens, requests, 1000, tokens) + cost.draft_ms(
        requests, ALL_DEPTHS, 1000, tokens
    )
    np.testing.assert_array_equal(step, parts)
    assert step.shape == (2, GAMMA + 1)
    assert step.dtype == np.float64
    one = cost.step_ms(64 * 4, 64, 1000, 64 * 4, 3)
    assert float(one) == step[1, 3]


def test_host_holds_up_the_steps_that_draft() -> None:
    """A step that drafts takes 30 ms by now, at whatever depth, one that does not what it did: the
    least that a step takes is learned, the parts stay, and depth 0 knows no floor."""
    cost = step_cases.model()
    for step in range(400):
        at = shape((4, 64)[step // 50 % 2], (0, 3)[step // 100 % 2])
        cost.observe(at, 30.0 if at.depth else step_cases.step_ms(at))
    for requests in (4, 64):
        assert predicted(cost, shape(requests, 0)) == pytest.approx(
            step_cases.step_ms(shape(requests, 0)), rel=0.05
        )
        for depth in (1, 3, 7):
            at = shape(requests, depth)
            assert predicted(cost, at) == pytest.approx(30.0, rel=0.05)
            assert cost.verify_ms(at.tokens, requests, 0, at.logits_rows) < 15
    assert cost.regimes >= 1
    assert sum(cost.timed) == 400
    assert cost.refused[3] < 20


def test_steady_state_is_the_step_of_each_depth() -> None:
    """Requests along one axis, depths along the other."""
    cost = corrected(2)
    requests = np.array([[1], [64]])
    steady = cost.steady_ms(requests, requests * 300, ALL_DEPTHS)
    assert steady.shape == (2, GAMMA + 1)
    for row, count in enumerate((1, 64)):
        for depth in ALL_DEPTHS.tolist():
            assert steady[row, depth] == predicted(cost, shape(count, depth, 300))


@pytest.mark.parametrize("drafts", [0, 1, 7, 2048])
def test_budget_curve_is_the_step_of_each_budget(drafts: int) -> None:
    """With a prefill of 500 tokens that asks for no logits along."""
    curve = MODEL.budget_curve(756, 256, 90000, 256, 5, drafts)
    assert curve.shape == (drafts + 1,)
    assert curve.dtype == np.float64
    for k in {0, drafts // 3, drafts}:
        assert curve[k] == MODEL.step_ms(756 + k, 256, 90000, 256 + k, 5)
    survival = np.full((drafts + 1, 1), 0.5)  # one spare draft: the curve has one entry too few
    with pytest.raises(ValueError, match="step_ms"):
        choose_budget(survival, np.ones(drafts + 1, dtype=int), curve, 256)


def test_budgets_stop_at_stairs() -> None:
    """What the stairs are for: padding is filled up, the next graph is not begun for little."""
    curve = MODEL.budget_curve(10, 8, 2400, 8, 7, 56)
    assert choose_budget(np.full((8, 7), 0.002), np.full(8, 7), curve, 8) == 16 - 10
    assert choose_budget(np.full((8, 7), 0.2), np.full(8, 7), curve, 8) == 56


def test_budget_curve_is_quick() -> None:
    """The best of 200 calls, with slack for a slow machine: a Python loop takes 100 times as
    long."""
    assert best_ms(lambda: MODEL.budget_curve(256, 256, 76800, 256, 7, 2048)) < 0.5


def test_default_is_a_sane_guess() -> None:
    """No profile: within a factor of 1.6 of the 8B model that its defaults describe, with stairs,
    and a model of an eighth takes an eighth."""
    cost = CostModel.default(GAMMA, CAPTURED)
    for requests in (1, 16, 64, 256):
        for depth in (0, 1, 7):
            step = shape(requests, depth)
            assert 1 / 1.6 < predicted(cost, step) / step_cases.step_ms(step) < 1.6
    assert cost.verify_ms(257, 1, 0, 1) == cost.verify_ms(272, 1, 0, 1)
    small = CostModel.default(GAMMA, CAPTURED, parameter_bytes=16.4e9 / 8)
    assert float(small.verify_ms(64, 64, 0, 64)) == pytest.approx(
        float(cost.verify_ms(64, 64, 0, 64)) / 8
    )
    with pytest.raises(ValueError, match="bandwidth"):
        CostModel.default(GAMMA, CAPTURED, bandwidth=0)


GOOD: dict[str, Any] = {
    "tokens": 4, "requests": 2, "context_tokens": 9, "logits_rows": 4, "depth": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("value", [-1, 1.5, True, "1", None, math.nan, [1, -1]])
def test_bad_sizes_are_named(name: str, value: Any) -> None:
    """In predictions and in shapes."""
    predicted(MODEL, StepShape(**GOOD))
    with pytest.raises(ValueError, match=f"^{name} "):
        MODEL.step_ms(**(GOOD | {name: value}))
    with pytest.raises(ValueError, match=f"^{name} "):
        StepShape(**(GOOD | {name: value}))


def test_other_bad_input_is_named() -> None:
    sample = step_cases.samples()[0]
    deep = StepSample(shape(2, 9), 1.0, 1.0)
    idle = StepSample(shape(2, 0), 1.0, 1.0)
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("samples", lambda: CostModel([], CAPTURED, GAMMA)),
        ("samples", lambda: CostModel([deep], CAPTURED, GAMMA)),
        ("samples", lambda: CostModel([idle], CAPTURED, GAMMA)),
        ("capture_sizes", lambda: CostModel([sample], [0], GAMMA)),
        ("gamma", lambda: CostModel([sample], CAPTURED, 0)),
        ("verify_ms", lambda: StepSample(shape(1, 1), 0.0, 1.0)),
        ("verify_ms", lambda: StepSample(shape(1, 1), math.nan, 1.0)),
        ("draft_ms", lambda: StepSample(shape(1, 1), 1.0, -1.0)),
        ("depth", lambda: MODEL.draft_ms(1, GAMMA + 1, 0, 0)),
        ("depth", lambda: MODEL.budget_curve(1, 1, 0, 1, GAMMA + 1, 0)),
        ("drafts", lambda: MODEL.budget_curve(1, 1, 0, 1, 1, -1)),
        ("base_tokens", lambda: MODEL.budget_curve(-1, 1, 0, 1, 1, 1)),
        ("measured_ms", lambda: MODEL.observe(shape(1, 1), 0.0)),
        ("measured_ms", lambda: MODEL.observe(shape(1, 1), math.inf)),
        ("depth", lambda: MODEL.observe(shape(1, GAMMA + 1), 1.0)),
        ("draft_ms", lambda: MODEL.observe(shape(1, 1), 1.0, draft_ms=1.0)),
    ]
    for name, call in calls:
        with pytest.raises(ValueError, match=f"^{name} "):
            call()
