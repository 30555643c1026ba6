"""Greedy output with DSpark equals the target's own, token for token, for every Markov head.

The pair is trained, so that drafts are accepted and rejected in earnest; both are asserted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine import MICRO, WHOLE, Request, engine, observed, run, tokens

PROMPTS = (
    "import os\n",
    "def main():\n    ",
    "class Node(object):\n    def __init__(self, value):\n        self.",
    "x = 1\ny = 2\n",
    "    for i in range(",
    "try:\n    import json\nexcept ImportError:\n    ",
    "# -*- coding",
    "return self._",
)

pytestmark = pytest.mark.engine


def batch(size: int) -> list[Request]:
    """`size` requests of different lengths that arrive two engine steps apart."""
    return [
        Request(PROMPTS[i], {"max_tokens": 40 - 4 * i, "ignore_eos": True}, arrives=2 * i)
        for i in range(size)
    ]


SIZES = (1, 2, 5, 8)


@pytest.fixture(scope="module")
def reference() -> dict[int, list[list[int]]]:
    """What the target says by itself, per batch size."""
    with engine(MICRO) as llm:
        return {size: tokens(run(llm, batch(size))) for size in SIZES}


@pytest.fixture(scope="module", params=["vanilla", "gated", "rnn"])
def speculating(request: pytest.FixtureRequest, reference: Any) -> Iterator[Any]:
    """One engine per head; `reference` is asked for first, so that its engine is gone."""
    drafter = f"dspark:{MICRO / f'dspark-{request.param}'}"
    with engine(MICRO, drafter, **WHOLE) as llm:
        yield llm


@pytest.mark.parametrize("size", SIZES)
def test_greedy_equals_target(
    speculating: Any, reference: dict[int, list[list[int]]], size: int
) -> None:
    """Catches a wrong token in any accepted prefix, bonus token or later context."""
    with observed(speculating) as seen:
        outputs = run(speculating, batch(size))
    assert tokens(outputs) == reference[size]
    (speculation,) = seen
    assert 0 < speculation.accepted < speculation.drafted


def test_drafter_accepts_what_it_was_trained_to(speculating: Any) -> None:
    """A drafter fed a wrong context, anchor or layer stays lossless but accepts next to
    nothing; the trained pair accepts far more than one token a round."""
    with observed(speculating) as seen:
        run(speculating, batch(8))
    assert seen[0].accepted_length > 1.8
