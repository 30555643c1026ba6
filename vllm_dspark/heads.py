"""The sequential stage's learned parts: Markov heads and the confidence head.

The parallel backbone gives, for a block of gamma positions, hidden states h_1..h_gamma and
base logits U_1..U_gamma. The Markov head turns them into draft distributions left to right,
softmax(U_k + B_k), where the bias B_k depends on tokens already drawn
(arXiv 2607.05147, "Semi-autoregressive generation"). With e = W1[x_(k-1)]:

    vanilla   B_k = e W2
    gated     B_k = (sigmoid(Wg [h_k ; e]) * e) W2
    rnn       B_k = tanh(o) W2,   [g ; c ; o] = W [s_(k-1) ; e ; h_k],   s_0 = 0
              s_k = sigmoid(g) * s_(k-1) + (1 - sigmoid(g)) * tanh(c)

The confidence head estimates the probability that x_k survives verification given that
x_1..x_(k-1) did: c_k = sigmoid(w . [h_k ; e] + b).

Parameter names are those of the published checkpoints, so a `state_dict` of these modules
is the `markov_head.*` and `confidence_head.*` part of a checkpoint. Training
(`examples/training`) and serving (`integration/`) use the same modules.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn


class MarkovHead(nn.Module):
    """Vanilla Markov head: the bias depends on the previous token alone.

    Args:
        vocab_size: words of the target, rows of `markov_w1`.
        draft_vocab_size: words the drafter can propose, columns of `markov_w2`.
        rank: width r of the low-rank transition table.
        hidden_size: width D of the backbone's hidden states.
    """

    head_type: ClassVar[str] = "vanilla"

    def __init__(
        self, *, vocab_size: int, draft_vocab_size: int, rank: int, hidden_size: int
    ) -> None:
        super().__init__()
        self.rank = rank
        self.hidden_size = hidden_size
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        # Any module that maps [..., r] to [..., V]; serving replaces it by vLLM's own.
        self.markov_w2: nn.Module = nn.Linear(rank, draft_vocab_size, bias=False)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """W1[token_ids]: int [...] → [..., r]."""
        return self.markov_w1(token_ids)

    def initial_state(self, embed: torch.Tensor) -> torch.Tensor | None:
        """State before the first position, shaped like `embed`; None for a memoryless head."""
        return None

    def advance(
        self,
        embed: torch.Tensor,  # [..., r], W1 of the previous token
        hidden: torch.Tensor,  # [..., D], backbone output at this position
        state: torch.Tensor | None,  # [..., r] or None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One position: the vector that W2 projects to the bias, and the next state."""
        return embed, state

    def bias(self, latent: torch.Tensor) -> torch.Tensor:
        """Project what `advance` returned: [..., r] → bias on the logits [..., V]."""
        return self.markov_w2(latent)

    def block_bias(
        self,
        previous_tokens: torch.Tensor,  # int [..., gamma], the token before each position
        hidden: torch.Tensor,  # [..., gamma, D]
    ) -> torch.Tensor:
        """Biases of a whole block whose tokens are known (training): [..., gamma, V]."""
        embeds = self.embed(previous_tokens)
        state = self.initial_state(embeds[..., 0, :])
        latents = []
        for k in range(previous_tokens.shape[-1]):
            latent, state = self.advance(embeds[..., k, :], hidden[..., k, :], state)
            latents.append(latent)
        return self.bias(torch.stack(latents, dim=-2))


class GatedMarkovHead(MarkovHead):
    """Markov head whose embedding is gated by the backbone's hidden state."""

    head_type: ClassVar[str] = "gated"

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.gate_proj = nn.Linear(self.hidden_size + self.rank, self.rank)

    def advance(
        self, embed: torch.Tensor, hidden: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `MarkovHead.advance`."""
        gate = torch.sigmoid(self.gate_proj(torch.cat([hidden, embed], dim=-1)))
        return gate * embed, state


class RnnMarkovHead(MarkovHead):
    """Head with a recurrent state, so position k sees the whole prefix x_1..x_(k-1)."""

    head_type: ClassVar[str] = "rnn"

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.joint_proj = nn.Linear(2 * self.rank + self.hidden_size, 3 * self.rank)

    def initial_state(self, embed: torch.Tensor) -> torch.Tensor:
        """Zeros, [..., r]."""
        return torch.zeros_like(embed)

    def advance(
        self, embed: torch.Tensor, hidden: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `MarkovHead.advance`."""
        assert state is not None, "start from initial_state()"
        joint = self.joint_proj(torch.cat([state, embed, hidden], dim=-1))
        gate, candidate, output = joint.chunk(3, dim=-1)
        gate = torch.sigmoid(gate)
        state = gate * state + (1 - gate) * torch.tanh(candidate)
        return torch.tanh(output), state


class ConfidenceHead(nn.Module):
    """Logit of the probability that a drafted token survives, given that its prefix did."""

    def __init__(self, *, hidden_size: int, rank: int, with_markov: bool) -> None:
        super().__init__()
        self.with_markov = with_markov
        self.proj = nn.Linear(hidden_size + (rank if with_markov else 0), 1)

    def forward(self, hidden: torch.Tensor, embed: torch.Tensor) -> torch.Tensor:
        """Hidden [..., D] and Markov embedding [..., r] of the previous token → logit [...]."""
        features = torch.cat([hidden, embed], dim=-1) if self.with_markov else hidden
        return self.proj(features).squeeze(-1)


HEADS: dict[str, type[MarkovHead]] = {
    head.head_type: head for head in (MarkovHead, GatedMarkovHead, RnnMarkovHead)
}


def build_markov_head(
    head_type: str, *, vocab_size: int, draft_vocab_size: int, rank: int, hidden_size: int
) -> MarkovHead:
    """The head a checkpoint's `markov_head_type` names.

    Raises:
        ValueError: the name is none of `vanilla`, `gated`, `rnn`.
    """
    if head_type not in HEADS:
        raise ValueError(
            f"markov_head_type is {head_type!r}, known are {', '.join(map(repr, HEADS))}"
        )
    return HEADS[head_type](
        vocab_size=vocab_size,
        draft_vocab_size=draft_vocab_size,
        rank=rank,
        hidden_size=hidden_size,
    )
