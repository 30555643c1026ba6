"""Device mode: how many drafts is decided on the host, whose is decided on the GPU.

The ranking reads the confidences of the current block where they were computed; the host never
learns the lengths and never waits. Needs attention that takes query lengths from the device, and
CUDA graphs that replay batches of mixed lengths.

The drafter overwrites its confidences in the next step that draws. Mostly that step has the same
requests in the same order, or verifies all there is; then nothing is copied. What a request that
sits out is still to be ranked by is kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_dspark.calibration.online import OnlineCalibrator
from vllm_dspark.integration.verification.allocation import (
    Allocation,
    Candidates,
    TorchAllocation,
)
from vllm_dspark.integration.verification.batch import Batch, Rows
from vllm_dspark.integration.verification.manager import VerificationManager
from vllm_dspark.scheduler.fixed import Ints


class DeviceVerification(VerificationManager):
    """Decides on the GPU.

    Args:
        calibrator: the policy's; its maps are kept on the device.
        rest: see `VerificationManager`.
        allocation: ranks and lays out; None is torch's.
    """

    mode = "device"

    def __init__(
        self, calibrator: OnlineCalibrator, *rest: Any, allocation: Allocation | None = None
    ) -> None:
        super().__init__(*rest)
        device = self.layout.query_start_loc.device
        slots, gamma = self.layout.query_start_loc.shape[0] - 1, self.policy.gamma
        self._calibrator = calibrator
        self._version = -1
        self._maps = torch.empty((2, 2, gamma), dtype=torch.float32, device=device)
        # Raw confidences of current blocks: those that the last block pass drew, by row, in the
        # drafter's own buffer, and all others by slot.
        self._drafters: tuple[Ints, torch.Tensor, torch.Tensor] | None = None
        self._kept = torch.full((slots, gamma), 0.5, dtype=torch.float32, device=device)
        self._cu_num_logits = torch.zeros(slots + 1, dtype=torch.int32, device=device)
        if allocation is None:
            allocation = TorchAllocation(slots, self.layout.num_bonus_tokens, device)
        self._allocation = allocation
        self._known: tuple[Rows, Candidates] | None = None

    def observe(self, num_sampled: torch.Tensor, num_rejected: torch.Tensor) -> None:
        """As there. The last call before the drafter draws again."""
        if not self._verifies:
            self._keep()  # nobody looked at them in this step
        super().observe(num_sampled, num_rejected)

    def _decide(self, batch: Batch) -> None:
        """Whose drafts are verified is decided on the device. Confidences that other requests are
        to be ranked by are kept."""
        if self._drafters is not None and not np.array_equal(self._drafters[0], batch.rows.slots):
            self._keep()

    def _drawn(self, confidence: torch.Tensor, input_batch: Any) -> None:
        slots = input_batch.idx_mapping_np.copy()
        self._drafters = slots, input_batch.idx_mapping, confidence

    def _keep(self) -> None:
        if self._drafters is not None:
            _, slots, confidence = self._drafters
            self._kept[slots] = confidence
            self._drafters = None

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
        verifying = int(np.count_nonzero(num_draft_tokens_per_req))  # they lead the batch
        share, more = divmod(batch.budget, verifying)
        others[:verifying] += share
        others[:more] += 1
        return others, cu_num_logits_np

    def reallocate_drafts(self, req_ids: list[str], idx_mapping: torch.Tensor) -> tuple[Any, ...]:
        """Rank and lay out, without reading anything back."""
        batch = self._take_batch(req_ids)
        if not batch.trims:
            self._drafters = None  # these blocks are verified, whatever their confidences
            return self._whole(batch)
        count, held = len(req_ids), self._drafters
        cu_num_logits = self._cu_num_logits[: count + 1]
        self._allocation(
            self._kept if held is None else held[2],
            idx_mapping if held is None else None,
            self._candidates(batch.rows),
            self._current_maps(),
            batch.budget,
            cu_num_logits,
            # Beyond the last row the runner has filled in the number of tokens, which is right.
            self.layout.query_start_loc[: count + 1],
        )
        return self._laid_out(cu_num_logits, batch.budget)

    def _candidates(self, rows: Rows) -> Candidates:
        """Copied to the device once for as many steps as these rows last."""
        if self._known is None or self._known[0] is not rows:
            limits = self.policy.limits(rows.slots, rows.drafts)
            sampled = self.policy.sampled[rows.slots]
            host = np.stack([limits, np.cumsum(rows.others), sampled]).astype(np.int32)
            device = self.layout.query_start_loc.device
            limits_there, others_ends, regimes = async_tensor_h2d(host, device=device)
            regime = int(sampled[0]) if (sampled == sampled[0]).all() else None
            most = int(limits.sum())
            self._known = rows, Candidates(most, limits_there, others_ends, regimes, regime)
        return self._known[1]

    def _current_maps(self) -> torch.Tensor:
        """Slopes and intercepts [2, 2, γ]; copied to the device when the calibrator moved on."""
        if self._version != self._calibrator.version:
            self._version = self._calibrator.version
            maps = np.stack(self._calibrator.affine()).astype(np.float32)
            async_tensor_h2d(maps, out=self._maps)
        return self._maps
