"""An engine, a drafter and a replica that simulation tests share."""

from __future__ import annotations

import json
from typing import Any

from vllm_dspark.scheduler.cost_model import CostModel
from vllm_dspark.simulation.acceptance import Drafter
from vllm_dspark.simulation.engine import Engine
from vllm_dspark.simulation.policies import Policy
from vllm_dspark.simulation.replica import Replica
from vllm_dspark.simulation.workload import Request

GAMMA = 3
CONDITIONAL = (0.8, 0.7, 0.6)
LAUNCH_MS = 20.0


def cost_model(
    verify: list[list[float]] | None = None,
    draft_ms: float = 1.0,
    captured: list[int] | None = None,
    context_ms: float = 0.0,
    gamma: int = GAMMA,
) -> CostModel:
    """Target: a table of tokens and ms. Drafter: `draft_ms` for each depth, at any load."""
    profile: dict[str, Any] = {
        "gamma": gamma,
        "doubt": 1.0,
        "captured": captured or [],
        "rates": {"context_ms": context_ms},
        "verify": verify or [[1, 64, 4096], [5.0, 6.0, 90.0]],
        "draft": {d: [[1, 1024], [d * draft_ms] * 2] for d in range(1, gamma + 1)},
    }
    return CostModel.from_json(json.dumps({"format": 1, "key": {}, "profile": profile}), {})


def engine(cost: CostModel | None = None, **limits: int) -> Engine:
    """An engine; limits as in `Engine`."""
    return Engine(cost or cost_model(), LAUNCH_MS, **limits)


def drafter(conditional: tuple[float, ...] = CONDITIONAL, **how: float) -> Drafter:
    """A drafter."""
    return Drafter(conditional, **how)


def replica(policy: Policy, on: Engine | None = None, **how: Any) -> Replica:
    """A replica that keeps its steps."""
    made = Replica(policy, on or engine(), how.pop("drafter", drafter()), how.pop("seed", 0), **how)
    made.shapes = []
    return made


def run(on: Replica, requests: list[Request]) -> list[Request]:
    """All of them at once, to their ends; in the order in which they ended."""
    for request in requests:
        on.submit(request)
    ended: list[Request] = []
    while on.load:
        ended += on.step()
    return ended
