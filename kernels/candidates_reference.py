"""`CandidateFinder.find` in plain torch, by a stable sort."""

from __future__ import annotations

import torch


def candidates_reference(
    base_logits: torch.Tensor,  # [rows, V]
    count: int,  # K
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draft words int32 [rows, K], ascending, and their base logits float32 [rows, K]."""
    values = base_logits.float()
    values = values.masked_fill(values.isnan(), -torch.inf)
    order = values.sort(dim=-1, descending=True, stable=True).indices
    ids = order[:, :count].sort(dim=-1).values
    return ids.int(), values.gather(1, ids)
