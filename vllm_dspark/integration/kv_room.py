"""Speculation gives way before a request is preempted for want of K/V blocks.

A step takes blocks for the tokens that it runs, drafts to verify included, and for the block that
the drafter writes beyond them. vLLM preempts a request as soon as one cannot have its blocks.
Here the same sum is done before: first the block to be drafted shrinks, then drafts that wait to be
verified are dropped, the last request's first. vLLM preempts only where even that is not enough.

Dropping is lossless. It goes by block counts, which know nothing of a drafted token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from vllm.utils.math_utils import cdiv


class _Need(NamedTuple):
    """Of a running request that the step serves."""

    request: Any
    tokens: int  # that it gets
    blocks: int  # beyond those that it holds


class KvRoom:
    """Counts blocks.

    Args:
        scheduler: vLLM's.
        lookahead: slots per request that a block of some depth is written to.
    """

    def __init__(self, scheduler: Any, lookahead: Callable[[int], int]) -> None:
        self._scheduler = scheduler
        self._lookahead = lookahead
        self._pool = scheduler.kv_cache_manager.block_pool
        self._groups = scheduler.kv_cache_manager.coordinator.single_type_managers
        self._asked, self._most = (0, 0), 0  # running requests and depth, and blocks that they take

    def fitting_depth(self, depths: Sequence[int]) -> int:
        """The deepest depth that no running request has to be preempted for.

        Args:
            depths: to choose from, descending.

        Returns:
            One of them; the last if none fits. Drafts to verify may have been dropped then.
        """
        if self._plenty(depths[0]):
            return depths[0]
        for depth in depths:
            if self._missing(depth) <= 0:
                return depth
        while self._drop_drafts(depths[-1]):  # whoever got no tokens before may get some now
            pass
        return depths[-1]

    def _plenty(self, depth: int) -> bool:
        """Whether it is not worth counting."""
        running = len(self._scheduler.running)
        if self._asked != (running, depth):
            self._asked, self._most = (running, depth), self._blocks(running, depth)
        return self._most <= self._pool.get_num_free_blocks()

    def _blocks(self, running: int, depth: int) -> int:
        """Blocks that so many requests take at most in a step."""
        each = 1 + self._scheduler.num_spec_tokens + self._lookahead(depth)
        budget = self._scheduler.max_num_scheduled_tokens
        return sum(
            running * (1 + cdiv(each, group.block_size)) + cdiv(budget, group.block_size)
            for group in self._groups
        )

    def _drop_drafts(self, depth: int) -> bool:
        """Drop as few as it takes, and say whether any were."""
        needs = list(self._needs(depth))
        missing = sum(need.blocks for need in needs) - int(self._pool.get_num_free_blocks())
        dropped = False
        for need in reversed(needs):
            if missing <= 0:
                break
            if need.request.spec_token_ids:
                need.request.spec_token_ids = []  # a new one: placeholders are shared
                bare = min(max(_wanted(need.request), 0), need.tokens)
                missing -= need.blocks - self._beyond(need.request, bare + self._lookahead(depth))
                dropped = True
        return dropped

    def _missing(self, depth: int) -> int:
        """Blocks that running requests need beyond those that are free."""
        needed = sum(need.blocks for need in self._needs(depth))
        return needed - int(self._pool.get_num_free_blocks())

    def _needs(self, depth: int) -> Iterator[_Need]:
        """Of all that are served, in the order in which vLLM serves them."""
        scheduler = self._scheduler
        budget, lookahead = scheduler.max_num_scheduled_tokens, self._lookahead(depth)
        for request in scheduler.running:
            if budget <= 0:
                return
            room = scheduler.max_model_len - request.num_computed_tokens - 1
            tokens = min(_wanted(request), budget, room)
            if tokens <= 0:
                continue
            budget -= tokens
            yield _Need(request, tokens, self._beyond(request, tokens + lookahead))

    def _beyond(self, request: Any, more: int) -> int:
        """Blocks of a request for so many slots behind its computed tokens, without those that it
        holds."""
        slots = min(request.num_computed_tokens + more, self._scheduler.max_model_len)
        blocks = 0
        for group in self._groups:
            held = len(group.req_to_blocks.get(request.request_id, ()))
            blocks += max(cdiv(slots, group.block_size) - held, 0)
        return blocks


def _wanted(request: Any) -> int:
    """Tokens that are not computed yet, drafts to verify among them."""
    known = request.num_tokens_with_spec + request.num_output_placeholders
    return int(known - request.num_computed_tokens)
