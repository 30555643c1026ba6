"""What verification emits follows the target, whatever was drafted: by chi-square.

Three words, two drafts: every distribution of the target (one for each prefix) and of the drafter
is written down. Blocks are drawn from the drafter, verified by the kernels, and filled up to three
tokens from the target itself; then all 27 sequences must come as often as the target alone would
say them. How much of a block is verified differs between requests, and hangs on the first draft.
The token after the accepted drafts is drawn from two tiles, of two words and of one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

from tests.kernel_cases import DEVICE
from tests.test_losslessness import p_value
from tests.verify_cases import KINDS, batch, emitted, on_device
from vllm_dspark.kernels import residual
from vllm_dspark.kernels.verify import Method, Verifier
from vllm_dspark.kernels.verify_batch import Batch, CompactDraft, DenseDraft

WORDS, GAMMA = 3, 2
SAMPLES = 1 << 20 if DEVICE.type == "cuda" else 96  # the interpreter needs about 60 ms for each
AT_ONCE = 1 << 15
TEMPERATURE = 0.7
SIGNIFICANCE = 1e-3  # of one test; there are 16 and seeds are fixed
METHODS: tuple[Method, ...] = ("standard", "block")
# Tokens [n, γ + 1], whatever behind those that are emitted, and counts of emitted and accepted [n].
Emitted = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
By = Callable[[Batch, Method], Emitted]  # whose kernels


@pytest.fixture(autouse=True)
def two_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual, "WORDS", 2)


def distributions(seed: int, *shape: int) -> np.ndarray:
    """Random distributions over the last axis."""
    weights = np.random.default_rng(seed).uniform(0.05, 1, shape) ** 2
    return weights / weights.sum(-1, keepdims=True)


P = [distributions(10 + i, *(WORDS,) * (i + 1)) for i in range(GAMMA + 1)]  # by the words before


def drafter(kind: str) -> list[np.ndarray]:
    """q of each draft, by the words before; of one word or of two, where the kind has no more."""
    q = [distributions(20 + i, *(WORDS,) * (i + 1)) for i in range(GAMMA)]
    least = {"one-hot": 2, "compact": 1, "dense": 0}[kind]
    kept = [np.where(each.argsort(-1).argsort(-1) >= least, each, 0) for each in q]
    return [each / each.sum(-1, keepdims=True) for each in kept]


def choose(random: np.random.Generator, p: np.ndarray) -> np.ndarray:
    """One word of each distribution [N, V]."""
    return (random.random((len(p), 1)) > p.cumsum(-1)[:, :-1]).sum(-1)


@functools.cache
def outcome(kind: str, method: Method, by: By) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequences [N, 3], accepted and verified drafts [N]."""
    random = np.random.default_rng(5)
    q = drafter(kind)
    first = choose(random, np.broadcast_to(q[0], (SAMPLES, WORDS)))
    second = choose(random, q[1][first])
    lengths = np.where(first == 0, 1, 2)  # what follows the first draft has no say
    lengths[::7] = 0
    parts = []
    for at in range(0, SAMPLES, AT_ONCE):
        some = slice(at, at + AT_ONCE)
        case = _case(kind, q, first[some], second[some], lengths[some], at)
        parts.append([tensor.cpu().numpy() for tensor in by(on_device(case), method)])
    tokens, counts, accepted = (np.concatenate(part) for part in zip(*parts, strict=True))
    for i in range(1, GAMMA + 1):
        prefix = tuple(tokens[:, :i].T)
        tokens[:, i] = np.where(counts > i, tokens[:, i], choose(random, P[i][prefix]))
    return tokens, accepted, lengths


def by_ours(case: Batch, method: Method) -> Emitted:
    """What our kernels emit."""
    verdict = Verifier(len(case.slots), case.gamma, DEVICE).verify(case, method)
    assert not verdict.failed.any()
    return verdict.tokens, verdict.emitted, verdict.accepted


def by_vllms(case: Batch, method: Method) -> Emitted:
    """What vLLM's own emit."""
    rows, slots = len(case.logits), case.slots.to(torch.int32)
    lengths = case.offsets.diff()
    expanded = slots.repeat_interleave(lengths)
    local = torch.arange(rows, device=DEVICE) - case.offsets[:-1].repeat_interleave(lengths)
    heat = case.temperature[expanded.long()]
    tokens, counts = rejection_sample(
        case.logits / torch.where(heat == 0, 1, heat)[:, None],
        case.draft.logits if isinstance(case.draft, DenseDraft) else None,
        case.tokens,
        case.offsets,
        case.positions,
        slots,
        expanded,
        local.to(torch.int32),
        case.temperature,
        case.seeds,
        case.gamma,
        use_block_verification=method == "block",
    )
    return tokens, counts, counts - 1


def _case(kind: str, q: list[np.ndarray], first: Any, second: Any, lengths: Any, at: int) -> Batch:
    """Blocks of these drafts, of which as many are verified as `lengths` say."""
    requests = len(first)
    p_rows = np.stack(
        [np.broadcast_to(P[0], (requests, WORDS)), P[1][first], P[2][first, second]], 1
    )
    q_rows = np.stack([np.broadcast_to(q[0], (requests, WORDS)), q[1][first]], 1)
    in_use = np.arange(GAMMA + 1) <= lengths[:, None]
    own = np.stack([np.zeros_like(first), first, second], 1)  # the token that a row stands behind
    draft: DenseDraft | CompactDraft | None = None
    with np.errstate(divide="ignore"):
        logits, logprobs = torch.tensor(np.log(p_rows[in_use])), torch.tensor(np.log(q_rows))
    if kind == "dense":
        draft = DenseDraft((TEMPERATURE * logprobs).float())
    elif kind == "compact":
        ids = torch.tensor([2, 0, 1], dtype=torch.int32).repeat(requests, GAMMA, 1)
        draft = CompactDraft(ids, logprobs[..., [2, 0, 1]].float().contiguous())
    return Batch(
        logits=(TEMPERATURE * logits).float(),
        offsets=torch.tensor(np.append(0, (lengths + 1).cumsum()), dtype=torch.int32),
        tokens=torch.tensor(own[in_use]),
        positions=torch.tensor(np.broadcast_to(np.arange(50, 53), own.shape)[in_use]),
        slots=torch.arange(requests),
        temperature=torch.full((requests,), TEMPERATURE),
        seeds=torch.arange(at, at + requests) * 1_000_003,
        gamma=GAMMA,
        draft=draft,
    )


WAYS = [(kind, method, by_ours) for kind in KINDS for method in METHODS]
WAYS += [(kind, "block", by_vllms) for kind in ("one-hot", "dense")]


@pytest.mark.parametrize(("kind", "method", "by"), WAYS)
def test_emitted_tokens_follow_the_target(kind: str, method: Method, by: By) -> None:
    """vLLM's kernels verify blocks that we cut short, too."""
    tokens, _, _ = outcome(kind, method, by)
    joint = P[0][:, None, None] * P[1][:, :, None] * P[2]
    assert p_value(tokens, joint) > SIGNIFICANCE
    for i in range(GAMMA + 1):
        others = tuple(j for j in range(GAMMA + 1) if j != i)
        assert p_value(tokens[:, [i]], np.asarray(joint.sum(others))) > SIGNIFICANCE


@pytest.mark.parametrize("kind", ["dense", "compact"])
def test_tokens_of_another_target_are_found_out(kind: str) -> None:
    """What was drafted, taken without a test, fails at this number of samples."""
    q, random = drafter(kind), np.random.default_rng(6)
    first = choose(random, np.broadcast_to(q[0], (SAMPLES, WORDS)))
    assert p_value(first[:, None], P[0]) < SIGNIFICANCE


def expected_accepted(kind: str, method: Method) -> float:
    """Mean accepted drafts, by the formulas of the two methods, over all blocks and lengths."""
    q, mean = drafter(kind), 0.0
    for first in range(WORDS):
        for second in range(WORDS):
            ratios = [P[0][first] / max(q[0][first], 1e-300)]
            ratios += [P[1][first, second] / max(q[1][first, second], 1e-300)]
            kept, chances = 1.0, []
            for ratio in ratios[: 1 if first == 0 else 2]:
                kept = min(kept * ratio, 1.0) if method == "block" else kept * min(ratio, 1.0)
                chances.append(kept)
            mean += q[0][first] * q[1][first, second] * sum(chances)
    return mean


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_accept_as_many_as_they_should(kind: str) -> None:
    """By blocks at least as many as one by one, here more unless the draft is a point."""
    one_by_one, by_blocks = (expected_accepted(kind, method) for method in METHODS)
    assert by_blocks > one_by_one * (1.0 if kind == "one-hot" else 1.01) - 1e-12
    for method, mean in zip(METHODS, (one_by_one, by_blocks), strict=True):
        _, accepted, lengths = outcome(kind, method, by_ours)
        judged = accepted[np.arange(SAMPLES) % 7 > 0]
        assert abs(judged.mean() - mean) < 4 * judged.std() / len(judged) ** 0.5
        assert (accepted <= lengths).all()


@pytest.mark.parametrize("kind", ["one-hot", "dense"])
def test_drafts_are_accepted_as_vllm_does(kind: str) -> None:
    """Same seeds and positions, same accepted drafts, and the same tokens of greedy requests. What
    a sampled request is given behind its drafts is another draw from the same distribution."""
    case = batch([4, 0, 3, 1, 4], 60, kind, temperature=[0.8, 1, 0, 0.5, 1])
    tokens, counts, _ = by_vllms(case, "standard")
    theirs = [row[:n] for row, n in zip(tokens.tolist(), counts.tolist(), strict=True)]
    ours = emitted(Verifier(5, 4, DEVICE).verify(case))
    assert [row[:-1] for row in ours] == [row[:-1] for row in theirs]
    assert ours[2] == theirs[2]  # the greedy one
