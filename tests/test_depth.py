"""The depth policy on a synthetic 8B server, against a search over all depths.

When it changes its mind is in test_hysteresis.py, probes are in test_probing.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import step_cases
from tests.depth_cases import choose, policy, rates
from tests.step_cases import DEPTHS, GAMMA, SURVIVAL, best_ms, shape
from vllm_dspark.scheduler.cost_model import CostModel
from vllm_dspark.scheduler.depth import DepthPolicy, Goal, Hysteresis, ProbeSettings


def test_depth_falls_with_load() -> None:
    """Full blocks for one request, one draft at most for 256, never deeper with more requests;
    and each is the best of all by the truth that the model was fitted to."""
    chosen = [choose(policy(), requests) for requests in (1, 4, 16, 32, 64, 128, 256, 512)]
    assert chosen[0] in (5, 7)
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[6] <= 1
    assert len(set(chosen)) >= 4
    for requests, depth in zip((1, 4, 16, 32, 64, 128, 256), chosen, strict=False):
        truth = {
            d: (1 + SURVIVAL[:d].sum()) / step_cases.step_ms(shape(requests, d)) for d in DEPTHS
        }
        assert truth[depth] >= 0.99 * max(truth.values())


def test_poor_drafts_are_not_made() -> None:
    """Nothing survives: depth 0 at every load, also where drafting costs next to nothing."""
    for requests in (1, 16, 256):
        assert choose(policy(), requests, np.zeros(GAMMA)) == 0


survivals = st.lists(st.floats(0, 1), min_size=GAMMA, max_size=GAMMA).map(
    lambda conditional: np.cumprod(conditional)
)
situations = st.tuples(st.integers(1, 600), survivals, st.floats(0, 1))


@settings(max_examples=60, deadline=None)
@given(st.lists(situations, min_size=1, max_size=40), st.sampled_from(["throughput", "floor"]))
def test_never_worse_than_no_drafts(steps: list[Any], kind: Any) -> None:
    """Whatever the load, survival and memory were before: a choice kept by hysteresis or left
    from another load must beat depth 0 by the model in every single step."""
    chosen = policy(Goal(kind, 100.0 if kind == "floor" else None))
    for requests, survival, free in steps:
        depth = choose(chosen, requests, survival, free_kv_fraction=free)
        by_depth = rates(requests, survival)
        assert depth in DEPTHS
        assert by_depth[depth] >= by_depth[0] * (1 - 1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), survivals, st.floats(1, 500))
def test_first_choice_is_the_best(requests: int, survival: np.ndarray, floor: float) -> None:
    """For both goals, against one depth after the other: the most tokens among those that keep
    the floor, the fastest for a user if none does."""
    for goal in (Goal(), Goal("floor", floor)):
        by_depth = rates(requests, survival)
        speeds = {d: 1000 * rate / requests for d, rate in by_depth.items()}
        kept = {d for d in DEPTHS if speeds[d] >= floor} if goal.kind == "floor" else set(DEPTHS)
        expected = max(by_depth[d] for d in kept) if kept else max(speeds.values()) * requests / 1e3
        assert by_depth[choose(policy(goal), requests, survival)] == pytest.approx(expected)


def test_latency_is_always_the_full_block() -> None:
    chosen = policy(Goal("latency"))
    for requests, survival, free in ((1, SURVIVAL, 0.9), (512, np.zeros(GAMMA), 0.0)):
        assert choose(chosen, requests, survival, free_kv_fraction=free) == GAMMA
    assert not chosen.probing


def test_a_missed_floor_is_urgent() -> None:
    """One draft, from a time of high load. At 16 requests it gives each 250 tok/s, and more are
    to be had: a floor of 300 moves at once, where throughput alone has patience."""
    slow = Hysteresis(patience=5, urgent=100.0)
    for goal, expected in ((Goal(), 1), (Goal("floor", 300.0), 5), (Goal("floor", 200.0), 1)):
        chosen = policy(goal, hysteresis=slow)
        assert choose(chosen, 256) == 1
        assert choose(chosen, 16) == expected
        for _ in range(5):
            settled = choose(chosen, 16)
        assert settled == 5


def test_a_floor_is_kept_with_those_that_wait() -> None:
    """One draft gives each of 4 requests 266 tok/s, and each of the 16 that run in the next step
    251. Catches a speed that is shared out among the running ones alone."""
    slow = Hysteresis(patience=5, urgent=100.0)
    for waiting, expected in ((0, 1), (12, 5)):
        chosen = policy(Goal("floor", 258.0), hysteresis=slow)
        assert choose(chosen, 256) == 1
        assert choose(chosen, 4, waiting=waiting) == expected


def test_waiting_requests_count_as_running() -> None:
    """16 run, 240 wait. They are let in, and the depth is that of 256; unless only 16 may run,
    or memory holds no more, where 16 stay 16."""
    assert choose(policy(), 16) == 5
    assert choose(policy(), 16, waiting=240) == choose(policy(), 256) == 1
    assert choose(policy(max_requests=16), 16, waiting=240) == 5
    assert choose(policy(max_requests=64), 16, waiting=240) == choose(policy(), 64) == 3
    # 80 % of memory for 16: two more fit before memory is short.
    assert choose(policy(), 16, waiting=240, free_kv_fraction=0.2) == 5
    assert choose(policy(), 16, waiting=240, free_kv_fraction=1.0) == 1
    assert choose(policy(max_requests=8), 16, waiting=1) == 5  # more run than may


def test_depth_shrinks_before_memory_runs_out() -> None:
    """From γ to 0 between the two fractions, at once, and never up as memory falls."""
    chosen = policy(kv_low=0.10, kv_stop=0.02)
    depths = [
        choose(chosen, 1, free_kv_fraction=free) for free in (0.5, 0.1, 0.09, 0.06, 0.03, 0.02, 0.0)
    ]
    assert depths == [7, 7, 5, 3, 0, 0, 0]
    assert [choose(chosen, 1, free_kv_fraction=0.5) for _ in range(100)][-1] == 7


def test_the_same_calls_give_the_same_depths() -> None:
    """No clock and no dice: two policies agree call by call, probes included."""
    random = np.random.default_rng(0)
    pair = [policy(probes=ProbeSettings(share=0.3, interval=5, longest=40)) for _ in range(2)]
    probed = 0
    for _ in range(600):
        requests, survival = int(random.integers(1, 300)), np.cumprod(random.random(GAMMA))
        one, other = (choose(p, requests, survival) for p in pair)
        assert one == other
        probed += pair[0].probing
    assert probed


def test_nothing_runs_nothing_changes() -> None:
    chosen = policy()
    assert choose(chosen, 0, context_tokens=0) == 0
    assert choose(chosen, 1) == 7
    assert choose(chosen, 0, context_tokens=0, survival=np.zeros(GAMMA)) == 7
    assert chosen.switches == 0


def test_a_survival_that_rises_is_cut_off() -> None:
    """Positions are averaged over different steps: a deeper one may look better by chance."""
    rising = SURVIVAL.copy()
    rising[3:] = 0.9
    flat = np.minimum.accumulate(rising)
    best = max(DEPTHS, key=rates(64, flat).__getitem__)
    assert best != max(DEPTHS, key=rates(64, rising).__getitem__)
    assert choose(policy(), 64, rising) == best


@pytest.mark.parametrize("gamma", [1, 2, 5, 7])
def test_any_block_length(gamma: int) -> None:
    cost = CostModel.default(gamma)
    chosen = DepthPolicy(gamma, range(gamma + 1))
    depth = chosen.choose(
        requests=1, waiting=0, survival=[0.99**j for j in range(1, gamma + 1)], context_tokens=0,
        free_kv_fraction=1.0, cost=cost,
    )  # fmt: skip
    assert depth == gamma


def test_choose_is_quick() -> None:
    """The best of 200 calls, with slack for a slow machine."""
    chosen = DepthPolicy(GAMMA, DEPTHS)
    assert best_ms(lambda: choose(chosen, 256)) < 0.3


BAD: dict[str, list[Any]] = {
    "requests": [-1, 1.5, True, None], "waiting": [-1, 1.5], "context_tokens": [-1, 0.5],
    "survival": [[0.5], [1.5] * GAMMA, [math.nan] * GAMMA, 0.5, []],
    "free_kv_fraction": [-0.1, 1.1, math.nan, "1"],
    "age": [[1.0], [-1.0] * GAMMA, [math.nan] * GAMMA],
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    for value in BAD[name]:
        with pytest.raises(ValueError, match=f"^{name} "):
            choose(policy(), **({"requests": 4} | {name: value}))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("gamma", lambda: DepthPolicy(0, [0])),
        ("depths", lambda: DepthPolicy(7, [])),
        ("depths", lambda: DepthPolicy(7, [1, 7])),  # no way to stop drafting
        ("depths", lambda: DepthPolicy(7, [0, 8])),
        ("max_requests", lambda: DepthPolicy(7, [0], max_requests=0)),
        ("kv_stop", lambda: DepthPolicy(7, [0], kv_low=0.1, kv_stop=0.1)),
        ("kind", lambda: Goal("speed")),  # type: ignore[arg-type]  # what a typo would be
        ("tokens_per_second_per_user", lambda: Goal("floor")),
        ("tokens_per_second_per_user", lambda: Goal("throughput", 50.0)),
        ("tokens_per_second_per_user", lambda: Goal("floor", 0.0)),
        ("margin", lambda: Hysteresis(margin=-1)),
        ("patience", lambda: Hysteresis(patience=0)),
        ("regret", lambda: Hysteresis(regret=-1)),
        ("dwell", lambda: Hysteresis(dwell=-1)),
        ("share", lambda: ProbeSettings(share=1.0)),
        ("interval", lambda: ProbeSettings(interval=0)),
        ("longest", lambda: ProbeSettings(interval=10, longest=9)),
    ],
)
def test_bad_settings_are_named(name: str, make: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} "):
        make()
