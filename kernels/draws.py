"""What decides which token of a distribution is drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Draws:
    """Noise keys and filters of a block's draws. Tensors of a request's options are read by slot,
    its place in the engine's request table.

    Attributes:
        slots: int64 [R, γ], the request's slot; negative for rows that only pad a CUDA graph.
        positions: int64 [R, γ], position of the drawn token; strides as those of `slots`. The
            noise is keyed by the position before, as vLLM does.
        temperature: float32 [slots]; 0 draws the likeliest word.
        seeds: int64 [slots].
        by_step: the draft's place in the block is mixed into its seed (see `noise_key`).
        top_k: int32 [slots], of the request, the vocabulary's size for none; None if no request
            has any.
        top_p: float32 [slots], 1 for none; given exactly where `top_k` is.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    temperature: torch.Tensor
    seeds: torch.Tensor
    by_step: bool = False
    top_k: torch.Tensor | None = None
    top_p: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.slots.shape != self.positions.shape:
            raise ValueError(
                f"slots is {tuple(self.slots.shape)} and positions {tuple(self.positions.shape)}, "
                "needed is one shape"
            )
        if self.slots.stride() != self.positions.stride():
            raise ValueError("slots and positions must have the same strides")
        if (self.top_k is None) != (self.top_p is None):
            raise ValueError("top_k and top_p are given together or not at all")
