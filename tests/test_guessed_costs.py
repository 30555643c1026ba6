"""Depths that are chosen from a cost profile that was guessed, and guessed wrong.

Where nothing is profiled, everything is learned from steps that run. In front of the server of
`host_bound`, the best depth that never changes must be as good as found after some steps of a load,
whatever was wrong with the guess.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests import simulations, step_cases
from tests.host_bound import GAMMA, Server, nothing
from vllm_dspark.scheduler.corrected import CorrectedTimes
from vllm_dspark.scheduler.cost_model import CostModel
from vllm_dspark.scheduler.roofline import roofline
from vllm_dspark.scheduler.step_times import StepShape
from vllm_dspark.simulation.engine import Engine
from vllm_dspark.simulation.ours import Ours
from vllm_dspark.simulation.policies import FixedDepth, Policy
from vllm_dspark.simulation.replica import Replica
from vllm_dspark.simulation.workload import Request

Profile = dict[str, Any]


def scaled(profile: Profile, verify: float = 1.0, draft: float = 1.0) -> Profile:
    sizes, times = profile["verify"]
    drafts = {d: [s, [draft * t for t in ms]] for d, (s, ms) in profile["draft"].items()}
    return profile | {"verify": [sizes, [verify * t for t in times]], "draft": drafts}


def steeper(profile: Profile, factor: float) -> Profile:
    """Every token costs so much more; the step without any stays as it is."""
    sizes, times = profile["verify"]
    return profile | {"verify": [sizes, [times[0] + factor * (t - times[0]) for t in times]]}


WRONG: dict[str, Callable[[Profile], Profile]] = {
    "as it is": lambda p: p,
    "three times as slow": lambda p: scaled(p, 3, 3),
    "three times as fast": lambda p: scaled(p, 1 / 3, 1 / 3),
    "tokens four times as dear": lambda p: steeper(p, 4),
    "drafts four times as cheap": lambda p: scaled(p, draft=1 / 4),
}


def guess(wrong: str) -> str:
    """A profile as text."""
    profile = WRONG[wrong](roofline(GAMMA, ()).to_dict())
    return json.dumps({"format": 1, "key": {}, "profile": profile})


@dataclasses.dataclass
class Guessing(Server):
    """Begins with what was guessed.

    Args:
        profile: as text.
    """

    profile: str = ""

    def _profile(self) -> str:
        return self.profile


@pytest.mark.parametrize("wrong", WRONG)
def test_the_best_depth_is_found_from_a_wrong_guess(wrong: str) -> None:
    """Loads up and down, 250 steps to learn and 250 that count."""
    server = Guessing(nothing, profile=guess(wrong))
    for requests in (256, 1, 4, 16, 64, 128, 256):
        server.run(requests, 250)
        assert server.run(requests, 250).share >= 0.96


def served(policy: Policy, engine: Engine) -> float:
    """Tokens per ms of steps 200 to 600 with 256 requests in flight."""
    replica = Replica(policy, engine, simulations.drafter((0.56, 0.5, 0.5)), seed=0, jitter=0.03)
    lengths = np.random.default_rng(0).integers(150, 450, size=4000).tolist()
    for _ in range(256):
        replica.submit(Request(64, lengths.pop()))
    before = (0, 0.0)
    for step in range(600):
        if step == 200:
            before = replica.totals.emitted, replica.clock
        for _ in replica.step():
            replica.submit(Request(64, lengths.pop()))
    return (replica.totals.emitted - before[0]) / (replica.clock - before[1])


def test_contexts_that_grow_do_not_hide_that_the_guess_is_too_dear() -> None:
    """Of 256 requests that began together. Steps without drafts take less than guessed, and that
    is put down to context as far as it can be: to the point where context costs nothing. Then it
    grows. What was learned besides must give way to what is measured."""
    sizes: list[float] = [1, 16, 64, 128, 256, 512, 1024]
    verify = [sizes, [5.2, 5.5, 5.6, 6.1, 8.9, 16.6, 32.2]]
    engine = Engine(simulations.cost_model(verify, draft_ms=0.6, context_ms=5e-5), 0.0)
    best = max(served(FixedDepth(depth), engine) for depth in range(simulations.GAMMA + 1))
    ours = Ours(simulations.GAMMA, Engine(CostModel.default(simulations.GAMMA), 0.0))
    assert served(ours, engine) >= 0.97 * best


def test_one_shape_again_and_again_leaves_the_others_open() -> None:
    """A step of 64 requests with one draft each takes half as long as guessed. Whether that is the
    target or the drafter is as open after 500 of them as after 5."""
    times = CorrectedTimes(roofline(GAMMA, (), context_bytes=1.0))
    seen, other = step_cases.shape(64, 1), step_cases.shape(64, 0)
    spreads = []
    for step in range(500):
        parts = times.parts(seen)
        assert times.learn(seen, 4.0, parts) or step < 40
        spreads.append(times.spreads([other], seen)[0])
    assert sum(times.parts(seen)) == pytest.approx(4.0, rel=0.01)
    assert spreads[-1] >= 0.9 * spreads[4] > 0.05
    assert times.spreads([seen], seen) == [0.0]


def test_a_part_at_its_limit_lets_the_others_follow() -> None:
    """Context costs nothing at all, as little as it can; and grows while it is learned."""
    cost = CostModel.default(GAMMA)
    for step in range(400):
        shape = step_cases.shape(256, 0, 64 + step)
        cost.observe(shape, 8.5)
        if step > 60:
            assert step_cases.predicted(cost, shape) == pytest.approx(8.5, rel=0.05)
    assert shape == StepShape(256, 256, 256 * 463, 256, 0)
