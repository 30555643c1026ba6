"""Rounds of several steps told together: their order, how old they are, and which are taken."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_dspark.calibration.rounds import Rounds, join


def step(requests: int, number: int, known: bool = True) -> Rounds:
    """One whose every number says which step it is."""
    counts = np.full(requests, number)
    request = np.arange(requests) if known else None
    learn = np.full(requests, True)
    return Rounds.of(1, np.full((requests, 1), number), counts, counts, learn, None, request)


def test_one_step_stays_what_it_is() -> None:
    alone = step(3, 1)
    rounds, later = join([alone], most=10, turn=5)
    assert later is None
    for column, other in zip(rounds, alone, strict=True):
        np.testing.assert_array_equal(column, other)


@pytest.mark.parametrize("known", [True, False])
def test_steps_follow_on_each_other(known: bool) -> None:
    rounds, later = join([step(2, 0, known), step(1, 1, known), step(3, 2, known)], 10, 0)
    assert later is not None
    assert later.tolist() == [2, 2, 1, 0, 0, 0]
    assert rounds.accepted.tolist() == rounds.verified.tolist() == [0, 0, 1, 2, 2, 2]
    assert rounds.confidence[:, 0].tolist() == [0, 0, 1, 2, 2, 2]
    if known:
        assert rounds.request is not None
        assert rounds.request.tolist() == [0, 1, 0, 0, 1, 2]
    else:
        assert rounds.request is None


def test_of_many_some_are_taken_in_turn() -> None:
    """As many of each step, none of them twice, and all of them in the end."""
    steps = [step(100, number) for number in range(4)]
    seen = []
    for turn in range(3):
        rounds, later = join(steps, most=40, turn=turn)
        assert later is not None
        assert rounds.request is not None
        assert len(later) <= 4 * 40
        assert np.bincount(later, minlength=4).min() >= 33
        assert (rounds.accepted == 3 - later).all()
        seen += list(zip(later.tolist(), rounds.request.tolist(), strict=True))
    assert len(seen) == len(set(seen)) == 400
