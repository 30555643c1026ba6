"""What a step verifies: the state behind budget and allocation, as confidences arrive.

A *block* is what one draft pass drew for one request, numbered by the step that drew it. When a
step is planned, each request holds its current block, whose drafts the step may verify. Two rules
make the emitted distribution the target's (`vllm_dspark.scheduler.budget` says why):

* The *number* of drafts comes from earlier blocks alone: for every request the newest confidences
  that arrived and are not its current block's. They were drawn two steps ago or earlier. Age is
  counted in a request's own blocks: one that sat out some steps still holds its current block,
  however long ago that was drawn.
* The *ranking* may read the current block: draft (r, k) is admitted or not by how many others
  outrank it, and what follows it in its row never does.

What is observed of a block (accepted, verified) is known before the request's next block is drawn,
so a calibrator may learn from it at once.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vllm_dspark.scheduler.budget import allocate, choose_budget
from vllm_dspark.scheduler.fixed import FixedPolicy, Ints
from vllm_dspark.scheduler.survival import prefix_survival

Floats = npt.NDArray[np.float64]
_NONE = -1  # number of no block
_KEPT = 8  # steps


class Calibrator(Protocol):
    """Turns raw confidences into probabilities; `vllm_dspark.calibration.online` has one."""

    def observe(
        self,
        confidence: Any,
        accepted: Any,
        verified: Any,
        sampled: Any,
        learn: Any = None,
        request: Any = None,
    ) -> None:
        """Rows [R, γ], int [R], int [R], bool [R]: what was predicted, and what came of it."""

    def calibrate(self, confidence: Any, sampled: Any) -> Floats:
        """Raw [R, γ] → conditional probabilities [R, γ]; NaN becomes the prior."""


class Costs(Protocol):
    """Prices steps; `vllm_dspark.scheduler.cost_model` does."""

    def budget_curve(
        self,
        base_tokens: int,
        requests: int,
        context_tokens: int,
        base_logits_rows: int,
        depth: int,
        drafts: int,
    ) -> Floats:
        """float64 [drafts + 1], ms: a step that admits 0, 1, …, `drafts` drafts."""


class VerificationPolicy(FixedPolicy):
    """Verifies as many drafts as pay, those that are likeliest to survive.

    Args:
        slots, gamma: see `FixedPolicy`.
        calibrator: see `Calibrator`.
        costs: see `Costs`.
    """

    def __init__(self, slots: int, gamma: int, calibrator: Calibrator, costs: Costs) -> None:
        super().__init__(slots, gamma)
        self.calibrator = calibrator
        self.costs = costs
        self._constrained = np.zeros(slots, dtype=bool)
        self._number = np.zeros(slots, dtype=np.int64)  # of the request, never used again
        self._requests = 0
        self._since = np.zeros(slots, dtype=np.int64)  # the request's first step
        self._current = np.full(slots, _NONE, dtype=np.int64)  # its current block
        self._depth = np.zeros(slots, dtype=np.int64)  # drafts of that
        # The two newest blocks whose confidences arrived, newest first.
        self._block = np.full((2, slots), _NONE, dtype=np.int64)
        self._confidence = np.full((2, slots, gamma), np.nan, dtype=np.float32)
        self._retired = np.ones(slots, dtype=bool)  # its newest known block was told of
        # Confidences and regimes of blocks to tell of; without a listener the oldest are dropped.
        self._over: deque[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = deque(maxlen=_KEPT)

    def add_request(
        self,
        slot: int,
        step: int,
        sampled: bool = False,
        constrained: bool = False,
        max_verified: int | None = None,
    ) -> None:
        """See `FixedPolicy.add_request`."""
        super().add_request(slot, step, sampled, constrained, max_verified)
        self._constrained[slot] = constrained
        self._number[slot] = self._requests
        self._requests += 1
        self._since[slot] = step
        self._current[slot] = _NONE
        self._block[:, slot] = _NONE
        self._retired[slot] = True
        self._confidence[:, slot] = np.nan

    def drafted(self, step: int, slots: Ints, depth: int) -> None:
        """See `FixedPolicy.drafted`."""
        self._current[slots] = step
        self._depth[slots] = depth

    def choose(
        self,
        slots: Ints,
        draft_lengths: Ints,
        base_tokens: int,
        sampling_requests: int,
        context_tokens: int,
        depth: int | None = None,
    ) -> int:
        """The number of drafts with the most tokens per millisecond; see `FixedPolicy.choose`."""
        limits = self.limits(slots, draft_lengths)
        candidates = limits
        constrained = self._constrained[slots] & (draft_lengths > 0)
        if constrained.any():
            # A grammar may have shortened the block by looking at its tokens. The length that was
            # drawn says nothing about them.
            drawn = np.minimum(self._depth[slots], self._most[slots])
            candidates = np.where(constrained, np.maximum(drawn, limits), limits)
        total = int(candidates.sum())
        if total == 0:
            return 0
        survival = self._survival(slots, self._before_current(slots))
        requests = len(slots)
        curve = self.costs.budget_curve(
            base_tokens,
            requests,
            context_tokens,
            requests,
            self.gamma if depth is None else depth,
            total,
        )
        budget = choose_budget(survival, candidates, curve, sampling_requests)
        return min(budget, int(limits.sum()))

    def allocate(self, slots: Ints, draft_lengths: Ints, budget: int, current: bool = True) -> Ints:
        """The drafts that are likeliest to survive; see `FixedPolicy.allocate`."""
        limits = self.limits(slots, draft_lengths)
        if budget >= limits.sum():
            return limits
        known = self._confidence[0, slots] if current else self._before_current(slots)
        return allocate(self._survival(slots, known), limits, budget)

    def outcomes_arrived(self, step: int, slots: Ints, accepted: Ints, verified: Ints) -> None:
        """Teach the calibrator; see `FixedPolicy.outcomes_arrived`."""
        over = slots[(step >= self._since[slots]) & ~self._retired[slots]]
        if over.size:
            self._retired[over] = True
            self._over.append((self._confidence[0, over], self.sampled[over]))
        # The newest block known of a request is the one that this step verified.
        teaches = (step >= self._since[slots]) & (self._block[0, slots] != _NONE) & (verified > 0)
        if teaches.any():
            rows = slots[teaches]
            self.calibrator.observe(
                self._confidence[0, rows],
                accepted[teaches],
                verified[teaches],
                self.sampled[rows],
                learn=~self._constrained[rows],
                request=self._number[rows],
            )

    def confidences_arrived(self, step: int, slots: Ints, confidence: npt.NDArray[Any]) -> None:
        """See `FixedPolicy.confidences_arrived`."""
        ours = step >= self._since[slots]
        slots = slots[ours]
        for kept in (self._block, self._confidence):
            kept[1, slots] = kept[0, slots]
        self._block[0, slots] = step
        self._confidence[0, slots] = confidence[ours]
        self._retired[slots] = False

    def retired(self) -> Floats:
        """Survival [N, γ] of blocks that no later step can verify, each told once; NaN for what was
        not drawn. Nothing that is still to be verified is among them, so it may decide on
        anything."""
        over = list(self._over)
        self._over.clear()
        if not over:
            return np.empty((0, self.gamma))
        confidence, sampled = (np.concatenate(parts) for parts in zip(*over, strict=True))
        survival = prefix_survival(self.calibrator.calibrate(confidence, sampled))
        return np.where(np.isnan(confidence), np.nan, survival)

    def _before_current(self, slots: Ints) -> npt.NDArray[Any]:
        """[R, γ]: confidences of the newest known block before the current one, or NaN."""
        # What arrived is never newer than the current block, so one step back is enough.
        arrived = self._block[0, slots] == self._current[slots]
        return np.where(arrived[:, None], self._confidence[1, slots], self._confidence[0, slots])

    def _survival(self, slots: Ints, confidence: npt.NDArray[Any]) -> Floats:
        return prefix_survival(self.calibrator.calibrate(confidence, self.sampled[slots]))
