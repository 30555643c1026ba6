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

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from vllm_dspark.scheduler.budget import choose_budget, share_out
from vllm_dspark.scheduler.fixed import FixedPolicy, Ints
from vllm_dspark.scheduler.retired import Blocks, Calibrates, Retired
from vllm_dspark.scheduler.standing import Load, Standing
from vllm_dspark.scheduler.survival import products

Floats = npt.NDArray[np.float64]
_NONE = -1  # number of no block

# Relative gain from which drafts are left out. To share a budget out is work for host and device
# that no curve knows of; a step that verifies all there is goes without it.
TRIM_GAIN = 0.02


class Calibrator(Calibrates, Protocol):
    """Learns to turn them into probabilities, too; `vllm_dspark.calibration.online` has one."""

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
        """A new float64 [drafts + 1], ms: a step that admits 0, 1, …, `drafts` drafts."""


class _Limits(NamedTuple):
    """What a step may verify. For the very same arrays it is not worked out again."""

    slots: Ints
    draft_lengths: Ints
    limits: Ints  # [R], drafts
    total: int
    constrained: npt.NDArray[np.bool_]  # [R]
    cut: bool  # a grammar may have shortened a block


class VerificationPolicy(FixedPolicy):
    """Verifies as many drafts as pay, those that are likeliest to survive.

    Args:
        slots, gamma: see `FixedPolicy`.
        calibrator: see `Calibrator`.
        costs: see `Costs`.
        stands: steps that a choice stands at most; see `Standing`.
    """

    def __init__(
        self, slots: int, gamma: int, calibrator: Calibrator, costs: Costs, stands: int = 1
    ) -> None:
        super().__init__(slots, gamma)
        self.calibrator = calibrator
        self.costs = costs
        self._standing = Standing(stands)
        self._limits: _Limits | None = None
        self._constrained = np.zeros(slots, dtype=bool)
        self._number = np.zeros(slots, dtype=np.int64)  # of the request, never used again
        self._requests = 0
        self._since = np.zeros(slots, dtype=np.int64)  # the request's first step
        self._newest = 0  # of those
        self._current = np.full(slots, _NONE, dtype=np.int64)  # its current block
        self._depth = np.zeros(slots, dtype=np.int64)  # drafts of that
        # The two newest blocks whose confidences arrived, newest first.
        self._block = np.full((2, slots), _NONE, dtype=np.int64)
        self._confidence = np.full((2, slots, gamma), np.nan, dtype=np.float32)
        self._retired = np.ones(slots, dtype=bool)  # its newest known block was told of
        self._over = Retired()

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
        self._newest = max(self._newest, step)
        self._limits = None
        self._current[slot] = _NONE
        self._block[:, slot] = _NONE
        self._retired[slot] = True
        self._confidence[:, slot] = np.nan

    def drafted(self, step: int, slots: Ints, depth: int) -> None:
        """See `FixedPolicy.drafted`."""
        self._current[slots] = step
        self._depth[slots] = depth

    def standing(
        self,
        slots: Ints,
        draft_lengths: Ints,
        depth: int | None = None,
        base_tokens: int | None = None,
    ) -> int | None:
        """See `FixedPolicy.standing`."""
        known = self._limits_of(slots, draft_lengths)
        if known.cut or not known.total:
            return None
        base = len(slots) if base_tokens is None else base_tokens
        return self._standing.take(Load(len(slots), known.total, base, depth))

    def choose(
        self,
        slots: Ints,
        draft_lengths: Ints,
        base_tokens: int,
        sampling_requests: int,
        context_tokens: int,
        depth: int | None = None,
    ) -> int:
        """The number of drafts with the most tokens per millisecond, or all of them if that gains
        less than `TRIM_GAIN`; see `FixedPolicy.choose`."""
        known = self._limits_of(slots, draft_lengths)
        candidates, total = known.limits, known.total
        if known.cut:
            # A grammar may have shortened the block by looking at its tokens. The length that was
            # drawn says nothing about them.
            drawn = np.minimum(self._depth[slots], self._most[slots])
            whole = np.maximum(drawn, candidates)
            candidates = np.where(known.constrained & (draft_lengths > 0), whole, candidates)
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
        curve[-1] /= 1 + TRIM_GAIN
        budget = choose_budget(survival, candidates, curve, sampling_requests)
        if known.cut:
            self._standing.forget()
            return min(budget, known.total)
        self._standing.put(Load(requests, total, base_tokens, depth), budget)
        return budget

    def allocate(self, slots: Ints, draft_lengths: Ints, budget: int, current: bool = True) -> Ints:
        """The drafts that are likeliest to survive; see `FixedPolicy.allocate`."""
        known = self._limits_of(slots, draft_lengths)
        limits = known.limits
        if len(slots) == 1 or budget >= known.total:
            return np.minimum(limits, budget)
        block = self._confidence[0].take(slots, axis=0) if current else self._before_current(slots)
        return share_out(self._survival(slots, block), limits, budget)

    def outcomes_arrived(self, step: int, slots: Ints, accepted: Ints, verified: Ints) -> None:
        """Teach the calibrator; see `FixedPolicy.outcomes_arrived`."""
        if step < self._newest:
            ours = step >= self._since.take(slots)
            slots, accepted, verified = slots[ours], accepted[ours], verified[ours]
        # A request that sat out a step verified an older block, or one that nobody told of.
        known = self._block[0].take(slots) == step - 1
        if np.count_nonzero(known) < known.size:
            slots, accepted, verified = slots[known], accepted[known], verified[known]
        if not slots.size:
            return
        confidence, sampled = self._confidence[0].take(slots, axis=0), self.sampled.take(slots)
        told = self._retired.take(slots)
        repeated = np.count_nonzero(told)
        if repeated < told.size:
            over = Blocks(confidence, sampled, *self._known(slots, accepted, verified))
            self._over.put(Blocks(*(part[~told] for part in over)) if repeated else over)
        self._retired[slots] = True
        teaches = verified > 0
        if np.count_nonzero(teaches) < teaches.size:
            slots, accepted, verified = slots[teaches], accepted[teaches], verified[teaches]
            confidence, sampled = confidence[teaches], sampled[teaches]
        if slots.size:
            self.calibrator.observe(
                confidence,
                accepted,
                verified,
                sampled,
                learn=~self._constrained.take(slots),
                request=self._number.take(slots),
            )

    def confidences_arrived(self, step: int, slots: Ints, confidence: npt.NDArray[Any]) -> None:
        """See `FixedPolicy.confidences_arrived`."""
        if step < self._newest:
            ours = step >= self._since.take(slots)
            slots, confidence = slots[ours], confidence[ours]
        for kept, new in ((self._block, step), (self._confidence, confidence)):
            kept[1][slots] = kept[0].take(slots, axis=0)
            kept[0][slots] = new
        self._retired[slots] = False

    def retired(self) -> Floats:
        """Survival [N, γ] of blocks that no later step can verify, see `Retired.take`.

        It is the calibrated one, with two exceptions. Confidences know nothing of grammars, so of
        a request under one it is what came of its drafts. A draft that its request keeps from
        verification is drawn in vain, and does not survive."""
        return self._over.take(self.calibrator, self.gamma)

    def _known(self, slots: Ints, accepted: Ints, verified: Ints) -> tuple[Ints, Ints]:
        """`survived` and `lost` of `Blocks`, [R] each."""
        lost = self._most.take(slots)
        constrained = self._constrained.take(slots)
        if not np.count_nonzero(constrained):
            return np.zeros_like(lost), lost
        rejected = np.where(constrained & (accepted < verified), accepted, lost)
        return np.where(constrained, accepted, 0), np.minimum(rejected, lost)

    def _limits_of(self, slots: Ints, draft_lengths: Ints) -> _Limits:
        known = self._limits
        if known is None or known.slots is not slots or known.draft_lengths is not draft_lengths:
            limits, constrained = self.limits(slots, draft_lengths), self._constrained.take(slots)
            cut, total = bool(np.count_nonzero(constrained)), int(limits.sum())
            known = self._limits = _Limits(slots, draft_lengths, limits, total, constrained, cut)
        return known

    def _before_current(self, slots: Ints) -> npt.NDArray[Any]:
        """[R, γ]: confidences of the newest known block before the current one, or NaN."""
        # What arrived is never newer than the current block, so one step back is enough.
        arrived = self._block[0].take(slots) == self._current.take(slots)
        before = self._confidence[1].take(slots, axis=0)
        if np.count_nonzero(arrived) == arrived.size:
            return before
        return np.where(arrived[:, None], before, self._confidence[0].take(slots, axis=0))

    def _survival(self, slots: Ints, confidence: npt.NDArray[Any]) -> Floats:
        return products(self.calibrator.calibrate(confidence, self.sampled.take(slots)))
