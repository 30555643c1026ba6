"""Step times that never fall as a step grows: how they are fitted, and how they are read.

A profile says what some sizes took. A fit explains every time as

    time = table of its group, at its size + Σ rate · amount,

where each table never falls with the size and no rate is negative. A table is a sum of
non-negative stairs, one at each profiled size, so that both are one non-negative least-squares
problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Against a table, a rate explains only what the table cannot: in a profile where both grow
# together the table takes it all. Far below what any real difference between samples weighs.
RIDGE = 1e-4
# Past the profile a size costs at least this share of its proportional part. The end of a
# profile may lie where reading the weights hides the arithmetic, and be flat; steps do not
# stay free.
LEAST_SLOPE = 0.1


class StairTable:
    """A time as a function of a size: stairs of captured sizes first, linear beyond.

    Up to the largest captured size the work is padded to the next captured one, so the time is
    that of the padded size. Between knots it is linear, below the first it is the first's, and
    beyond the last it grows by the slope over the upper half of the knots. The first size past
    the captured ones is read off the knots there: nothing links the two ways of running.

    Args:
        sizes: [K] of numbers, ascending, what was profiled.
        times: float64 [K], ms, non-negative and non-decreasing.
        captured: ascending sizes of captured graphs; none means that nothing is padded.
    """

    def __init__(self, sizes: npt.ArrayLike, times: npt.ArrayLike, captured: Sequence[int]) -> None:
        profiled = np.asarray(sizes, dtype=np.float64), np.asarray(times, dtype=np.float64)
        self.sizes, self.times = profiled
        self.captured = tuple(captured)
        graphs = np.array(self.captured, dtype=np.int64)
        self.limit = int(graphs[-1]) if graphs.size else 0
        self._padded = np.arange(self.limit + 1)
        if graphs.size:
            self._padded = graphs[np.searchsorted(graphs, self._padded)]
        self.knots, self.values = _refined(*profiled, graphs)
        self.slope = _end_slope(*profiled)

    def padded(self, sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """int64, of any shape: the sizes that run when `sizes` are asked for."""
        if not self.limit:
            return sizes
        return np.where(sizes <= self.limit, self._padded[np.minimum(sizes, self.limit)], sizes)

    def read(self, sizes: npt.NDArray[np.int64], values: Floats | None = None) -> Floats:
        """float64, ms, in the shape of `sizes`, which are int64.

        Args:
            values: float64 like `self.values`, read in their place: corrected ones.
        """
        return self.between(self.padded(sizes), values)

    def between(self, sizes: npt.NDArray[Any], values: Floats | None = None) -> Floats:
        """As `read`, of sizes that are padded already."""
        if values is None:
            values = self.values
        times = np.interp(sizes, self.knots, values)
        last = self.values[-1]
        slope = self.slope * (values[-1] / last if last > 0 else 1.0)
        return times + slope * np.maximum(sizes - self.knots[-1], 0.0)


@dataclass(frozen=True)
class Fit:
    """What `fit_tables` found: per group its sizes and times (ms), and the rates (ms each)."""

    tables: dict[int, tuple[Floats, Floats]]
    rates: Floats


def fit_tables(
    groups: npt.NDArray[np.int64],  # [N]
    sizes: npt.NDArray[np.int64],  # [N]
    amounts: Floats,  # [N, M]
    times: Floats,  # [N] ms
    scales: Floats,  # [N] ms
) -> Fit:
    """One table per group and M rates that all groups share, so that the sum of squares of
    (fitted − times) / scales is least."""
    knots = {int(group): np.unique(sizes[groups == group]) for group in np.unique(groups)}
    stairs = [(groups == g)[:, None] & (sizes[:, None] >= knots[g]) for g in knots]
    largest = np.maximum(np.abs(amounts / scales[:, None]).max(axis=0), 1e-30)
    columns = np.concatenate([*stairs, amounts / largest], axis=1) / scales[:, None]
    ridge = np.zeros((amounts.shape[1], columns.shape[1]))
    ridge[:, columns.shape[1] - amounts.shape[1] :] = np.sqrt(RIDGE) * np.eye(amounts.shape[1])
    solution = nonnegative_least_squares(
        np.concatenate([columns, ridge]),
        np.concatenate([times / scales, np.zeros(len(ridge))]),
    )
    tables, start = {}, 0
    for group, at in knots.items():
        rises = solution[start : start + at.size]
        tables[group] = at.astype(np.float64), np.cumsum(rises)
        start += at.size
    return Fit(tables, solution[start:] / largest)


def nonnegative_least_squares(matrix: Floats, target: Floats) -> Floats:
    """The x ≥ 0 with the least ‖matrix·x − target‖, by active sets (Lawson and Hanson, 1974).

    Args:
        matrix: float64 [N, M].
        target: float64 [N].

    Returns:
        float64 [M].
    """
    unknowns = matrix.shape[1]
    solution, free = np.zeros(unknowns), np.zeros(unknowns, dtype=bool)
    moment, gram = matrix.T @ target, matrix.T @ matrix
    tolerance = 1e-10 * max(float(np.abs(moment).max()), 1e-300)
    for _ in range(3 * unknowns):  # far more rounds than it takes
        gradient = np.where(free, -np.inf, moment - gram @ solution)
        candidate = int(gradient.argmax())
        if gradient[candidate] <= tolerance:
            break
        free[candidate] = True
        solution = _descend(matrix, target, solution, free)
    return solution


def _descend(
    matrix: Floats, target: Floats, solution: Floats, free: npt.NDArray[np.bool_]
) -> Floats:
    """The least-squares solution over the `free` unknowns, of which those that would turn
    negative are fixed at 0 one after the other, in place."""
    while free.any():
        trial = np.zeros_like(solution)
        trial[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
        blocking = free & (trial <= 0)
        if not blocking.any():
            return trial
        room = solution[blocking] / np.maximum(solution[blocking] - trial[blocking], 1e-300)
        solution = solution + float(room.min()) * (trial - solution)
        free &= solution > 1e-14 * max(float(solution.max()), 1e-300)
        solution[~free] = 0
    return solution


def _refined(sizes: Floats, times: Floats, graphs: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Knots that follow the stairs: the profiled ones, the captured ones, powers of two so that
    a correction can bend the table where it was not profiled, and the first size past the
    graphs."""
    limit = int(graphs[-1]) if graphs.size else 0
    powers = 2.0 ** np.arange(0, max(1, int(np.log2(max(sizes[-1], 1))) + 1))
    knots = np.unique(np.concatenate([sizes, graphs, powers, [limit + 1.0] if limit else []]))
    knots = knots[knots <= max(sizes[-1], limit)]
    values = np.interp(knots, sizes, times)
    beyond = knots > sizes[-1]
    values[beyond] += _end_slope(sizes, times) * (knots[beyond] - sizes[-1])
    past = sizes > limit
    if limit and past.any() and not past.all():
        first, first_ms = sizes[past][0], times[past][0]
        slope = 0.0
        if past.sum() > 1:
            slope = (times[past][1] - first_ms) / (sizes[past][1] - first)
        gap = (knots > limit) & (knots < first)
        below = values[knots <= limit][-1]
        values[gap] = np.maximum(below, first_ms - slope * (first - knots[gap]))
    return knots, values


def _end_slope(sizes: Floats, times: Floats) -> float:
    """ms per unit of size beyond the last knot."""
    proportional = float(times[-1] / max(sizes[-1], 1.0))
    if sizes.size == 1:
        return proportional  # dearer than any step that has a fixed part
    start = max(int(np.searchsorted(sizes, sizes[-1] / 2, side="right")) - 1, 0)
    slope = float((times[-1] - times[start]) / (sizes[-1] - sizes[start]))
    return max(slope, LEAST_SLOPE * proportional)
