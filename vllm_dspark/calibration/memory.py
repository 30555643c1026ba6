"""Outcomes of verified drafts, forgotten at a steady pace, with no step or request prevailing.

Kept per regime, position and bin of the logit: counts, so that a fit to them is a fit to the
remembered observations, whatever the path to it was.

* An observation's weight halves with every `HALF_LIFE` later ones of its position. About
  `CAPACITY` count, which is enough to know a rate of 0.8 to ±0.008.
* A position fades at half the pace of position 1 at least. One that is not verified any more
  does not keep for good the verdict that stopped its verification.
* One step, however many requests it holds, adds a tenth of `CAPACITY` at most. One request,
  however many rounds it runs, holds a tenth of it at most: beyond that its rounds do not count
  until others have pushed out some of its own. The tenth is of `CAPACITY`: of less than that,
  after a start or at a position that is rarely verified, it is a larger part.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_dspark.calibration.shares import RequestShares

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

HALF_LIFE = 1000.0  # observations of a position
CAPACITY = HALF_LIFE / float(np.log(2))  # weight of an endless past
LIMIT = 0.1 * CAPACITY  # weight per position of one step, and of one request
FADING = 0.5
# Weight below which a bin is empty: long before float64 runs out of digits for it.
TRACE = 1e-9
# Logits beyond ±10 (0.99995) are nothing a drafter can tell apart.
LOGIT_LIMIT = 10.0
BINS_PER_LOGIT = 2
BINS = int(2 * LOGIT_LIMIT) * BINS_PER_LOGIT


class PositionMetrics(NamedTuple):
    """What is remembered of one position of one regime.

    Each outcome counts against what was predicted before it was learned from. With a full memory
    the noise of `ece` is 0.01 to 0.02.
    """

    observations: float  # each at what is left of its weight
    gap: float | None  # mean (predicted − outcome); None without observations
    ece: float | None  # as `expected_calibration_error`, in bins of one logit
    prior: float


class Memory:
    """Remembered observations.

    Attributes:
        count: float64 [regimes, γ, BINS], weight.
        accepts: the same, weight of those accepted.
        logits: the same, weight times logit.
        predicted: the same, weight times what was predicted before it was observed.
    """

    def __init__(self, regimes: int, gamma: int) -> None:
        self._shape = regimes, gamma
        self._sums = np.zeros((4, regimes, gamma, BINS))
        self.count, self.accepts, self.logits, self.predicted = self._sums
        self._shares = RequestShares(regimes * gamma, LIMIT)

    def remember(
        self,
        cell: Ints,  # [n], regime · γ + position
        logit: Floats,  # [n], within ±LOGIT_LIMIT
        accepted: npt.NDArray[np.bool_],  # [n]
        predicted: Floats,  # [n], probabilities
        row: Ints,  # [n], which round
        request: Ints | None,  # [R], whose it is; None: no request was seen before
        later: Ints | None = None,  # [R], how many of these steps came after its own
    ) -> None:
        """Add n observations of R rounds, one of each request, of one step.

        Or of several steps one after the other, where `later` is given: from the number of the
        steps after the first to 0. Each of them is taken to have added as much as the others.
        """
        regimes, gamma = self._shape
        steps = 1 if later is None else 1 + int(later[0])
        weight = np.ones(cell.size)
        if request is not None:
            slot = self._shares.claim(request.astype(np.int64)).take(row)
            weight = self._shares.allowed(slot, cell)
        added = np.bincount(cell, weight, regimes * gamma)
        part = np.minimum(1, steps * LIMIT / np.maximum(added, steps * LIMIT))
        weight *= part.take(cell)
        added = (added * part).reshape(regimes, gamma)

        half_lives = np.maximum(added, FADING * added[:, :1]) / HALF_LIFE
        if later is not None:  # meanwhile the first ones are half forgotten
            weight *= np.exp2(half_lives.take(cell) * (later.take(row) / -steps))
        self._sums *= np.exp2(-half_lives)[..., None] * (self.count > TRACE)
        index = ((logit + LOGIT_LIMIT) * BINS_PER_LOGIT).astype(np.int64)
        index = cell * BINS + np.minimum(index, BINS - 1)
        for sums, factor in zip(self._sums, (None, accepted, logit, predicted), strict=True):
            values = weight if factor is None else weight * factor
            sums += np.bincount(index, values, sums.size).reshape(sums.shape)
        if request is not None:
            self._shares.forget(half_lives.ravel())
            self._shares.add(slot, cell, weight)

    def mean_logits(self) -> Floats:
        """[regimes, γ, BINS], 0 in empty bins."""
        return np.divide(
            self.logits, self.count, out=np.zeros_like(self.count), where=self.count > 0
        )

    def running_mean(self, first: float, pull: float) -> Floats:
        """Rate of acceptance [regimes, γ], each position pulled towards the one before it.

        Args:
            first: what the first position is pulled towards, a probability.
            pull: weight of what a position is pulled towards, in observations.
        """
        rates = []
        for counts, accepts in zip(
            self.count.sum(-1).tolist(), self.accepts.sum(-1).tolist(), strict=True
        ):
            rate = first
            for n, y in zip(counts, accepts, strict=True):
                rate = (y + pull * rate) / (n + pull)
                rates.append(rate)
        return np.reshape(rates, self._shape)

    def metrics(self, prior: Floats) -> list[list[PositionMetrics]]:
        """One list a regime, one entry a position; `prior` [regimes, γ] is handed on."""
        weight = self.count.sum(-1)
        share = np.divide(1, weight, out=np.zeros_like(weight), where=weight > 0)
        bins = (self.predicted - self.accepts).reshape(*self._shape, -1, BINS_PER_LOGIT).sum(-1)
        gap, ece = bins.sum(-1) * share, np.abs(bins).sum(-1) * share
        return [
            [
                PositionMetrics(n, g if n else None, e if n else None, p)
                for n, g, e, p in zip(*regime, strict=True)
            ]
            for regime in zip(
                *(values.tolist() for values in (weight, gap, ece, prior)), strict=True
            )
        ]
