"""`DenseDrafter.draw` in plain torch, in float64."""

from __future__ import annotations

import torch

from vllm_dspark.kernels.dense_scores_reference import dense_scores_reference
from vllm_dspark.kernels.draws import Draws
from vllm_dspark.kernels.head_state_reference import head_state_reference
from vllm_dspark.kernels.head_weights import HeadWeights


def dense_reference(
    base_logits: torch.Tensor,  # [R, d, V]
    hidden: torch.Tensor,  # [R, d, D]
    anchors: torch.Tensor,  # int [R]
    head: HeadWeights,
    draws: Draws | None = None,
    cache_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens int64 [R, d], target ids, and logits before temperature float64 [R, d, V]; arguments
    as those of `DenseDrafter.draw`. Equal scores go to the lowest word."""
    share = head.hidden_part(hidden)
    previous, state = anchors, None
    tokens, logits = [], []
    for k in range(base_logits.shape[1]):
        own = None if share is None else share[:, k]
        latent, state = head_state_reference(head, previous, own, state)
        logit, score = dense_scores_reference(
            base_logits[:, k], latent, head.w2, draws, k,
            scale=head.w2_scale, words=head.words, cache_dtype=cache_dtype,
        )  # fmt: skip
        previous = score.argmax(dim=-1)
        if head.words is not None:
            previous = head.words[previous]
        tokens.append(previous)
        logits.append(logit)
    return torch.stack(tokens, dim=1), torch.stack(logits, dim=1)
