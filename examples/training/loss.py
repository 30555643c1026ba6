"""The drafter's loss (arXiv 2607.05147, "Training").

With q_k the draft distribution at position k = 1..gamma, p_k the target's at the same place and
TV_k = 1/2 || q_k - p_k ||_1, the probability that rejection sampling turns x_k down:

    loss = mean over k, weighted w_k = exp(-(k - 1) / gamma), of
           0.1 CE(q_k, x_k) + 0.9 TV_k + 1.0 BCE(c_k, 1 - TV_k)

Early positions weigh more: a later one counts only if all before it survived. The label of the
confidence, 1 - TV_k, is detached, so the confidence never bends the distributions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

CROSS_ENTROPY_WEIGHT = 0.1
TOTAL_VARIATION_WEIGHT = 0.9
CONFIDENCE_WEIGHT = 1.0


@dataclass
class DraftLoss:
    """The loss and its parts, scalars unless noted."""

    total: torch.Tensor
    cross_entropy: torch.Tensor  # nats
    total_variation: torch.Tensor  # [0, 1]
    confidence: torch.Tensor  # binary cross-entropy, nats
    acceptance: torch.Tensor  # [gamma], mean 1 - TV_k, no gradient


def position_weights(block_size: int, device: torch.device) -> torch.Tensor:
    """exp(-(k - 1) / gamma) for k = 1..gamma, scaled to sum to one: fp32 [gamma]."""
    weights = torch.exp(-torch.arange(block_size, device=device) / block_size)
    return weights / weights.sum()


def total_variation(draft_logits: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    """1/2 || softmax(draft) - softmax(target) ||_1 over the last axis: [..., V] → [...]."""
    return 0.5 * (draft_logits.softmax(-1) - target_logits.softmax(-1)).abs().sum(-1)


def draft_loss(
    draft_logits: torch.Tensor,  # fp32 [N, gamma, V], Markov bias included
    target_logits: torch.Tensor,  # fp32 [N, gamma, V], no gradient
    labels: torch.Tensor,  # int [N, gamma], the tokens that followed
    confidence_logits: torch.Tensor,  # fp32 [N, gamma]
) -> DraftLoss:
    """Loss of N blocks. Dead-word biases are the caller's, on both sets of logits."""
    weights = position_weights(labels.shape[1], labels.device)
    cross_entropy = F.cross_entropy(
        draft_logits.flatten(0, 1), labels.flatten(), reduction="none"
    ).view_as(labels)
    variation = total_variation(draft_logits, target_logits)
    survival = (1.0 - variation).detach().clamp(0.0, 1.0)
    confidence = F.binary_cross_entropy_with_logits(confidence_logits, survival, reduction="none")
    parts = [(part.mean(0) * weights).sum() for part in (cross_entropy, variation, confidence)]
    return DraftLoss(
        total=CROSS_ENTROPY_WEIGHT * parts[0]
        + TOTAL_VARIATION_WEIGHT * parts[1]
        + CONFIDENCE_WEIGHT * parts[2],
        cross_entropy=parts[0],
        total_variation=parts[1],
        confidence=parts[2],
        acceptance=survival.mean(0),
    )
