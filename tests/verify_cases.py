"""Random batches for the verification kernels, on a GPU or for the interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from tests.kernel_cases import DEVICE
from vllm_dspark.kernels.residual import residual
from vllm_dspark.kernels.verify import Method, Verifier
from vllm_dspark.kernels.verify_batch import Batch, CompactDraft, DenseDraft
from vllm_dspark.kernels.verify_verdict import Choice, Verdict

KINDS = ("one-hot", "dense", "compact")
CANDIDATES = 5
NAN, INF = float("nan"), float("inf")


def batch(
    lengths: Sequence[int],
    vocab: int,
    kind: str = "one-hot",
    *,
    gamma: int = 4,
    temperature: float | Sequence[float] = 0.8,
    min_p: float | Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Batch:
    """Requests of the given numbers of drafts, whose targets like what was drafted now and then.

    Request i has slot R - i, so that a kernel which takes one for the other is caught.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    requests, slots = len(lengths), len(lengths) + 1
    heat = _by_slot(temperature, requests)
    offsets = torch.tensor([0, *(length + 1 for length in lengths)]).cumsum(0)
    rows = int(offsets[-1])
    tokens = torch.randint(vocab, (rows,), generator=generator)
    logits = normal(rows, vocab)
    draft: DenseDraft | CompactDraft | None = None
    own = normal(slots, gamma, vocab).to(dtype)
    ids = torch.rand(slots, gamma, vocab, generator=generator).argsort(-1)
    ids = ids[..., :CANDIDATES].int().contiguous()
    logprobs = torch.log_softmax(normal(*ids.shape), -1)
    for request, length in enumerate(lengths):
        slot = requests - request
        for step in range(length):
            row = int(offsets[request]) + step
            if kind == "dense":
                q = torch.softmax(own[slot, step].float() / (heat[slot] or 1), -1)
                tokens[row + 1] = torch.multinomial(q, 1, generator=generator)[0]
                logits[row] = own[slot, step] + 0.7 * normal(vocab)
            elif kind == "compact":
                pick = torch.multinomial(logprobs[slot, step].exp(), 1, generator=generator)[0]
                tokens[row + 1] = ids[slot, step, pick]
                logits[row, ids[slot, step].long()] += 1 + logprobs[slot, step]
            else:
                logits[row, tokens[row + 1]] += 2.5
    if kind == "dense":
        draft = DenseDraft(own)
    elif kind == "compact":
        draft = CompactDraft(ids, logprobs)
    least = None if min_p is None else _by_slot(min_p, requests)
    return on_device(
        Batch(
            logits=logits.to(dtype),
            offsets=offsets.int(),
            tokens=tokens,
            positions=7 + 3 * torch.arange(rows),
            slots=torch.arange(requests, 0, -1),
            temperature=heat,
            seeds=torch.arange(slots) * 12_345_678_901 - 5 - seed,
            gamma=gamma,
            min_p=least,
            draft=draft,
        )
    )


def _by_slot(values: float | Sequence[float], requests: int) -> torch.Tensor:
    if isinstance(values, float | int):
        values = [values] * requests
    return torch.tensor([NAN, *reversed(list(values))], dtype=torch.float32)  # slot 0 is nobody's


def on_device(case: Batch) -> Batch:
    """The same batch where the kernels run."""
    moved: dict[str, Any] = {
        name: value.to(DEVICE)
        for name, value in vars(case).items()
        if isinstance(value, torch.Tensor)
    }
    if isinstance(case.draft, DenseDraft):
        moved["draft"] = DenseDraft(case.draft.logits.to(DEVICE))
    elif isinstance(case.draft, CompactDraft):
        moved["draft"] = CompactDraft(case.draft.ids.to(DEVICE), case.draft.logprobs.to(DEVICE))
    return replace(case, **moved)


def only(case: Batch, request: int) -> Batch:
    """One request of a batch, by itself."""
    start, stop = (int(at) for at in case.offsets[request : request + 2])
    return replace(
        case,
        logits=case.logits[start:stop],
        offsets=case.offsets[request : request + 2] - start,
        tokens=case.tokens[start:stop],
        positions=case.positions[start:stop],
        slots=case.slots[request : request + 1],
    )


def verified(case: Batch, method: Method = "standard") -> Verdict:
    """What a fresh verifier says."""
    return Verifier(case.requests, case.gamma, case.logits.device).verify(case, method)


def drawn(case: Batch, rejected: Sequence[int], factor: float = 1.0) -> Verdict:
    """What `residual` by itself says of requests whose first draft is rejected.

    Args:
        rejected: that draft, or -1 where the token is to be drawn from p itself.
        factor: of p, in what the rejected draft leaves.
    """
    device = case.logits.device
    choice, verdict = Choice.empty(case.requests, device), Verdict.empty(case.requests, 1, device)
    choice.row[:, 0] = case.offsets[:-1]
    choice.row[:, 1] = torch.tensor(rejected, device=device)
    distributions = [case.logits[case.offsets[:-1].long()]]
    if isinstance(case.draft, DenseDraft):
        distributions.append(case.draft.logits[case.slots, 0])
    heat = case.temperature[case.slots][:, None]
    for i, logits in enumerate(distributions):
        peak = logits.float().amax(1, keepdim=True)
        choice.totals[:, 2 * i] = peak[:, 0]
        choice.totals[:, 2 * i + 1] = ((logits - peak) / heat).exp().sum(1)
    choice.totals[:, 4] = factor
    verdict.tokens.fill_(-1)
    verdict.counts.copy_(torch.tensor([[1], [0], [0], [0]]).expand(4, case.requests))
    residual(case, choice, verdict)
    return verdict


def emitted(verdict: Verdict) -> list[list[int]]:
    """The tokens that count, of each request."""
    lengths = verdict.emitted.tolist()
    return [row[:n] for row, n in zip(verdict.tokens.tolist(), lengths, strict=True)]
