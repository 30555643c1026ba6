"""Step times as profiled, with the factors that measured steps taught put onto them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_dspark.scheduler.correction import Correction
from vllm_dspark.scheduler.host_floor import HostFloor, Longer
from vllm_dspark.scheduler.monotone import Floats
from vllm_dspark.scheduler.step_times import StepShape, StepTimes

Counts = npt.NDArray[np.int64]

# Time to read the K/V of a token of context, as a share of the smallest step: in an 8B model
# that is 147 kB to 16.4 GB of weights.
USUAL_CONTEXT = 1e-5
STALE = 0.01  # relative, that tables may be off what was learned before they are made anew


class Parts(NamedTuple):
    """What a predicted step consists of, ms."""

    table: float
    rest: float  # context tokens, logits rows and requests
    draft: float
    draft_rest: float  # context K/V, and context read by draft attention


class CorrectedTimes:
    """Predictions; ints come in as arrays, and are not checked here.

    Args:
        profile: what the factors are put onto.

    Attributes:
        correction: of the device's times.
        floor: under the steps that draft.
    """

    def __init__(self, profile: StepTimes) -> None:
        self.profile = profile
        # A rate that the profile could not tell, or that is lost in its noise, is learned in
        # units of what is usual.
        usual = USUAL_CONTEXT * float(profile.verify.values[0])
        self._context_unit = max(profile.rates.context_ms, usual, 1e-12)
        least = -profile.rates.context_ms / self._context_unit
        self.correction = Correction(profile.gamma, least, profile.doubt)
        self._most_requests = profile.draft_table.shape[1] - 1
        self.floor = HostFloor(
            float(profile.verify.values[0] + profile.draft_table[1, 1]) + profile.rates.request_ms
        )
        self._apply()

    def _apply(self) -> None:
        """Factors differ from size to size and depth to depth: nothing may fall by them."""
        profile, correction = self.profile, self.correction
        factors = np.exp(correction.at_tokens(np.maximum(profile.verify.knots, 1)))
        self._verify_values = np.maximum.accumulate(profile.verify.values * factors)
        self._context_ms = profile.rates.context_ms + self._context_unit * correction.context
        by_depth = np.exp(correction.depth)
        self._draft_table = np.maximum.accumulate(profile.draft_table * by_depth[:, None], axis=0)
        self._draft_slope = np.maximum.accumulate(profile.draft_slope * by_depth)
        # Of every size that graphs are captured for, at hand.
        self._table = profile.verify.read(np.arange(profile.verify.limit + 1), self._verify_values)
        self._whole = math.exp(correction.whole)
        self._applied = correction.parts.copy()

    def verify_ms(self, tokens: Counts, requests: Counts, context: Counts, rows: Counts) -> Floats:
        """The target's part, float64, ms."""
        rates = self.profile.rates
        linear = self._context_ms * context + rates.logits_ms * rows + rates.request_ms * requests
        return self._whole * (self._table_ms(tokens) + linear)

    def _table_ms(self, tokens: Counts) -> Floats:
        """The target's table, before `whole`."""
        if tokens.size and tokens.max() < self._table.size:
            return self._table[tokens]
        return self.profile.verify.read(tokens, self._verify_values)

    def draft_ms(self, requests: Counts, depth: Counts, context: Counts, rows: Counts) -> Floats:
        """The drafter's part, float64, ms."""
        rates = self.profile.rates
        linear = rates.row_ms * rows + rates.draft_context_ms * context * (depth > 0)
        return self._whole * (self._block_ms(requests, depth) + linear)

    def device_ms(
        self, tokens: Counts, requests: Counts, context: Counts, rows: Counts, depth: Counts
    ) -> Floats:
        """Both parts, float64, ms."""
        return self.verify_ms(tokens, requests, context, rows) + self.draft_ms(
            requests, depth, context, tokens
        )

    def _block_ms(self, requests: Any, depth: Any) -> Any:
        """The draft table of each depth, before `whole`."""
        within = np.minimum(requests, self._most_requests)
        return self._draft_table[depth, within] + self._draft_slope[depth] * (requests - within)

    def parts(self, shape: StepShape) -> Parts:
        """The prediction of one step, by parts."""
        rates = self.profile.rates
        rest = rates.logits_ms * shape.logits_rows + rates.request_ms * shape.requests
        rest += self._context_ms * shape.context_tokens
        draft_rest = rates.row_ms * shape.tokens
        if shape.depth:
            draft_rest += rates.draft_context_ms * shape.context_tokens
        table = float(self._table_ms(np.asarray(shape.tokens)))
        block, whole = float(self._block_ms(shape.requests, shape.depth)), self._whole
        return Parts(whole * table, whole * rest, whole * block, whole * draft_rest)

    def floor_ms(self, requests: Any, depth: Any) -> Any:
        """What the host takes to launch the step, float64, ms."""
        return self.floor.ms(requests) * (depth > 0)

    def learn(self, shape: StepShape, measured_ms: float, parts: Parts, whole: bool = True) -> bool:
        """Correct by what these parts together were measured to take; nothing to learn from
        parts that are predicted to take no time.

        Args:
            shape, parts: of the step.
            measured_ms: what they took.
            whole: that is the time of the whole step, the host's part in it included.

        Returns:
            Whether it was believed.
        """
        total = sum(parts)
        if total <= 0:
            return False
        correction, floor = self.correction, self.floor
        verifies = parts.table > 0
        unit_ms = self._whole * self._context_unit * shape.context_tokens * verifies
        padded = int(self.profile.verify.padded(np.asarray(shape.tokens)))
        shares = correction.shares(
            padded, shape.depth, parts.table / total, unit_ms / total, parts.draft / total
        )
        log_ratio = math.log(measured_ms / total)
        log_ratio -= float(shares[1:] @ (correction.parts - self._applied))
        kind = padded.bit_length() // 2, shape.depth, verifies
        longer: Longer | None = "device"
        if not shape.depth:
            floor.rest()
        elif whole:
            regimes = floor.regimes
            spread = math.sqrt(correction.variance(shares) + correction.gate.noise**2)
            longer = floor.observe(shape.requests, measured_ms, log_ratio, spread)
            if longer == "floor":
                if floor.regimes > regimes:
                    correction.gate.clear(kind)
                    correction.doubt_whole()  # it may have been the device after all
                return True
        regimes = correction.gate.regimes
        if not correction.learn(log_ratio, shares, kind, doubtful=longer is None):
            return False
        if correction.gate.regimes > regimes:
            floor.forget()
        self._whole = math.exp(correction.whole)
        if np.abs(correction.parts - self._applied).max() > STALE:
            self._apply()
        return True
