"""Greedy equivalence with two tensor-parallel ranks, each in a process of its own."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.conftest import HAS_GPU
from tests.engine import MICRO, engine, observed, run, tokens
from tests.test_equivalence_heads import batch

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(HAS_GPU, reason="the two ranks are CPU ranks; the GPU suite has one GPU"),
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores, one for each rank"),
]


def test_two_ranks_equal_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches seams that do not reach the workers, and ranks that draft different tokens: the
    RNN head runs replicated on both, on hidden states that were reduced across them."""
    with engine(MICRO) as llm:
        reference = tokens(run(llm, batch(3)))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    options: dict[str, Any] = {"tensor_parallel_size": 2}
    with engine(MICRO, f"dspark:{MICRO / 'dspark-rnn'}", **options) as llm:
        with observed(llm) as seen:
            outputs = run(llm, batch(3))
    assert tokens(outputs) == reference
    assert 0 < seen[0].accepted < seen[0].drafted
