"""What verifying a step must read from device memory, and how long the blocks of a step are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Conditional acceptance of the trained pair of `benchmarks.inflate` at temperature 1, position by
# position: how far drafts survive, and so how many of a block are worth verifying.
ACCEPTANCE = (0.70, 0.63, 0.57, 0.54, 0.52, 0.50, 0.47)


@dataclass(frozen=True)
class Shape:
    """Sizes of a step.

    Attributes:
        requests: R.
        gamma: γ.
        vocab: V.
        itemsize: bytes of a logit, of the target and of a dense draft.
        dense: drafts were drawn from distributions that are kept whole.
    """

    requests: int
    gamma: int = 7
    vocab: int = 151_936
    itemsize: int = 2
    dense: bool = True

    @property
    def row(self) -> int:
        """Bytes of one row of logits."""
        return self.vocab * self.itemsize


def ragged_lengths(requests: int, gamma: int, random: np.random.Generator) -> np.ndarray:
    """Drafts to verify, int [R]: each request as many as one draw of `ACCEPTANCE` lets survive, and
    the one that fails, which is what a scheduler that knew would verify."""
    chances = np.resize(np.append(ACCEPTANCE, ACCEPTANCE[-1:]), gamma)
    chances[len(ACCEPTANCE) :] = ACCEPTANCE[-1]
    failed = random.random((requests, gamma)) > chances
    return np.minimum(np.where(failed.any(1), failed.argmax(1), gamma) + 1, gamma)


def rows_needed(accepted: Sequence[int], verified: Sequence[int]) -> tuple[int, int]:
    """Rows that any method must read of a step.

    Returns:
        Rows that a draft is tested against, up to the first that fails; and rows that are read for
        a replacement, whose draft distribution is needed too. A row of either kind is read once:
        it may stay in a cache until the draw.
    """
    tested = sum(min(a + 1, v) for a, v in zip(accepted, verified, strict=True))
    replaced = sum(a < v for a, v in zip(accepted, verified, strict=True))
    return tested, replaced


def floor_bytes(
    shape: Shape, accepted: Sequence[int], verified: Sequence[int], greedy: Sequence[bool]
) -> int:
    """Bytes that any method must read: tested rows of the target, bonus rows where all drafts
    passed, and tested rows of dense drafts where a request is sampled."""
    tested, replaced = rows_needed(accepted, verified)
    bonus = len(verified) - replaced
    own = 0
    if shape.dense:
        sampled = [i for i, is_greedy in enumerate(greedy) if not is_greedy]
        own, _ = rows_needed([accepted[i] for i in sampled], [verified[i] for i in sampled])
    return (tested + bonus + own) * shape.row
