"""One step of a Markov head in plain torch float64, from the split weights that kernels use."""

from __future__ import annotations

import torch

from vllm_dspark.kernels.head_weights import HeadWeights


def head_state_reference(
    head: HeadWeights,
    tokens: torch.Tensor,  # int [R], the token before the position
    share: torch.Tensor | None,  # [R, r or 3r], the position's, from `HeadWeights.hidden_part`
    state: torch.Tensor | None,  # float64 [R, r], None before the first position
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Latent vector that W2 projects, and next state; float64 [R, r]."""
    embed = head.w1[tokens.long()].double()
    if share is None:
        return embed, None
    assert head.mixing is not None
    mixing = head.mixing.double()
    if head.kind == "gated":
        return torch.sigmoid(share.double() + embed @ mixing.T) * embed, None
    if state is None:
        state = torch.zeros_like(embed)
    joint = share.double() + torch.cat([state, embed], dim=-1) @ mixing.T
    gate, candidate, output = joint.chunk(3, dim=-1)
    gate = torch.sigmoid(gate)
    return torch.tanh(output), gate * state + (1 - gate) * torch.tanh(candidate)
