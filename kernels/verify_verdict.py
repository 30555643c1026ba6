"""What batched verification finds, and what its launches tell each other of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Verdict:
    """What verification found.

    Attributes:
        tokens: int64 [R, γ + 1], the accepted drafts, then one token of the target's own, then -1.
        counts: int32 [4, R], the four that follow.
    """

    tokens: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def empty(cls, requests: int, gamma: int, device: torch.device) -> Verdict:
        """Room for a verdict on `requests` requests."""
        tokens = torch.empty(requests, gamma + 1, dtype=torch.int64, device=device)
        return cls(tokens, torch.empty(4, requests, dtype=torch.int32, device=device))

    @classmethod
    def joined(cls, verdicts: Sequence[Verdict]) -> Verdict:
        """One verdict on the requests of all, in this order; at least one is given."""
        if len(verdicts) == 1:
            return verdicts[0]
        tokens = torch.cat([verdict.tokens for verdict in verdicts])
        return cls(tokens, torch.cat([verdict.counts for verdict in verdicts], dim=1))

    @property
    def emitted(self) -> torch.Tensor:
        """int32 [R], tokens that count: 1 to γ + 1."""
        return self.counts[0]

    @property
    def rejected(self) -> torch.Tensor:
        """int32 [R], drafts that were judged and not accepted, with those behind them. Not those
        behind a placeholder, nor one whose row, or whose own distribution, is none."""
        return self.counts[1]

    @property
    def accepted(self) -> torch.Tensor:
        """int32 [R], drafts accepted: one less than `emitted`."""
        return self.counts[2]

    @property
    def verified(self) -> torch.Tensor:
        """int32 [R], drafts that were judged: `accepted` and `rejected`."""
        return self.counts[1] + self.counts[2]

    @property
    def outcomes(self) -> torch.Tensor:
        """int32 [2, R], `emitted` and `rejected`, where they lie."""
        return self.counts[:2]

    @property
    def failed(self) -> torch.Tensor:
        """int32 [R], 1 where a row that decides has no distribution: logits that are no number,
        +inf, or all -inf. The last token of such a request is 0 and means nothing."""
        return self.counts[3]


@dataclass(frozen=True)
class Choice:
    """The row that each request's next token is drawn from.

    Attributes:
        row: int32 [R, 2], row of the logits, or -1 if the token is known; and the rejected draft,
            or -1 if the draw is from p itself.
        totals: float32 [R, 5], of that row: largest logit and sum of the target, and of a dense
            draft, and the factor of p in what is left (1 unless verification is by blocks).
    """

    row: torch.Tensor
    totals: torch.Tensor

    @classmethod
    def empty(cls, requests: int, device: torch.device) -> Choice:
        """Room for the choices of `requests` requests."""
        row = torch.empty(requests, 2, dtype=torch.int32, device=device)
        return cls(row, torch.empty(requests, 5, device=device))
