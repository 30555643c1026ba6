"""An engine's costs from a sweep: what steps must take for fixed arms to take as long as they did.

Which steps a closed loop runs depends on acceptance alone, not on how long they take. So every
fixed arm is replayed for its steps, and the time it took is the sum of theirs, which is linear in

    verify(tokens) = stairs at `KNOTS`, non-negative, linear in between    + context_ms · context
    draft(d, R)    = a + b · d + c · d · R + e · R                          for d > 0

with non-negative coefficients, by least squares of relative errors. Steps with a prefill take
`launch_ms` at least; of the values tried, the one with the smallest error is taken. A sweep has
contexts of one length only, so what a token of context costs is given, not fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_dspark.scheduler.cost_model import CostModel
from vllm_dspark.scheduler.monotone import nonnegative_least_squares
from vllm_dspark.scheduler.profile_text import to_text
from vllm_dspark.scheduler.roofline import roofline
from vllm_dspark.scheduler.step_times import Rates, StepTimes
from vllm_dspark.simulation.acceptance import Drafter
from vllm_dspark.simulation.engine import Engine
from vllm_dspark.simulation.loads import closed_loop
from vllm_dspark.simulation.measured import Cell, Measured, MeasuredArm
from vllm_dspark.simulation.policies import FixedDepth
from vllm_dspark.simulation.replica import Replica

Floats = npt.NDArray[np.float64]

KNOTS = np.array([1, 4, 16, 64, 128, 256, 512, 1024, 2048, 8192], dtype=np.float64)  # tokens
LAUNCHES_MS = np.arange(0.0, 42.5, 2.5)
_ROUNDS = 8  # in which it settles which steps are bound by their launch
_REQUESTS = (1.0, 1024.0)  # a line through these


class _Steps(NamedTuple):
    """All steps of one cell."""

    columns: Floats  # [N, unknowns]
    context_ms: Floats  # [N]
    prefills: npt.NDArray[np.bool_]  # [N]
    total_ms: float


class Fit(NamedTuple):
    """What was found."""

    engine: Engine
    error: float  # root of the mean square of (fitted / measured time − 1)


def fit_engine(measured: Measured, gammas: Sequence[int], drafter: Drafter, seed: int = 0) -> Fit:
    """Costs of the engine that was swept.

    Args:
        measured: holds arms of these γ.
        gammas: of the arms to fit, at least one above 0; 0 is no speculation.
        drafter: that was served.
        seed: of the replays.

    Raises:
        ValueError: an arm is missing, or none of them drafts.
    """
    if not any(gammas):
        raise ValueError(f"gammas must have one above 0, got {list(gammas)}")
    context_ms = roofline(drafter.gamma, ()).rates.context_ms
    cells = []
    for gamma in gammas:
        arm = _fixed_arm(measured, gamma)
        cells += [_replay(cell, gamma, measured, drafter, seed, context_ms) for cell in arm.cells]
    fits = [(*_solve(cells, float(launch)), float(launch)) for launch in LAUNCHES_MS]
    solution, error, launch_ms = min(fits, key=lambda fit: fit[1])
    cost = _cost_model(solution, drafter.gamma, context_ms)
    return Fit(Engine(cost, launch_ms, measured.most_requests), error)


def _fixed_arm(measured: Measured, gamma: int) -> MeasuredArm:
    kind = "fixed" if gamma else "none"
    for arm in measured.arms:
        if arm.kind == kind and arm.gamma == gamma:
            return arm
    wanted = f"of fixed γ = {gamma}" if gamma else "without speculation"
    raise ValueError(f"it has no arm {wanted}")


def _replay(
    cell: Cell, gamma: int, measured: Measured, drafter: Drafter, seed: int, context_ms: float
) -> _Steps:
    """The steps of a cell, on an engine that takes any time at all."""
    engine = Engine(CostModel.default(drafter.gamma), most_requests=measured.most_requests)
    kept: list[Replica] = []

    def make(seed: int) -> Replica:
        replica = Replica(FixedDepth(gamma), engine, drafter, seed)
        replica.shapes = []
        kept.append(replica)
        return replica

    closed_loop(make, cell.concurrency, measured.lengths, cell.requests, seed)
    shapes = kept[0].shapes or []
    tokens, requests, context = np.array(
        [(shape.tokens, shape.requests, shape.context_tokens) for shape, _ in shapes], np.float64
    ).T
    columns = np.concatenate([_stairs(tokens), _draft_terms(gamma, requests)], axis=1)
    prefills = np.array([prefills for _, prefills in shapes])
    return _Steps(columns, context_ms * context, prefills, 1000 * cell.seconds)


def _stairs(tokens: Floats) -> Floats:
    """[N, knots]: how much of each rise between knots a step of so many tokens has."""
    rises = (tokens[:, None] - KNOTS[:-1]) / np.diff(KNOTS)
    rises = np.maximum(rises, 0.0)
    rises[:, :-1] = np.minimum(rises[:, :-1], 1.0)  # beyond the last knot, on and on
    return np.concatenate([np.ones((tokens.size, 1)), rises], axis=1)


def _draft_terms(depth: int, requests: Floats) -> Floats:
    """[N, 4], see the module."""
    terms = [np.ones_like(requests), np.full_like(requests, depth), depth * requests, requests]
    return np.stack(terms, axis=1) * (depth > 0)


def _solve(cells: Sequence[_Steps], launch_ms: float) -> tuple[Floats, float]:
    """Coefficients and the error. Steps bound by their launch drop out of the linear problem;
    which those are follows from its solution, so that both are found in turns."""
    solution = np.zeros(KNOTS.size + 4)
    matrix, target = np.zeros((len(cells), solution.size)), np.zeros(len(cells))
    bound = [np.zeros_like(cell.prefills) for cell in cells]
    for _ in range(_ROUNDS):
        for i, (cell, launched) in enumerate(zip(cells, bound, strict=True)):
            known = cell.context_ms[~launched].sum() + launch_ms * launched.sum()
            matrix[i] = cell.columns[~launched].sum(axis=0) / cell.total_ms
            target[i] = 1 - known / cell.total_ms
        solution = nonnegative_least_squares(matrix, target)
        before, bound = bound, [_bound(cell, solution, launch_ms) for cell in cells]
        if all(map(np.array_equal, before, bound)):
            break
    ratios = [_total_ms(cell, solution, launch_ms) / cell.total_ms for cell in cells]
    return solution, float(np.sqrt(np.mean((np.array(ratios) - 1) ** 2)))


def _bound(cell: _Steps, solution: Floats, launch_ms: float) -> npt.NDArray[np.bool_]:
    """Steps whose launch takes longer than what they compute."""
    return cell.prefills & (cell.columns @ solution + cell.context_ms < launch_ms)


def _total_ms(cell: _Steps, solution: Floats, launch_ms: float) -> float:
    times = cell.columns @ solution + cell.context_ms
    return float(np.where(cell.prefills, np.maximum(times, launch_ms), times).sum())


def _cost_model(solution: Floats, gamma: int, context_ms: float) -> CostModel:
    """As a profile, read back the way a server reads one."""
    verify = np.cumsum(solution[: KNOTS.size])
    requests = np.array(_REQUESTS)
    draft = {
        depth: (requests, _draft_terms(depth, requests) @ solution[KNOTS.size :])
        for depth in range(1, gamma + 1)
    }
    rates = Rates(context_ms=context_ms)
    profile = StepTimes((KNOTS, verify), draft, rates, (), gamma)
    return CostModel.from_json(to_text(profile, {}), {})
