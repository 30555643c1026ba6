"""Batched verification against the whole computation in float64, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.verify_cases import INF, KINDS, NAN, batch, emitted, only, verified
from vllm_dspark.kernels import residual, verify_stats
from vllm_dspark.kernels.block_verify_reference import block_verify_reference
from vllm_dspark.kernels.verify import Method, Verifier
from vllm_dspark.kernels.verify_batch import MOST_WORDS, Batch, DenseDraft, tile_count
from vllm_dspark.kernels.verify_reference import Outcome, verify_reference

REFERENCES: dict[Method, Callable[[Batch], list[Outcome]]] = {
    "standard": verify_reference,
    "block": block_verify_reference,
}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `torch.empty` gives holds NaN and nonsense, as it may."""
    real = torch.empty

    def empty(*size: Any, **options: Any) -> torch.Tensor:
        made = real(*size, **options)
        return made.fill_(NAN if made.is_floating_point() else (1 << 30) + 5)

    monkeypatch.setattr(torch, "empty", empty)


def compare(case: Batch, method: Method = "standard") -> None:
    """Tokens and counts as the reference has them, where it decides by more than a rounding."""
    verdict = verified(case, method)
    expected = REFERENCES[method](case)
    assert min(outcome.margin for outcome in expected) > 1e-5, "the case is decided by a hair"
    assert emitted(verdict) == [outcome.tokens for outcome in expected]
    assert verdict.verified.tolist() == [outcome.verified for outcome in expected]
    assert verdict.accepted.tolist() == [len(outcome.tokens) - 1 for outcome in expected]
    assert verdict.failed.tolist() == [outcome.failed for outcome in expected]
    for row, count in zip(verdict.tokens.tolist(), verdict.emitted.tolist(), strict=True):
        assert row[count:] == [-1] * (len(row) - count)


@pytest.mark.parametrize("method", REFERENCES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("lengths", "vocab", "dtype", "min_p", "words"),
    [
        ([0, 4, 1, 3, 2, 4], 3, torch.float32, None, 2),  # fewer words than candidates
        ([4, 0, 3, 4], 37, torch.bfloat16, None, 2048),  # one tile, not full
        ([2, 4], 4500, torch.float16, None, 2048),  # a tile and a bit, in the draw two and a bit
        ([3, 4, 0, 1], 37, torch.float32, [0.3, 0.0, 0.6, 0.1], 8),
    ],
)
def test_tokens_are_the_references(
    monkeypatch: pytest.MonkeyPatch,
    method: Method,
    kind: str,
    lengths: list[int],
    vocab: int,
    dtype: torch.dtype,
    min_p: list[float] | None,
    words: int,
) -> None:
    """Ragged lengths, 0 among them, drawn in tiles of `words`. Catches a row, slot, step or tile
    taken for another, and noise that is keyed by anything else."""
    monkeypatch.setattr(residual, "WORDS", words)
    compare(batch(lengths, vocab, kind, dtype=dtype, min_p=min_p, seed=vocab), method)


def test_greedy_and_sampled_requests_in_one_batch() -> None:
    case = batch([3, 4, 0, 4], 50, "dense", temperature=[0, 1, 0, 0.3], min_p=[0.5, 0, 0, 0.2])
    compare(case)
    greedy = [tokens for i, tokens in enumerate(emitted(verified(case))) if i in (0, 2)]
    assert [emitted(verified(case, "block"))[i] for i in (0, 2)] == greedy


def test_greedy_ties_go_to_the_lowest_word() -> None:
    """Whole numbers tie within tiles and across them, at drafts and at the bonus token."""
    case = batch([2, 2, 2], 2 * MOST_WORDS + 9, temperature=0)
    whole = case.logits.round().clamp(max=2)
    best = whole == whole.amax(1, keepdim=True)
    assert (best[:, :MOST_WORDS].any(1) & best[:, MOST_WORDS:].any(1)).any()
    drafts = whole.argmax(1).roll(1)
    drafts[4] += 1  # and one draft that is not the target's
    compare(replace(case, logits=whole, tokens=drafts))


@pytest.mark.parametrize("kind", KINDS)
def test_many_tiles(kind: str) -> None:
    """A vocabulary of 152,001 words: odd, and 38 tiles, in the draw 75."""
    compare(batch([1, 0], 152_001, kind, gamma=1, temperature=0.05, seed=3))


@pytest.mark.parametrize("method", REFERENCES)
def test_equal_distributions_accept_everything(method: Method) -> None:
    """Also where the uniform number is nearly 1: rounding must not reject p = q."""
    case = batch([4] * 6, 20, "dense", temperature=0.5)
    assert isinstance(case.draft, DenseDraft)
    logits = case.logits.clone()
    for request in range(6):
        start = int(case.offsets[request])
        logits[start : start + 4] = case.draft.logits[int(case.slots[request])]
    verdict = verified(replace(case, logits=logits), method)
    assert verdict.accepted.tolist() == [4] * 6


@pytest.mark.parametrize("method", REFERENCES)
@pytest.mark.parametrize("kind", KINDS)
def test_excluded_drafts_are_rejected(method: Method, kind: str) -> None:
    case = batch([3, 1, 4], 11, kind)
    logits = case.logits.clone()
    logits[torch.arange(len(logits) - 1), case.tokens[1:]] = -INF
    case = replace(case, logits=logits)
    compare(case, method)
    assert verified(case, method).accepted.tolist() == [0, 0, 0]


@pytest.mark.parametrize("method", REFERENCES)
@pytest.mark.parametrize("kind", ["one-hot", "dense"])
def test_target_with_one_word(method: Method, kind: str) -> None:
    """Every other word is excluded: what is drafted otherwise is replaced by that word."""
    case = batch([4, 4], 9, kind)
    logits = torch.full_like(case.logits, -INF)
    logits[torch.arange(len(logits)), case.tokens.roll(-1)] = 1.0
    logits[7] = logits[7].roll(1)  # the third draft of the second request is not it
    verdict = verified(replace(case, logits=logits), method)
    right = [*case.tokens[1:5].tolist(), int(logits[4].argmax())]
    wrong = [*case.tokens[6:8].tolist(), int(logits[7].argmax())]
    assert emitted(verdict) == [right, wrong]


@pytest.mark.parametrize("method", REFERENCES)
def test_draft_with_one_word_is_the_one_hot_draft(method: Method) -> None:
    case = batch([4, 2, 3], 12)
    dense = torch.full((4, 4, 12), -INF)
    for request in range(3):
        start, stop = case.offsets[request : request + 2].tolist()
        steps = torch.arange(stop - start - 1)
        dense[int(case.slots[request]), steps, case.tokens[start + 1 : stop].cpu()] = 3.0
    same = replace(case, draft=DenseDraft(dense.to(case.logits.device)))
    assert emitted(verified(same, method)) == emitted(verified(case, method))


@pytest.mark.parametrize("method", REFERENCES)
@pytest.mark.parametrize("kind", KINDS)
def test_placeholders_end_the_block(method: Method, kind: str) -> None:
    """A draft of -1 was never drawn: the row before it gives the token, from p itself."""
    case = batch([4, 3, 4], 15, kind, seed=5)
    tokens = case.tokens.clone()
    tokens[[1, 7, 8, 13]] = -1  # the first of one, the second and third of the next, the last
    case = replace(case, tokens=tokens)
    compare(case, method)
    assert verified(case, method).verified.tolist() == [0, 1, 3]


def test_draft_vocabulary_may_be_smaller() -> None:
    case = batch([3, 4], 30, "dense")
    assert isinstance(case.draft, DenseDraft)
    compare(replace(case, draft=DenseDraft(case.draft.logits[..., :21]), tokens=case.tokens % 21))


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_does_not_depend_on_its_neighbours(kind: str) -> None:
    case = batch([4, 0, 2, 3], 4200, kind, temperature=[0.7, 1, 0, 1.3])
    together = emitted(verified(case))
    assert [emitted(verified(only(case, i)))[0] for i in range(4)] == together


@pytest.mark.parametrize("kind", KINDS)
def test_processed_rows_count_as_they_are(kind: str) -> None:
    """Temperature and filters were applied to them, and only the draft's logits still need it."""
    case = batch([3, 2, 4], 20, kind, temperature=[0.5, 0.7, 0])
    rows = torch.tensor([4, 6, 1, 8])  # of the second, the second, the first, the third request
    heat = torch.tensor([0.7, 0.7, 0.5, 1.0], device=case.logits.device)
    processed = torch.full((6, 20), NAN, device=case.logits.device)
    processed[1:5] = case.logits[rows].float() / heat[:, None]
    place = torch.full((len(case.logits),), -1, dtype=torch.int32)
    place[rows] = torch.arange(1, 5, dtype=torch.int32)
    spoilt = case.logits.clone()
    spoilt[rows] = NAN
    mixed = replace(
        case, logits=spoilt, processed=processed, processed_row=place.to(case.logits.device)
    )
    compare(mixed)
    assert emitted(verified(mixed)) == emitted(verified(case))
    compare(replace(mixed, temperature=mixed.temperature.clamp(min=0.5)), "block")


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize(
    ("kind", "vocab"), [*((kind, 40) for kind in KINDS), ("dense", MOST_WORDS + 4)]
)
def test_rows_behind_a_rejection_are_left_out(
    monkeypatch: pytest.MonkeyPatch, kind: str, temperature: float, vocab: int
) -> None:
    """The first rejection is noted, and where rows come one after the other, as they do in the
    interpreter if there is one tile, all behind it are left out. The verdict stays the same, and
    the next batch finds no trace of this one."""
    case = batch([4, 4, 0, 3], vocab, kind, temperature=temperature, seed=1)
    whole = verified(case)
    accepted, drafts = whole.accepted.tolist(), whole.verified.tolist()
    assert any(a + 1 < d for a, d in zip(accepted, drafts, strict=True))
    monkeypatch.setattr(verify_stats, "AT_ONCE", 0)
    verifier = Verifier(case.requests, case.gamma, case.logits.device)
    planes, tiles = verify_stats.planes_of(case), tile_count(vocab)
    stats = torch.empty(len(case.logits), planes, tiles, device=case.logits.device)
    verify_stats.verify_stats(case, stats, verifier._arrived, verifier._rejected)
    noted = [a if a < d else verify_stats.NEVER for a, d in zip(accepted, drafts, strict=True)]
    assert verifier._rejected.tolist() == noted
    if case.logits.device.type == "cpu" and tiles == 1:
        left = stats[:, 0, 0].isnan().tolist()
        for request, (a, d) in enumerate(zip(accepted, drafts, strict=True)):
            start = int(case.offsets[request])
            assert left[start : start + d] == [step > a for step in range(d)]
    verifier = Verifier(case.requests, case.gamma, case.logits.device)
    for _ in range(2):
        assert emitted(verifier.verify(case)) == emitted(whole)
    assert not verifier._arrived.any()
    assert (verifier._rejected == verify_stats.NEVER).all()


BROKEN = {
    "a number is missing": lambda row: row.index_fill_(
        0, torch.tensor([5], device=row.device), NAN
    ),
    "all are missing": lambda row: row.fill_(NAN),
    "one is infinite": lambda row: row.index_fill_(0, torch.tensor([2], device=row.device), INF),
    "all words are excluded": lambda row: row.fill_(-INF),
}


@pytest.mark.parametrize("method", REFERENCES)
@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_rows_fail_their_request_alone(
    method: Method, name: str, temperature: float
) -> None:
    """At the first row, in the middle, and at the bonus token; and none where the row is behind a
    rejection, which is what the last request shows."""
    case = batch([2, 2, 2, 2], 40, temperature=temperature)
    logits = case.logits.clone()
    likely = torch.nn.functional.one_hot(case.tokens.roll(-1), 40) * 50.0
    logits += likely  # all drafts are accepted
    logits[9] -= 2 * likely[9]  # but for the last request's first
    healthy = emitted(verified(replace(case, logits=logits), method))
    for row in (0, 4, 8, 10):
        BROKEN[name](logits[row])
    verdict = verified(replace(case, logits=logits), method)
    assert verdict.failed.tolist() == [1, 1, 1, 0]
    drafts = case.tokens.tolist()
    assert emitted(verdict) == [[0], [drafts[4], 0], [*drafts[7:9], 0], healthy[3]]
    # A broken row rejects nothing; what it leaves unjudged teaches nobody.
    assert verdict.outcomes.tolist() == [[1, 2, 3, 1], [0, 0, 0, 2]]


def test_broken_draft_is_not_used() -> None:
    """Without a q there is no test: the row's own p gives the token."""
    case = batch([2, 2], 10, "dense")
    assert isinstance(case.draft, DenseDraft)
    case.draft.logits[int(case.slots[0]), 0, 3] = NAN
    for method in REFERENCES:
        compare(case, method)
        assert verified(case, method).accepted[0] == verified(case, method).verified[0] == 0


def test_arguments_that_do_not_fit() -> None:
    case = batch([1, 2], 10, "dense")
    with pytest.raises(ValueError, match="offsets"):
        replace(case, offsets=case.offsets[:-1])
    with pytest.raises(ValueError, match="tokens and positions"):
        replace(case, tokens=case.tokens[:-1])
    with pytest.raises(ValueError, match="processed_row"):
        replace(case, processed=case.logits)
    with pytest.raises(ValueError, match="draft must be"):
        replace(case, gamma=9)
    with pytest.raises(ValueError, match="contiguous words"):
        replace(case, logits=case.logits.T)
    with pytest.raises(ValueError, match="draft has 10 words, more than the 9 of logits"):
        replace(case, logits=case.logits[:, :9].contiguous())
    with pytest.raises(ValueError, match="room is for 1"):
        Verifier(1, 4, case.logits.device).verify(case)
    assert tile_count(case.vocab_size) == 1
