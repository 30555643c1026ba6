"""The learned parts as the kernels want them: each product split into what is known before the
block is drawn and what is not.

The gated and the RNN head mix the hidden state h_k with the previous token's embedding e and the
state s by one matrix. Its columns for h_k are applied to all positions of a block at once, by one
ordinary matrix product before the first draw (`hidden_part`); the kernels add the rest, which is
of the size of the rank alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_dspark.heads import ConfidenceHead, MarkovHead


def fp8_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [..., N] in FP8 (E4M3), and what each row is to be multiplied by, float32 [...]."""
    dtype, exact = torch.float8_e4m3fn, values.float()
    scale = exact.abs().amax(dim=-1).clamp_min(1e-12) / torch.finfo(dtype).max
    return (exact / scale[..., None]).to(dtype), scale


@dataclass(frozen=True)
class HeadWeights:
    """A Markov head. All of one dtype but `w2`, on one device.

    Attributes:
        kind: "vanilla", "gated" or "rnn"; see `vllm_dspark.heads`.
        w1: [V_target, r], contiguous.
        w2: [V, r], contiguous.
        w2_scale: float32 [V], what a row of `w2` is to be multiplied by where that is FP8.
        mixing: columns that multiply what is only known while drawing: e for the gated head,
            [r, r]; [s ; e] for the RNN head, [3r, 2r]. A view, rows may lie apart.
        from_hidden: columns that multiply h: [r or 3r, D], a view likewise.
        bias: [r or 3r].
        words: int64 [V], the target's id of each draft word; None where they are the same.
    """

    kind: str
    w1: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor | None = None
    mixing: torch.Tensor | None = None
    from_hidden: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    words: torch.Tensor | None = None

    @classmethod
    def of(cls, head: MarkovHead, words: torch.Tensor | None = None) -> HeadWeights:
        """Views of a head's parameters: they follow what is loaded into it.

        Raises:
            ValueError: tables of different dtypes.
        """
        w1: torch.Tensor = head.markov_w1.weight
        w2: Any = head.markov_w2.weight
        if w1.dtype != w2.dtype:
            raise ValueError(f"markov_w1 is {w1.dtype} and markov_w2 {w2.dtype}, needed is one")
        if head.head_type == "vanilla":
            return cls("vanilla", w1, w2, words=words)
        joint: Any
        if head.head_type == "gated":
            joint, known = head.gate_proj, slice(None, head.hidden_size)
            drawn = slice(head.hidden_size, None)
        else:
            joint, known = head.joint_proj, slice(2 * head.rank, None)
            drawn = slice(None, 2 * head.rank)
        mixing, from_hidden = joint.weight[:, drawn], joint.weight[:, known]
        return cls(
            head.head_type,
            w1,
            w2,
            mixing=mixing,
            from_hidden=from_hidden,
            bias=joint.bias,
            words=words,
        )

    def in_fp8(self) -> HeadWeights:
        """With a copy of `w2` in FP8: half of what every position reads. It does not follow what is
        loaded later."""
        w2, scale = fp8_rows(self.w2)
        return replace(self, w2=w2, w2_scale=scale)

    @property
    def rank(self) -> int:
        """r."""
        return self.w1.shape[1]

    @property
    def vocab_size(self) -> int:
        """V, words that the drafter can propose."""
        return self.w2.shape[0]

    def hidden_part(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Hidden states [R, γ, D] → their share of the gates, [R, γ, r or 3r]; None for a head
        that does not read them."""
        if self.from_hidden is None:
            return None
        return torch.nn.functional.linear(hidden, self.from_hidden, self.bias)


@dataclass(frozen=True)
class ConfidenceWeights:
    """A confidence head: c_k = sigmoid((w · [h_k ; e] + b) / T_k).

    Attributes:
        weight: [D + r], or [D] if it does not read e.
        bias: [1], or None.
        temperatures: float32 [γ], T_k; ones leave the confidence as the head gave it.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    temperatures: torch.Tensor

    @classmethod
    def of(
        cls, head: ConfidenceHead, gamma: int, temperatures: torch.Tensor | None = None
    ) -> ConfidenceWeights:
        """Views of a head's parameters; without temperatures, ones."""
        weight = head.proj.weight[0]
        if temperatures is None:
            temperatures = torch.ones(gamma, device=weight.device)
        return cls(weight, head.proj.bias, temperatures)
