"""Every policy at every load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vllm_dspark import checks
from vllm_dspark.scheduler.depth import Goal
from vllm_dspark.simulation.acceptance import Drafter
from vllm_dspark.simulation.built_in import PROFILE_CONTEXT, BuiltIn
from vllm_dspark.simulation.engine import Engine
from vllm_dspark.simulation.loads import Result, closed_loop, poisson
from vllm_dspark.simulation.ours import Ours
from vllm_dspark.simulation.policies import FixedDepth, Policy
from vllm_dspark.simulation.replica import Replica
from vllm_dspark.simulation.workload import Lengths

NONE, BUILT_IN, OURS = "no speculation", "built-in-like", "vllm-dspark"
FEWEST_ARRIVALS = 32  # on each simulated GPU

LoadKind = Literal["concurrency", "rate"]


@dataclass(frozen=True)
class Plan:
    """What is served on what.

    Args:
        engine, drafter: of every GPU; γ is the drafter's.
        lengths: of requests.
        gpus: independent replicas, at least 1.
        fixed: depths of arms that never change theirs, each in 1..γ.
        goal: ours is asked for.
        by_block: whether ours verifies drafts as blocks.
        most_context: tokens a request can have; the built-in mode profiles up to that.
        requests: for each one in flight.
        seconds: of arrivals, where they come at a rate.
        jitter: standard deviation of the logarithm of step times.
        seed: of all chance; every policy sees the same arrivals.

    Raises:
        ValueError: an argument, which it names, is outside of that.
    """

    engine: Engine
    drafter: Drafter
    lengths: Lengths
    gpus: int = 1
    fixed: Sequence[int] = ()
    goal: Goal = field(default_factory=Goal)
    by_block: bool = False
    most_context: int = PROFILE_CONTEXT
    requests: int = 8
    seconds: float = 60.0
    jitter: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        checks.whole("gpus", self.gpus, least=1)
        checks.whole("requests", self.requests, least=1)
        checks.positives("seconds", [self.seconds], "a number")
        checks.amount("jitter", self.jitter)
        for depth in self.fixed:
            if checks.whole("fixed", depth, least=1) > self.drafter.gamma:
                raise ValueError(f"fixed must lie in 1..{self.drafter.gamma}, got {depth}")

    @property
    def policies(self) -> dict[str, Callable[[], Policy]]:
        """By name, how to make one for a replica."""
        gamma, engine = self.drafter.gamma, self.engine
        fixed = {f"fixed {d}": (lambda d=d: FixedDepth(d)) for d in sorted(set(self.fixed))}
        return {
            NONE: lambda: FixedDepth(0),
            **fixed,
            BUILT_IN: lambda: BuiltIn(gamma, engine, self.most_context),
            OURS: lambda: Ours(gamma, engine, self.goal, by_block=self.by_block),
        }


@dataclass(frozen=True)
class Point:
    """One policy at one load."""

    policy: str
    kind: LoadKind
    load: float  # requests in flight per GPU, or requests per second and GPU
    result: Result

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"policy": self.policy, self.kind: self.load, **self.result.to_dict()}


def sweep(plan: Plan, kind: LoadKind, loads: Sequence[float]) -> Iterator[Point]:
    """Simulate, load by load.

    Args:
        loads: whole numbers of requests in flight per GPU, or requests per second and GPU.

    Raises:
        ValueError: a load is none.
    """
    for load in loads:
        for name, policy in plan.policies.items():
            yield Point(name, kind, load, _result(plan, policy, kind, load))


def _result(plan: Plan, policy: Callable[[], Policy], kind: LoadKind, load: float) -> Result:
    def make(seed: int) -> Replica:
        return Replica(policy(), plan.engine, plan.drafter, seed, plan.jitter)

    if kind == "rate":
        requests = max(round(load * plan.seconds), FEWEST_ARRIVALS)
        return poisson(make, load, plan.lengths, requests, plan.seed, plan.gpus)
    concurrency = int(load)
    if concurrency != load:
        raise ValueError(f"concurrency must be whole, got {load}")
    requests = plan.requests * concurrency
    return closed_loop(make, concurrency, plan.lengths, requests, plan.seed, plan.gpus)
