"""What a worker reports of its steps: which of them, when, and what it learns itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.verification_cases import PlainCalibrator, Prices
from vllm_dspark.calibration.online import OnlineCalibrator
from vllm_dspark.integration import step_clock
from vllm_dspark.integration.step_clock import DeviceClock, HostClock
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
        self.model: Any = None

    def follow(self, model: Any) -> None:
        self.model = model

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
    step(metered, {"a": 3})
    assert step(metered, {"a": 3, "b": 3}).steps == ()
    report = step(metered, {"a": 3, "b": 0}, depth=1)
    assert report.steps == (TimedStep(8, 2, 20, 8, GAMMA, 2.0, True),)
    assert step(metered, {"a": 0}).steps == (TimedStep(5, 2, 20, 5, 1, 3.0, True),)


def test_a_step_after_one_of_another_kind_is_not_reported() -> None:
    """Its time began where that one ended: a prefill, or a step whose host had less to launch and
    ran ahead. Between depths above 0 the host does the same."""
    metered = meter()
    depths = (GAMMA, 1, 0, 0, GAMMA, GAMMA, 1)
    reported = []
    for depth in depths:
        reported += step(metered, {"a": 1}, depth=depth).steps
    reported += step(metered, {"a": 1}, prefill=5).steps
    for _ in range(3):
        reported += step(metered, {"a": 1}).steps
    assert [timed.ms - 1 for timed in reported] == [1, 3, 5, 6, 9]


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
    assert [t.tokens for t in reported] == [1 + n % 4 for n in range(1, 1 + len(reported))]
    assert [t.ms for t in reported] == [n + 1.0 for n in range(1, 1 + len(reported))]
    assert len(reported) == 18 - lag


@pytest.mark.parametrize("kind", [{"prefill": 5}, {"new": True}])
def test_prefills_are_not_reported(kind: dict[str, Any]) -> None:
    """A step with one in it is no decode step of its size, and shifts no other's time."""
    metered = meter()
    step(metered, {"a": 3})
    step(metered, {"a": 3})
    assert len(step(metered, {"a": 3, "b": 0}, **kind).steps) == 1
    assert step(metered, {"a": 3}).steps == ()
    assert step(metered, {"a": 3}).steps == ()
    assert step(metered, {"a": 3}).steps[0].ms == 5.0


def test_trimmed_step_has_the_size_that_ran() -> None:
    """Not what was scheduled; unusual only where a trimmed batch leaves its graph."""
    for replay in (True, False):
        managed = manager()
        managed.costs.trims_replay = replay
        metered = meter(managed)
        step(metered, {"a": 3}, managed)
        step(metered, {"a": 3, "b": 3}, managed, verified=2)
        (timed,) = step(metered, {"a": 3, "b": 3}, managed).steps
        assert (timed.tokens, timed.logits_rows, timed.usual) == (4, 4, replay)
        (whole,) = step(metered, {"a": 3}, managed).steps
        assert (whole.tokens, whole.usual) == (8, True)


def test_drafts_are_reported_with_their_own_step() -> None:
    """Requests that have any, how many were scheduled, and how many were verified. Catches requests
    without drafts that are counted, and counts that are told again by a step without drafts."""
    managed = manager()
    metered = meter(managed)
    assert step(metered, {"a": 3, "b": 3, "c": 0}, managed, verified=2).drafts == (2, 6, 2)
    assert step(metered, {"a": 0}, managed).drafts == ()


def test_costs_learn_from_the_plan_alone() -> None:
    """Catches a rank that goes by its own clock."""
    managed = manager()
    metered = meter(managed)
    told = TimedStep(5, 2, 30, 5, 1, 9.0, False)
    step(metered, {"a": 3}, managed)
    step(metered, {"a": 3}, managed, plan=StepPlan((told,)))
    assert managed.costs.seen == [(told.shape, 9.0, False)]


def test_worker_in_the_schedulers_process_does_not_learn_twice() -> None:
    """It prices by the scheduler's model. What trimmed steps outside of graphs take is its own."""
    managed = manager()
    metered = meter(managed)
    usual = TimedStep(5, 2, 30, 5, 1, 9.0, True)
    model: Any = object()
    step(metered, {"a": 3}, managed, plan=StepPlan((usual, usual._replace(usual=False)), model))
    assert managed.costs.model is model
    assert managed.costs.seen == [(usual.shape, 9.0, False)]


def test_survival_is_told_once_in_a_while() -> None:
    """With the first report and with every eighth; times with each."""
    policy = VerificationPolicy(2, GAMMA, PlainCalibrator(), Prices(1.0))
    metered = StepMeter(GAMMA, manager(policy), CountedClock(), STARTUP, every=8)
    reports = [step(metered, {"a": 3}) for _ in range(25)]
    assert [n for n, report in enumerate(reports) if report.survival] == [0, 7, 15, 23]
    assert all(report.steps for report in reports[2:])


def test_age_counts_steps_and_not_reports() -> None:
    """Where survival is told every eighth step, each report has aged by eight. Catches an age that
    grows by one a report, by which the scheduler would probe eight times too late."""
    policy = VerificationPolicy(1, GAMMA, PlainCalibrator(), Prices(1.0))
    policy.add_request(0, 0)
    metered = StepMeter(GAMMA, manager(policy), CountedClock(), STARTUP, every=8)
    slots = np.zeros(1, int)
    for n in range(16):
        policy.outcomes_arrived(n, slots, slots + 1, slots + GAMMA)
        policy.confidences_arrived(n, slots, np.full((1, GAMMA), 0.5))
        step(metered, {"a": GAMMA})
    reports = [step(metered, {"a": 0}, depth=0) for _ in range(16)]
    assert [report.age[0] for report in reports if report.age] == [8.0, 16.0]


def test_calibration_is_told_once_in_a_while() -> None:
    """By regime, every 128th step. Catches a look at the calibrator with every report, which takes
    the host's time, and one that never comes."""
    policy = VerificationPolicy(1, GAMMA, OnlineCalibrator(GAMMA), Prices(1.0))
    metered = StepMeter(GAMMA, manager(policy), CountedClock(), STARTUP, every=8)
    reports = [step(metered, {"a": 3}) for _ in range(256)]
    assert [n for n, report in enumerate(reports) if report.calibration] == [127, 255]
    assert len(reports[127].calibration) == len(OnlineCalibrator.REGIMES)


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


class Stream:
    """A clock, and events in a stream that runs as soon as it is told."""

    def __init__(self) -> None:
        self.now = 0.0  # seconds
        self.passed = 0
        self.recorded = 0

    def perf_counter(self) -> float:
        return self.now

    def event(self, enable_timing: bool) -> Any:
        return Event(self)


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def record(self) -> None:
        self.at, self.stream.recorded = self.stream.now, self.stream.recorded + 1
        self.number = self.stream.recorded

    def query(self) -> bool:
        return self.number <= self.stream.passed

    def elapsed_time(self, other: Event) -> float:
        assert self.query()
        assert other.query()
        return (other.at - self.at) * 1e3


@pytest.fixture(params=["host", "device"])
def clocked(request: Any, monkeypatch: Any) -> tuple[Any, Stream]:
    """A clock, and what it reads; a step passes as soon as it is launched."""
    stream = Stream()
    stream.passed = 10**9
    monkeypatch.setattr(step_clock.time, "perf_counter", stream.perf_counter)
    monkeypatch.setattr(step_clock.torch.cuda, "Event", stream.event)
    return (HostClock() if request.param == "host" else DeviceClock()), stream


def run_steps(clock: Any, stream: Stream, *steps: tuple[int, float, float]) -> None:
    """Each of a number, seconds until it begins, and seconds that it takes."""
    for number, gap, taken in steps:
        stream.now += gap
        clock.begin()
        stream.now += taken
        clock.end(number)


def test_what_the_host_takes_between_steps_counts(clocked: Any) -> None:
    """A time goes from end to end; the first step has none. Each is told once."""
    clock, stream = clocked
    run_steps(clock, stream, (4, 0.1, 1.0), (5, 0.25, 2.0), (6, 0.5, 1.0))
    assert clock.ended() == [(5, pytest.approx(2250.0)), (6, pytest.approx(1500.0))]
    assert clock.ended() == []
    run_steps(clock, stream, (7, 0.0, 3.0))
    assert clock.ended() == [(7, pytest.approx(3000.0))]


def test_a_step_with_nothing_to_run_breaks_the_line(clocked: Any) -> None:
    """It began and never ended: who knows how long nothing ran."""
    clock, stream = clocked
    run_steps(clock, stream, (0, 0.0, 1.0), (1, 0.0, 1.0))
    clock.begin()
    run_steps(clock, stream, (2, 60.0, 1.0), (3, 0.0, 2.0))
    assert clock.ended() == [(1, pytest.approx(1000.0)), (3, pytest.approx(2000.0))]


def test_device_clock_tells_what_has_passed(monkeypatch: Any) -> None:
    """In order, no sooner, and no wrong time where nobody asked for so long that events ran out."""
    stream = Stream()
    monkeypatch.setattr(step_clock.torch.cuda, "Event", stream.event)
    clock = DeviceClock()
    run_steps(clock, stream, *((step, 0.0, 1.0 + step) for step in range(6)))
    assert clock.ended() == []
    stream.passed = 4
    assert clock.ended() == [(step, pytest.approx(1e3 * (1 + step))) for step in (1, 2, 3)]
    run_steps(clock, stream, *((step, 0.0, 1.0 + step) for step in range(6, 40)))
    stream.passed = 40
    told = clock.ended()
    assert told == [(step, pytest.approx(1e3 * (1 + step))) for step, _ in told]
    assert told[-1][0] == 39
    assert len(told) >= 7
