"""The floor under steps that draft, learned from times that are the device's or the host's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests import step_cases
from tests.step_cases import shape
from vllm_dspark.scheduler.cost_model import CostModel
from vllm_dspark.scheduler.gate import REGIME_STEPS
from vllm_dspark.scheduler.host_floor import AGREE, GUESS, HostFloor

NOISE = 0.05
REQUESTS = (1, 4, 16, 64, 128)


def host_ms(requests: float) -> float:
    return 7.5 + 0.03 * requests


def device_ms(requests: float) -> float:
    """Shorter than the host's at all of these loads."""
    return 5.5 + 0.04 * requests


class Run:
    """Steps of a device that is known to 2 %."""

    def __init__(self, outliers: float = 0.0) -> None:
        self.floor, self.random = HostFloor(device_ms(1)), np.random.default_rng(0)
        self.outliers, self.longer = outliers, [0, 0, 0]  # device, floor, neither

    def show(self, requests: int, steps: int, host: float = 1.0, device: float = 1.0) -> None:
        """Steps of one load, of factors on the time of both."""
        for _ in range(steps):
            taken = max(host * host_ms(requests), device * device_ms(requests))
            taken *= self.random.lognormal(0, NOISE)
            taken *= 3 if self.random.random() < self.outliers else 1
            spread = math.hypot(0.02, NOISE)
            known = math.log(taken / (device * device_ms(requests)))
            longer = self.floor.observe(requests, taken, known, spread)
            self.longer[{"device": 0, "floor": 1, None: 2}[longer]] += 1


def test_nothing_is_thought_of_a_floor_before_one_was_seen() -> None:
    """It lies below the smallest step, and may be anything."""
    floor = HostFloor(10.0)
    assert floor.ms(0) == pytest.approx(GUESS * 10)
    assert floor.doubt(1) > 0.9
    assert (np.diff(floor.ms(np.arange(1000))) > 0).all()
    assert floor.ms(np.arange(3)).dtype == np.float64


@pytest.mark.parametrize("outliers", [0.0, 0.02])
def test_the_floor_is_learned(outliers: float) -> None:
    """At one load soon; at all once two loads that are far apart were seen."""
    run = Run(outliers)
    run.show(1, 30)
    assert run.floor.ms(1) == pytest.approx(host_ms(1), rel=0.05)
    run.show(64, 60)
    for requests in REQUESTS:
        assert run.floor.ms(requests) == pytest.approx(host_ms(requests), rel=0.08)
    assert run.longer[1] > 60


def test_a_device_that_binds_teaches_no_floor() -> None:
    """Steps of 128 requests take the device's time: the floor stays below, where it could not have
    been noticed, and little remains possible above."""
    run = Run(outliers=0.02)
    run.show(128, 300, host=0.1)
    assert run.longer[1] == 0
    assert run.floor.ms(128) < 0.8 * device_ms(128)
    assert run.floor.ms(128) * math.exp(2 * run.floor.doubt(128)) < 1.2 * device_ms(128)


@pytest.mark.parametrize("times", [1, AGREE - 1])
def test_a_few_long_times_raise_nothing(times: int) -> None:
    """A pause, seen before anything else. Those that agree do, and the shortest counts."""
    floor, before = HostFloor(5.0), HostFloor(5.0).ms(4)
    for _ in range(times):
        assert floor.observe(4, 15.0, math.log(3), NOISE) is None
    assert floor.ms(4) == before
    for _ in range(AGREE - times):
        longer = floor.observe(4, 12.0, math.log(12 / 5), NOISE)
    assert longer == "floor"
    assert floor.ms(4) == pytest.approx(12.0, rel=0.01)
    assert floor.regimes == 1


def test_times_far_above_a_known_floor_take_longer_to_believe() -> None:
    """As many as anywhere, not the few that raise one in doubt. Catches a burst of pauses that is
    taken for a slower host."""
    run = Run()
    run.show(4, 200)
    known, pause = run.floor.ms(4), 3 * host_ms(4)
    for _ in range(REGIME_STEPS - 1):
        assert run.floor.observe(4, pause, math.log(pause / device_ms(4)), NOISE) is None
    assert run.floor.ms(4) == known


def test_a_time_of_the_device_ends_a_row_of_long_ones() -> None:
    """Two pauses, a normal step, two pauses. Catches times that agree over whatever came between,
    which pauses do in the end."""
    floor = HostFloor(5.0)
    said = [floor.observe(4, ms, math.log(ms / 5), NOISE) for ms in (15.0, 15.0, 5.0, 15.0, 15.0)]
    assert said == [None, None, "device", None, None]


def test_one_short_time_refutes_it() -> None:
    """Times are never too short by chance: what had been learned falls at once."""
    run = Run()
    run.show(4, 100)
    assert run.floor.ms(4) == pytest.approx(host_ms(4), rel=0.05)
    assert run.floor.observe(4, device_ms(4), 0.0, NOISE) == "device"
    assert run.floor.ms(4) < device_ms(4)
    assert run.floor.doubt(4) > 0.3


@pytest.mark.parametrize("factor", [0.6, 1.4, 3.0])
def test_another_host_is_relearned(factor: float) -> None:
    """Within 30 steps; where it is faster than the device by then, it is no longer seen."""
    run = Run(outliers=0.02)
    run.show(4, 200)
    run.show(4, 30, host=factor)
    if factor * host_ms(4) > device_ms(4):
        assert run.floor.ms(4) == pytest.approx(factor * host_ms(4), rel=0.06)
    else:
        assert run.floor.ms(4) < device_ms(4)


def test_a_device_that_explains_everything_needs_no_floor() -> None:
    """The times of a slow host turn out to be the device's, whose prediction follows: the floor
    falls, or shallower blocks would look as dear as these for good."""
    run = Run()
    run.show(4, 100)
    slow = host_ms(4) / device_ms(4)
    run.show(4, 20, host=0.1, device=slow)
    assert run.floor.ms(4) < 0.75 * host_ms(4)


def test_doubt_returns_while_nothing_is_drafted() -> None:
    """The estimate stays."""
    run = Run()
    run.show(4, 100)
    known, sure = run.floor.ms(4), run.floor.doubt(4)
    for _ in range(2000):
        run.floor.rest()
    assert run.floor.ms(4) == known
    assert sure < 0.05 < 0.4 < run.floor.doubt(4) < 1.1
    run.floor.forget()
    assert run.floor.doubt(4) >= 1.0


def test_several_steps_of_rest_at_once() -> None:
    """As if they had been told one by one. Catches a step that stands for others and counts as
    one."""
    one, other = Run(), Run()
    for run in (one, other):
        run.show(4, 100)
    one.floor.rest(8)
    for _ in range(8):
        other.floor.rest()
    assert one.floor.doubt(4) == pytest.approx(other.floor.doubt(4), rel=1e-3)


def drafting() -> CostModel:
    """A cost model that saw steps that draft, as profiled, and knows by them where the floor is
    not."""
    cost, step = step_cases.model(), shape(16, 3)
    for _ in range(100):
        cost.observe(step, step_cases.step_ms(step))
    return cost


def test_steps_that_do_not_draft_bring_doubt_back_for_all_they_stand_for() -> None:
    """Every eighth of 800 is learned from, or each. Catches a cost model that does not tell the
    floor of those that were passed over."""
    rest, doubt = shape(16, 0), []
    for stands in (1, 8):
        cost = drafting()
        for _ in range(800 // stands):
            cost.observe(rest, step_cases.step_ms(rest), stands=stands)
        doubt.append(cost._times.floor.doubt(16))
    assert doubt[1] == pytest.approx(doubt[0], rel=0.02)


def test_a_new_regime_of_the_device_puts_the_floor_in_doubt() -> None:
    """Steps without drafts take half as long again by now, and whoever slowed them down may have
    slowed the host down too. Catches a floor that is as sure as before."""
    cost, rest = drafting(), shape(16, 0)
    assert cost._times.floor.doubt(16) < 0.9
    for _ in range(REGIME_STEPS):
        cost.observe(rest, 1.5 * step_cases.step_ms(rest))
    assert cost.regimes == 1
    assert cost._times.floor.doubt(16) > 0.99


def test_any_times_leave_it_sane() -> None:
    """Of anything from a microsecond to a minute: positive, growing, finite doubt."""
    floor, random = HostFloor(5.0), np.random.default_rng(0)
    for _ in range(3000):
        taken = float(np.exp(random.uniform(-7, 11)))
        floor.observe(int(random.integers(1, 2000)), taken, math.log(taken / 5), 0.06)
        times = floor.ms(np.array([0, 1, 10, 1000]))
        assert (times > 0).all()
        assert (np.diff(times) > 0).all()
        assert np.isfinite(times).all()
        assert 0 < floor.doubt(16) < 2
