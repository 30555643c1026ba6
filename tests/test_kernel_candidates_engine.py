"""The engine drafting from candidates: it says what the target says, and each draft is judged by
what it was drawn from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.candidate_watch import watched
from tests.depth_runs import (
    ChosenDepths,
    asynchronous_on_cpu,
    choose_by,
    random_depths,
    scheduled,
)
from tests.engine import MICRO, Request, engine, observed, run, tokens
from tests.pairs import write_drafter, write_target
from tests.test_losslessness import POSITIONS, PROMPT, SIGNIFICANCE, exact_joint, p_value
from tests.verification_cases import runner_of
from vllm_dspark.integration import rejection
from vllm_dspark.kernels.verify_batch import CompactDraft

pytestmark = pytest.mark.engine

GAMMA, COUNT = 3, 16  # γ, K
PROMPTS = ("import os\n", "def main():\n    ", "x = 1\ny = 2\n", "    for i in range(")
WORDS, SAMPLES = 24, 40  # of the random pair; of each regime, seeds are fixed
REGIMES: tuple[dict[str, Any], ...] = ({"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9})


def options(**changes: Any) -> dict[str, Any]:
    """Of an engine that drafts from candidates and verifies every draft."""
    ours = {"draft_candidates": COUNT, "verification": "all"} | changes
    return {"additional_config": {"dspark": ours}}


def speculative(head: str, method: str) -> dict[str, Any]:
    return {
        "method": "dspark",
        "model": str(MICRO / f"dspark-{head}"),
        "draft_sample_method": method,
        "num_speculative_tokens": GAMMA,
    }


def greedy(length: int = 12) -> list[Request]:
    return [Request(prompt, {"max_tokens": length, "ignore_eos": True}) for prompt in PROMPTS]


def drawn(count: int) -> list[Request]:
    """Seeded requests of different ways and lengths, which arrive while others run; the seed tells
    the way."""
    ways: tuple[dict[str, Any], ...] = (
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 5},
        {"temperature": 0.0},
    )
    return [
        Request(
            PROMPTS[i % 3],
            ways[i % 4] | {"seed": i, "max_tokens": 5 + 2 * (i % 3), "ignore_eos": True},
            arrives=i,
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def target() -> list[list[int]]:
    """What the target says to the greedy requests by transformers' own code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MICRO)
    model = AutoModelForCausalLM.from_pretrained(MICRO, dtype=torch.float32).eval()
    said = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        with torch.no_grad():
            for _ in range(12):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        said.append(ids[0, -12:].tolist())
    return said


@pytest.fixture(scope="module")
def vanilla() -> Iterator[Any]:
    """An engine of four slots that schedules a step ahead; it drafts γ unless told otherwise."""
    config = speculative("vanilla", "probabilistic")
    with (
        asynchronous_on_cpu(),
        engine(MICRO, config, max_num_seqs=4, **options(depth="auto")) as llm,
    ):
        run(llm, [Request(PROMPTS[0], {"max_tokens": 3})])
        choose_by(llm, ChosenDepths(lambda step: GAMMA))
        yield llm


def test_greedy_output_is_the_targets(vanilla: Any, target: list[list[int]]) -> None:
    """Drafting is probabilistic, so a greedy request's proposal is all on its draft."""
    speculator = runner_of(vanilla).speculator
    assert speculator.draft_logits is None
    assert speculator.proposal.ids.shape == (4, GAMMA, COUNT)
    with observed(vanilla) as seen, watched(vanilla) as watch:
        assert tokens(run(vanilla, greedy())) == target
    assert seen[0].accepted_length > 1.5
    assert watch.wrong == 0
    assert {n for counts in watch.possible.values() for n in counts} == {1}


def test_every_draft_is_judged_by_what_it_was_drawn_from(vanilla: Any) -> None:
    """Ten requests in four slots, one after the other, while the depth changes at random: catches q
    of another request, another position or an earlier step, and filters of another request."""
    choose_by(vanilla, random_depths(GAMMA, seed=5))
    with watched(vanilla) as watch, scheduled(vanilla) as steps:
        run(vanilla, drawn(10))
    choose_by(vanilla, ChosenDepths(lambda step: GAMMA))
    assert {step.num_spec_tokens_to_schedule for step in steps} == set(range(GAMMA + 1))
    assert watch.wrong == 0
    assert watch.right > 30
    assert len(watch.possible) > 4  # more requests than slots had drafts that were judged
    for seed, counts in watch.possible.items():
        few, many = ((COUNT, COUNT), (1, COUNT), (5, 5), (1, 1))[seed % 4]
        assert few <= min(counts) <= max(counts) <= many
    narrowed = [n for seed, counts in watch.possible.items() if seed % 4 == 1 for n in counts]
    assert min(narrowed) < COUNT


@pytest.mark.parametrize("dimension", [0, 1], ids=["request", "position"])
def test_the_watch_finds_proposals_that_are_mixed_up(vanilla: Any, dimension: int) -> None:
    """With those of the next request, or of the next position, in their place."""
    verifier = runner_of(vanilla).rejection_sampler.verifier
    with watched(vanilla) as watch:
        verify = verifier.verify

        def mixed_up(batch: Any, *others: Any) -> Any:
            parts = batch.draft.ids, batch.draft.logprobs
            rolled = CompactDraft(*(part.roll(1, dimension) for part in parts))
            return verify(replace(batch, draft=rolled), *others)

        verifier.verify = mixed_up
        run(vanilla, drawn(2))
    assert watch.wrong > 0


def test_processed_requests_may_be_verified_some_after_others(
    vanilla: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where their rows are too many for the memory that vLLM allows itself. Same words."""
    requests = [replace(request, arrives=0) for request in drawn(3)]  # two of them are processed
    with watched(vanilla) as watch:
        whole = tokens(run(vanilla, requests))
        monkeypatch.setattr(rejection, "get_max_chunk_logits", lambda words: 1)
        calls: list[int] = []
        verifier = runner_of(vanilla).rejection_sampler.verifier
        verify = verifier.verify

        def counted(batch: Any, *others: Any) -> Any:
            calls.append(batch.requests)
            assert batch.processed is None or len(batch.processed) <= GAMMA + 1
            return verify(batch, *others)

        verifier.verify = counted
        assert tokens(run(vanilla, requests)) == whole
    assert watch.wrong == 0
    assert {1, 2} <= set(calls)  # three requests, in two parts


@pytest.mark.parametrize("head", ["gated", "rnn"])
def test_greedy_drafting(target: list[list[int]], head: str) -> None:
    """Nothing is kept of what drafts were drawn from, and words are the target's."""
    with engine(MICRO, speculative(head, "greedy"), **options()) as llm:
        assert runner_of(llm).speculator.proposal is None
        with observed(llm) as seen:
            assert tokens(run(llm, greedy(7))) == [said[:7] for said in target]
        assert runner_of(llm).rejection_sampler.verdict is not None
    assert seen[0].accepted_length > 1.5


def test_sampled_output_follows_the_target(tmp_path: Path) -> None:
    """Of 24 words, a third of which are never drafted at a position: requests of both regimes in
    one batch, each by its own distribution. Joint over three positions, and at each."""
    write_target(tmp_path, vocab_size=WORDS, seed=3, scale=3.0)
    write_drafter(tmp_path / "dspark", tmp_path, rank=4, seed=4)
    config = {
        "method": "dspark",
        "draft_sample_method": "probabilistic",
        "num_speculative_tokens": POSITIONS - 1,
    }
    fixed = {"max_tokens": POSITIONS, "ignore_eos": True, "detokenize": False}
    requests = [
        Request(PROMPT, regime | fixed | {"seed": i}) for i in range(SAMPLES) for regime in REGIMES
    ]
    changes = {"skip_tokenizer_init": True, "max_num_seqs": 16} | options()
    with engine(tmp_path, config, **changes) as llm, observed(llm) as seen:
        samples = np.array(tokens(run(llm, requests)))
        assert runner_of(llm).speculator.proposal is not None
    assert 0.05 < seen[0].accepted / seen[0].drafted < 0.95
    for i, regime in enumerate(REGIMES):
        joint = exact_joint(tmp_path, regime, WORDS)
        own = samples[i :: len(REGIMES)]
        assert p_value(own, joint) > SIGNIFICANCE
        for position in range(POSITIONS):
            others = tuple(j for j in range(POSITIONS) if j != position)
            assert p_value(own[:, [position]], np.asarray(joint.sum(others))) > SIGNIFICANCE
