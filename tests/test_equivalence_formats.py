"""Greedy equivalence for every published checkpoint format and drafter family.

The pairs are random, made so that drafts are accepted now and then (see `tests.pairs`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine import Request, engine, observed, run, tokens
from tests.pairs import write_drafter, write_target

pytestmark = pytest.mark.engine

REQUESTS = [
    Request([5, 9, 2, 7][: 2 + i], {"max_tokens": 16, "ignore_eos": True, "detokenize": False},
            arrives=3 * i)
    for i in range(3)
]  # fmt: skip
FORMATS: dict[str, dict[str, Any]] = {
    "DeepSpec": {},
    "speculators, 1+N layout": {"layout": "speculators", "sample_from_anchor": False},
    "speculators, predicting anchor": {"layout": "speculators", "sample_from_anchor": True},
    "no confidence head": {"confidence": False},
    "confidence without Markov features": {"with_markov": False},
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A random Qwen3 target and what it says by itself."""
    folder = write_target(tmp_path_factory.mktemp("qwen3"))
    with engine(folder, skip_tokenizer_init=True) as llm:
        return folder, tokens(run(llm, REQUESTS))


@pytest.mark.parametrize("name", FORMATS)
def test_qwen3(target: tuple[Path, list[list[int]]], tmp_path: Path, name: str) -> None:
    """Catches layer ids off by one, a wrong block layout, a head that is not loaded. The
    confidence head is evaluated on every draft."""
    folder, reference = target
    drafter = write_drafter(tmp_path / "drafter", folder, **FORMATS[name])
    options = {"additional_config": {"dspark": {"confidence": "always"}}}
    with engine(folder, f"dspark:{drafter}", skip_tokenizer_init=True, **options) as llm:
        with observed(llm) as seen:
            outputs = run(llm, REQUESTS)
    assert tokens(outputs) == reference
    (speculation,) = seen
    depth = 6 if "1+N" in name else 7
    assert speculation.drafted == depth * speculation.rounds
    assert 0 < speculation.accepted < speculation.drafted


@pytest.mark.parametrize("head_type", ["vanilla", "rnn"])
def test_gemma4(tmp_path: Path, head_type: str) -> None:
    """A Gemma4 drafter has its own embedding, LM head and soft cap."""
    folder = write_target(tmp_path / "gemma4", family="gemma4")
    drafter = write_drafter(folder / "dspark", folder, head_type=head_type)
    assert drafter.is_dir()
    with engine(folder, skip_tokenizer_init=True) as llm:
        reference = tokens(run(llm, REQUESTS))
    with engine(folder, "dspark", skip_tokenizer_init=True) as llm, observed(llm) as seen:
        outputs = run(llm, REQUESTS)
    assert tokens(outputs) == reference
    assert 0 < seen[0].accepted < seen[0].drafted
