"""`CandidateDrafter.draw` in plain torch, in float64."""

from __future__ import annotations

import torch

from vllm_dspark.kernels.candidate_walk_reference import candidate_walk_reference
from vllm_dspark.kernels.candidates_reference import candidates_reference
from vllm_dspark.kernels.draws import Draws
from vllm_dspark.kernels.head_weights import HeadWeights


def candidate_reference(
    base_logits: torch.Tensor,  # [R, d, V]
    hidden: torch.Tensor,  # [R, d, D]
    anchors: torch.Tensor,  # int [R]
    head: HeadWeights,
    count: int,  # K
    draws: Draws | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens int64 [R, d], and by row the candidates' target ids int32 [R, d, K] and
    log-probabilities float64 [R, d, K]; arguments as those of `CandidateDrafter.draw`."""
    rows, depth, vocab = base_logits.shape
    found = candidates_reference(base_logits.reshape(rows * depth, vocab), count)
    ids, values = (x.view(rows, depth, count) for x in found)
    return candidate_walk_reference(ids, values, anchors, head, head.hidden_part(hidden), draws)
