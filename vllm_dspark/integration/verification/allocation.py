"""The ranking of `vllm_dspark.scheduler.budget`, on tensors: no host value is read.

Everything here runs on any device, and on CPU tensors gives what the numpy functions give.
"""

from __future__ import annotations

import math

import torch

from vllm_dspark.calibration.memory import LOGIT_LIMIT
from vllm_dspark.calibration.online import MARGIN

_LEAST = 1 / (1 + math.exp(LOGIT_LIMIT))  # its logit is −LOGIT_LIMIT
_LOGIT_MARGIN = math.log(1 / MARGIN - 1)


def calibrated_survival(
    confidence: torch.Tensor,  # float32 [R, γ], raw
    sampled: torch.Tensor | int,  # int [R], 0 greedy, 1 sampled; or one for all
    slope: torch.Tensor,  # float32 [2, γ], as `OnlineCalibrator.affine`
    intercept: torch.Tensor,  # float32 [2, γ]
) -> torch.Tensor:
    """Survival float32 [R, γ], never increasing along a row, not even by rounding.

    What is no probability counts as a half; a new block of a live drafter has none such.
    """
    # Every operation costs the host a launch, so each does as much as it can: `logit` cuts its
    # argument, and what is worked on is not copied.
    logit = torch.logit(confidence, eps=_LEAST).nan_to_num_(nan=0.0)
    logit = torch.addcmul(intercept[sampled], slope[sampled], logit)
    conditional = logit.clamp_(-_LOGIT_MARGIN, _LOGIT_MARGIN).sigmoid_()
    # A parallel scan multiplies in another order than left to right, so neighbours could swap.
    return conditional.cumprod(dim=1).cummin(dim=1).values


def admit(survival: torch.Tensor, capacities: torch.Tensor | None, budget: int) -> torch.Tensor:
    """The `budget` best candidates, as a prefix of each row.

    Args:
        survival: float [R, γ] in [0, 1], non-increasing along a row.
        capacities: int [R], row r has candidates j < capacities[r] only; None for all γ.
        budget: drafts, 0 to the sum of `capacities`.

    Returns:
        int32 [R]: prefix lengths with sum `budget`. Ties: a prefix before its extension, then the
        lower row, as `scheduler.budget.allocate`.
    """
    if capacities is not None:
        positions = torch.arange(survival.shape[1], device=survival.device)
        survival = survival.masked_fill(positions >= capacities[:, None], -1.0)
    # Stable over the rows laid end to end, which is the order that ties are to have.
    order = survival.flatten().sort(descending=True, stable=True).indices[:budget]
    admitted = survival.new_zeros(survival.numel(), dtype=torch.bool).index_fill_(0, order, True)
    return admitted.view_as(survival).sum(dim=1, dtype=torch.int32)
