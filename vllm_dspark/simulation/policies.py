"""What is drafted and verified, step by step: what a replica asks, and the simpler answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vllm_dspark.scheduler.cost_model import StepShape

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Queue:
    """What is known before a step is scheduled."""

    requests: int  # running
    waiting: int
    context_tokens: int  # of the running ones


@dataclass(frozen=True)
class Batch:
    """A step before its drafts are verified, requests in the order of their slots."""

    step: int
    slots: Ints  # [R]
    drafts: Ints  # [R], scheduled
    base_tokens: int  # that run in any case
    sampling: int  # requests that emit a token in any case
    context_tokens: int
    depth: int  # drafted per request at its end


@dataclass(frozen=True)
class Outcome:
    """A step after it has run."""

    batch: Batch
    verified: Ints  # [R]
    accepted: Ints  # [R]
    drew: Ints  # slots that have a new block
    confidence: Floats  # [len(drew), γ], raw
    shape: StepShape
    ms: float
    prefills: bool


class Policy(Protocol):
    """Decides for one engine.

    Attributes:
        by_block: whether drafts are verified as blocks, not one by one.
    """

    by_block: bool

    def admit(self, step: int, slot: int) -> None:
        """A request takes over a slot; `step` is its first."""

    def depth(self, queue: Queue) -> int:
        """Drafts per request at the end of the step that is being scheduled, 0..γ."""

    def lengths(self, batch: Batch) -> Ints:
        """int64 [R]: drafts of each request to verify, at most those that are scheduled."""

    def ended(self, outcome: Outcome) -> None:
        """A step has run. What can be known of it by when is the policy's business."""


class FixedDepth:
    """The same number of drafts in every step, all of them verified; 0 is no speculation."""

    by_block = False

    def __init__(self, depth: int) -> None:
        self._depth = depth

    def admit(self, step: int, slot: int) -> None:
        """See `Policy`."""

    def depth(self, queue: Queue) -> int:
        """See `Policy`."""
        return self._depth

    def lengths(self, batch: Batch) -> Ints:
        """See `Policy`."""
        return batch.drafts

    def ended(self, outcome: Outcome) -> None:
        """See `Policy`."""
