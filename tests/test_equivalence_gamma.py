"""Greedy equivalence for every γ from 1 to the trained block."""

from __future__ import annotations

import pytest

from tests.engine import MICRO, engine, observed, run, tokens
from tests.test_equivalence_heads import batch

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def reference() -> list[list[int]]:
    """What the target says by itself."""
    with engine(MICRO) as llm:
        return tokens(run(llm, batch(3)))


@pytest.mark.parametrize("gamma", range(1, 8))
def test_greedy_equals_target(reference: list[list[int]], gamma: int) -> None:
    """Catches buffers or positions that assume the full block."""
    config = {
        "method": "dspark",
        "model": str(MICRO / "dspark-vanilla"),
        "num_speculative_tokens": gamma,
    }
    with engine(MICRO, config) as llm, observed(llm) as seen:
        outputs = run(llm, batch(3))
    assert tokens(outputs) == reference
    (speculation,) = seen
    assert speculation.drafted == gamma * speculation.rounds
    assert speculation.accepted > 0
