"""How long a chosen number of drafts stands, and what ends it."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_dspark.scheduler.standing import Standing

SLOTS, DRAFTS = np.arange(20), np.full(20, 7)
TOTAL = 140


def steps_until_chosen(standing: Standing, budget: int) -> int:
    """Choose a number; how many steps it stands with that one."""
    standing.put(SLOTS, DRAFTS, 7, budget, TOTAL)
    steps = 1
    while standing.take(SLOTS, DRAFTS, 7) == budget:
        steps += 1
    return steps


@pytest.mark.parametrize("most", [1, 2, 6, 8])
def test_doubles_up_to_the_most(most: int) -> None:
    standing = Standing(most)
    seen = [steps_until_chosen(standing, 90) for _ in range(6)]
    assert seen == [min(2**n, most) for n in range(6)]


def test_about_the_same_is_steady_and_more_is_not() -> None:
    """A thirty-second of the drafts, up or down. Catches noise of confidences that has every step
    choose anew, and a drift that goes unnoticed."""
    standing = Standing(8)
    assert [steps_until_chosen(standing, budget) for budget in (90, 94, 90, 95)] == [1, 2, 4, 1]
    assert [steps_until_chosen(standing, budget) for budget in (95, 95)] == [2, 4]


def test_nothing_stands_before_and_after() -> None:
    standing = Standing(8)
    assert standing.take(SLOTS, DRAFTS, 7) is None
    for _ in range(4):
        standing.put(SLOTS, DRAFTS, 7, 90, TOTAL)
    standing.forget()
    assert standing.take(SLOTS, DRAFTS, 7) is None
    assert steps_until_chosen(standing, 90) == 1


def test_equal_arrays_are_not_enough() -> None:
    """Only the very same are known to be: they are not compared."""
    standing = Standing(8)
    for _ in range(3):
        standing.put(SLOTS, DRAFTS, 7, 90, TOTAL)
    assert standing.take(SLOTS.copy(), DRAFTS, 7) is None
    assert standing.take(SLOTS, DRAFTS.copy(), 7) is None
    assert standing.take(SLOTS, DRAFTS, 5) is None
    assert standing.take(SLOTS, DRAFTS, 7) == 90
