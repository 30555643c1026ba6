"""Host mode: query lengths are known on the host before the step is launched. Works everywhere.

On a CPU the ranking is by the current block. On a GPU it is by the newest block before it: the
current one is still being drawn when the host plans, or may have arrived or not, and nothing
waits for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_dspark.integration.verification.batch import Batch, boundaries
from vllm_dspark.integration.verification.manager import VerificationManager


class HostVerification(VerificationManager):
    """Decides on the host."""

    mode = "host"

    def _decide(self, batch: Batch) -> None:
        if batch.trims:
            rows = batch.rows
            current = self.layout.query_start_loc.device.type == "cpu"
            batch.lengths = self.policy.allocate(rows.slots, rows.drafts, batch.budget, current)

    def _drawn(self, confidence: torch.Tensor, input_batch: Any) -> None:
        """Nothing: the policy is told when they arrive."""

    def compact_batch(
        self,
        num_draft_tokens_per_req: npt.NDArray[np.int32],
        num_scheduled_tokens: npt.NDArray[np.int32],
        cu_num_logits_np: npt.NDArray[np.int32],
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """The true lengths.

        They are written into `num_scheduled_tokens`, because the runner keeps that array as an
        upper bound and makes other things of it that have to be exact here, such as which token
        belongs to which LoRA adapter. `num_draft_tokens_per_req` stays what was scheduled: grammar
        masks follow it.
        """
        batch = self._batch
        assert batch is not None
        if not batch.trims:
            return num_scheduled_tokens, cu_num_logits_np
        assert batch.lengths is not None
        num_scheduled_tokens[:] = batch.rows.others + batch.lengths
        return num_scheduled_tokens, boundaries(batch.lengths + self.layout.num_bonus_tokens)

    def reallocate_drafts(self, req_ids: list[str], idx_mapping: torch.Tensor) -> tuple[Any, ...]:
        """The same on the device. Query boundaries are there already, from the host's lengths."""
        batch = self._take_batch(req_ids)
        if not batch.trims:
            return self._whole(batch)
        assert batch.lengths is not None
        rows = self.layout.boundaries(batch.lengths + self.layout.num_bonus_tokens)
        return self._laid_out(rows, batch.budget)
