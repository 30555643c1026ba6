"""What a worker reports of its steps: which of them, when, and what it learns itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.verification_cases import PlainCalibrator, Prices
from vllm_dspark.integration.step_clock import HostClock
from vllm_dspark.integration.step_meter import StepMeter
from vllm_dspark.integration.step_report import Startup, StepPlan, TimedStep
from vllm_dspark.scheduler.verification import VerificationPolicy

GAMMA = 3
STARTUP = Startup((0, 1, 3), None)


class CountedClock:
    """Step n takes n + 1 ms, and is known `lag` steps later."""

    def __init__(self, lag: int = 0) -> None:
        self._lag, self._done = lag, 0
        self.steps = 0

    def begin(self) -> None:
        pass

    def end(self, step: int) -> None:
        self.steps = step + 1

    def ended(self) -> list[tuple[int, float]]:
        ready = range(self._done, max(self.steps - self._lag, self._done))
        self._done = ready.stop
        return [(n, n + 1.0) for n in ready]


class Costs:
    trims_replay = True

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def observe(self, *observation: Any) -> None:
        self.seen.append(observation)


def manager(policy: Any = None) -> Any:
    return SimpleNamespace(
        counters=SimpleNamespace(verified=0), costs=Costs(), policy=policy, head=None
    )


def meter(managed: Any = None, lag: int = 0) -> StepMeter:
    return StepMeter(GAMMA, managed, CountedClock(lag), STARTUP)


def step(
    metered: StepMeter,
    drafts: dict[str, int],
    managed: Any = None,
    verified: int | None = None,
    prefill: int = 0,
    new: bool = False,
    plan: StepPlan = StepPlan(),  # noqa: B008  # immutable
    depth: int = GAMMA,
) -> Any:
    """One step of requests with so many scheduled drafts each; the report of it."""
    metered.begin(plan)
    total = sum(drafts.values())
    if managed is not None:
        managed.counters.verified += total if verified is None else verified
    output = SimpleNamespace(
        scheduled_spec_decode_tokens={name: [-1] * n for name, n in drafts.items() if n},
        total_num_scheduled_tokens=len(drafts) + total + prefill,
        scheduled_new_reqs=["new"] if new else [],
    )
    batch = SimpleNamespace(num_reqs=len(drafts), num_computed_tokens_np=np.full(len(drafts), 10))
    metered.launched(output, batch, depth)
    return metered.end()


def test_step_is_reported_with_a_later_one() -> None:
    """Its time with its own shape; never with itself, whose drafts are still to be verified."""
    metered = meter()
    assert step(metered, {"a": 3, "b": 3}).steps == ()
    report = step(metered, {"a": 0, "b": 0}, depth=0)
    assert report.steps == (TimedStep(8, 2, 20, 8, GAMMA, 1.0, True),)
    assert step(metered, {"a": 0}).steps == (TimedStep(2, 2, 20, 2, 0, 2.0, True),)


def test_times_that_never_come_pile_nothing_up() -> None:
    """A clock that gave up on some steps."""
    metered = meter(lag=10_000)
    for _ in range(500):
        step(metered, {"a": 3})
    assert len(metered._shapes) <= 65


def test_startup_is_reported_once() -> None:
    metered = meter()
    assert step(metered, {"a": 0}).startup == STARTUP
    assert step(metered, {"a": 0}).startup is None


@pytest.mark.parametrize("lag", [1, 2, 5])
def test_times_that_arrive_late_keep_their_shapes(lag: int) -> None:
    metered = meter(lag=lag)
    reported = [t for n in range(20) for t in step(metered, {"a": n % 4}).steps]
    assert [t.tokens for t in reported] == [1 + n % 4 for n in range(len(reported))]
    assert [t.ms for t in reported] == [n + 1.0 for n in range(len(reported))]
    assert len(reported) == 19 - lag


@pytest.mark.parametrize("kind", [{"prefill": 5}, {"new": True}])
def test_prefills_are_not_reported(kind: dict[str, Any]) -> None:
    """A step with one in it is no decode step of its size, and shifts no other's time."""
    metered = meter()
    step(metered, {"a": 3})
    assert len(step(metered, {"a": 3, "b": 0}, **kind).steps) == 1
    assert step(metered, {"a": 3}).steps == ()
    assert step(metered, {"a": 3}).steps[0].ms == 3.0


def test_trimmed_step_has_the_size_that_ran() -> None:
    """Not what was scheduled; unusual only where a trimmed batch leaves its graph."""
    for replay in (True, False):
        managed = manager()
        managed.costs.trims_replay = replay
        metered = meter(managed)
        step(metered, {"a": 3, "b": 3}, managed, verified=2)
        (timed,) = step(metered, {"a": 3, "b": 3}, managed).steps
        assert (timed.tokens, timed.logits_rows, timed.usual) == (4, 4, replay)
        (whole,) = step(metered, {"a": 3}, managed).steps
        assert (whole.tokens, whole.usual) == (8, True)


def test_costs_learn_from_the_plan_alone() -> None:
    """Catches a rank that goes by its own clock."""
    managed = manager()
    metered = meter(managed)
    told = TimedStep(5, 2, 30, 5, 1, 9.0, False)
    step(metered, {"a": 3}, managed)
    step(metered, {"a": 3}, managed, plan=StepPlan((told,)))
    assert managed.costs.seen == [(told.shape, 9.0, False)]


def test_survival_of_blocks_that_are_over() -> None:
    """From the policy, each block once, aging by steps where nothing is drafted."""
    policy = VerificationPolicy(2, GAMMA, PlainCalibrator(), Prices(1.0))
    managed = manager(policy)
    metered = meter(managed)
    slots = np.arange(2)
    for slot in range(2):
        policy.add_request(slot, 0)
    confidence = np.array([[0.9, 0.5, np.nan], [0.7, 0.5, np.nan]])
    for n in range(300):  # two drafts each step
        policy.outcomes_arrived(n, slots, np.ones(2, int), np.full(2, 2))
        policy.confidences_arrived(n, slots, confidence)
        report = step(metered, {"a": 2, "b": 2}, managed)
    np.testing.assert_allclose(report.survival[:2], [0.8, 0.4], atol=0.01)
    assert report.age[:2] == (0.0, 0.0)
    assert report.age[2] == float("inf")
    for _ in range(5):
        report = step(metered, {"a": 0, "b": 0}, managed, depth=0)
    assert report.age[:2] == (5.0, 5.0)


def test_without_a_ranking_no_survival_is_reported() -> None:
    """The scheduler then goes by outcomes."""
    assert step(meter(manager()), {"a": 3}).survival == ()
    assert step(meter(None), {"a": 3}).survival == ()


def test_depths_are_noted_for_who_asks() -> None:
    metered = meter()
    step(metered, {"a": 3})
    metered.depths = []
    step(metered, {"a": 3}, depth=2)
    assert metered.depths == [2]


def test_host_clock() -> None:
    """Times are of the step between its own begin and end, each told once."""
    clock = HostClock()
    clock.begin()
    clock.begin()  # the first was a step without requests
    clock.end(4)
    ((number, ms),) = clock.ended()
    assert number == 4
    assert 0 <= ms < 1000
    assert clock.ended() == []
