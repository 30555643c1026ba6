"""Running mean of the survival of drafts, per position, and how long ago each was seen.

Positions that are not drafted are not seen. What is remembered of them is how many survive of those
that the position before lets through: text that is drafted better or worse changes what gets that
far within a few steps, and the rest of the block with it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_dspark import checks

Floats = npt.NDArray[np.float64]

# Conditional acceptance before anything was seen; published drafters have 0.77 to 0.93 at
# position 1 (arXiv 2607.05147). It weighs as much as that many drafts.
FIRST_GUESS, GUESS_WEIGHT = 0.8, 8.0
# What is remembered halves in 45 steps, seen or not: what a probe sees of a position after a long
# time counts for more than what was known of it before.
STEPS = 64.0
# Drafts that the past weighs at most. With many requests one step tells enough.
MOST_WEIGHT = 128.0


class RunningSurvival:
    """Mean over requests and recent steps.

    Args:
        gamma: γ, positions, at least 1.

    Attributes:
        mean: float64 [γ], probabilities. Positions are seen at different times, so it may rise
            along the block by chance.
        age: float64 [γ], steps since each position was last seen; infinite before that.

    Raises:
        ValueError: `gamma` is below 1.
    """

    def __init__(self, gamma: int) -> None:
        gamma = checks.whole("gamma", gamma, least=1)
        self.mean: Floats = np.power(FIRST_GUESS, np.arange(1.0, gamma + 1))
        self.age: Floats = np.full(gamma, np.inf)
        self._given: Floats = np.full(gamma, FIRST_GUESS)  # of those that the one before lets pass
        self._weight: Floats = np.full(gamma, GUESS_WEIGHT)

    def step(self, survival: npt.NDArray[np.floating], steps: int = 1) -> None:
        """A step has passed, or several.

        Args:
            survival: float [R, γ], a row a block: the probability that each of its drafts
                survives, or 1 and 0 where that is known by now. NaN where nothing was drafted or
                nobody knows, from some position on. R may be 0.
            steps: that have passed, at least 1.
        """
        known = ~np.isnan(survival)
        count = known.sum(axis=0)
        total = np.where(known, survival, 0.0).sum(axis=0)
        self._weight *= np.exp(-steps / STEPS)
        self.age += steps
        seen = count > 0
        weight = self._weight + count
        self.mean[seen] += (total[seen] - count[seen] * self.mean[seen]) / weight[seen]
        self._weight = np.minimum(weight, MOST_WEIGHT)
        self.age[seen] = 0
        self._carry(int(np.count_nonzero(seen)))

    def _carry(self, seen: int) -> None:
        """Positions behind the first `seen` follow what those have become."""
        if not seen:
            return
        before = np.concatenate([[1.0], self.mean[: seen - 1]])
        now = self.mean[:seen]
        possible = before > 0
        self._given[:seen][possible] = np.minimum(now[possible] / before[possible], 1.0)
        self.mean[seen:] = now[-1] * np.cumprod(self._given[seen:])


def outcomes(accepted: npt.ArrayLike, verified: npt.ArrayLike, gamma: int) -> Floats:
    """What became of drafts that were all verified, as `RunningSurvival.step` takes it.

    Args:
        accepted: int [R], drafts.
        verified: int [R], drafts, at most γ.
        gamma: γ.

    Returns:
        float64 [R, γ]: 1 for a draft that survived, 0 for one that did not, NaN for none.
    """
    positions = np.arange(gamma)
    survived = positions < np.asarray(accepted, dtype=np.int64).reshape(-1, 1)
    drafted = positions < np.asarray(verified, dtype=np.int64).reshape(-1, 1)
    return np.where(drafted, survived.astype(np.float64), np.nan)
