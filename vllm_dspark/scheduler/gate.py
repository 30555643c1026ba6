"""Which measured times to learn from: those that noise and doubt explain, and new regimes.

A time that lies outside of what noise and doubt explain teaches nothing: pauses, compilation,
a prefill that was taken for a decode step. When such times outweigh the others by some number, of
all steps or of those of one kind, they are the new regime: whoever learns restores all doubt, and
starts from what stands for them. Thresholds are in observed steps, since nothing here reads a
clock.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

NOISE_FIRST, NOISE_LEAST, NOISE_MOST = 0.05, 0.01, 0.5  # relative, of a measured time
NOISE_PACE = 0.03  # change of the noise in a step
SPREADS = 4.0  # standard deviations that noise and doubt explain
REGIME_STEPS = 12
_MEDIAN = 0.6745  # of the absolute value of a standard normal variable


class Verdict(NamedTuple):
    """What to learn from."""

    log_ratio: float
    anew: bool  # it is a new regime's: restore all doubt first


class Gate:
    """Of one learner.

    Args:
        pick: what stands for the times of a new regime.

    Attributes:
        noise: relative standard deviation of a measured time, going by the median, which shrugs
            outliers off.
        regimes: new ones so far.
    """

    def __init__(self, pick: Callable[[Iterable[float]], float] = statistics.median) -> None:
        self._pick = pick
        self.noise = NOISE_FIRST
        self.regimes = 0
        self._refused: defaultdict[Hashable, list[float]] = defaultdict(list)

    def judge(
        self,
        log_ratio: float,
        variance: float,
        kind: Hashable,
        doubtful: bool = False,
        steps: int = REGIME_STEPS,
    ) -> Verdict | None:
        """Count one time.

        Args:
            log_ratio: logarithm of the measured time over the predicted one.
            variance: of the logarithm of the predicted one.
            kind: of the step; None for no kind of its own.
            doubtful: refuse it, whatever explains it.
            steps: by which refused times outweigh the others in a new regime.

        Returns:
            None where it teaches nothing.
        """
        kinds = [self._refused[one] for one in {kind, None}]
        limit = SPREADS * math.sqrt(variance + self.noise * self.noise)
        if abs(log_ratio) <= limit and not doubtful:
            for refused in kinds:
                del refused[:1]
            longer = abs(log_ratio) > _MEDIAN * self.noise
            self.noise *= math.exp(NOISE_PACE if longer else -NOISE_PACE)
            self.noise = min(max(self.noise, NOISE_LEAST), NOISE_MOST)
            return Verdict(log_ratio, False)
        for refused in kinds:
            refused.append(log_ratio)
        regime = max(kinds, key=len)
        if len(regime) < steps:
            return None
        self.noise = NOISE_FIRST
        self.regimes += 1
        self._refused.clear()
        return Verdict(self._pick(regime), True)

    def clear(self, kind: Hashable) -> None:
        """What was refused so far of a kind is explained by now."""
        for one in {kind, None}:
            self._refused[one].clear()
