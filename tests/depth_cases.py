"""A depth policy on the synthetic 8B server, and what it should weigh up."""

from __future__ import annotations

from typing import Any

from tests import step_cases
from tests.step_cases import CONTEXT, DEPTHS, GAMMA, SURVIVAL, shape
from vllm_dspark.scheduler.cost_model import CostModel
from vllm_dspark.scheduler.depth import CostProbeSettings, DepthPolicy, Goal, ProbeSettings

MODEL = step_cases.model()
NO_PROBES = ProbeSettings(share=0.0)
NO_COST_PROBES = CostProbeSettings(share=0.0)


def policy(goal: Goal | None = None, depths: Any = DEPTHS, **options: Any) -> DepthPolicy:
    """Without probes, unless asked for."""
    without: dict[str, Any] = {"probes": NO_PROBES, "cost_probes": NO_COST_PROBES}
    return DepthPolicy(GAMMA, depths, goal, **(without | options))


def choose(of: DepthPolicy, requests: int, survival: Any = SURVIVAL, **options: Any) -> int:
    return of.choose(
        **(
            {
                "requests": requests, "waiting": 0, "survival": survival,
                "context_tokens": CONTEXT * (requests or 0), "free_kv_fraction": 0.9, "cost": MODEL,
            }
            | options
        )
    )  # fmt: skip


def rates(
    requests: int, survival: Any = SURVIVAL, cost: CostModel = MODEL, depths: Any = DEPTHS
) -> dict[int, float]:
    """Θ of each depth, one by one."""
    return {
        d: requests * (1 + sum(survival[:d])) / step_cases.predicted(cost, shape(requests, d))
        for d in depths
    }
