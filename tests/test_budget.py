"""Budget and allocation against exhaustive search over all prefix lengths.

Survival is in sixteenths and costs are small integers, so that ties occur often, and sums and
comparisons are exact.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.budget_cases import Case, candidates, cases, changed_behind
from vllm_dspark.scheduler.budget import allocate, choose_budget, early_stop_lengths

THOUSANDS = settings(max_examples=2000, deadline=None)


def prefix_vectors(case: Case) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(n + 1) for n in case.lengths)))


def gain(case: Case, vector: tuple[int, ...]) -> Fraction:
    return sum(
        (Fraction(a) for row, n in zip(case.survival, vector, strict=True) for a in row[:n]),
        Fraction(0),
    )


@THOUSANDS
@given(cases())
def test_budget_is_the_best_of_all_prefix_vectors(case: Case) -> None:
    """Catches an early stop, a sum over the wrong positions, and a later k on ties."""
    rate = {
        vector: (case.base + gain(case, vector)) / int(case.step_ms[sum(vector)])
        for vector in prefix_vectors(case)
    }
    best = max(rate.values())
    expected = min(sum(vector) for vector, value in rate.items() if value == best)
    budget = choose_budget(*case)
    assert budget == expected
    assert type(budget) is int


@THOUSANDS
@given(cases(), st.integers(0, 25))
def test_allocation_is_the_best_of_its_size(case: Case, budget: int) -> None:
    """Largest sum of survival; of several, lower rows first: the lexicographically largest."""
    lengths = allocate(case.survival, case.lengths, budget)
    size = min(budget, int(case.lengths.sum()))
    assert lengths.shape == case.lengths.shape
    assert lengths.dtype == np.int64
    assert lengths.sum() == size
    vectors = (vector for vector in prefix_vectors(case) if sum(vector) == size)
    assert tuple(lengths) == max(vectors, key=lambda vector: (gain(case, vector), vector))


@settings(max_examples=1000, deadline=None)
@given(cases(), st.integers(0, 25), st.data())
def test_allocation_ignores_what_follows(case: Case, budget: int, data: st.DataObject) -> None:
    """Admission of (r, j) stays when the survival behind it in its row changes: this is what
    losslessness rests on, and an extension that wins a tie against its prefix breaks it."""
    row, position, changed = data.draw(changed_behind(case))
    before = allocate(case.survival, case.lengths, budget)[row] > position
    after = allocate(changed, case.lengths, budget)[row] > position
    assert before == after


def test_positions_beyond_the_length_are_not_used() -> None:
    """Left-overs of an earlier, longer draft must neither be admitted nor rank, nor be refused
    for rising."""
    survival = [[0.5, 0.9, 1.0], [0.4, 0.3, 1.0], [1.0, 1.0, 1.0]]
    lengths = [1, 2, 0]
    assert allocate(survival, lengths, 2).tolist() == [1, 1, 0]
    # What rises beyond a length must not stand in for the position that it hides.
    assert allocate([[0.5, 0.4, 1.0], [0.45, 0.0, 0.0]], [2, 1], 2).tolist() == [1, 1]
    assert allocate(survival, lengths, 99).tolist() == [1, 2, 0]
    assert choose_budget(survival, lengths, [1, 1, 1, 1], 3) == 3
    assert early_stop_lengths(survival, lengths, [1, 1, 1, 1], 3).tolist() == [1, 2, 0]


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_equal_survival_everywhere(value: float) -> None:
    """Everything ties: whole rows fill in order, each from its front."""
    survival = np.full((3, 3), value)
    filled = [allocate(survival, [3, 2, 3], k).tolist() for k in (1, 3, 4, 6, 8)]
    assert filled == [[1, 0, 0], [3, 0, 0], [3, 1, 0], [3, 2, 1], [3, 2, 3]]


@pytest.mark.parametrize(("value", "budget"), [(0.0, 0), (1.0, 6)])
def test_free_drafts(value: float, budget: int) -> None:
    """At no cost, drafts that cannot survive are not worth it, and sure ones all are."""
    assert choose_budget(np.full((2, 3), value), [3, 3], np.ones(7), 2) == budget


def test_early_stop_admits_nothing_that_gains_nothing() -> None:
    """The first draft leaves Θ as it is, and a second one would double it. Catches a stop at losses
    alone."""
    assert early_stop_lengths([[0.5, 0.5]], [2], [1.0, 1.5, 1.0], 1.0).tolist() == [0]


def test_no_drafts() -> None:
    """All lengths zero is a step without speculation, not an error."""
    survival = np.full((2, 3), 0.5)
    assert choose_budget(survival, [0, 0], [3.0], 2) == 0
    assert allocate(survival, [0, 0], 5).tolist() == [0, 0]
    assert early_stop_lengths(survival, [0, 0], [3.0], 2).tolist() == [0, 0]


@pytest.mark.parametrize("layout", ["float32", "fortran", "strided", "list", "int32"])
def test_layouts_agree(layout: str) -> None:
    """The flat shortcuts inside must not read memory order; narrow dtypes must not overflow."""
    random = np.random.default_rng(3)
    survival = np.sort(random.integers(0, 17, (513, 7)) / 16, axis=1)[:, ::-1].copy()
    lengths = random.integers(0, 8, 513)
    step_ms = 5 + 0.002 * np.arange(lengths.sum() + 1)
    same, same_lengths = {
        "float32": (survival.astype(np.float32), lengths),
        "fortran": (np.asfortranarray(survival), lengths),
        "strided": (np.repeat(survival, 2, axis=1)[:, ::2], lengths),
        "list": (survival.tolist(), lengths.tolist()),
        "int32": (survival, lengths.astype(np.int32)),
    }[layout]
    budget = choose_budget(survival, lengths, step_ms, 513)
    assert 0 < budget < lengths.sum()
    assert choose_budget(same, same_lengths, step_ms, 513) == budget
    expected = allocate(survival, lengths, budget)
    np.testing.assert_array_equal(allocate(same, same_lengths, budget), expected)


def test_large_allocation_follows_the_ranking() -> None:
    """512 × 7 with thousands of ties, against sorting every candidate."""
    random = np.random.default_rng(4)
    survival = np.sort(random.integers(0, 9, (512, 7)) / 8, axis=1)[:, ::-1]
    case = Case(survival, random.integers(0, 8, 512), np.ones(1), 0)
    ranked = candidates(case)
    for budget in (1, 7, 500, 1001, len(ranked) - 1, len(ranked)):
        rows = [row for _, row, _ in ranked[:budget]]
        expected = np.bincount(rows, minlength=512)
        np.testing.assert_array_equal(allocate(survival, case.lengths, budget), expected)


def test_inputs_are_left_alone() -> None:
    """Sorting and masking happen on copies, and a full allocation is no view of the lengths."""
    survival, lengths, step_ms = np.array([[0.25, 0.125]]), np.array([2]), np.ones(3)
    kept = survival.copy(), lengths.copy(), step_ms.copy()
    choose_budget(survival, lengths, step_ms, 1)
    early_stop_lengths(survival, lengths, step_ms, 1)
    allocate(survival, lengths, 1)
    allocate(survival, lengths, 2)[0] = 9
    for array, copy in zip((survival, lengths, step_ms), kept, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_cost_tables_may_be_longer_than_needed() -> None:
    """One table serves steps of all sizes; what lies beyond the drafts is never chosen."""
    assert choose_budget([[0.5]], [1], [1.0, 2.0, 0.001], 1) == 0


BAD: dict[str, list[Any]] = {
    "survival": [
        [[0.5, math.nan], [0.5, 0.5]], [[1.5, 0.5], [0.5, 0.5]], [[0.5, -0.5], [0.5, 0.5]],
        [[0.4, 0.5], [0.5, 0.5]],  # rises: no prefix could be the best choice
        [[0.5, 0.5], [0.4, 0.5]], [0.5, 0.5], [[[0.5]]], np.zeros((0, 2)), np.zeros((2, 0)),
        [[True, True], [True, True]], [["a", "b"], ["c", "d"]], [[0.5], [0.5, 0.5]],
    ],
    "draft_lengths": [
        [-1, 2], [2, 3], [2], [2, 2, 2], [[2, 2]], [], 2, [1.0, 1.0], [True, True],
        [math.nan, 1], [2**64 - 1, 1],
    ],
    "step_ms": [
        [1, 1, 1, 1], [1, 1, 0, 1, 1], [1, 1, -1, 1, 1], [1, 1, math.nan, 1, 1],
        [1, 1, math.inf, 1, 1], [[1, 1, 1, 1, 1]], [], 1.0, [True] * 5,
    ],
    "emitted_without_drafts": [-1, math.nan, math.inf, True, "2", None, [1, 2]],
    "budget": [-1, 1.0, True, np.True_, math.nan, "1", None, [1, 2]],
}  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_bad_input_is_named(argument: str, value: Any) -> None:
    """Every function that takes the argument refuses it, and says which one it was."""
    good: dict[str, Any] = {
        "survival": [[0.5, 0.25], [0.5, 0.5]], "draft_lengths": [2, 2],
        "step_ms": [1, 1, 1, 1, 1], "emitted_without_drafts": 2, "budget": 2,
    }  # fmt: skip
    ran = 0
    for function in (choose_budget, allocate, early_stop_lengths):
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        call: Any = function
        call(**{name: good[name] for name in names})
        if argument in names:
            ran += 1
            with pytest.raises(ValueError, match=f"^{argument} "):
                call(**{name: (good | {argument: value})[name] for name in names})
    assert ran
