"""Counting K/V blocks before vLLM does: what shrinks first, and when nothing has to."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dspark.integration.kv_room import KvRoom

BLOCK = 16
GAMMA = 7
DEPTHS = [7, 5, 3, 2, 1, 0]


@dataclass
class Running:
    """A request that decodes: all its tokens but the last are computed."""

    request_id: str
    tokens: int
    drafts: int = GAMMA
    num_output_placeholders: int = 0
    spec_token_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_computed_tokens = self.tokens - 1
        self.spec_token_ids = [-1] * self.drafts

    @property
    def num_tokens_with_spec(self) -> int:
        return self.tokens + len(self.spec_token_ids)


def room(running: list[Running], free: int, held: int, groups: int = 1, **changes: Any) -> KvRoom:
    """A scheduler with some free blocks, whose requests hold `held` blocks of each group."""
    blocks = {request.request_id: [None] * held for request in running}
    manager = SimpleNamespace(block_size=BLOCK, req_to_blocks=blocks)
    scheduler = SimpleNamespace(
        running=running,
        num_spec_tokens=GAMMA,
        max_num_scheduled_tokens=256,
        max_model_len=4096,
        kv_cache_manager=SimpleNamespace(
            block_pool=SimpleNamespace(get_num_free_blocks=lambda: free),
            coordinator=SimpleNamespace(single_type_managers=[manager] * groups),
        ),
    )
    vars(scheduler).update(changes)
    return KvRoom(scheduler, lambda depth: depth)


def kept(running: list[Running]) -> list[int]:
    return [len(request.spec_token_ids) for request in running]


def test_plenty_is_not_counted() -> None:
    """No request is looked at: catches a count over all requests in every step."""
    running = [Running(str(i), 40) for i in range(4)]
    counted = room(running, free=10_000, held=0)
    counted._missing = None  # type: ignore[assignment]  # calling it would fail
    assert counted.fitting_depth(DEPTHS) == GAMMA


def test_plenty_is_seen_anew_when_requests_come() -> None:
    """What a step takes at most is worked out once, and again for more requests or another
    depth."""
    running = [Running("0", 40)]
    counted = room(running, free=28, held=0)
    assert [counted._plenty(20), counted._plenty(20)] == [True, True]
    running.extend(Running(str(i), 40) for i in range(1, 5))
    assert [counted._plenty(depth) for depth in (20, 0, 20)] == [False, True, False]


@pytest.mark.parametrize(
    ("tokens", "depth"),
    # the request holds 32 slots; its step ends at `tokens` + 7, and the block lies beyond
    [(18, 7), (20, 5), (21, 3), (22, 3), (23, 2), (24, 1), (25, 0)],
)
def test_block_to_be_drafted_shrinks_first(tokens: int, depth: int) -> None:
    """To what fits into the blocks that the request holds, drafts to verify untouched."""
    running = [Running("a", tokens)]
    assert room(running, free=0, held=2).fitting_depth(DEPTHS) == depth
    assert kept(running) == [GAMMA]


def test_free_block_is_enough_for_one_of_two() -> None:
    """Needs are summed over requests: each of them alone would fit."""
    running = [Running("a", 24), Running("b", 24)]
    assert room(running, free=2, held=2).fitting_depth(DEPTHS) == GAMMA
    assert room(running, free=1, held=2).fitting_depth(DEPTHS) == 1


def test_needs_are_summed_over_groups() -> None:
    running = [Running("a", 24)]
    assert room(running, free=1, held=2, groups=2).fitting_depth(DEPTHS) == 1
    assert room(running, free=2, held=2, groups=2).fitting_depth(DEPTHS) == GAMMA


def test_drafts_to_verify_are_dropped_next() -> None:
    """The last request's first, and no more of them than it takes."""
    running = [Running("a", 30), Running("b", 30), Running("c", 30)]
    assert room(running, free=1, held=2).fitting_depth(DEPTHS) == 0
    assert kept(running) == [GAMMA, 0, 0]


def test_dropping_takes_one_pass() -> None:
    """Nobody is looked at again for each request whose drafts go: catches a time that grows with
    their square."""
    running = [Running(str(i), 30) for i in range(200)]
    full = room(running, free=0, held=2, max_num_scheduled_tokens=8192)
    looked: list[int] = []
    needs = full._needs
    full._needs = lambda depth: looked.append(depth) or needs(depth)  # type: ignore[method-assign,func-returns-value]  # counts calls
    assert full.fitting_depth(DEPTHS) == 0
    assert kept(running) == [0] * 200
    assert len(looked) <= len(DEPTHS) + 2


def test_who_gets_tokens_by_what_was_dropped_is_counted() -> None:
    """The budget serves two of three requests with drafts, and all three without."""
    running = [Running(name, 30) for name in "abc"]
    limited = room(running, free=0, held=2, max_num_scheduled_tokens=16)
    assert limited.fitting_depth(DEPTHS) == 0
    assert kept(running) == [0, 0, 0]


def test_shared_placeholders_are_not_changed() -> None:
    """vLLM gives all requests one list."""
    running = [Running("a", 30), Running("b", 30)]
    shared = [-1] * GAMMA
    for request in running:
        request.spec_token_ids = shared
    assert room(running, free=1, held=2).fitting_depth(DEPTHS) == 0
    assert len(shared) == GAMMA
    assert kept(running) == [GAMMA, 0]


def test_where_nothing_helps_vllm_preempts() -> None:
    """All drafts are dropped, and the deepest depth is none."""
    running = [Running("a", 33), Running("b", 33)]
    assert room(running, free=1, held=2).fitting_depth(DEPTHS) == 0
    assert kept(running) == [0, 0]


def test_end_of_the_context_window() -> None:
    """Slots beyond the longest context are never taken."""
    running = [Running("a", 30)]
    assert room(running, free=0, held=2, max_model_len=32).fitting_depth(DEPTHS) == GAMMA


def test_budget_ends_before_all_requests_run() -> None:
    """Requests that get no tokens in this step need no blocks."""
    running = [Running(name, 24) for name in "abc"]
    limited = room(running, free=1, held=2, max_num_scheduled_tokens=8)
    assert limited.fitting_depth(DEPTHS) == GAMMA


def test_prefill_takes_what_the_budget_leaves() -> None:
    """A prompt in the middle of its prefill is counted by the chunk, not as a whole."""
    prompt = Running("a", 1001, drafts=0)
    prompt.num_computed_tokens = 64
    limited = room([prompt], free=4, held=4, max_num_scheduled_tokens=57)
    assert limited.fitting_depth(DEPTHS) == GAMMA  # 64 + 57 + 7 slots are 8 blocks
    assert room([prompt], free=3, held=4, max_num_scheduled_tokens=57).fitting_depth(DEPTHS) == 0


def test_steps_in_flight_are_counted() -> None:
    """Tokens that were sampled and are not known yet have slots too."""
    running = [Running("a", 18)]
    running[0].num_computed_tokens = 25  # a step with 7 drafts is under way
    running[0].num_output_placeholders = 8
    assert room(running, free=0, held=2).fitting_depth(DEPTHS) == 0
    assert kept(running) == [0]


def test_who_has_nothing_to_compute_is_passed_over() -> None:
    """A request whose tokens are all computed takes no part in the step; the one behind it does.
    Catches a count that ends at the first such request, and one of a block for it."""
    done, other = Running("a", 32, drafts=0), Running("b", 24)
    done.num_computed_tokens = 32  # a slot more would take a block
    assert room([done, other], free=0, held=2).fitting_depth(DEPTHS) == 1
