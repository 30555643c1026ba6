"""The verification policy: what it reads, when, and what it forgets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.verification_cases import LookAhead, PlainCalibrator, Prices
from vllm_dspark.calibration.online import OnlineCalibrator
from vllm_dspark.scheduler.fixed import FixedPolicy
from vllm_dspark.scheduler.verification import VerificationPolicy

SURE, UNSURE = [0.9, 0.9, 0.9], [0.1, 0.1, 0.1]
RISING = 1.0, 1.3, 1.6, 1.9, 2.2, 2.5, 2.8  # a draft pays if it survives in a third of the cases


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def make(
    gamma: int = 3, slots: int = 4, step_ms: Any = RISING, cls: Any = VerificationPolicy
) -> Any:
    """A policy, with requests in all slots from step 0 on."""
    policy = cls(slots, gamma, PlainCalibrator(), Prices(*step_ms))
    for slot in range(slots):
        policy.add_request(slot, 0)
    return policy


def draw(policy: Any, step: int, blocks: dict[int, list[float]], arrives: bool = True) -> None:
    """Step `step` draws blocks with these confidences, by slot."""
    slots = ints(*blocks)
    policy.drafted(step, slots, policy.gamma)
    if arrives:
        policy.confidences_arrived(step, slots, np.array(list(blocks.values()), np.float32))


def choose(policy: Any, *slots: int, drafts: int = 3) -> int:
    count = len(slots)
    return policy.choose(ints(*slots), ints(*[drafts] * count), count, count, 100 * count)


def test_new_request_has_the_prior() -> None:
    """Not confidence 1, with which all three would be verified."""
    policy = make(step_ms=(1.0, 1.4, 1.7, 2.0))
    draw(policy, 0, {0: SURE})
    assert choose(policy, 0) == 1  # 1.5 / 1.4 beats 1.75 / 1.7 and 1.875 / 2
    draw(policy, 1, {0: UNSURE})
    assert choose(policy, 0) == 3  # the prior's place was taken by the block before


def test_budget_reads_the_block_before_the_current_one() -> None:
    """Whatever the current block says, the budget is the same; the block before it decides."""
    for before, expected in ((SURE, 3), (UNSURE, 0)):
        for current in (SURE, UNSURE):
            policy = make()
            draw(policy, 0, {0: before})
            draw(policy, 1, {0: current})
            assert choose(policy, 0) == expected


@pytest.mark.parametrize(("gain", "expected"), [(0.01, 3), (0.03, 2)])
def test_drafts_are_left_out_only_where_that_pays(gain: float, expected: int) -> None:
    """Two of three drafts promise more than all of them, by that much."""
    two = (1 + 0.5 + 0.25) / 1.5
    policy = make(step_ms=(1.0, 1.3, 1.5, (1 + 0.5 + 0.25 + 0.125) / two * (1 + gain)))
    draw(policy, 0, {0: [0.5, 0.5, 0.5]})
    draw(policy, 1, {0: UNSURE})
    assert choose(policy, 0) == expected


def test_look_ahead_is_told_from_the_real_one() -> None:
    """The stand-in that leaks in other tests does read the current block."""
    policy = make(cls=LookAhead)
    draw(policy, 0, {0: SURE})
    draw(policy, 1, {0: UNSURE})
    assert choose(policy, 0) == 0


def test_request_that_sat_out_still_holds_its_current_block() -> None:
    """Request 0 drew its block three steps before it is verified. Counted in steps of the engine
    its confidences are old; they are the current block's all the same."""
    for current in (SURE, UNSURE):
        policy = make()
        draw(policy, 0, {0: SURE, 1: UNSURE})
        draw(policy, 1, {0: current, 1: UNSURE})
        for step in (2, 3, 4):
            draw(policy, step, {1: UNSURE})
        assert choose(policy, 0) == 3


def test_late_confidences() -> None:
    """Nothing waits: the newest that arrived decides, however old, and none at all is the prior."""
    policy = make()
    draw(policy, 0, {0: UNSURE}, arrives=False)
    draw(policy, 1, {0: SURE}, arrives=False)
    assert choose(policy, 0) == 1  # the prior
    policy.confidences_arrived(0, ints(0), np.array([UNSURE], np.float32))
    assert choose(policy, 0) == 0
    policy.confidences_arrived(1, ints(0), np.array([SURE], np.float32))
    assert choose(policy, 0) == 0  # that was the current block
    draw(policy, 2, {0: UNSURE}, arrives=False)
    assert choose(policy, 0) == 3


def test_ranking_reads_the_current_block_if_it_may() -> None:
    """Both requests swap confidence from block to block."""
    policy = make()
    draw(policy, 0, {0: SURE, 1: UNSURE})
    draw(policy, 1, {0: UNSURE, 1: SURE})
    drafts = ints(3, 3)
    assert policy.allocate(ints(0, 1), drafts, 3).tolist() == [0, 3]
    assert policy.allocate(ints(0, 1), drafts, 3, current=False).tolist() == [3, 0]
    assert policy.allocate(ints(1, 0), drafts, 3).tolist() == [3, 0]  # rows follow the batch


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_request_reads_its_current_block(data: st.DataObject) -> None:
    """Two histories that differ only in blocks that are current when the budget is chosen, in any
    order of drawing, arriving and sitting out: the budget is the same. Its admission under the
    ranking does not depend on what follows it either."""
    one, other = make(slots=3), make(slots=3)
    current: dict[int, Any] = {}
    late: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []
    confidences = st.lists(st.sampled_from([0.1, 0.5, 0.9]), min_size=3, max_size=3)
    steps = data.draw(st.integers(1, 6))
    for step in range(steps):
        rows = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True))
        slots = ints(*rows)
        block = np.array([data.draw(confidences) for _ in rows], np.float32)
        changed = block.copy()
        last = {slot: step for slot in rows}
        current |= last
        for policy in (one, other):
            policy.drafted(step, slots, 3)
        late.append((step, slots, block, changed))
    for step, slots, _, changed in late:
        for row, slot in enumerate(slots):
            if current[int(slot)] == step:
                changed[row] = data.draw(confidences)
    for step, slots, block, changed in late[: data.draw(st.integers(0, steps))]:
        one.confidences_arrived(step, slots, block)
        other.confidences_arrived(step, slots, changed)
    everyone = ints(*current)
    drafts = np.full(len(everyone), 3)
    arguments = everyone, drafts, len(everyone), len(everyone), 0
    assert one.choose(*arguments) == other.choose(*arguments)
    budget = data.draw(st.integers(0, 3 * len(everyone)))
    stale = [policy.allocate(everyone, drafts, budget, current=False) for policy in (one, other)]
    assert stale[0].tolist() == stale[1].tolist()


def budgets(
    policy: Any, blocks: list[list[float]], last: list[float], drafts: np.ndarray, slots: np.ndarray
) -> list[int | None]:
    """What each step verifies while blocks of request 0 are drawn, the last one of them another;
    None where nothing stood, and it was chosen."""
    seen = []
    for step, block in enumerate([*blocks, last]):
        draw(policy, step, {0: block})
        standing = policy.standing(slots, drafts)
        if standing is None:
            policy.choose(slots, drafts, 1, 1, 100)
        seen.append(standing)
    return seen


def test_steady_choice_stands_for_more_and_more_steps() -> None:
    """One step, two, four, then as many as it may; whatever the confidences are meanwhile."""
    policy = VerificationPolicy(4, 3, PlainCalibrator(), Prices(*RISING), stands=4)
    policy.add_request(0, 0)
    slots, drafts = ints(0), ints(3)
    draw(policy, 0, {0: SURE})
    policy.choose(slots, drafts, 1, 1, 100)  # by the prior
    stood = budgets(policy, [SURE] * 12, UNSURE, drafts, slots)
    assert stood == [None, None, 3, None, 3, 3, 3, None, 3, 3, 3, None, 3]


def test_choice_stands_for_the_load() -> None:
    """Whoever runs, as long as they are as many with as many drafts; not for another number of
    drafts, another depth, or another number of requests."""
    policy = VerificationPolicy(4, 3, PlainCalibrator(), Prices(1.0), stands=8)
    for slot in range(2):
        policy.add_request(slot, 0)
    slots, drafts = ints(0, 1), ints(3, 3)

    def steady() -> None:
        for _ in range(4):
            if policy.standing(slots, drafts, 3) is None:
                policy.choose(slots, drafts, 2, 2, 100, 3)

    steady()
    assert policy.standing(ints(1, 0), ints(3, 3), 3) == 6
    policy.add_request(2, 1)
    assert policy.standing(ints(2, 1), ints(3, 3), 3) == 6
    for changed in (
        (slots, ints(3, 2), 3), (slots, drafts, 2), (ints(0, 1, 2), ints(3, 3, 0), 3),
        (slots, drafts, 3, 40), (slots, ints(0, 0), 3),
    ):  # fmt: skip
        steady()
        assert policy.standing(*changed) is None


def test_what_stands_respects_what_requests_let_be_verified() -> None:
    """Catches a standing number above what is scheduled, or above the limit of a new request."""
    policy = VerificationPolicy(40, 3, PlainCalibrator(), Prices(1.0), stands=8)
    for slot in range(39):
        policy.add_request(slot, 0)
    slots, drafts = np.arange(32), np.full(32, 3)
    for _ in range(4):
        if policy.standing(slots, drafts, 3) is None:
            assert policy.choose(slots, drafts, 32, 32, 100, 3) == 96
    policy.add_request(39, 1, max_verified=1)
    slots = np.array([*range(31), 39])
    assert policy.standing(slots, np.full(32, 3), 3) == policy.limits(slots, drafts).sum() == 94
    assert policy.standing(slots[:31], np.full(31, 3), 3) == 93


def test_nothing_stands_with_a_grammar() -> None:
    """How many drafts it left says something about them, and would decide on what stands."""
    policy = VerificationPolicy(4, 3, PlainCalibrator(), Prices(1.0), stands=8)
    policy.add_request(0, 0, constrained=True)
    policy.add_request(1, 0)
    slots = ints(0, 1)
    for drafts in (ints(3, 3), ints(0, 3)):
        for _ in range(6):
            assert policy.standing(slots, drafts) is None
            policy.choose(slots, drafts, 2, 2, 100)


def test_a_step_with_a_grammar_ends_what_stands() -> None:
    """Catches a choice from before it, which would go on to stand in the step after."""
    policy = VerificationPolicy(4, 3, PlainCalibrator(), Prices(1.0), stands=8)
    for slot in range(3):
        policy.add_request(slot, 0, constrained=slot == 2)
    slots, drafts = ints(0, 1), ints(3, 3)
    for _ in range(4):
        if policy.standing(slots, drafts) is None:
            policy.choose(slots, drafts, 2, 2, 100)
    assert policy.standing(slots, drafts) == 6
    policy.choose(ints(1, 2), drafts, 2, 2, 100)
    assert policy.standing(slots, drafts) is None


def test_many_blocks_are_not_all_told() -> None:
    """The newest are enough for a mean; the others are never told."""
    policy = make(slots=100)
    slots = np.arange(100)
    for step in range(8):
        policy.outcomes_arrived(step, slots, slots * 0, slots * 0 + 3)
        policy.confidences_arrived(step, slots, np.full((100, 3), 0.5 + step / 100, np.float32))
    survival = policy.retired()
    assert len(survival) == 300
    np.testing.assert_allclose(np.unique(survival[:, 0]), [0.54, 0.55, 0.56], rtol=1e-6)
    assert len(policy.retired()) == 0


def test_slot_of_a_new_request_forgets_its_predecessor() -> None:
    """What was still under way when the request left is nobody's."""
    policy = make()
    draw(policy, 0, {0: SURE})
    draw(policy, 1, {0: SURE}, arrives=False)
    policy.add_request(0, 2)
    policy.outcomes_arrived(1, ints(0), ints(2), ints(3))
    policy.confidences_arrived(1, ints(0), np.array([SURE], np.float32))
    assert policy.calibrator.observed == []
    draw(policy, 2, {0: UNSURE})
    assert choose(policy, 0) == 1  # the prior
    assert policy.calibrator.observed == []


def test_outcomes_meet_the_confidences_that_were_verified() -> None:
    """Step 1 verifies the block of step 0 and draws the next; both are told together."""
    policy = make()
    policy.add_request(1, 0, sampled=True)
    draw(policy, 0, {0: [0.5, 0.4, 0.3], 1: [0.9, 0.8, 0.7]})
    policy.outcomes_arrived(1, ints(1, 0), ints(2, 0), ints(3, 1))
    draw(policy, 1, {1: [0.2] * 3, 0: [0.1] * 3})
    policy.outcomes_arrived(2, ints(0, 1), ints(1, 0), ints(1, 0))
    (first, second) = policy.calibrator.observed
    confidence, accepted, verified, sampled, learn, request = first
    np.testing.assert_allclose(confidence, [[0.9, 0.8, 0.7], [0.5, 0.4, 0.3]])
    assert (accepted.tolist(), verified.tolist()) == ([2, 0], [3, 1])
    assert (sampled.tolist(), learn.tolist()) == ([True, False], [True, True])
    assert request[0] != request[1]
    np.testing.assert_allclose(second[0], [[0.1] * 3])  # slot 1 verified nothing
    assert second[-1] == request[1:]


def test_outcomes_of_an_unknown_block_teach_nothing() -> None:
    """Nobody told of the block of step 1, as where steps are sampled, and slot 1 sat step 1 out:
    what step 2 verified is not what the policy knows. Step 3 verifies what it was told of."""
    policy = make()
    draw(policy, 0, {0: SURE, 1: SURE})
    policy.drafted(1, ints(0), 3)
    policy.outcomes_arrived(2, ints(0, 1), ints(3, 0), ints(3, 3))
    assert not policy.calibrator.observed
    draw(policy, 2, {0: UNSURE, 1: UNSURE})
    policy.outcomes_arrived(3, ints(0, 1), ints(0, 1), ints(3, 3))
    (seen,) = policy.calibrator.observed
    np.testing.assert_allclose(seen[0], [UNSURE, UNSURE])


def test_numbers_of_requests_are_not_used_again() -> None:
    """The calibrator bounds what one request can teach it."""
    policy = make()
    numbers = []
    for step in range(0, 6, 2):
        policy.add_request(0, step)
        draw(policy, step, {0: SURE})
        policy.outcomes_arrived(step + 1, ints(0), ints(1), ints(2))
        numbers.append(int(policy.calibrator.observed[-1][-1][0]))
    assert len(set(numbers)) == 3


def test_constrained_requests_do_not_teach() -> None:
    """A grammar rejects what the drafter could not know."""
    policy = make()
    policy.add_request(0, 0, constrained=True)
    draw(policy, 0, {0: SURE, 1: SURE})
    policy.outcomes_arrived(1, ints(0, 1), ints(0, 2), ints(3, 3))
    assert policy.calibrator.observed[0][4].tolist() == [False, True]


def test_length_that_a_grammar_cut_does_not_change_the_budget() -> None:
    """A grammar may cut a block where a token does not fit. A budget that followed would verify the
    first draft or not according to what the second one is."""
    budgets = set()
    for cut in (1, 2, 3):
        policy = make()
        policy.add_request(0, 0, constrained=True)
        for step in range(2):
            draw(policy, step, {0: SURE, 1: [0.5, 0.1, 0.1]})
        drafts = ints(cut, 3)
        budgets.add(policy.choose(ints(0, 1), drafts, 2, 2, 0))
        assert policy.costs.asked[-1][-1] == 6  # candidates
        assert policy.allocate(ints(0, 1), drafts, 6).tolist() == [cut, 3]
    assert budgets == {3}


def test_no_more_is_verified_than_a_grammar_left() -> None:
    """The budget is chosen for the whole block, of which one draft is left. Catches drafts counted
    that no step has."""
    policy = make(step_ms=(1.0,))
    policy.add_request(0, 0, constrained=True)
    policy.drafted(0, ints(0, 1), 3)
    assert policy.choose(ints(0, 1), ints(1, 3), 2, 2, 0) == 4
    assert policy.costs.asked[-1][-1] == 6  # candidates


@pytest.mark.parametrize("cls", [FixedPolicy, VerificationPolicy])
def test_requests_can_ask_for_less(cls: Any) -> None:
    """Zero to γ drafts a step at most, whatever would pay."""
    calibrator: Any = PlainCalibrator(prior=0.99)
    more = (calibrator, Prices(1.0)) if cls is VerificationPolicy else ()
    policy = cls(4, 3, *more)
    for slot, most in enumerate((0, 1, None, 3)):
        policy.add_request(slot, 0, max_verified=most)
    slots, drafts = np.arange(4), ints(3, 3, 3, 2)
    assert policy.choose(slots, drafts, 4, 4, 0) == 6
    assert policy.allocate(slots, drafts, 6).tolist() == [0, 1, 3, 2]
    policy.add_request(0, 1)
    assert policy.allocate(slots, drafts, 9).tolist() == [3, 1, 3, 2]


def test_limits_bind_the_ranking_too() -> None:
    """The surest request lets one draft be verified; the rest goes to the other."""
    policy = make()
    policy.add_request(0, 0, max_verified=1)
    draw(policy, 0, {0: SURE, 1: [0.5, 0.5, 0.5]})
    assert policy.allocate(ints(0, 1), ints(3, 3), 3).tolist() == [1, 2]


def test_positions_that_were_not_drawn_are_the_priors() -> None:
    """A shallow block says nothing of deeper positions, which the next block may have."""
    policy = make(step_ms=(1.0, 1.1, 1.2, 1.3))
    draw(policy, 0, {0: [0.9, np.nan, np.nan]})
    draw(policy, 1, {0: UNSURE})
    assert choose(policy, 0) == 3  # 0.9, then the prior's 0.45 and 0.225
    assert choose(policy, 0, drafts=1) == 1


def test_prices_are_asked_for_the_step() -> None:
    policy = make()
    policy.choose(ints(0, 2), ints(3, 2), 40, 1, 700)
    assert policy.costs.asked == [(40, 2, 700, 2, 3, 5)]
    assert policy.choose(ints(0, 2), ints(0, 0), 40, 1, 700) == 0
    assert len(policy.costs.asked) == 1  # nothing to decide


def test_with_the_real_calibrator() -> None:
    """It learns through the policy, and its prior stands in for a new request."""
    calibrator = OnlineCalibrator(3)
    policy = VerificationPolicy(2, 3, calibrator, Prices(*RISING))
    policy.add_request(0, 0)
    draw(policy, 0, {0: SURE})
    for step in range(1, 200):
        policy.outcomes_arrived(step, ints(0), ints(0), ints(3))
        draw(policy, step, {0: SURE})
    assert calibrator.prior(False)[0] < 0.2
    assert choose(policy, 0) == 0  # raw confidences of 0.9 are seen through
    policy.add_request(1, 200)
    draw(policy, 200, {1: SURE})
    assert choose(policy, 1) == 0
