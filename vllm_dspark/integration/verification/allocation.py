"""The ranking of `vllm_dspark.scheduler.budget`, on tensors: no host value is read.

Everything here runs on any device, and on CPU tensors gives what the numpy functions give.
"""

from __future__ import annotations

import torch

from vllm_dspark.calibration.memory import LOGIT_LIMIT
from vllm_dspark.calibration.online import MARGIN


def calibrated_survival(
    confidence: torch.Tensor,  # float32 [R, γ], raw
    sampled: torch.Tensor,  # int64 [R], 0 greedy, 1 sampled
    slope: torch.Tensor,  # float32 [2, γ], as `OnlineCalibrator.affine`
    intercept: torch.Tensor,  # float32 [2, γ]
) -> torch.Tensor:
    """Survival float32 [R, γ], never increasing along a row, not even by rounding.

    What is no probability counts as a half; a new block of a live drafter has none such.
    """
    known = torch.nan_to_num(confidence, nan=0.5).clamp(0, 1)
    logit = torch.logit(known).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
    conditional = torch.sigmoid(slope[sampled] * logit + intercept[sampled])
    survival = conditional.clamp(MARGIN, 1 - MARGIN).cumprod(dim=1)
    # A parallel scan multiplies in another order than left to right, so neighbours could swap.
    return survival.cummin(dim=1).values


def admit(survival: torch.Tensor, capacities: torch.Tensor, budget: int) -> torch.Tensor:
    """The `budget` best candidates, as a prefix of each row.

    Args:
        survival: float [R, γ] in [0, 1], non-increasing along a row.
        capacities: int [R], row r has candidates j < capacities[r] only.
        budget: drafts, 0 to the sum of `capacities`.

    Returns:
        In the dtype of `capacities`, [R]: prefix lengths with sum `budget`. Ties: a prefix before
        its extension, then the lower row, as `scheduler.budget.allocate`.
    """
    positions = torch.arange(survival.shape[1], device=survival.device)
    candidates = survival.masked_fill(positions >= capacities[:, None], -1.0).flatten()
    # Stable over the rows laid end to end, which is the order that ties are to have.
    order = candidates.sort(descending=True, stable=True).indices[:budget]
    admitted = torch.zeros_like(candidates, dtype=torch.bool).index_fill_(0, order, True)
    return admitted.view_as(survival).sum(dim=1, dtype=capacities.dtype)
