"""Greedy output is the target's own, token for token, whatever number of drafts is verified.

The shipped pair on the real engine, host mode, under two policies: the adaptive one, at prices that
do not hang on this machine, and one that verifies a random prefix of every request in every step.
The KV cache is small, so that requests are preempted on the way.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests import test_equivalence_features as features
from tests.engine import MICRO, Request, counters, engine, run, tokens
from tests.test_equivalence_heads import batch
from tests.test_equivalence_preemption import REQUESTS as LONG
from tests.verification_cases import Prices, RandomLengths, manager_of

pytestmark = pytest.mark.engine

POLICIES = ("adaptive", "random")
OPTIONS: dict[str, Any] = {
    "max_num_batched_tokens": 128,
    "enable_prefix_caching": True,
    # a small model would fill an object with spaces where it may
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}


def traffic(llm: Any, plain: list[list[int]], policy: str) -> dict[str, list[Request]]:
    """What a policy has to do, by name. What the features ask for is tested with the adaptive
    policy elsewhere; here the random one meets them."""
    if policy == "adaptive":
        return {"batch": batch(8)}
    eos = llm.get_tokenizer().eos_token_id
    return {"batch": batch(8), "long": LONG} | features.scenarios(plain, eos)


def run_together(llm: Any, groups: dict[str, list[Request]]) -> dict[str, list[Any]]:
    """All groups at once, each arriving a step after the one before: whatever they are about, they
    share batches and compete."""
    requests = [
        replace(request, arrives=request.arrives + i)
        for i, group in enumerate(groups.values())
        for request in group
    ]
    outputs = iter(run(llm, requests))
    return {name: [next(outputs) for _ in group] for name, group in groups.items()}


class Outcome:
    """What one engine did: outputs by group, and what was verified meanwhile."""

    def __init__(self, llm: Any, plain: list[list[int]], policy: str) -> None:
        before = counters(llm)["vllm:num_preemptions"]
        manager = manager_of(llm)
        if policy == "random":
            manager.policy = RandomLengths(8, 7, seed=1)
        elif policy == "adaptive":
            manager.policy.costs = Prices(*(1 + 0.05 * k for k in range(8 * 7 + 1)))
        self.policy: Any = None if manager is None else manager.policy
        was = {} if manager is None else manager.snapshot()
        self.outputs = run_together(llm, traffic(llm, plain, policy))
        now = {} if manager is None else manager.snapshot()
        self.counted = {name: now[name] - was[name] for name in now if name != "mode"}
        self.preemptions = counters(llm)["vllm:num_preemptions"] - before


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """Of the target alone, and of every policy."""
    with engine(MICRO, **OPTIONS) as llm:
        plain = tokens(run(llm, [Request("def f(self", {"max_tokens": 24, "ignore_eos": True})]))
        made = {"target": Outcome(llm, plain, "target")}
    # 16 blocks of 32 tokens, one of them vLLM's own, for eight requests at a time
    drafter = f"dspark:{MICRO / 'dspark-vanilla'}"
    host = {"additional_config": {"dspark": {"verification_mode": "host"}}}
    with engine(MICRO, drafter, num_gpu_blocks_override=16, **OPTIONS, **host) as llm:
        for policy in POLICIES:
            made[policy] = Outcome(llm, plain, policy)
    return made


NAMES = ("batch", "long", *features.NAMES)
CASES = [("adaptive", "batch"), *(("random", name) for name in NAMES)]


@pytest.mark.parametrize(("policy", "name"), CASES)
def test_equals_target(outcomes: dict[str, Outcome], policy: str, name: str) -> None:
    """Tokens, text and reason to finish are the target's own."""
    target, ours = outcomes["target"].outputs[name], outcomes[policy].outputs[name]
    features.check_equal(name, target, ours)


def test_logprobs_are_the_targets(outcomes: dict[str, Outcome]) -> None:
    """Rows of a trimmed batch belong to the right requests."""
    target, ours = (
        outcomes[name].outputs["logprobs"][0].outputs[0].logprobs for name in ("target", "random")
    )
    assert len(target) == len(ours) == 24
    for a, b in zip(target, ours, strict=True):
        assert set(a) == set(b)
        for word in a:
            assert b[word].logprob == pytest.approx(a[word].logprob, abs=1e-4)


def test_every_kind_of_step_occurred(outcomes: dict[str, Outcome]) -> None:
    """Random lengths: all drafts, none, and requests of one batch that differ. Preemptions too."""
    steps = outcomes["random"].policy.lengths
    assert any(not lengths.any() for lengths in steps)
    assert any(len(set(lengths.tolist())) > 3 for lengths in steps)
    counted = outcomes["random"].counted
    assert 5 < counted["whole"] < counted["rounds"] == len(steps)
    assert 0 < counted["verified"] < counted["scheduled"]
    assert outcomes["random"].preemptions > 0


def test_adaptive_policy_adapted(outcomes: dict[str, Outcome]) -> None:
    """It trimmed, and it learned."""
    counted = outcomes["adaptive"].counted
    assert 0 < counted["verified"] < counted["scheduled"]
    assert outcomes["adaptive"].policy.calibrator.version > 0
