"""On a GPU, with full CUDA graphs: the shipped pair is exact in fp32 and works in bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine import MICRO, TINY, WHOLE, Request, engine, observed, run, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

REQUESTS = [
    Request(f"import os\n\n\ndef function_{i}(", {"max_tokens": 32 + 4 * i, "ignore_eos": True},
            arrives=2 * i)
    for i in range(12)
]  # fmt: skip
GRAPHS: dict[str, Any] = {
    "max_model_len": 512,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 2048,
    "kv_cache_memory_bytes": 1 << 28,
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [8, 16, 32, 64, 128],
    },
}


TWO_RANKS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two ranks need two GPUs")


def speculation(drafting: str) -> dict[str, Any]:
    """The shipped drafter in a drafting mode."""
    return {"method": "dspark", "draft_sample_method": drafting}


@pytest.mark.parametrize("drafting", ["greedy", "probabilistic"])
def test_fp32_tokens_equal(drafting: str) -> None:
    """Catches anything that CUDA graph capture or padding does to a drafted token."""
    with engine(TINY, dtype="float32", **GRAPHS) as llm:
        reference = tokens(run(llm, REQUESTS))
    with engine(TINY, speculation(drafting), dtype="float32", **GRAPHS, **WHOLE) as llm:
        with observed(llm) as seen:
            outputs = run(llm, REQUESTS)
    assert tokens(outputs) == reference
    assert seen[0].accepted_length > 2.0


@pytest.mark.parametrize("head", ["gated", "rnn"])
def test_other_heads_fp32_tokens_equal(head: str) -> None:
    """The heads that vLLM does not know, inside CUDA graphs."""
    with engine(MICRO, dtype="float32", **GRAPHS) as llm:
        reference = tokens(run(llm, REQUESTS))
    drafter = f"dspark:{MICRO / f'dspark-{head}'}"
    with engine(MICRO, drafter, dtype="float32", **GRAPHS, **WHOLE) as llm, observed(llm) as seen:
        outputs = run(llm, REQUESTS)
    assert tokens(outputs) == reference
    assert seen[0].accepted_length > 1.8


def test_bf16_runs_and_accepts() -> None:
    """bf16 rounds differently for different batch shapes, so tokens may differ; acceptance
    must not."""
    with engine(TINY, speculation("greedy"), dtype="bfloat16", **GRAPHS, **WHOLE) as llm:
        with observed(llm) as seen:
            outputs = run(llm, REQUESTS)
    assert [len(t) for t in tokens(outputs)] == [r.params["max_tokens"] for r in REQUESTS]
    assert seen[0].accepted_length > 2.0


def test_sequential_stage_equals_the_builtins() -> None:
    """With a vanilla head and the same seeds, drafts and outputs are vLLM's built-in's own."""
    requests = [
        Request(r.prompt, r.params | {"temperature": 1.0, "seed": i}, arrives=r.arrives)
        for i, r in enumerate(REQUESTS)
    ]
    ours = {"verification": "all", "kernels": "reference"}
    results = []
    for chosen in ({"enabled": False}, ours):
        extra = {"additional_config": {"dspark": chosen}}
        config = speculation("probabilistic") | {"rejection_sample_method": "standard"}
        with engine(TINY, config, dtype="float32", **GRAPHS, **extra) as llm:
            with observed(llm) as seen:
                results.append((tokens(run(llm, requests)), seen))
    assert results[0] == results[1]
