"""Random weights at memory speed: every matrix is cut from one of two pools of normal numbers."""

from __future__ import annotations

import zlib

import torch

SIGMA = 0.02  # Qwen3's `initializer_range`
FAINT = 2.0**-24
_POOL = 16_777_213  # prime, so that no two rows of a matrix start at the same place of the pool


class Noise:
    """Fills bf16 tensors. What a tensor gets depends on the seed and its name alone, whichever
    thread asks and when.

    Args:
        seed: of the pool and of where in it each tensor starts.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        generator = torch.Generator().manual_seed(seed)
        loud = torch.randn(_POOL, generator=generator).mul_(SIGMA).to(torch.bfloat16)
        self._pools = {False: loud, True: loud * FAINT}  # a power of two: the same mantissas

    def tensor(self, name: str, shape: tuple[int, ...], *, faint: bool) -> torch.Tensor:
        """A new bf16 tensor of normal numbers: σ = `SIGMA`, times `FAINT` if `faint`."""
        out = torch.empty(shape, dtype=torch.bfloat16)
        flat, pool = out.view(-1), self._pools[faint]
        start = zlib.crc32(f"{self._seed}/{name}".encode()) % _POOL
        done = 0
        while done < len(flat):
            count = min(_POOL - start, len(flat) - done)
            flat[done : done + count] = pool[start : start + count]
            done, start = done + count, 0
        return out
