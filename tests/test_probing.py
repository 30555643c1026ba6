"""Probes: cheap by the bill, rare without success, soon where there is something to find."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import step_cases
from tests.depth_cases import policy
from tests.step_cases import ACCEPTANCE, CONTEXT, DEPTHS, GAMMA, SURVIVAL, predicted, shape
from vllm_dspark.scheduler.depth import DepthPolicy, Hysteresis, ProbeSettings

MODEL = step_cases.model()
POOR = np.full(GAMMA, 0.05)  # survival at which drafting does not pay
NEVER_SEEN = np.full(GAMMA, np.inf)


def run(
    of: DepthPolicy, steps: int, requests: int, survival: Any = POOR, **options: Any
) -> list[tuple[int, int]]:
    """Depth chosen and depth drafted, step by step; survival does not learn."""
    taken = []
    for _ in range(steps):
        drafted = of.choose(
            requests=requests, survival=survival, context_tokens=requests * CONTEXT, cost=MODEL,
            **({"waiting": 0, "free_kv_fraction": 0.9} | options),
        )  # fmt: skip
        assert of.probing == (drafted != of.depth)
        assert drafted >= of.depth
        taken.append((of.depth, drafted))
    return taken


def probes(taken: list[tuple[int, int]]) -> list[int]:
    """Steps at which a probe starts."""
    deeper = np.array([drafted > depth for depth, drafted in taken])
    return np.flatnonzero(deeper & ~np.concatenate([[False], deeper[:-1]])).tolist()


@pytest.mark.parametrize("share", [0.005, 0.05])
@pytest.mark.parametrize("requests", [1, 4, 16, 64, 256])
def test_probes_cost_less_than_their_share(requests: int, share: float) -> None:
    """With nothing ever accepted of them, no age ever falling and no interval to speak of: the
    bill alone holds them back, at every load, with and without requests that wait."""
    for waiting in (0, 200):
        settings = ProbeSettings(share=share, interval=1, longest=1)
        taken = run(
            policy(probes=settings),
            1500, requests, np.zeros(GAMMA), age=NEVER_SEEN, waiting=waiting,
        )  # fmt: skip
        cost = {d: predicted(MODEL, shape(requests, d)) for d in DEPTHS}
        normal = sum(cost[depth] for depth, _ in taken)
        extra = sum(cost[drafted] - cost[depth] for depth, drafted in taken)
        assert 0 < extra < share * normal


def test_what_is_saved_for_probes_is_bounded() -> None:
    """For long there is nothing to probe, then nothing but: what was saved pays for one probe at
    its longest. Catches a share that adds up, and is spent in one burst."""
    chosen = policy(depths=(0, GAMMA), probes=ProbeSettings(share=0.05, interval=1, longest=1))
    run(chosen, 2000, 64, np.zeros(GAMMA), age=np.zeros(GAMMA))
    taken = run(chosen, 200, 64, np.zeros(GAMMA), age=NEVER_SEEN)
    cost = {d: predicted(MODEL, shape(64, d)) for d in DEPTHS}
    extra = sum(cost[drafted] - cost[depth] for depth, drafted in taken)
    assert 0 < extra < 8 * (cost[GAMMA] - cost[0]) + 0.05 * 200 * cost[0]


def test_a_probe_ends_when_it_grows_dear() -> None:
    """Eight steps were begun for one request. Then 256 run, at sixty times the extra cost: the
    probe must not go on at the old bill, however often that happens."""
    chosen = policy(probes=ProbeSettings(share=0.05, interval=1, longest=1))
    normal = extra = 0.0
    jumps, requests = 0, 1
    for _ in range(3000):
        ((depth, drafted),) = run(chosen, 1, requests, np.zeros(GAMMA), age=NEVER_SEEN)
        normal += predicted(MODEL, shape(requests, depth))
        extra += predicted(MODEL, shape(requests, drafted)) - predicted(
            MODEL, shape(requests, depth)
        )
        jumps += requests == 1 and chosen.probing
        requests = 256 if requests == 1 and chosen.probing else 1
    assert jumps > 10
    assert extra < 0.05 * normal


def test_a_probe_finds_out_and_is_followed() -> None:
    """Acceptance was poor and became good at step 1000: the depth rises although nothing deeper
    than 0 was chosen, within a few thousand steps, all the way; and the unlucky time before
    costs less than 1 % of the tokens."""
    chosen = policy(probes=ProbeSettings())
    random, age = np.random.default_rng(0), np.zeros(GAMMA)
    truth = {True: 0.1 * ACCEPTANCE, False: ACCEPTANCE}
    hits, trials = np.full(GAMMA, 0.5), np.full(GAMMA, 10.0)  # both forget by the step
    before, depths, extra, normal = 0, [], 0.0, 0.0
    for step in range(5000):
        age += 1
        hits, trials = np.maximum(hits * 0.99, 0.1), np.maximum(trials * 0.99, 1.0)
        alive = 64
        for j in range(before):  # verifies what the step before drafted
            if alive:
                age[j], accepted = 0, random.binomial(alive, truth[step < 1000][j])
                hits[j], trials[j] = hits[j] + accepted, trials[j] + alive
                alive = accepted
        before = chosen.choose(
            requests=64, waiting=0, survival=np.cumprod(hits / trials), context_tokens=64 * CONTEXT,
            free_kv_fraction=0.9, cost=MODEL, age=age,
        )  # fmt: skip
        depths.append(chosen.depth)
        if step < 1000:
            normal += predicted(MODEL, shape(64, chosen.depth))
            extra += predicted(MODEL, shape(64, before)) - predicted(MODEL, shape(64, chosen.depth))
    assert set(depths[:1000]) == {0}
    assert 0 < extra < 0.01 * normal
    assert set(depths[4000:]) == {3}
    assert chosen.switches <= 4


def test_intervals_double_up_to_the_longest() -> None:
    """Each probe that changes nothing halves the rate of the next; it never dries up."""
    settings = ProbeSettings(share=0.9, interval=10, longest=80)
    chosen = policy(probes=settings)
    gaps = np.diff(probes(run(chosen, 1000, 64, age=NEVER_SEEN)))
    assert gaps[:4].tolist() == [11, 21, 41, 81]
    assert set(gaps[3:]) == {81}
    assert chosen.probes.interval == 80


def test_what_counts_as_stale_grows_with_the_interval() -> None:
    """Seen 15 steps ago, with an interval of 10 that becomes 20: one probe. Catches staleness that
    goes by the shortest interval for good."""
    chosen = policy(probes=ProbeSettings(share=0.9, interval=10, longest=40))
    taken = run(chosen, 300, 64, np.zeros(GAMMA), age=np.full(GAMMA, 15.0))
    assert len(probes(taken)) == 1


@pytest.mark.parametrize("requests", [32, 128])
def test_another_load_starts_over(requests: int) -> None:
    """From 64 to half or twice as many: what was learned of the text may be of another load."""
    settings = ProbeSettings(share=0.9, interval=10, longest=640)
    chosen = policy(probes=settings)
    run(chosen, 700, 64, age=NEVER_SEEN)
    assert chosen.probes.interval == 640
    run(chosen, 1, 90, age=NEVER_SEEN)
    assert chosen.probes.interval == 640  # not by so little
    assert probes(run(chosen, 12, requests, age=NEVER_SEEN))


def test_another_load_makes_stale_what_was_not_seen_since() -> None:
    """It may be other text, too. A look comes soon, not after an interval."""
    chosen = policy(probes=ProbeSettings(share=0.9, interval=1000, longest=1000, settle=10))
    seen = np.full(GAMMA, 70.0)  # steps ago
    assert probes(run(chosen, 70, 256, age=seen)) == [9]  # the first load is one, too
    assert probes(run(chosen, 300, 256, age=seen)) == []
    assert probes(run(chosen, 300, 64, age=seen)) == [9]


def test_only_what_is_stale_and_promising_is_probed() -> None:
    """At 256 requests with one draft that pays. Position 2 unseen could pay: probed. Seen, it
    cannot, and 3 would have to survive like it, which does not pay either: nothing is."""
    settings = ProbeSettings(share=0.9, interval=10, longest=10)

    def probed(survival: Any, age: Any) -> set[int]:
        taken = run(policy(probes=settings), 60, 256, survival, age=age)
        assert {depth for depth, _ in taken} == {1}
        return {drafted for _, drafted in taken} - {1}

    high = np.array([0.8, *SURVIVAL[1:]])
    assert probed(high, np.array([0, *[np.inf] * 6])) == {2}
    assert probed(high, np.array([0, 0, *[np.inf] * 5])) == set()
    assert probed(high, np.zeros(GAMMA)) == set()


def test_what_is_known_to_pay_is_no_probe() -> None:
    """Depth 3 and 5 are known to be better than 1, and patience has not run out: a probe would
    find nothing new."""
    settings = ProbeSettings(share=0.9, interval=5, longest=5)
    slow = Hysteresis(patience=1000, urgent=100.0, regret=1000.0)
    chosen = policy(probes=settings, hysteresis=slow)
    run(chosen, 1, 256, SURVIVAL)
    taken = run(chosen, 50, 16, SURVIVAL, age=np.zeros(GAMMA))
    assert set(taken) == {(1, 1)}
    assert probes(run(chosen, 50, 16, SURVIVAL, age=NEVER_SEEN))


def test_no_probe_without_room_above() -> None:
    """Full depth has nothing to see; short K/V memory forbids to look."""
    settings = ProbeSettings(share=0.9, interval=1, longest=1)
    assert not probes(run(policy(probes=settings), 50, 1, SURVIVAL))
    short = policy(probes=settings)
    assert not probes(run(short, 50, 64, age=NEVER_SEEN, free_kv_fraction=0.02))
    some = policy(probes=settings)
    limited = run(some, 50, 64, np.zeros(GAMMA), age=NEVER_SEEN, free_kv_fraction=0.06)
    assert 0 < max(drafted for _, drafted in limited) <= 3


@pytest.mark.parametrize(("requests", "steps"), [(1, 8), (8, 4), (16, 2), (64, 1)])
def test_a_probe_lasts_until_enough_was_seen(requests: int, steps: int) -> None:
    """32 blocks, or 8 steps."""
    settings = ProbeSettings(share=0.9, interval=20, longest=20)
    chosen = policy(probes=settings)
    taken = run(chosen, 100, requests, np.zeros(GAMMA), age=NEVER_SEEN)
    lasts = [drafted > depth for depth, drafted in taken]
    start = lasts.index(True)
    assert all(lasts[start : start + steps])
    assert not lasts[start + steps]


def test_without_ages_what_was_drafted_counts_as_seen() -> None:
    """Then a position goes stale by itself, and a probe makes it fresh."""
    settings = ProbeSettings(share=0.9, interval=50, longest=50)
    chosen = policy(probes=settings)
    starts = probes(run(chosen, 400, 64, np.zeros(GAMMA)))
    assert 4 <= len(starts) <= 9
    assert min(np.diff(starts)) > 50
