"""`gumbel` in plain torch: the hash in int64, the noise in float64."""

from __future__ import annotations

import torch

from vllm_dspark.kernels.gumbel import DRAFT_SALT

_ALL = 0xFFFFFFFF


def _rotate(bits: torch.Tensor, n: int) -> torch.Tensor:
    return ((bits << n) | (bits >> (32 - n))) & _ALL


def _absorb(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    word = _rotate((word * 0xCC9E2D51) & _ALL, 15)
    word = (word * 0x1B873593) & _ALL
    return (_rotate(state ^ word, 13) * 5 + 0xE6546B64) & _ALL


def gumbel_reference(
    seeds: torch.Tensor,  # int64 [R]
    positions: torch.Tensor,  # int64 [R], of the token before the drawn one
    words: torch.Tensor,  # int64 [V] or [R, V], ids in the target's vocabulary
    *,
    step: int = 0,
    by_step: bool = False,
) -> torch.Tensor:
    """Standard Gumbel noise, float64 [R, V]; arguments as in `noise_key` and `gumbel`."""
    if by_step:
        seeds = seeds ^ (step << 32)
    state = torch.zeros_like(seeds)
    for word in (seeds & _ALL, (seeds >> 32) & _ALL, (positions + DRAFT_SALT.value) & _ALL):
        state = _absorb(state, word)
    bits = _absorb(state[:, None], words) ^ 16
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & _ALL
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & _ALL
    bits = bits ^ (bits >> 16)
    u = (bits.double() + 0.5) / (1 << 32)
    return -torch.log(-torch.log1p(-u))
