"""Device mode: how many drafts is decided on the host, whose is decided on the GPU.

The ranking reads the confidences of the current block where they were computed; the host never
learns the lengths and never waits. Needs attention that takes query lengths from the device, and
CUDA graphs that replay batches of mixed lengths.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_dspark.calibration.online import OnlineCalibrator
from vllm_dspark.integration.verification.allocation import admit, calibrated_survival
from vllm_dspark.integration.verification.batch import Batch
from vllm_dspark.integration.verification.manager import VerificationManager


class DeviceVerification(VerificationManager):
    """Decides on the GPU.

    Args:
        calibrator: the policy's; its maps are kept on the device.
        rest: see `VerificationManager`.
    """

    mode = "device"

    def __init__(self, calibrator: OnlineCalibrator, *rest: Any) -> None:
        super().__init__(*rest)
        device = self.layout.query_start_loc.device
        slots, gamma = self.layout.query_start_loc.shape[0] - 1, self.policy.gamma
        self._calibrator = calibrator
        self._version = -1
        self._maps = torch.empty((2, 2, gamma), dtype=torch.float32, device=device)
        # Raw confidences of every request's current block.
        self._confidence = torch.full((slots, gamma), 0.5, dtype=torch.float32, device=device)
        self._cu_num_logits = torch.zeros(slots + 1, dtype=torch.int32, device=device)

    def _decide(self, batch: Batch) -> None:
        """Nothing: whose drafts are verified is decided on the device."""

    def _drawn(self, confidence: torch.Tensor, input_batch: Any) -> None:
        self._confidence[input_batch.idx_mapping] = confidence

    def compact_batch(
        self,
        num_draft_tokens_per_req: npt.NDArray[np.int32],
        num_scheduled_tokens: npt.NDArray[np.int32],
        cu_num_logits_np: npt.NDArray[np.int32],
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Lengths with the right sum, and the right lengths of all that verify nothing: the budget
        in equal shares. Boundaries of logits rows stay as scheduled, which is an upper bound;
        without any draft they are exact."""
        batch = self._batch
        assert batch is not None
        if not batch.trims:
            return num_scheduled_tokens, cu_num_logits_np
        others = num_scheduled_tokens - num_draft_tokens_per_req
        if batch.budget == 0:
            bonus, dtype = self.layout.num_bonus_tokens, cu_num_logits_np.dtype
            return others, np.arange(len(others) + 1, dtype=dtype) * bonus
        verifying = int((num_draft_tokens_per_req > 0).sum())  # they lead the batch
        share, more = divmod(batch.budget, verifying)
        others[:verifying] += share
        others[:more] += 1
        return others, cu_num_logits_np

    def reallocate_drafts(self, req_ids: list[str], idx_mapping: torch.Tensor) -> tuple[Any, ...]:
        """Rank and lay out, without reading anything back."""
        batch = self._take_batch(req_ids)
        if not batch.trims:
            return self._whole(batch)
        limits = self.policy.limits(batch.slots, batch.drafts)
        sampled = self.policy.sampled[batch.slots]
        device = idx_mapping.device
        host = np.stack([limits, batch.others, sampled]).astype(np.int32)
        capacities, others, regimes = async_tensor_h2d(host, device=device)
        if batch.budget == limits.sum():
            lengths = capacities
        elif batch.budget == 0:
            lengths = torch.zeros_like(capacities)
        else:
            slope, intercept = self._current_maps()
            confidence = self._confidence[idx_mapping]
            survival = calibrated_survival(confidence, regimes, slope, intercept)
            lengths = admit(survival, capacities, batch.budget)
        rows = len(req_ids)
        cu_num_logits = self._cu_num_logits[: rows + 1]
        torch.cumsum(lengths + self.layout.num_bonus_tokens, 0, out=cu_num_logits[1:])
        # Beyond the last row the runner has filled in the number of tokens, which is right.
        torch.cumsum(lengths + others, 0, out=self.layout.query_start_loc[1 : rows + 1])
        return self._laid_out(cu_num_logits, batch.budget)

    def _current_maps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Slope and intercept [2, γ] each; copied to the device when the calibrator moved on."""
        if self._version != self._calibrator.version:
            self._version = self._calibrator.version
            maps = np.stack(self._calibrator.affine()).astype(np.float32)
            async_tensor_h2d(maps, out=self._maps)
        return self._maps[0], self._maps[1]
