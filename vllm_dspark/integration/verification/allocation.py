"""The ranking of `vllm_dspark.scheduler.budget`, on tensors: no host value is read.

Everything here runs on any device, and on CPU tensors gives what the numpy functions give.
`allocation_kernel` does the same in one launch.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch

from vllm_dspark.calibration.memory import LOGIT_LIMIT
from vllm_dspark.calibration.online import MARGIN

RAW_MARGIN = 1 / (1 + math.exp(LOGIT_LIMIT))  # its logit is −LOGIT_LIMIT
_LOGIT_MARGIN = math.log(1 / MARGIN - 1)


class Candidates(NamedTuple):
    """The drafts of a batch that may be verified, beside their confidences."""

    most: int  # drafts in all, sum of `limits`
    limits: torch.Tensor  # int32 [R], drafts of each request
    others_ends: torch.Tensor  # int32 [R], running sum of tokens that run in any case
    regimes: torch.Tensor  # int32 [R], 0 greedy, 1 sampled
    regime: int | None  # that of all requests, if they have the same


class Allocation(Protocol):
    """Shares a budget out and lays the batch out."""

    def __call__(
        self,
        confidence: torch.Tensor,
        places: torch.Tensor | None,
        candidates: Candidates,
        maps: torch.Tensor,
        budget: int,
        offsets: torch.Tensor,
        queries: torch.Tensor,
    ) -> None:
        """Admit the `budget` likeliest drafts.

        Args:
            confidence: float32 [≥ R, γ], raw.
            places: int [R], the requests' rows of it; None if they are the first R in order.
            candidates: of the R requests.
            maps: float32 [2, 2, γ], slopes and intercepts as `OnlineCalibrator.affine` has them.
            budget: drafts, 0 to `candidates.most`.
            offsets: int32 [R + 1], out, first logits row of each request; [0] is 0 already.
            queries: int32 [R + 1], out, first token of each request; [0] is 0 already.
        """


class TorchAllocation:
    """By operations of torch.

    Args:
        slots: most requests of a batch.
        bonus: logits rows of a request without drafts.
        device: of all tensors.
    """

    def __init__(self, slots: int, bonus: int, device: torch.device) -> None:
        self._bonus_ends = torch.arange(1, slots + 1, dtype=torch.int32, device=device) * bonus

    def __call__(
        self,
        confidence: torch.Tensor,
        places: torch.Tensor | None,
        candidates: Candidates,
        maps: torch.Tensor,
        budget: int,
        offsets: torch.Tensor,
        queries: torch.Tensor,
    ) -> None:
        """See `Allocation`."""
        lengths = self._lengths(confidence, places, candidates, maps, budget)
        ends = lengths.cumsum(0, dtype=torch.int32)
        torch.add(ends, self._bonus_ends[: len(ends)], out=offsets[1:])
        torch.add(ends, candidates.others_ends, out=queries[1:])

    def _lengths(
        self,
        confidence: torch.Tensor,
        places: torch.Tensor | None,
        candidates: Candidates,
        maps: torch.Tensor,
        budget: int,
    ) -> torch.Tensor:
        """Verified drafts, int32 [R]."""
        limits = candidates.limits
        if budget == 0 or len(limits) == 1:
            return torch.full_like(limits, budget)
        if budget == candidates.most:
            return limits
        own = confidence[: len(limits)] if places is None else confidence[places]
        regimes = candidates.regimes if candidates.regime is None else candidates.regime
        survival = calibrated_survival(own, regimes, maps[0], maps[1])
        full = candidates.most == survival.numel()
        return admit(survival, None if full else limits, budget)


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
    logit = torch.logit(confidence, eps=RAW_MARGIN).nan_to_num_(nan=0.0)
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
