"""Simulated against measured, for every arm and concurrency of a sweep.

Costs and acceptance are fitted on some fixed arms; all others are predicted. The built-in mode
stands there twice: with what it would verify by cost tables of its own, and with as many drafts per
request as it was measured to verify. The first asks whether its choice is understood, the second
whether its steps are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vllm_dspark.simulation.acceptance import Drafter
from vllm_dspark.simulation.built_in import PROFILE_CONTEXT, BuiltIn
from vllm_dspark.simulation.engine import Engine
from vllm_dspark.simulation.fitting import Fit
from vllm_dspark.simulation.loads import closed_loop
from vllm_dspark.simulation.measured import Cell, Measured, MeasuredArm
from vllm_dspark.simulation.ours import Ours
from vllm_dspark.simulation.policies import FixedDepth, Policy
from vllm_dspark.simulation.replica import Replica

BAR = 0.10  # |simulated / measured − 1| that is asked for
GIVEN = ", as many as measured"
# Decode steps to simulate of a cell, over all its seeds: few requests tell little of the mean.
_FEWEST_REQUESTS = 96


@dataclass(frozen=True)
class Row:
    """One arm at one concurrency."""

    arm: str
    kind: str
    concurrency: int
    fitted: bool  # its measurement went into the costs
    measured: float  # tok/s
    simulated: float  # tok/s
    measured_verified: float | None  # drafts per request and step
    simulated_verified: float

    @property
    def ratio(self) -> float:
        """Simulated over measured throughput."""
        return self.simulated / self.measured

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"ratio": self.ratio}


def validate(
    measured: Measured, fit: Fit, drafter: Drafter, gammas: Sequence[int], seed: int = 1
) -> list[Row]:
    """One row for every measured arm and concurrency, in the order of the sweep; built-in arms
    have two.

    Args:
        measured, drafter, gammas: as they were fitted.
        fit: see `fit_engine`.
        seed: of the simulations.
    """
    rows = []
    for arm in measured.arms:
        fitted = arm.kind in ("none", "fixed") and arm.gamma in gammas
        for cell in arm.cells:
            rows.append(_row(measured, fit.engine, drafter, arm, cell, fitted, seed))
            if arm.kind == "built-in adaptive" and cell.verified_per_request is not None:
                rows.append(_row(measured, fit.engine, drafter, arm, cell, False, seed, given=True))
    return rows


def misses(rows: Sequence[Row]) -> list[Row]:
    """Rows beyond the bar, our own arm aside: the sweep may hold one of an older version."""
    return [row for row in rows if row.kind != "ours" and not abs(row.ratio - 1) <= BAR]


def _row(
    measured: Measured,
    engine: Engine,
    drafter: Drafter,
    arm: MeasuredArm,
    cell: Cell,
    fitted: bool,
    seed: int,
    given: bool = False,
) -> Row:
    decide = _policy(measured, engine, arm, cell.verified_per_request if given else None)
    times = max(-(-_FEWEST_REQUESTS // cell.requests), 1)
    results = [
        closed_loop(
            lambda s: Replica(decide(), engine, drafter, s),
            cell.concurrency, measured.lengths, cell.requests, seed + i,
        )
        for i in range(times)
    ]  # fmt: skip
    seconds = float(np.mean([result.seconds / result.requests for result in results]))
    tokens = float(np.mean([r.tokens_per_second * r.seconds / r.requests for r in results]))
    return Row(
        arm=arm.name + (GIVEN if given else ""),
        kind=arm.kind,
        concurrency=cell.concurrency,
        fitted=fitted,
        measured=cell.tokens_per_second,
        simulated=tokens / seconds,
        measured_verified=cell.verified_per_request,
        simulated_verified=float(np.mean([result.verified_per_request for result in results])),
    )


def _policy(
    measured: Measured, engine: Engine, arm: MeasuredArm, verified: float | None
) -> Callable[[], Policy]:
    if arm.kind == "ours":
        return lambda: Ours(arm.gamma, engine)
    if arm.kind == "built-in adaptive":
        context = arm.profile_context or PROFILE_CONTEXT
        return lambda: BuiltIn(arm.gamma, engine, measured.most_context, context, verified)
    return lambda: FixedDepth(arm.gamma)
