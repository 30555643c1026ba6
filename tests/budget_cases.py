"""Small scheduling problems whose sums and comparisons are exact, with many ties."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

SHAPES = [(1, 1), (1, 7), (4, 1), (2, 3), (3, 2), (3, 3), (4, 2)]


class Case(NamedTuple):
    survival: np.ndarray
    lengths: np.ndarray
    step_ms: np.ndarray
    base: int  # tokens emitted without drafts


@st.composite
def cases(draw: st.DrawFn) -> Case:
    requests, gamma = draw(st.sampled_from(SHAPES))
    sixteenths = st.integers(0, 16) | st.sampled_from([0, 8, 16])
    rows = draw(
        st.lists(
            st.lists(sixteenths, min_size=gamma, max_size=gamma).map(sorted),
            min_size=requests,
            max_size=requests,
        )
    )
    lengths = draw(
        st.just([gamma] * requests)
        | st.lists(st.integers(0, gamma), min_size=requests, max_size=requests)
    )
    total = sum(lengths)
    steps = draw(st.lists(st.integers(0, 6), min_size=total + 1, max_size=total + 1))
    kind = draw(st.sampled_from(["any", "rising", "flat"]))  # stairs are "rising" with zeros
    step_ms = {
        "any": np.array(steps) + 1,  # not even monotone: padding to graph sizes does that
        "rising": np.cumsum(steps) + 1,
        "flat": np.full(total + 1, steps[0] + 1),
    }[kind]
    survival = np.array(rows)[:, ::-1] / 16
    return Case(survival, np.array(lengths), step_ms, draw(st.integers(0, requests)))


def candidates(case: Case) -> list[tuple[float, int, int]]:
    """(−survival, row, position), best first."""
    return sorted(
        (-case.survival[r, j], r, j) for r, n in enumerate(case.lengths) for j in range(n)
    )


@st.composite
def changed_behind(draw: st.DrawFn, case: Case) -> tuple[int, int, np.ndarray]:
    """A candidate (row, position), and survival that differs only behind it in its row."""
    changed = case.survival.copy()
    row = draw(st.integers(0, len(changed) - 1))
    position = draw(st.integers(0, changed.shape[1] - 1))
    for j in range(position + 1, changed.shape[1]):
        changed[row, j] = draw(st.integers(0, int(16 * changed[row, j - 1]))) / 16
    return row, position, changed
