"""Two arms at the same throughput, or the same tok/s/user: by hand, and only where measured."""

from __future__ import annotations

import pytest

from benchmarks.frontier import (
    Curve,
    Match,
    Point,
    curve,
    match_per_user,
    match_throughput,
    per_user_at,
    throughput_at,
)
from tests.sweeps import arm, run

REFERENCE: Curve = [[Point(1, 100, 100), Point(2, 80, 300)]]
OURS: Curve = [[Point(1, 160, 200), Point(2, 100, 400), Point(4, 60, 500)]]


def test_matched_throughput_by_hand() -> None:
    """Both reach 200 to 300 tok/s. At 200 the reference is half way from 100 to 80 tok/s/user; at
    300 ours is half way from 160 to 100. 100, 400 and 500 tok/s are one arm's alone."""
    at_200, at_300 = match_throughput(REFERENCE, OURS)
    assert at_200 == Match(200, (None, 1), reference=90, ours=160)
    assert at_300 == Match(300, (2, None), reference=80, ours=130)
    assert at_300.ratio == pytest.approx(1.625)


def test_matched_per_user_by_hand() -> None:
    """Both reach 80 to 100 tok/s/user. At 80 ours is half way from 400 to 500 tok/s; at 100 both
    were measured. 60 and 160 are one arm's alone."""
    at_80, at_100 = match_per_user(REFERENCE, OURS)
    assert at_80 == Match(80, (2, None), reference=300, ours=450)
    assert at_100 == Match(100, (1, 2), reference=100, ours=400)


def test_nothing_is_extrapolated() -> None:
    """Not by a hair beyond the ends; the ends themselves count."""
    assert per_user_at(REFERENCE, 99.99) is None
    assert per_user_at(REFERENCE, 100) == 100
    assert per_user_at(REFERENCE, 300.01) is None
    assert throughput_at(OURS, 59.99) is None
    assert throughput_at(OURS, 160) == 200
    assert match_throughput([[Point(1, 50, 10)]], OURS) == []


def test_no_line_across_a_missing_concurrency() -> None:
    """200 tok/s lies between concurrency 1 and 4, but 2 is missing: nobody knows the way."""
    holey = arm("ours", 7, run(1, 100, 100), run(4, 300, 75))
    assert curve(holey, 1.0, [1, 4]) == [[Point(1, 100, 100), Point(4, 75, 300)]]
    assert per_user_at(curve(holey, 1.0, [1, 4]), 200) == 87.5
    broken = curve(holey, 1.0, [1, 2, 4])
    assert broken == [[Point(1, 100, 100)], [Point(4, 75, 300)]]
    assert per_user_at(broken, 200) is None
    assert per_user_at(broken, 300) == 75


def test_past_saturation_the_better_point_counts() -> None:
    """Throughput that falls again is passed twice; nobody would run at the worse place."""
    falling: Curve = [[Point(1, 100, 100), Point(2, 80, 200), Point(4, 30, 150)]]
    assert per_user_at(falling, 150) == 90
    assert per_user_at(list(reversed([list(reversed(piece)) for piece in falling])), 150) == 90


def test_level_curve() -> None:
    """Two points of the same throughput: no division by zero, the better one."""
    assert per_user_at([[Point(1, 100, 200), Point(2, 80, 200)]], 200) == 100


def test_curve_takes_medians() -> None:
    """An outlying repeat must not bend the curve."""
    one = arm("ours", 7, run(2, 100), run(2, 102, repeat=1), run(2, 900, repeat=2))
    assert curve(one, 1.0, [2]) == [[Point(2, 51, 102)]]
    assert curve(one, 0.0, [2]) == []
