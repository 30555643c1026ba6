"""Whether each draft is judged by what it was drawn from, in an engine that drafts from candidates.

A draft is known by the seed of its request and by its position in the sequence, whatever slot or
place in a block it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.verification_cases import runner_of
from vllm_dspark.kernels.candidate_reference import candidate_reference


@dataclass
class Watch:
    """What drafts were drawn from, by the reference, against what they are judged by.

    Attributes:
        drawn: of the latest draft by seed of its request and position: its word and q.
        right, wrong: judged drafts whose q is that one, and others.
        possible: words that q gave anything, of each judged draft, by seed.
    """

    drawn: dict[tuple[int, int], tuple[int, torch.Tensor]] = field(default_factory=dict)
    right: int = 0
    wrong: int = 0
    possible: dict[int, list[int]] = field(default_factory=dict)

    def draw(self, head: Any, count: int, words: int, arguments: tuple[Any, ...]) -> None:
        """One call of `CandidateDrafter.draw`."""
        base, hidden, anchors, _, draws = arguments[:5]
        found = candidate_reference(base, hidden, anchors, head, count, draws)
        for row, slot in enumerate(draws.slots[:, 0].tolist()):
            for k in range(base.shape[1] if slot >= 0 else 0):
                token, ids, logprobs = (tensor[row, k] for tensor in found)
                key = int(draws.seeds[slot]), int(draws.positions[row, k])
                self.drawn[key] = int(token), dense(ids, logprobs, words)

    def verify(self, batch: Any) -> None:
        """One call of `Verifier.verify`."""
        for request, slot in enumerate(batch.slots.tolist()):
            start, stop = batch.offsets[request : request + 2].tolist()
            for step, row in enumerate(range(start + 1, stop)):
                if batch.tokens[row] < 0:
                    continue
                seed, position = int(batch.seeds[slot]), int(batch.positions[row])
                token, expected = self.drawn[seed, position]
                ids, logprobs = batch.draft.ids[slot, step], batch.draft.logprobs[slot, step]
                q = dense(ids, logprobs, batch.vocab_size)
                same = token == int(batch.tokens[row]) and bool((q - expected).abs().max() < 1e-5)
                self.right, self.wrong = self.right + same, self.wrong + (not same)
                self.possible.setdefault(seed, []).append(int((q > 0).sum()))


def dense(ids: torch.Tensor, logprobs: torch.Tensor, words: int) -> torch.Tensor:
    """Candidates and their log-probabilities [K] → q, float64 [V]."""
    q = torch.zeros(words, dtype=torch.float64)
    return q.index_add_(0, ids.long(), logprobs.double().exp())


@contextmanager
def watched(llm: Any) -> Iterator[Watch]:
    """Watches an engine that drafts from candidates."""
    watch, runner = Watch(), runner_of(llm)
    drafter, verifier = runner.speculator.kernels._drafter, runner.rejection_sampler.verifier
    draw, verify = drafter.draw, verifier.verify

    def watched_draw(*arguments: Any) -> None:
        draw(*arguments)
        watch.draw(drafter.head, drafter.count, runner.vocab_size, arguments)

    def watched_verify(batch: Any, *others: Any) -> Any:
        watch.verify(batch)
        return verify(batch, *others)

    drafter.draw, verifier.verify = watched_draw, watched_verify
    try:
        yield watch
    finally:
        del drafter.draw, verifier.verify
