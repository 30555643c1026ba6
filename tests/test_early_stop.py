"""Early stop against the loop it stands for; that it is causal, and where it is not optimal."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.budget_cases import Case, candidates, cases, changed_behind
from vllm_dspark.scheduler.budget import choose_budget, early_stop_lengths


@settings(max_examples=2000, deadline=None)
@given(cases())
def test_early_stop_is_the_loop_of_the_paper(case: Case) -> None:
    lengths = [0] * len(case.lengths)
    emitted, admitted = Fraction(case.base), 0
    for negated, row, _ in candidates(case):
        raised = emitted - Fraction(negated)
        if raised / int(case.step_ms[admitted + 1]) <= emitted / int(case.step_ms[admitted]):
            break
        emitted, admitted = raised, admitted + 1
        lengths[row] += 1
    result = early_stop_lengths(*case)
    assert result.tolist() == lengths
    assert result.dtype == np.int64


@settings(max_examples=1000, deadline=None)
@given(cases(), st.data())
def test_early_stop_ignores_what_follows(case: Case, data: st.DataObject) -> None:
    """The same causality as of `allocate`, though here the budget reads current survival too."""
    row, position, changed = data.draw(changed_behind(case))
    before = early_stop_lengths(*case)[row] > position
    after = early_stop_lengths(*case._replace(survival=changed))[row] > position
    assert before == after


@settings(max_examples=300, deadline=None)
@given(cases())
def test_early_stop_is_optimal_on_a_single_peak(case: Case) -> None:
    """A straight cost line makes Θ unimodal; there the two searches agree."""
    assume(case.base > 0)
    case = case._replace(step_ms=4 + np.arange(len(case.step_ms)))
    assert early_stop_lengths(*case).sum() == choose_budget(*case)


def test_a_stair_stops_the_early_stop_only() -> None:
    """One dear admission, then free ones: the unrestricted search sees across the stair."""
    survival, lengths = np.full((1, 4), 1.0), [4]
    step_ms = [1, 3, 3, 3, 3]
    assert early_stop_lengths(survival, lengths, step_ms, 1).tolist() == [0]
    assert choose_budget(survival, lengths, step_ms, 1) == 4
