"""Greedy output is the target's own, token for token, however deep each step drafts.

The shipped pair on the real engine. Depth changes at random from step to step, to 0 and from it,
and so does the number of verified drafts of every request. Steps are scheduled one ahead, the K/V
cache is small so that requests are preempted, and what other features ask for is in the same
batches.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from tests import test_equivalence_adaptive as adaptive
from tests import test_equivalence_features as features
from tests.depth_runs import (
    AUTO,
    asynchronous_on_cpu,
    choose_by,
    random_depths,
    scheduled,
    scheduler_of,
)
from tests.engine import MICRO, Request, counters, engine, run, tokens
from tests.test_equivalence_heads import batch
from tests.verification_cases import RandomLengths, manager_of

pytestmark = pytest.mark.engine

GAMMA = 7
NAMES = ("chunked_prefill", "shared_prefix", "json_schema", "aborts", "stop_string", "penalties")
PLAIN = Request("def f(self", {"max_tokens": 24, "ignore_eos": True})


class Outcome:
    """What one engine did."""

    def __init__(self, llm: Any, plain: list[list[int]]) -> None:
        eos = llm.get_tokenizer().eos_token_id
        scenarios = features.scenarios(plain, eos)
        groups = {"batch": batch(8)} | {name: scenarios[name] for name in NAMES}
        before = counters(llm)["vllm:num_preemptions"]
        self.outputs = adaptive.run_together(llm, groups)
        self.preemptions = counters(llm)["vllm:num_preemptions"] - before


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    """Of the target alone; of ours, with what was scheduled and the state at each preemption."""
    with engine(MICRO, **adaptive.OPTIONS) as llm:
        plain = tokens(run(llm, [PLAIN]))
        made: dict[str, Any] = {"target": Outcome(llm, plain)}
    drafter = f"dspark:{MICRO / 'dspark-vanilla'}"
    with (
        asynchronous_on_cpu(),
        engine(MICRO, drafter, num_gpu_blocks_override=10, **adaptive.OPTIONS | AUTO) as llm,
    ):
        run(llm, [PLAIN])
        choose_by(llm, random_depths(GAMMA, seed=5))
        manager_of(llm).policy = RandomLengths(8, GAMMA, seed=2)
        made["at preemptions"] = watch_preemptions(scheduler_of(llm))
        with scheduled(llm) as made["steps"]:
            made["ours"] = Outcome(llm, plain)
        made["verified"] = manager_of(llm).snapshot()["verified"]
    return made


def watch_preemptions(scheduler: Any) -> list[tuple[int, int]]:
    """Look-ahead slots and drafts that wait to be verified, at every preemption from now on."""
    states: list[tuple[int, int]] = []
    original = scheduler._preempt_request

    def preempt(request: Any, *args: Any, **kwargs: Any) -> None:
        drafts = sum(len(each.spec_token_ids) for each in [request, *scheduler.running])
        states.append((scheduler.num_lookahead_tokens, drafts))
        original(request, *args, **kwargs)

    scheduler._preempt_request = preempt
    return states


@pytest.mark.parametrize("name", ["batch", *NAMES])
def test_equals_target(outcomes: dict[str, Any], name: str) -> None:
    """Tokens, text and reason to finish are the target's own."""
    target, ours = outcomes["target"].outputs[name], outcomes["ours"].outputs[name]
    features.check_equal(name, target, ours)


def test_every_kind_of_step_occurred(outcomes: dict[str, Any]) -> None:
    """All depths, none after some and some after none, and drafts were accepted and verified."""
    depths = [output.num_spec_tokens_to_schedule for output in outcomes["steps"]]
    assert set(depths) == set(range(GAMMA + 1))
    changes = set(pairwise(depths))
    assert any(before == 0 < after for before, after in changes)
    assert any(before > 0 == after for before, after in changes)
    assert outcomes["verified"] > 0


def test_speculation_gives_way_to_requests(outcomes: dict[str, Any]) -> None:
    """A request was preempted only where there was nothing left to save: neither slots for a block
    to be drafted nor drafts to be verified."""
    assert outcomes["ours"].preemptions == len(outcomes["at preemptions"]) > 0
    assert set(outcomes["at preemptions"]) == {(0, 0)}
