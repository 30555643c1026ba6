"""Which measured steps are learned from, and what brings back all of them."""

from __future__ import annotations

import pytest

from tests import step_cases
from tests.step_cases import DEPTHS, GAMMA
from vllm_dspark.scheduler.controller import DepthController
from vllm_dspark.scheduler.depth import Goal
from vllm_dspark.scheduler.thinning import Thinning

KIND = 64, 128, 1  # requests, tokens, depth


def taken(
    thinning: Thinning, steps: int, kind: tuple[int, int, int] = KIND, believed: bool = True
) -> list[int]:
    """What each step stands for."""
    seen = []
    for _ in range(steps):
        seen.append(thinning.takes(*kind))
        if seen[-1]:
            thinning.learned(believed)
    return seen


def test_one_in_a_few_once_known() -> None:
    """And all steps are accounted for by those that are taken."""
    assert taken(Thinning(every=4, known=3), 12) == [1, 1, 1, 0, 0, 0, 4, 0, 0, 0, 4, 0]


@pytest.mark.parametrize("other", [(64, 128, 2), (73, 128, 1), (55, 128, 1), (64, 145, 1)], ids=str)
def test_another_kind_is_learned_from_at_once(other: tuple[int, int, int]) -> None:
    thinning = Thinning(every=4, known=3)
    taken(thinning, 7)
    assert taken(thinning, 4, other) == [1, 1, 1, 0]


def test_what_was_passed_over_is_accounted_for_by_another_kind() -> None:
    """Two steps of the kind before, and its own. Catches a change of kind that forgets them."""
    thinning = Thinning(every=4, known=3)
    assert taken(thinning, 5) == [1, 1, 1, 0, 0]
    assert taken(thinning, 1, (64, 128, 2)) == [3]


def test_a_little_more_or_less_is_the_same_kind() -> None:
    thinning = Thinning(every=4, known=3)
    taken(thinning, 7)
    assert taken(thinning, 4, (60, 120, 1)) == [0, 0, 0, 4]


def test_a_time_that_is_not_believed_brings_back_every_step() -> None:
    thinning = Thinning(every=4, known=3)
    taken(thinning, 7)
    assert taken(thinning, 4, believed=False) == [0, 0, 0, 4]
    assert taken(thinning, 5) == [1, 1, 1, 0, 0]


def test_a_pause_takes_a_few_steps_of_it_back() -> None:
    """One time in thirty, as on a busy host, must not have all others learned from."""
    thinning = Thinning(every=4, known=12, doubt=3)
    assert taken(thinning, 16)[-4:] == [0, 0, 0, 4]
    assert taken(thinning, 4, believed=False) == [0, 0, 0, 4]
    assert taken(thinning, 8) == [1, 1, 1, 0, 0, 0, 4, 0]
    taken(thinning, 16, believed=False)  # no pause any more
    assert taken(thinning, 14) == [*[1] * 12, 0, 0]


def test_controller_passes_steps_over_and_still_learns_a_change() -> None:
    """Half as slow again from one step to the next, with a pause every fifty steps: known within
    forty steps. Nobody is told of what was passed over."""
    control = DepthController(GAMMA, Goal())
    control.start(DEPTHS, step_cases.model().to_json({}))
    step = step_cases.shape(64, 1)
    fields = step.tokens, step.requests, step.context_tokens, step.logits_rows, step.depth
    ms = step_cases.step_ms(step)
    told = [control.observe_step(fields, ms * (4 if n % 50 == 49 else 1), True) for n in range(600)]
    assert sum(told) < 500
    assert sum(told[20:48]) < 28
    assert control.cost.timed[1] == sum(told)
    for _ in range(40):
        control.observe_step(fields, 1.5 * ms, True)
    assert step_cases.predicted(control.cost, step) == pytest.approx(1.5 * ms, rel=0.05)
