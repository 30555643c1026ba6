"""`confidence` in plain torch."""

from __future__ import annotations

import torch

from vllm_dspark.kernels.head_weights import ConfidenceWeights


def confidence_reference(
    hidden: torch.Tensor,  # [R, d, D]
    w1: torch.Tensor,  # [V_target, r]
    weights: ConfidenceWeights,
    anchors: torch.Tensor,  # int [R]
    tokens: torch.Tensor,  # int64 [R, d]
) -> torch.Tensor:
    """Float64 [R, d]; arguments as those of `confidence`."""
    depth, width = hidden.shape[1:]
    features = hidden.double()
    if weights.weight.shape[0] != width:
        previous = torch.cat([anchors[:, None].long(), tokens[:, : depth - 1]], dim=1)
        features = torch.cat([features, w1[previous].double()], dim=-1)
    logit = features @ weights.weight.double()
    if weights.bias is not None:
        logit = logit + weights.bias.double()
    return torch.sigmoid(logit / weights.temperatures[:depth].double())
