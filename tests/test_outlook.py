"""For how long and for which loads a prediction stands, as the depth policy uses it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.depth_cases import MODEL, NO_COST_PROBES, choose, policy
from tests.step_cases import CONTEXT, GAMMA, SURVIVAL
from vllm_dspark.scheduler.cost_model import CostModel
from vllm_dspark.scheduler.depth import DepthPolicy

NOTHING = np.zeros(GAMMA)  # survives: depth 0, at once


class Counting:
    """A cost model that counts what it is asked."""

    regimes = 0

    def __init__(self) -> None:
        self.asked = 0

    def steady_ms(self, *steps: Any) -> Any:
        """As `CostModel.steady_ms`."""
        self.asked += 1
        return MODEL.steady_ms(*steps)


def settled(cost: Any) -> DepthPolicy:
    """One whose prediction was made in the last step, for 64 requests."""
    made = policy(stands=4)
    choose(made, 64, cost=cost)
    return made


def asks(cost: Any, of: DepthPolicy, requests: int = 64, **options: Any) -> bool:
    """Whether a step predicts anew."""
    before = cost.asked
    choose(of, requests, cost=cost, **options)
    return bool(cost.asked > before)


def test_stands_for_four_steps() -> None:
    """Then it is made anew, although nothing changed."""
    cost = Counting()
    chosen = settled(cost)
    assert [asks(cost, chosen) for _ in range(9)] == [False] * 3 + [True] + [False] * 3 + [
        True,
        False,
    ]


@pytest.mark.parametrize(
    "change",
    [{"requests": 73}, {"requests": 55}, {"waiting": 9}, {"free_kv_fraction": 0.05}],
    ids=str,
)
def test_another_load_is_predicted_at_once(change: dict[str, Any]) -> None:
    cost = Counting()
    chosen = settled(cost)
    assert asks(cost, chosen, **change)


def test_about_the_same_load_is_not() -> None:
    cost = Counting()
    chosen = settled(cost)
    assert not asks(cost, chosen, requests=70, waiting=2)
    assert not asks(cost, chosen, requests=58, context_tokens=90 * CONTEXT)


def test_new_regime_and_new_model_are_predicted_at_once() -> None:
    cost = Counting()
    chosen = settled(cost)
    cost.regimes = 1
    assert asks(cost, chosen)
    assert not asks(cost, chosen)
    other = Counting()
    assert asks(other, chosen)


def test_what_survives_is_seen_within_four_steps() -> None:
    """By default in the next one."""
    assert choose(policy(), 16, NOTHING) == 0
    late = policy(stands=4)
    assert choose(late, 16) > 0
    depths = [choose(late, 16, NOTHING) for _ in range(4)]
    assert depths[:3] == [depths[0]] * 3 != [0] * 3
    assert depths[3] == 0


def test_depths_are_those_of_one_that_predicts_in_every_step() -> None:
    """But for some steps of delay: a load that comes and goes, with survival that wanders."""
    random, delays = np.random.default_rng(0), 0
    often, seldom = policy(), policy(stands=4)
    for phase in range(40):
        requests = int(random.integers(1, 300))
        survival = SURVIVAL * random.uniform(0.8, 1)
        depths = [(choose(often, requests, survival), choose(seldom, requests, survival))
                  for _ in range(60)]  # fmt: skip
        delays += sum(one != other for one, other in depths)
        assert depths[-1][0] == depths[-1][1], phase
    assert delays <= 40 * 4


def test_a_probe_is_watched_in_every_step() -> None:
    """What it finds would be missed by a prediction from before."""
    chosen = DepthPolicy(GAMMA, [0, 3, GAMMA], probes=None, cost_probes=NO_COST_PROBES, stands=4)
    model, asked, probing = CostModel.default(GAMMA), 0, 0
    unseen = np.full(GAMMA, np.inf)
    count = Counting()
    count.steady_ms = model.steady_ms  # type: ignore[method-assign]  # cheap drafts
    for _ in range(400):
        was, before = chosen.probing, chosen._outlook
        choose(chosen, 64, np.full(GAMMA, 0.12) ** np.arange(1, GAMMA + 1), cost=count, age=unseen)
        if was:
            probing += 1
            asked += chosen._outlook is not before
    assert asked == probing > 0


@pytest.mark.parametrize("stands", [0, 1.5])
def test_stands_is_checked(stands: Any) -> None:
    with pytest.raises(ValueError, match=r"^stands "):
        policy(stands=stands)
