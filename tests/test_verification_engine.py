"""The real engine: what requests ask for, a fixed γ, and a drafter without a confidence head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine import MICRO, Request, engine, observed, run, tokens
from tests.pairs import write_drafter, write_target
from tests.verification_cases import Prices, manager_of, runner_of
from vllm_dspark.scheduler.fixed import FixedPolicy

pytestmark = pytest.mark.engine

PLAIN: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True}
LIMITS = (0, 1, None, 7)


class Watched(FixedPolicy):
    """The policy of a fixed γ, and what it let be verified, by slot."""

    def __init__(self, served: FixedPolicy) -> None:
        super().__init__(len(served.sampled), served.gamma)
        self.lengths: dict[int, list[int]] = {}

    def allocate(self, slots: Any, draft_lengths: Any, budget: int, current: bool = True) -> Any:
        lengths = super().allocate(slots, draft_lengths, budget, current)
        for slot, length in zip(slots.tolist(), lengths.tolist(), strict=True):
            self.lengths.setdefault(slot, []).append(length)
        return lengths


def test_requests_are_given_what_they_ask_for() -> None:
    """Under a fixed γ, where nobody else trims: each request gets its own limit in every step, one
    of 0 does not speculate at all, and all say what the target says."""
    requests = [
        Request(
            "def main(self",
            PLAIN | ({} if limit is None else {"extra_args": {"dspark_max_verified": limit}}),
        )
        for limit in LIMITS
    ]
    with engine(MICRO) as llm:
        expected = tokens(run(llm, requests[:1]))[0]
    fixed = {"additional_config": {"dspark": {"verification": "all"}}}
    with engine(MICRO, f"dspark:{MICRO / 'dspark-vanilla'}", **fixed) as llm:
        manager = manager_of(llm)
        assert type(manager.policy) is FixedPolicy
        assert not runner_of(llm).speculator.use_confidence_head  # nothing would read it
        outputs = tokens(run(llm, [Request("def main(self", PLAIN)]))
        whole = manager.snapshot()
        assert whole["whole"] == whole["rounds"] > 0
        manager.policy = policy = Watched(manager.policy)
        outputs += tokens(run(llm, requests))
    assert outputs == [expected] * 5
    most = sorted(max(lengths) for lengths in policy.lengths.values())
    assert most == [0, 1, 7, 7]
    # Without drafts every token takes a step: 19 after the first one, and one more that async
    # scheduling begins before it knows.
    assert 19 <= max(len(lengths) for lengths in policy.lengths.values()) <= 20


def test_drafter_without_a_confidence_head(tmp_path: Path) -> None:
    """Adaptive if it is asked for: the peak of each draft distribution stands in, calibrated."""
    write_target(tmp_path, vocab_size=64)
    write_drafter(tmp_path / "dspark", tmp_path, confidence=False, block_size=4)
    requests = [Request([1 + i, 2, 3], {"max_tokens": 24, "ignore_eos": True}) for i in range(4)]
    options: dict[str, Any] = {"skip_tokenizer_init": True}
    with engine(tmp_path, **options) as llm:
        expected = tokens(run(llm, requests))
    options["additional_config"] = {"dspark": {"verification": "adaptive"}}
    with engine(tmp_path, {"method": "dspark"}, **options) as llm:
        manager = manager_of(llm)
        manager.policy.costs = Prices(*(1 + 0.02 * k for k in range(4 * 4 + 1)))
        with observed(llm) as seen:
            assert tokens(run(llm, requests)) == expected
        known = manager.policy._confidence[0]
        counted = manager.snapshot()
    assert 0 < seen[0].accepted < seen[0].drafted
    assert 0 < counted["verified"] < counted["scheduled"]
    confidence = known[known == known]
    assert len(set(confidence.tolist())) > 4
    assert ((confidence > 1 / 64) & (confidence <= 1)).all()
