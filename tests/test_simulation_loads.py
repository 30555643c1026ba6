"""Closed loops and arrivals: what must hold whatever the engine costs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.simulations import GAMMA, cost_model, drafter, engine, replica
from vllm_dspark.simulation.built_in import BuiltIn
from vllm_dspark.simulation.loads import Result, closed_loop, poisson
from vllm_dspark.simulation.planning import Plan, sweep
from vllm_dspark.simulation.policies import FixedDepth
from vllm_dspark.simulation.replica import Replica
from vllm_dspark.simulation.workload import Lengths, Request

SHORT = Lengths(prompt=8, output=40, spread=0.5)


def make(seed: int) -> Replica:
    """A replica that always drafts."""
    return replica(FixedDepth(GAMMA), seed=seed)


def test_closed_loop_by_hand() -> None:
    """Two requests at a time, three times: prefills and decodes in step."""
    result = closed_loop(
        lambda seed: replica(FixedDepth(0)), 2, Lengths(prompt=4, output=11), requests=6, seed=0
    )
    step_ms = float(cost_model().verify_ms(2, 2, 0, 2))
    assert result.requests == 6
    assert result.seconds == pytest.approx(3 * (20 + 10 * step_ms) / 1000)
    assert result.tokens_per_second == pytest.approx(66 / result.seconds)
    assert result.tokens_per_second_per_user == pytest.approx(1000 / step_ms)
    assert result.first_token_ms == pytest.approx(20.0)
    assert (result.accepted_length, result.verified_per_request) == (1.0, 0.0)
    assert result.depth_shares == {0: 1.0}


def test_closed_loop_keeps_as_many_in_flight() -> None:
    made = make(0)
    result = closed_loop(lambda seed: made, 7, SHORT, 70, 0)
    assert result.requests == 70
    assert max(shape.requests for shape, _ in made.shapes or []) == 7
    assert result.verified_per_request == pytest.approx(result.drafted_per_request)


@pytest.mark.parametrize("gpus", [1, 3, 2000])
def test_arrivals_are_served_at_their_rate(gpus: int) -> None:
    """Far below what the engine can do, throughput is what comes in: 5 requests of 40 tokens."""
    result = poisson(make, 5.0, SHORT, 400, seed=1, gpus=gpus)
    assert result.gpus == gpus
    assert result.tokens_per_second == pytest.approx(5 * 40, rel=0.1)


def test_the_first_quarter_is_not_counted() -> None:
    """Of 200 arrivals that are all served, 150 count. Catches figures that are mixed with those of
    an engine which is still filling up."""
    assert poisson(make, 5.0, SHORT, 200, seed=1).requests == pytest.approx(150, abs=10)


def test_arrivals_are_at_times_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request arrives when it was drawn to, in the middle of a step as well. Catches one whose
    time begins with the end of that step, as if it had not waited for it."""
    made = make(0)
    arrived: list[Request] = []
    submit = made.submit

    def watched(request: Request) -> None:
        arrived.append(request)
        submit(request)

    monkeypatch.setattr(made, "submit", watched)
    poisson(lambda seed: made, 20.0, SHORT, 40, seed=1)
    gaps = np.random.default_rng(1).exponential(1000 / 20, size=40)
    np.testing.assert_allclose([request.arrived for request in arrived], np.cumsum(gaps))


def test_too_many_arrivals_wait() -> None:
    def busy(rate: float) -> Result:
        on = engine(most_requests=4)
        return poisson(lambda seed: replica(FixedDepth(0), on, seed=seed), rate, SHORT, 150, 0)

    calm, full, overfull = busy(1.0), busy(200.0), busy(400.0)
    assert overfull.tokens_per_second == pytest.approx(full.tokens_per_second, rel=0.1)
    assert full.first_token_ms > 5 * calm.first_token_ms


@pytest.mark.parametrize("gpus", [1, 2])
def test_what_does_not_keep_up_is_told(gpus: int) -> None:
    """Some 15 requests a second at most: 5 leave nothing behind, of 30 half wait at the end."""
    on = engine(most_requests=4)

    def busy(rate: float, requests: int = 80) -> Result:
        def one(seed: int) -> Replica:
            return replica(FixedDepth(0), on, seed=seed)

        return poisson(one, rate, SHORT, requests, 3, gpus=gpus)

    calm, full = busy(5.0), busy(30.0)
    assert calm.keeps_up
    assert calm.waiting < 4
    assert not full.keeps_up
    assert full.waiting == pytest.approx(40, rel=0.4)  # of 80 on each GPU
    assert full.running == pytest.approx(4, abs=0.5)
    assert full.to_dict()["keeps_up"] is False
    longer = busy(30.0, 240)
    assert longer.first_token_ms > 2 * full.first_token_ms  # which is why it must be told


def test_arrivals_that_do_not_end_in_time_are_told() -> None:
    """Requests of 4000 tokens within a second: there is room for all, and none ends. Those that
    wait have come in the last steps."""
    result = poisson(make, 100.0, Lengths(prompt=8, output=4000), 100, seed=0)
    assert result.waiting < 8
    assert result.waiting + result.running == 100
    assert not result.keeps_up
    assert closed_loop(make, 4, SHORT, 16, 0).keeps_up


def test_a_router_evens_out() -> None:
    """The least loaded of four waits less than one that takes what comes."""
    on = engine(most_requests=4)

    def first_token_ms(gpus: int) -> float:
        def one(seed: int) -> Replica:
            return replica(FixedDepth(0), on, seed=seed)

        return poisson(one, 14.0, SHORT, 300, 5, gpus=gpus).first_token_ms

    assert first_token_ms(4) < 0.85 * first_token_ms(1)


def test_a_fleet_in_a_closed_loop_is_as_many_times_one() -> None:
    one, many = (closed_loop(make, 4, SHORT, 16, 0, gpus=gpus) for gpus in (1, 1000))
    assert many.gpus == 1000
    assert many.tokens_per_second == one.tokens_per_second


@pytest.mark.parametrize("requests", [1, 3])
def test_what_was_not_seen_is_not_a_number(requests: int) -> None:
    result = closed_loop(make, 1, Lengths(prompt=3, output=1), requests, 0)
    assert math.isnan(result.tokens_per_second_per_user)
    assert result.to_dict()["tokens_per_second_per_user"] is None
    assert result.to_dict()["accepted_length"] is None


def test_a_plan_holds_every_policy_at_every_load() -> None:
    plan = Plan(engine(), drafter(), SHORT, fixed=(1, 3), requests=3)
    points = list(sweep(plan, "concurrency", (1, 2)))
    names = ["no speculation", "fixed 1", "fixed 3", "built-in-like", "vllm-dspark"]
    assert [point.policy for point in points] == 2 * names
    assert [point.load for point in points] == 5 * [1] + 5 * [2]
    assert [point.result.requests for point in points] == 5 * [3] + 5 * [6]
    depths = [point.result.drafted_per_request for point in points[:4]]
    assert depths == [0, 1, 3, 3]
    assert isinstance(plan.policies["built-in-like"](), BuiltIn)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"gpus": 0}, "gpus"), ({"requests": 0}, "requests"), ({"fixed": (4,)}, "fixed"),
        ({"jitter": -1}, "jitter"), ({"seconds": 0}, "seconds"),
    ],
)  # fmt: skip
def test_impossible_plans_are_refused(arguments: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Plan(engine(), drafter(), SHORT, **arguments)


def test_impossible_loads_are_refused() -> None:
    plan = Plan(engine(), drafter(), SHORT)
    with pytest.raises(ValueError, match="concurrency"):
        list(sweep(plan, "concurrency", (1.5,)))
    with pytest.raises(ValueError, match="rate"):
        list(sweep(plan, "rate", (0.0,)))
