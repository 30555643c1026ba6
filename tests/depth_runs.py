"""Running vLLM's engine in this process at depths that a test chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

# For engines of which a test chooses the depths, or that are to choose them as they serve.
AUTO: dict[str, Any] = {"additional_config": {"dspark": {"depth": "auto"}}}


class ChosenDepths:
    """In the place of a DepthPolicy: a function of the number of the step, counted from 0.

    Attributes:
        chosen: what was answered, a depth a step.
        asked: what `choose` was given, a dict a step.
    """

    switches = 0
    probing = False

    def __init__(self, depth_of: Callable[[int], int]) -> None:
        self._depth_of = depth_of
        self.chosen: list[int] = []
        self.asked: list[dict[str, Any]] = []

    def choose(self, **asked: Any) -> int:
        self.asked.append(asked)
        self.chosen.append(self._depth_of(len(self.chosen)))
        return self.chosen[-1]


def random_depths(gamma: int, seed: int) -> ChosenDepths:
    """Another depth nearly every step; none and γ half of the time, for a step or for several."""
    random = np.random.default_rng(seed)
    depths: list[int] = []

    def depth_of(step: int) -> int:
        while len(depths) <= step:
            depth = int(random.choice([0, gamma, *random.integers(gamma + 1, size=2)]))
            depths.extend([depth] * int(random.choice([1, 1, 1, 3])))
        return depths[step]

    return ChosenDepths(depth_of)


def choose_by(llm: Any, policy: ChosenDepths) -> None:
    """From now on the engine drafts what `policy` says. The engine must have run before: until its
    workers reported, it drafts γ."""
    scheduler = scheduler_of(llm)
    assert scheduler.controller.policy is not None, "the workers have not reported yet"
    scheduler.controller.policy = policy


def scheduler_of(llm: Any) -> Any:
    """The scheduler of an engine that runs in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def worker_of(llm: Any) -> Any:
    """Its worker, if it has one."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


@contextmanager
def asynchronous_on_cpu() -> Iterator[None]:
    """While active, engines that start here schedule a step ahead, as they do on a GPU. vLLM turns
    that off for CPUs."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        original(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", classmethod(check_and_update_config))
        yield


@contextmanager
def scheduled(llm: Any) -> Iterator[list[Any]]:
    """Collects what the scheduler puts out, with our note of `num_lookahead_tokens` on each."""
    scheduler = scheduler_of(llm)
    outputs: list[Any] = []
    original = scheduler.schedule

    def schedule(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if output.num_scheduled_tokens:
            output.noted_lookahead = scheduler.num_lookahead_tokens
            outputs.append(output)
        return output

    scheduler.schedule = schedule
    try:
        yield outputs
    finally:
        del scheduler.schedule


@contextmanager
def proposals(llm: Any) -> Iterator[list[tuple[str, int, list[int]]]]:
    """Collects drafts: request, position of the anchor, the tokens drafted after it."""
    runner = worker_of(llm).model_runner
    seen: list[tuple[str, int, list[int]]] = []
    original = runner.speculator.propose

    def propose(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        drafts = original(input_batch, *args, **kwargs)
        depth = kwargs["num_speculative_tokens"]
        computed = runner.req_states.num_computed_tokens.gpu
        for row, request in enumerate(input_batch.req_ids):
            anchor = int(computed[input_batch.idx_mapping[row]])
            seen.append((request, anchor, drafts[row, :depth].tolist()))
        return drafts

    runner.speculator.propose = propose
    try:
        yield seen
    finally:
        del runner.speculator.propose


def by_anchor(seen: Sequence[tuple[str, int, list[int]]]) -> dict[int, list[int]]:
    """Drafts of one request, of steps that drafted."""
    return {anchor: drafts for _, anchor, drafts in seen if drafts}
