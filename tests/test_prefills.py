"""Prompts wait for each other as long as that pays, and no longer than they may."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dspark.scheduler.prefills import CHANCE, UNSEEN, PrefillGroups

DECODE_MS, EXTRA_MS, TOKEN_MS = 10.0, 6.0, 0.01


@dataclass
class Served:
    """A server with a place for every request, each of which takes as many steps.

    Args:
        extra_ms, token_ms: of a step that prefills, and of each token of its prompts.
        late: what a prefill takes beyond shows in the next step, as from a device that runs behind
            the host.
    """

    groups: PrefillGroups
    requests: int
    steps: int = 64
    extra_ms: float = EXTRA_MS
    token_ms: float = TOKEN_MS
    late: bool = False
    seed: int = 0
    now: float = 0.0
    prefills: int = 0
    waited_ms: list[float] = field(default_factory=list)

    def run(self, steps: int) -> float:
        """Tokens per ms of a closed loop."""
        random = np.random.default_rng(self.seed)
        ends = list(random.integers(1, self.steps, self.requests))
        waiting: list[float] = []  # since when
        tokens, began, behind = 0, self.now, 0.0
        for step in range(steps):
            ended = sum(end <= step for end in ends)
            ends = [end for end in ends if end > step]
            waiting += [self.now] * ended
            holds = self.groups.holds(self.now, len(ends), len(waiting))
            arrived = 0 if holds else len(waiting)
            prompts = int(random.integers(20, 200, arrived).sum())
            if arrived:
                self.waited_ms += [self.now - since for since in waiting]
                ends += [
                    int(e)
                    for e in step + random.integers(self.steps // 2, self.steps * 3 // 2, arrived)
                ]
                waiting = []
                self.prefills += 1
            self.groups.scheduled(arrived, prompts)
            extra = (self.extra_ms if arrived else 0.0) + self.token_ms * prompts
            now, behind = (behind, extra) if self.late else (extra, 0.0)
            self.now += (DECODE_MS + now) * float(np.exp(0.02 * random.standard_normal()))
            tokens += len(ends)
        return tokens / (self.now - began)


@pytest.mark.parametrize("late", [False, True])
def test_times_are_learned(late: bool) -> None:
    """Of a decode step, of a prefill beyond that, and none of it from the tokens of prompts."""
    groups = PrefillGroups(40.0)
    Served(groups, 128, late=late).run(2000)
    assert groups.decode_ms == pytest.approx(DECODE_MS, rel=0.05)
    assert groups.extra_ms == pytest.approx(EXTRA_MS, rel=0.25)


@pytest.mark.parametrize(("requests", "gain"), [(16, 1.0), (64, 1.12), (256, 1.2)])
def test_more_tokens_per_second(requests: int, gain: float) -> None:
    """Than with no prompt held back, the more the more often one comes."""
    alone, grouped = PrefillGroups(0.0), PrefillGroups(40.0)
    least = Served(alone, requests).run(4000)
    assert Served(grouped, requests).run(4000) > gain * least
    assert alone.held == 0 < grouped.held


@pytest.mark.parametrize("requests", [1, 4, 64, 256])
def test_nothing_waits_where_nothing_is_saved(requests: int) -> None:
    """Prefills that take what their tokens take; and a load at which hardly two meet."""
    groups = PrefillGroups(40.0)
    server = Served(groups, requests, extra_ms=EXTRA_MS if requests <= 4 else 0.0)
    server.run(4000)
    waited = sum(ms > 0 for ms in server.waited_ms)
    assert waited < 0.05 * len(server.waited_ms)


def test_long_prompts_are_not_mistaken_for_slow_steps() -> None:
    """Each takes 30 ms, which sharing a step does not save."""
    groups = PrefillGroups(40.0)
    server = Served(groups, 64, extra_ms=0.0, token_ms=0.3)
    server.run(4000)
    assert sum(ms > 0 for ms in server.waited_ms) < 0.05 * len(server.waited_ms)


@given(
    longest=st.floats(0.0, 200.0),
    steps=st.lists(st.tuples(st.floats(0.1, 300.0), st.integers(0, 9)), max_size=200),
    running=st.integers(1, 300),
)
@settings(max_examples=300, deadline=None)
def test_no_prompt_waits_longer_than_it_may(
    longest: float, steps: list[tuple[float, int]], running: int
) -> None:
    """Whatever steps take: the one that it is held back in may take longer than was known."""
    groups = PrefillGroups(longest)
    now, waiting, since = 0.0, 0, math.inf
    for ms, arrive in steps:
        waiting += arrive
        if groups.holds(now, running, waiting):
            assert longest > 0
            since = min(since, now)
            assert now - since <= longest
            groups.scheduled(0, 0)
        else:
            groups.scheduled(waiting, 50 * waiting)
            waiting, since = 0, math.inf
        now += ms


@given(a=st.floats(0.0, 5.0), rate=st.floats(0.01, 8.0), running=st.integers(1, 512))
@settings(max_examples=300, deadline=None)
def test_group_costs_least(a: float, rate: float, running: int) -> None:
    """Against all groups up to 2048: what a prompt adds to the times of all requests."""
    groups = PrefillGroups(40.0)
    groups._decode_ms, groups._rate = DECODE_MS, rate
    groups._sums = (1e9, 0.0, 1e9 * a * DECODE_MS, 0.0, 0.0)
    extra = max(groups.extra_ms - CHANCE * DECODE_MS, 0.0)
    sizes = np.arange(1, 2049)
    costs = extra * running / sizes + (sizes - 1) * DECODE_MS / (2 * rate)
    chosen = groups.group(running)
    assert costs[chosen - 1] <= costs.min() * (1 + 1e-9) + 1e-9


def test_decode_steps_are_made_where_none_are_seen() -> None:
    """A server that has a prompt in every step from the start holds them back once to learn."""
    groups, now, held = PrefillGroups(40.0), 0.0, []
    for step in range(2 * UNSEEN):
        if groups.holds(now, 64, 2):
            held.append(step)
            groups.scheduled(0, 0)
        else:
            groups.scheduled(2, 100)
        now += 12.0
    assert held[0] == UNSEEN - 1
    assert groups.decode_ms == 12.0


def test_times_that_do_not_allow_it_are_tried_once_in_a_while() -> None:
    """Steps so long that two of them are beyond the limit never tell D: no reason to go on."""
    groups, now, held = PrefillGroups(40.0), 0.0, 0
    for _ in range(10 * UNSEEN):
        holds = groups.holds(now, 64, 2)
        held += holds
        groups.scheduled(0 if holds else 2, 0 if holds else 100)
        now += 30.0
    assert math.isnan(groups.decode_ms)
    assert 5 <= held <= 10


def test_a_pause_teaches_nothing() -> None:
    """An engine that had nothing to do, or stood still."""
    groups = PrefillGroups(40.0)
    server = Served(groups, 64)
    server.run(1000)
    known = groups.decode_ms, groups.extra_ms
    groups.holds(server.now + 5000.0, 64, 0)
    groups.scheduled(0, 0)
    groups.holds(server.now + 6000.0, 0, 0)
    groups.scheduled(3, 300)
    groups.holds(server.now + 6500.0, 3, 0)
    assert (groups.decode_ms, groups.extra_ms) == known


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf, "40"])
def test_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="longest_ms"):
        PrefillGroups(wrong)  # type: ignore[arg-type]
