"""How long a chosen number of drafts stands, for which loads, and what ends it."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_dspark.scheduler.standing import Load, Standing

DECODE = Load(requests=32, drafts=224, base=32, depth=7)


def steps_until_chosen(standing: Standing, budget: int, load: Load = DECODE) -> int:
    """Choose a number; how many steps it stands with that one."""
    standing.put(load, budget)
    steps = 1
    while standing.take(load) == budget:
        steps += 1
    return steps


def stood(standing: Standing, load: Load) -> bool:
    """Whether a number that is chosen again and again for `DECODE` holds for another load."""
    for _ in range(5):
        standing.put(DECODE, 100)
    return standing.take(load) is not None


@pytest.mark.parametrize("most", [1, 2, 6, 8])
def test_doubles_up_to_the_most(most: int) -> None:
    """And is renewed then, however little changed."""
    standing = Standing(most)
    standing.take(DECODE)
    seen = [steps_until_chosen(standing, 90) for _ in range(6)]
    assert seen == [min(2**n, most) for n in range(6)]


def test_about_the_same_is_steady_and_more_is_not() -> None:
    """A sixteenth of the drafts, up or down. Catches noise of confidences that has every step
    choose anew, and a drift that goes unnoticed."""
    standing = Standing(8)
    standing.take(DECODE)
    assert [steps_until_chosen(standing, budget) for budget in (90, 104, 90, 105)] == [1, 2, 4, 2]
    assert [steps_until_chosen(standing, budget) for budget in (90, 105, 105)] == [1, 1, 2]


def test_nothing_stands_before_and_after() -> None:
    standing = Standing(8)
    assert standing.take(DECODE) is None
    for _ in range(4):
        standing.put(DECODE, 90)
    standing.forget()
    assert standing.take(DECODE) is None
    assert steps_until_chosen(standing, 90) == 1


@pytest.mark.parametrize(
    "change",
    [{"requests": 35, "base": 35}, {"drafts": 209}, {"drafts": 239}, {"depth": 5}, {"base": 35}],
    ids=str,
)
def test_another_load_is_chosen_for_anew(change: dict[str, Any]) -> None:
    assert not stood(Standing(8), DECODE._replace(**change))


@pytest.mark.parametrize("requests", [30, 34])
def test_a_few_more_or_less_are_scaled(requests: int) -> None:
    """One comes or goes in most steps of a busy server. Never more than there is, and all of it
    where all was chosen."""
    load = Load(requests, 7 * requests, requests, 7)
    for budget in (0, 1, 100, DECODE.drafts):
        standing = Standing(8)
        for _ in range(4):
            standing.put(DECODE, budget)
        assert standing.take(load) == budget * load.drafts // DECODE.drafts <= load.drafts
    assert standing.take(load) == load.drafts


def test_steady_is_the_scaled_number() -> None:
    """All drafts are chosen, of a few requests less too. Catches a comparison with the number
    itself, to which every request that comes or goes is a change."""
    few, standing = Load(30, 210, 30, 7), Standing(8)
    for load in (DECODE, few):
        standing.take(load)
        standing.put(load, load.drafts)
    assert standing.take(few) == few.drafts


def test_another_load_starts_with_one_step() -> None:
    """Half of everything. Catches steps that a steady choice had earned for the load before."""
    standing = Standing(8)
    standing.take(DECODE)
    assert [steps_until_chosen(standing, 90) for _ in range(3)] == [1, 2, 4]
    assert steps_until_chosen(standing, 45, Load(16, 112, 16, 7)) == 1


def test_prefills_in_between_do_not_end_it() -> None:
    """Steps with one and without may come in turn: each has a choice of its own, and both grow
    older with every step."""
    standing = Standing(4)
    prefill = DECODE._replace(base=DECODE.base + 500)
    for _ in range(3):
        standing.put(DECODE, 90)
        standing.put(prefill, 40)
    seen = [standing.take(load) for load in (DECODE, prefill, DECODE, prefill, DECODE)]
    assert seen == [90, 40, 90, None, None]


@pytest.mark.parametrize(("base", "expected"), [(90, True), (150, True), (89, False), (151, False)])
def test_prompts_differ_in_length(base: int, expected: bool) -> None:
    """Steps with a prefill are about the same up to a quarter of their tokens."""
    standing, load = Standing(8), DECODE._replace(base=120)
    for _ in range(5):
        standing.put(load, 100)
    assert (standing.take(load._replace(base=base)) is not None) == expected
