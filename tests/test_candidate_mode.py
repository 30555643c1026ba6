"""What drafting from candidates is refused for, and the memory that it spares."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.worker.gpu.sample.sampler import Sampler

from tests import test_kernel_verify_processing as processing
from tests.engine import MICRO
from tests.test_kernel_draft_proposer import prepared
from vllm_dspark.checkpoint import drafter_spec
from vllm_dspark.config import DSparkConfig, DSparkConfigError
from vllm_dspark.integration import rejection
from vllm_dspark.integration.candidate_mode import (
    choose_kernels,
    refuse_candidates,
    without_draft_logits,
)
from vllm_dspark.integration.draft_kernels import DraftKernels, draft_kernels
from vllm_dspark.integration.drafter_config import read_config
from vllm_dspark.integration.processing import DraftFilters
from vllm_dspark.kernels.candidate_reference import candidate_reference
from vllm_dspark.kernels.dispatch import VARIABLE
from vllm_dspark.kernels.head_weights import HeadWeights

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the proposer here is on the CPU")

WORDS = 151_936  # of Qwen3


def spec(words: int = 300) -> Any:
    """A drafter's, of so many words."""
    found = drafter_spec("drafter", read_config(str(MICRO / "dspark-vanilla"), None))
    assert found is not None
    return replace(found, draft_vocab_size=words)


def asked(**options: Any) -> DSparkConfig:
    return DSparkConfig.from_additional_config({"dspark": {"draft_candidates": 16} | options})


@pytest.mark.parametrize(
    ("options", "variable", "words", "why"),
    [
        ({"kernels": "reference"}, "", 300, 'Triton kernels, but kernels is "reference"'),
        ({}, "reference", 300, "DSPARK_KERNELS is reference"),
        ({}, "", None, "vLLM's own head draws"),
        ({"draft_candidates": 64}, "", 63, "only 63 words"),
        ({"draft_candidates": 64}, "", 64, None),
        ({"draft_candidates": 0, "kernels": "reference"}, "", 8, None),
        ({"kernels": "reference"}, "triton", 300, None),
    ],
    ids=["option", "variable", "vLLM's head", "few words", "every word", "dense", "overridden"],
)
def test_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    variable: str,
    words: int | None,
    why: str | None,
) -> None:
    """With the reason and a fix; nothing is refused that works."""
    monkeypatch.setenv(VARIABLE, variable)
    drafter = None if words is None else spec(words)
    if why is None:
        refuse_candidates(asked(**options), drafter)
    else:
        with pytest.raises(DSparkConfigError, match=f"draft_candidates is .*{why}.*Fix:"):
            refuse_candidates(asked(**options), drafter)


@pytest.mark.parametrize("variable", ["", "auto"])
def test_auto_means_our_kernels(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(VARIABLE, variable)
    assert choose_kernels(asked(), "drawn", None).triton
    assert not choose_kernels(asked(draft_candidates=None), "drawn", None).triton


def test_what_stands_in_the_way_of_a_stage_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense drafting falls back to the reference there."""
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(DSparkConfigError, match=r"must be verified.*tokens are watermarked.*Fix:"):
        choose_kernels(asked(), "verified", "tokens are watermarked")
    dense = asked(draft_candidates=None, kernels="triton")
    assert not choose_kernels(dense, "verified", "tokens are watermarked").triton


@pytest.mark.parametrize(("mode", "refused"), [("processed_logits", True), ("raw_logits", False)])
def test_logprobs_that_vllms_kernels_tell(mode: str, refused: bool) -> None:
    """vLLM's own verification would have to read the proposal; without one, it may serve."""
    sampler = object.__new__(Sampler)
    plain = {"return_sampling_mask": False, "use_fp64_gumbel": False}
    sampler.__dict__.update(vars(processing.sampler()) | plain | {"logprobs_mode": mode})
    runner = processing.runner("triton", sampler=sampler)
    assert rejection._obstacle(runner) is None
    runner.speculator.proposal = object()
    assert (rejection._obstacle(runner) is not None) == refused


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"draft_watermarker": object()}, "watermarked"),
        ({"use_fp64_gumbel": True}, "float64"),
        ({"peak_confidence": True}, "no confidence head"),
    ],
    ids=["watermark", "fp64", "peak"],
)
def test_proposers_that_the_kernels_cannot_serve(changes: dict[str, Any], why: str) -> None:
    proposer = proposer_of("vanilla")[0]
    proposer.__dict__.update(changes)
    with pytest.raises(DSparkConfigError, match=f"draft_candidates is 16.*drawn.*{why}"):
        draft_kernels(proposer)


def proposer_of(
    head: str, method: str = "probabilistic", **options: Any
) -> tuple[Any, torch.Tensor]:
    """A bare proposer that drafts from 16 candidates."""
    proposer, hidden = prepared(head, **options)
    proposer.dspark_config = asked()
    proposer.speculative_config.draft_sample_method = method
    return proposer, hidden


@pytest.mark.parametrize("words", [None, 18], ids=["all words", "reduced"])
@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_proposals_are_the_references(head: str, words: int | None) -> None:
    """Of three requests in slots 2, 0 and 1, two of four drafts, each with filters of its own: in
    the rows of their slots, in the first columns, and nowhere else."""
    sizes: dict[str, Any] = {} if words is None else {"words": words}
    proposer, hidden = proposer_of(head, **sizes)
    if words is not None:  # draft words 9 to 17 are the target's 14 to 22
        proposer.model.draft_id_to_target_id = 5 * (torch.arange(words) > 8)
    kernels = proposer.kernels = draft_kernels(proposer)
    assert isinstance(kernels, DraftKernels)
    assert kernels.proposal is not None
    assert kernels.filters is not None
    kernels.filters.follow(states([5, 300, 300], [1.0, 0.6, 1.0]))
    kernels.filters.refresh()
    proposer.drawn = 2
    proposer.sample_idx_mapping = torch.tensor([2, 0, 1]).repeat_interleave(4)
    drawn: list[Any] = []
    drafter: Any = kernels._drafter
    draw = drafter.draw

    def kept(*arguments: Any) -> None:
        drawn.append(arguments)
        draw(*arguments)

    drafter.draw = kept
    proposer._sample_sequential(3, hidden)
    base, states_of, anchors, _, draws = drawn[0][:5]
    table = proposer.model.draft_id_to_target_id
    named = None if table is None else torch.arange(len(table)) + table
    weights = HeadWeights.of(proposer.model.sequential_head, named)
    tokens, ids, logprobs = candidate_reference(base, states_of, anchors, weights, 16, draws)
    assert torch.equal(proposer.draft_tokens[:3, :2], tokens)
    slots = torch.tensor([2, 0, 1])
    assert torch.equal(kernels.proposal.ids[slots, :2], ids)
    torch.testing.assert_close(kernels.proposal.logprobs[slots, :2], logprobs.float())
    possible = (kernels.proposal.logprobs > -torch.inf).sum(-1)
    assert (possible[0, :2] == 5).all()  # top-k of slot 0
    assert (possible[1, :2] < 16).all()  # top-p of slot 1
    assert (possible[2, :2] == 16).all()
    assert not possible[:, 2:].any()
    assert not possible[3:].any()


def test_greedy_drafting_keeps_no_proposal() -> None:
    """A draft is the only word it could be then."""
    proposer, hidden = proposer_of("vanilla", "greedy")
    proposer.kernels = draft_kernels(proposer)
    assert proposer.proposal is None
    proposer.follow(SimpleNamespace())  # there is nothing to respect
    proposer._sample_sequential(3, hidden)
    chosen = proposer.draft_tokens.clone()
    proposer.dspark_config = asked(draft_candidates=None, kernels="triton")
    proposer.kernels = draft_kernels(proposer)
    proposer._sample_sequential(3, hidden)
    assert torch.equal(chosen[:3], proposer.draft_tokens[:3])  # 16 of 23 words are enough here


def states(top_k: list[int], top_p: list[float]) -> Any:
    """A sampler's, of ten slots."""
    filled = top_k + [300] * (10 - len(top_k)), top_p + [1.0] * (10 - len(top_p))
    arrays = torch.tensor(filled[0], dtype=torch.int32), torch.tensor(filled[1])
    return SimpleNamespace(
        top_k=SimpleNamespace(np=arrays[0].numpy()), top_p=SimpleNamespace(np=arrays[1].numpy())
    )


def test_filters_stay_where_a_graph_reads_them() -> None:
    filters = DraftFilters(10, torch.device("cpu"))
    places = filters.top_k.data_ptr(), filters.top_p.data_ptr()
    filters.refresh()  # nobody to follow yet: no request has any
    assert filters.top_p.tolist() == [1.0] * 10
    assert (filters.top_k >= WORDS).all()
    followed = states([7], [0.5])
    filters.follow(followed)
    filters.refresh()
    assert filters.top_k.tolist() == [7] + [300] * 9
    assert filters.top_p.tolist() == [0.5] + [1.0] * 9
    followed.top_p.np[3] = 0.25
    assert filters.top_p[3] == 1.0  # not before the next draft
    filters.refresh()
    assert filters.top_p[3] == 0.25
    assert places == (filters.top_k.data_ptr(), filters.top_p.data_ptr())


@pytest.mark.parametrize("count", [16, 64, 256])
def test_memory(count: int) -> None:
    """The proposal takes a hundredth of what vLLM's cache of draft logits does, or less, at 1024
    requests, γ = 7 and Qwen3's words in bf16; with all that lies between launches, a twentieth."""
    meta = torch.device("meta")
    table = torch.empty(WORDS, 256, dtype=torch.bfloat16, device=meta)
    proposer: Any = SimpleNamespace(
        dspark_config=asked(draft_candidates=count),
        speculative_config=SimpleNamespace(draft_sample_method="probabilistic"),
        model=SimpleNamespace(logits_processor=SimpleNamespace(head_dtype=None)),
        max_num_reqs=1024,
        num_speculative_steps=7,
    )
    kernels: Any = object.__new__(DraftKernels)
    drafter = kernels._from_candidates(proposer, HeadWeights("vanilla", table, table))
    dense = 1024 * 7 * WORDS * 2
    proposal = kernels.proposal.ids.nbytes + kernels.proposal.logprobs.nbytes
    assert 100 * proposal <= dense
    kept = [value for owner in (drafter, drafter._finder) for value in vars(owner).values()]
    between = sum(value.nbytes for value in kept if isinstance(value, torch.Tensor))
    assert 20 * (proposal + between) <= dense


def test_no_cache_of_logits_is_asked_for() -> None:
    """And the engine's own configuration still says how drafts are drawn."""
    speculative = SimpleNamespace(draft_sample_method="probabilistic", num_speculative_tokens=7)
    given = SimpleNamespace(speculative_config=speculative, model_config="the model's")
    changed = without_draft_logits(given)
    assert changed.speculative_config.draft_sample_method == "greedy"
    assert changed.speculative_config.num_speculative_tokens == 7
    assert changed.model_config == "the model's"
    assert given.speculative_config.draft_sample_method == "probabilistic"
