"""Simulated against measured, for every arm and concurrency of a sweep.

Costs and acceptance are fitted on some fixed arms; all others are predicted. The built-in mode
stands there twice: with what it would verify by cost tables of its own, and with as many drafts per
request as it was measured to verify. The first asks whether its choice is understood, the second
whether its steps are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

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


class _Served(NamedTuple):
    """What is simulated alike for all arms; see `validate`."""

    measured: Measured
    engine: Engine
    drafter: Drafter
    seed: int
    by_block: bool


def validate(
    measured: Measured,
    fit: Fit,
    drafter: Drafter,
    gammas: Sequence[int],
    seed: int = 1,
    by_block: bool = False,
) -> list[Row]:
    """One row for every measured arm and concurrency, in the order of the sweep; built-in arms
    have two.

    Args:
        measured, drafter, gammas: as they were fitted.
        fit: see `fit_engine`.
        seed: of the simulations.
        by_block: whether ours verified drafts as blocks.
    """
    on = _Served(measured, fit.engine, drafter, seed, by_block)
    rows = []
    for arm in measured.arms:
        fitted = arm.kind in ("none", "fixed") and arm.gamma in gammas
        for cell in arm.cells:
            rows.append(_row(on, arm, cell, fitted))
            if arm.kind == "built-in adaptive" and cell.verified_per_request is not None:
                rows.append(_row(on, arm, cell, False, cell.verified_per_request))
    return rows


def misses(rows: Sequence[Row]) -> list[Row]:
    """Rows beyond the bar, our own arm aside: the sweep may hold one of an older version."""
    return [row for row in rows if row.kind != "ours" and not abs(row.ratio - 1) <= BAR]


def _row(
    on: _Served, arm: MeasuredArm, cell: Cell, fitted: bool, verified: float | None = None
) -> Row:
    decide = _policy(on, arm, verified)
    times = max(-(-_FEWEST_REQUESTS // cell.requests), 1)
    results = [
        closed_loop(
            lambda s: Replica(decide(), on.engine, on.drafter, s),
            cell.concurrency, on.measured.lengths, cell.requests, on.seed + i,
        )
        for i in range(times)
    ]  # fmt: skip
    seconds = float(np.mean([result.seconds / result.requests for result in results]))
    tokens = float(np.mean([r.tokens_per_second * r.seconds / r.requests for r in results]))
    return Row(
        arm=arm.name + ("" if verified is None else GIVEN),
        kind=arm.kind,
        concurrency=cell.concurrency,
        fitted=fitted,
        measured=cell.tokens_per_second,
        simulated=tokens / seconds,
        measured_verified=cell.verified_per_request,
        simulated_verified=float(np.mean([result.verified_per_request for result in results])),
    )


def _policy(on: _Served, arm: MeasuredArm, verified: float | None) -> Callable[[], Policy]:
    measured, engine = on.measured, on.engine
    if arm.kind == "ours":
        return lambda: Ours(arm.gamma, engine, by_block=on.by_block)
    if arm.kind == "built-in adaptive":
        context = arm.profile_context or PROFILE_CONTEXT
        return lambda: BuiltIn(arm.gamma, engine, measured.most_context, context, verified)
    return lambda: FixedDepth(arm.gamma)
