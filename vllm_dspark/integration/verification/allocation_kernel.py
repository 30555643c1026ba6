"""The ranking of `allocation` in one launch, and which of the two serves."""

from __future__ import annotations

import os

import torch

from vllm_dspark.calibration.online import MARGIN
from vllm_dspark.config import DSparkConfig
from vllm_dspark.integration.verification.allocation import (
    RAW_MARGIN,
    Allocation,
    Candidates,
    TorchAllocation,
)
from vllm_dspark.integration.verification.batch import Layout
from vllm_dspark.kernels.allocate import MOST_DRAFTS, MOST_REQUESTS, Calibration, allocate
from vllm_dspark.kernels.dispatch import choose, device_obstacle, is_measured


def allocation_of(config: DSparkConfig, layout: Layout, gamma: int) -> Allocation:
    """What serves in device mode. Says which, and why, in the log.

    Raises:
        ValueError: DSPARK_KERNELS holds an unknown word.
    """
    device = layout.query_start_loc.device
    slots, bonus = layout.query_start_loc.shape[0] - 1, layout.num_bonus_tokens
    faster = is_measured(device)
    choice = choose(config.kernels, os.environ, _obstacle(slots, gamma, device), faster=faster)
    _log("a Triton kernel" if choice.triton else "torch", choice.why)
    if choice.triton:
        return KernelAllocation(slots, gamma, bonus, device)
    return TorchAllocation(slots, bonus, device)


def _obstacle(slots: int, gamma: int, device: torch.device) -> str | None:
    if slots > MOST_REQUESTS or gamma > MOST_DRAFTS:
        return (
            f"a launch takes {MOST_REQUESTS} requests with {MOST_DRAFTS} drafts, and this engine "
            f"has {slots} with {gamma}"
        )
    return device_obstacle(device, torch.float32)


def _log(who: str, why: str) -> None:
    from vllm.logger import init_logger

    init_logger("vllm.dspark").info_once("vllm-dspark: budgets are shared out by %s: %s", who, why)


class KernelAllocation:
    """By our kernel. It is compiled here, once for every power of two of requests, so that no step
    waits for it: every call has arguments of the same types.

    Args:
        slots: most requests of a batch.
        gamma: γ.
        bonus: logits rows of a request without drafts.
        device: of all tensors.
    """

    def __init__(self, slots: int, gamma: int, bonus: int, device: torch.device) -> None:
        self._bonus = bonus
        self._in_order = torch.arange(slots, device=device)
        confidence = torch.full((slots, gamma), 0.5, device=device)
        maps = torch.ones((2, 2, gamma), device=device)
        offsets, queries = torch.zeros((2, slots + 1), dtype=torch.int32, device=device)
        for requests in {min(1 << n, slots) for n in range(slots.bit_length() + 1)}:
            zeros = torch.zeros(requests, dtype=torch.int32, device=device)
            nothing = Candidates(0, zeros, zeros, zeros, 0)
            self(confidence, None, nothing, maps, 0, offsets, queries)

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
        """See `Allocation`. Always the same variant of the kernel, whatever could be left out."""
        requests = len(candidates.limits)
        allocate(
            confidence,
            Calibration(maps[0], maps[1], RAW_MARGIN, MARGIN),
            candidates.regimes,
            budget,
            candidates.others_ends,
            offsets,
            queries,
            places=self._in_order[:requests] if places is None else places.long(),
            limits=candidates.limits,
            bonus=self._bonus,
        )
