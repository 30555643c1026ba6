"""`verify` in plain torch, float64: one request, one row, one word after the other.

The distributions are written down whole, and a token is drawn from each by the same uniform numbers
and noise that the kernels take, tile and word as in `residual`, so that results can be compared
token by token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_dspark.kernels.gumbel import DRAFT_SALT
from vllm_dspark.kernels.gumbel_reference import gumbel_reference
from vllm_dspark.kernels.residual import residual_tiles
from vllm_dspark.kernels.verify_batch import Batch, CompactDraft, DenseDraft
from vllm_dspark.kernels.verify_uniform_reference import uniform_reference


@dataclass(frozen=True)
class Outcome:
    """What becomes of one request.

    Attributes:
        tokens: the accepted drafts and one token more.
        verified: drafts that were judged.
        failed: the row that decides has no distribution; the last token is 0.
        margin: how near the closest decision came to falling the other way, in units of
            probability for tests and of a logit for draws. Roundings of a kernel are far smaller
            than a margin of 1e-4.
    """

    tokens: list[int]
    verified: int
    failed: bool
    margin: float


def target_distribution(batch: Batch, request: int, step: int) -> torch.Tensor | None:
    """p of the row behind `step` drafts, float64 [V]; None if there is none. A greedy request's is
    all on the lowest of the likeliest words."""
    row = int(batch.offsets[request]) + step
    temperature, min_p = _options(batch, request)
    own = -1 if batch.processed_row is None else int(batch.processed_row[row])
    logits = batch.logits[row].double()
    if own >= 0:
        assert batch.processed is not None
        logits = batch.processed[own].double()
        temperature = float(temperature > 0)  # they went through it already
    if logits.isnan().any() or not logits.max().isfinite():
        return None
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), logits.numel()).double()
    p = torch.softmax(logits / temperature, dim=0)
    p = torch.where(p >= min_p * p.max(), p, 0.0)
    return p / p.sum()


def draft_distribution(batch: Batch, request: int, step: int, draft: int) -> torch.Tensor | None:
    """q of the draft at `step`, float64 [V]; None if there is none."""
    slot = int(batch.slots[request])
    temperature, _ = _options(batch, request)
    q = torch.zeros(batch.vocab_size, dtype=torch.float64, device=batch.logits.device)
    if isinstance(batch.draft, DenseDraft):
        logits = batch.draft.logits[slot, step].double()
        if logits.isnan().any() or not logits.max().isfinite():
            return None
        q[: logits.numel()] = torch.softmax(logits / temperature, dim=0)[: q.numel()]
    elif isinstance(batch.draft, CompactDraft):
        logprobs = batch.draft.logprobs[slot, step].double()
        real = logprobs > -float("inf")
        q[batch.draft.ids[slot, step][real].long()] = logprobs[real].exp()
    else:
        q[draft] = 1.0
    return q


def verify_reference(batch: Batch) -> list[Outcome]:
    """Each request verified draft by draft (Leviathan et al. 2023).

    Args:
        batch: on the CPU or a GPU, small.
    """
    return [_verify_one(batch, request) for request in range(batch.requests)]


def drafts_of(batch: Batch, request: int) -> list[int]:
    """The request's drafts before a placeholder."""
    start, stop = (int(at) for at in batch.offsets[request : request + 2])
    drafts = [int(token) for token in batch.tokens[start + 1 : stop]]
    ends = next((i for i, draft in enumerate(drafts) if draft < 0), len(drafts))
    return drafts[:ends]


def draw(batch: Batch, request: int, step: int, weights: torch.Tensor) -> tuple[int, float]:
    """The word that wins log w(x) + g(x) in the tile that wins log W_t + g(t); the likeliest if the
    request is greedy.

    Args:
        weights: float64 [V], not all 0.

    Returns:
        The word, and by how much the closer of the two was won.
    """
    vocab = weights.numel()
    words, tiles = residual_tiles(vocab)
    number = torch.arange(words * tiles + tiles, device=weights.device)  # words, then tiles
    noise = torch.zeros(number.shape, dtype=torch.float64, device=weights.device)
    if float(batch.temperature[int(batch.slots[request])]) > 0:
        row = int(batch.offsets[request]) + step
        seeds = batch.seeds[int(batch.slots[request])][None]
        positions = batch.positions[row][None] - DRAFT_SALT.value
        noise = gumbel_reference(seeds, positions, number)[0]
    weight = torch.nn.functional.pad(weights, (0, words * tiles - vocab)).view(tiles, words)
    tile, tile_margin = _winner(weight.sum(1).log() + noise[words * tiles :])
    word, margin = _winner(weight[tile].log() + noise[: words * tiles].view(tiles, words)[tile])
    return tile * words + word, min(tile_margin, margin)


def _winner(score: torch.Tensor) -> tuple[int, float]:
    """The best of scores [N], the lowest among equals, and its distance to the next."""
    top = score.topk(min(2, score.numel())).values
    margin = float(top[0] - top[-1]) if score.numel() > 1 else float("inf")
    return int(score.argmax()), margin


def _verify_one(batch: Batch, request: int) -> Outcome:
    drafts = drafts_of(batch, request)
    slot, start = int(batch.slots[request]), int(batch.offsets[request])
    accepted: list[int] = []
    margin = float("inf")
    for step, draft in enumerate(drafts):
        p = target_distribution(batch, request, step)
        q = draft_distribution(batch, request, step, draft)
        if p is None or q is None:
            break
        greedy = float(batch.temperature[slot]) == 0
        u = uniform_reference(int(batch.seeds[slot]), int(batch.positions[start + step]))
        if not greedy:
            margin = min(margin, abs(float(p[draft] - u * q[draft])) / max(float(q[draft]), 1e-9))
        if not (p[draft] > 0 if greedy else p[draft] > 0 and p[draft] >= u * q[draft]):
            left = p if greedy else (p - q).clamp(min=0)
            token, by = draw(batch, request, step, left)
            return Outcome([*accepted, token], len(drafts), False, min(margin, by))
        accepted.append(draft)
    p = target_distribution(batch, request, len(accepted))
    if p is None:
        return Outcome([*accepted, 0], len(accepted), True, margin)
    token, by = draw(batch, request, len(accepted), p)
    return Outcome([*accepted, token], len(accepted), False, min(margin, by))


def _options(batch: Batch, request: int) -> tuple[float, float]:
    slot = int(batch.slots[request])
    min_p = 0.0 if batch.min_p is None else float(batch.min_p[slot])
    return float(batch.temperature[slot]), min_p
