"""`candidate_walk` in plain torch, in float64."""

from __future__ import annotations

import torch

from vllm_dspark.kernels.draws import Draws
from vllm_dspark.kernels.gumbel_reference import gumbel_reference
from vllm_dspark.kernels.head_state_reference import head_state_reference
from vllm_dspark.kernels.head_weights import HeadWeights


def passes_filters_reference(
    logits: torch.Tensor,  # [R, K], after temperature
    top_k: torch.Tensor,  # int [R]
    top_p: torch.Tensor,  # [R]
) -> torch.Tensor:
    """`passes_filters` for R requests: bool [R, K]."""
    ordered = logits.sort(dim=-1, descending=True).values
    kth = ordered.gather(1, top_k.clamp_max(logits.shape[1])[:, None].long() - 1)
    probability = torch.softmax(ordered.masked_fill(ordered < kth, -torch.inf), dim=-1)
    ahead = probability.cumsum(dim=-1) - probability
    inside = (ordered >= kth) & (ahead < top_p[:, None].double())
    return logits >= ordered.masked_fill(~inside, torch.inf).amin(dim=-1, keepdim=True)


def candidate_walk_reference(
    ids: torch.Tensor,  # int32 [R, d, K]
    values: torch.Tensor,  # float32 [R, d, K]
    anchors: torch.Tensor,  # int [R]
    head: HeadWeights,
    share: torch.Tensor | None,  # [R, d, r or 3r]
    draws: Draws | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens int64 [R, d], ids int32 [R, d, K] as the target's, log-probabilities float64
    [R, d, K]; arguments as those of `candidate_walk`."""
    words = ids.long()
    named = words if head.words is None else head.words[words]
    previous, state = anchors, None
    tokens, logprobs = [], []
    for k in range(ids.shape[1]):
        own = None if share is None else share[:, k]
        latent, state = head_state_reference(head, previous, own, state)
        bias = torch.einsum("rki,ri->rk", head.w2[words[:, k]].double(), latent)
        logits = values[:, k].double() + bias
        logits = logits.masked_fill(logits.isnan(), -torch.inf)
        place, logprob = _draw(logits, named[:, k], draws, k)
        previous = named[:, k].gather(1, place)[:, 0]
        tokens.append(previous)
        logprobs.append(logprob)
    return torch.stack(tokens, 1), named.int(), torch.stack(logprobs, 1)


def _draw(
    logits: torch.Tensor, named: torch.Tensor, draws: Draws | None, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Place of the drawn candidate, [R, 1], and log-probabilities [R, K]."""
    drawn = torch.zeros(len(logits), 1, dtype=torch.bool, device=logits.device)
    scores = logits
    if draws is not None:
        slots, positions = draws.slots[:, step], draws.positions[:, step]
        heat = torch.where(slots >= 0, draws.temperature[slots.clamp_min(0)], 0.0)[:, None]
        slots, drawn = slots.clamp_min(0), heat != 0
        warm = logits / heat.double().masked_fill(~drawn, 1)
        if draws.top_k is not None and draws.top_p is not None:
            passes = passes_filters_reference(warm, draws.top_k[slots], draws.top_p[slots])
            warm = warm.masked_fill(~passes, -torch.inf)
        logits = torch.where(drawn, warm, logits)
        noise = gumbel_reference(
            draws.seeds[slots], positions - 1, named, step=step, by_step=draws.by_step
        )
        scores = torch.where(drawn, warm + noise, logits)
    place = scores.argmax(dim=-1, keepdim=True)
    certain = torch.full_like(logits, -torch.inf).scatter(1, place, 0.0)
    nothing = logits.isneginf().all(dim=-1, keepdim=True)
    return place, torch.where(drawn & ~nothing, logits.log_softmax(dim=-1), certain)
