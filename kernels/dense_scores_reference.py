"""`dense_scores` in plain torch, in float64 and with all of [R, V] in memory."""

from __future__ import annotations

import torch

from vllm_dspark.kernels.draws import Draws
from vllm_dspark.kernels.gumbel_reference import gumbel_reference


def dense_scores_reference(
    base: torch.Tensor,  # [R, V]
    latent: torch.Tensor,  # [R, r]
    w2: torch.Tensor,  # [V, r]
    draws: Draws | None,
    step: int,
    *,
    scale: torch.Tensor | None = None,  # float32 [V], of FP8 rows of w2
    words: torch.Tensor | None = None,  # int64 [V]
    cache_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits before temperature and scores, both float64 [R, V], over draft words.

    With a `cache_dtype`, logits of rows that have a slot are rounded to it, as in `dense_scores`.
    """
    rows = w2.double() if scale is None else w2.double() * scale.double()[:, None]
    logits = base.double() + latent.double() @ rows.T
    logits = logits.masked_fill(logits.isnan(), -torch.inf)
    if draws is None:
        return logits, logits
    slots, positions = draws.slots[:, step], draws.positions[:, step]
    real = slots >= 0
    if cache_dtype is not None:
        rounded = logits.float().to(cache_dtype).double()
        logits = torch.where(real[:, None], rounded, logits)
    slots = slots.clamp_min(0)
    temperature = torch.where(real, draws.temperature[slots], 0.0).double()[:, None]
    if words is None:
        words = torch.arange(base.shape[1], device=base.device)
    seeds = draws.seeds[slots]
    noise = gumbel_reference(seeds, positions - 1, words, step=step, by_step=draws.by_step)
    drawn = temperature != 0
    return logits, torch.where(drawn, logits / temperature.masked_fill(~drawn, 1) + noise, logits)
