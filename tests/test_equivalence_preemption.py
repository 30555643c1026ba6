"""Greedy equivalence when the KV cache is too small and requests are preempted."""

from __future__ import annotations

import pytest

from tests.engine import MICRO, Request, counters, engine, observed, run, tokens

pytestmark = pytest.mark.engine

REQUESTS = [
    Request(text, {"max_tokens": 90, "ignore_eos": True}, arrives=i)
    for i, text in enumerate(("import os\n", "def main(", "class A(B):\n", "for x in "))
]


def test_greedy_equals_target_under_preemption() -> None:
    """Catches draft state or context K/V that survives a preemption it should not survive."""
    with engine(MICRO) as llm:
        reference = tokens(run(llm, REQUESTS))
    # 9 blocks of 32 tokens (one is vLLM's own null block) for four requests of about four each
    drafter = f"dspark:{MICRO / 'dspark-vanilla'}"
    with engine(MICRO, drafter, num_gpu_blocks_override=9) as llm:
        before = counters(llm)["vllm:num_preemptions"]
        with observed(llm) as seen:
            outputs = run(llm, REQUESTS)
        preemptions = counters(llm)["vllm:num_preemptions"] - before
    assert tokens(outputs) == reference
    assert preemptions > 0
    assert seen[0].accepted > 0
