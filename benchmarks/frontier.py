"""The throughput-interactivity frontier: an arm's tok/s against its tok/s/user, point by point
along concurrency, and what two arms give at the same value of one of the two.

Between two neighbouring concurrencies of the sweep the curve is a straight line. It is never
continued beyond its ends, nor across a concurrency at which the arm was not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from benchmarks.results_format import Arm


class Point(NamedTuple):
    """Medians over repeats at one concurrency."""

    concurrency: int
    per_user: float  # tok/s/user
    throughput: float  # tok/s


Curve = list[list[Point]]  # unbroken pieces, each in the order of concurrency


class Match(NamedTuple):
    """Two arms at the same level of one quantity, compared by the other quantity."""

    level: float
    concurrencies: tuple[int | None, int | None]  # where an arm was measured at this very level
    reference: float
    ours: float

    @property
    def ratio(self) -> float:
        """Ours / reference."""
        return self.ours / self.reference


def curve(arm: Arm, temperature: float, concurrencies: Sequence[int]) -> Curve:
    """The measured curve of an arm. `concurrencies` are those of the whole sweep, ascending; it
    breaks where the arm lacks one."""
    pieces: Curve = [[]]
    for concurrency in concurrencies:
        per_user = arm.median(concurrency, temperature, "tokens_per_second_per_user")
        throughput = arm.median(concurrency, temperature, "tokens_per_second")
        if per_user is None or throughput is None:
            pieces.append([])
        else:
            pieces[-1].append(Point(concurrency, per_user, throughput))
    return [piece for piece in pieces if piece]


def per_user_at(measured: Curve, throughput: float) -> float | None:
    """tok/s/user at a throughput in tok/s. The largest where a curve passes it more than once:
    past saturation, more requests give less of both. None outside of what was measured."""
    return _highest(measured, throughput, level=2, value=1)


def throughput_at(measured: Curve, per_user: float) -> float | None:
    """tok/s at a tok/s/user, likewise the largest, or None."""
    return _highest(measured, per_user, level=1, value=2)


def match_throughput(reference: Curve, ours: Curve) -> list[Match]:
    """tok/s/user of both at every throughput that one was measured at and both reach, ascending."""
    return _matches(reference, ours, level=2, value=1)


def match_per_user(reference: Curve, ours: Curve) -> list[Match]:
    """tok/s of both at every tok/s/user that one was measured at and both reach, ascending."""
    return _matches(reference, ours, level=1, value=2)


# `level` and `value` below are positions in a Point: 1 is tok/s/user, 2 is tok/s.


def _highest(measured: Curve, wanted: float, level: int, value: int) -> float | None:
    found = [point[value] for piece in measured for point in piece if point[level] == wanted]
    for piece in measured:
        for start, end in pairwise(piece):
            low, high = sorted((start[level], end[level]))
            if low < wanted < high:
                share = (wanted - start[level]) / (end[level] - start[level])
                found.append(start[value] + share * (end[value] - start[value]))
    return max(found, default=None)


def _matches(reference: Curve, ours: Curve, level: int, value: int) -> list[Match]:
    measured = {point[level] for arm in (reference, ours) for piece in arm for point in piece}
    matches = []
    for wanted in sorted(measured):
        theirs = _highest(reference, wanted, level, value)
        own = _highest(ours, wanted, level, value)
        if theirs is not None and own is not None:
            places = _measured_at(reference, wanted, level), _measured_at(ours, wanted, level)
            matches.append(Match(wanted, places, theirs, own))
    return matches


def _measured_at(measured: Curve, wanted: float, level: int) -> int | None:
    points = (point for piece in measured for point in piece if point[level] == wanted)
    return next((point.concurrency for point in points), None)
