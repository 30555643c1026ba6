"""Blocks that no later step can verify, and what survived of them.

Nothing that is still to be verified is among them, so what is known of them may decide on anything;
the draft depth is drawn from it.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from vllm_dspark.scheduler.survival import products

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_KEPT = 8  # steps
_TOLD = 256  # blocks at a time: more say nothing new of a mean


class Calibrates(Protocol):
    """Turns raw confidences into probabilities."""

    def calibrate(self, confidence: Any, sampled: Any) -> Floats:
        """Raw [R, γ] → conditional probabilities, a new float64 [R, γ]; NaN becomes the prior."""


class Blocks(NamedTuple):
    """Of one step."""

    confidence: npt.NDArray[Any]  # [N, γ], raw; NaN for what was not drawn
    sampled: npt.NDArray[np.bool_]  # [N]
    survived: Ints  # [N], first drafts that are known to have
    lost: Ints  # [N], position from which on drafts are known to be in vain, γ if none is


class Retired:
    """Keeps the newest until somebody asks; without a listener the oldest are dropped."""

    def __init__(self) -> None:
        self._steps: deque[Blocks] = deque(maxlen=_KEPT)

    def put(self, blocks: Blocks) -> None:
        """Of one more step."""
        self._steps.append(blocks)

    def take(self, calibrator: Calibrates, gamma: int) -> Floats:
        """Survival [N, γ], each block told once, and of many the newest; NaN for what was not
        drawn. It is the calibrated one but for what is known better."""
        steps: list[Blocks] = []
        rows = 0
        while self._steps and rows < _TOLD:
            steps.append(self._steps.pop())
            rows += len(steps[-1].sampled)
        self._steps.clear()
        if not steps:
            return np.empty((0, gamma))
        confidence, sampled, survived, lost = map(np.concatenate, zip(*steps, strict=True))
        accepts = calibrator.calibrate(confidence, sampled)
        positions = np.arange(gamma)
        if np.count_nonzero(survived):
            accepts[positions < survived[:, None]] = 1.0
        if lost.min() < gamma:
            accepts[positions >= lost[:, None]] = 0.0
        survival = products(accepts)
        survival[np.isnan(confidence)] = np.nan
        return survival
