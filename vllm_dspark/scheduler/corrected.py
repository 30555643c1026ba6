"""Step times as profiled, with the factors that measured steps taught put onto them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_dspark.scheduler.correction import Correction
from vllm_dspark.scheduler.monotone import Floats
from vllm_dspark.scheduler.step_times import StepShape, StepTimes

Counts = npt.NDArray[np.int64]

# Time to read the K/V of a token of context, as a share of the smallest step: in an 8B model
# that is 147 kB to 16.4 GB of weights.
USUAL_CONTEXT = 1e-5


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
        self._whole = math.exp(correction.whole)

    def verify_ms(self, tokens: Counts, requests: Counts, context: Counts, rows: Counts) -> Floats:
        """The target's part, float64, ms."""
        rates = self.profile.rates
        linear = self._context_ms * context + rates.logits_ms * rows + rates.request_ms * requests
        return self._whole * (self.profile.verify.read(tokens, self._verify_values) + linear)

    def draft_ms(self, requests: Counts, depth: Counts, context: Counts, rows: Counts) -> Floats:
        """The drafter's part, float64, ms."""
        rates = self.profile.rates
        linear = rates.row_ms * rows + rates.draft_context_ms * context * (depth > 0)
        return self._whole * (self._block_ms(requests, depth) + linear)

    def _block_ms(self, requests: Any, depth: Any) -> Any:
        """The draft table of each depth, before `whole`."""
        beyond = np.maximum(requests - self._most_requests, 0)
        table = self._draft_table[depth, np.minimum(requests, self._most_requests)]
        return table + self._draft_slope[depth] * beyond

    def parts(self, shape: StepShape) -> Parts:
        """The prediction of one step, by parts."""
        rates, tokens = self.profile.rates, np.asarray(shape.tokens)
        rest = rates.logits_ms * shape.logits_rows + rates.request_ms * shape.requests
        rest += self._context_ms * shape.context_tokens
        draft_rest = rates.row_ms * shape.tokens
        if shape.depth:
            draft_rest += rates.draft_context_ms * shape.context_tokens
        parts = (
            float(self.profile.verify.read(tokens, self._verify_values)),
            rest,
            float(self._block_ms(shape.requests, shape.depth)),
            draft_rest,
        )
        return Parts(*(self._whole * part for part in parts))

    def learn(self, shape: StepShape, measured_ms: float, parts: Parts) -> None:
        """Correct by what these parts together were measured to take; nothing to learn from
        parts that are predicted to take no time."""
        total = sum(parts)
        if total <= 0:
            return
        verifies = parts.table > 0
        unit_ms = self._whole * self._context_unit * shape.context_tokens * verifies
        taught = self.correction.observe(
            math.log(measured_ms / total),
            int(self.profile.verify.padded(np.asarray(shape.tokens))),
            shape.depth,
            parts.table / total,
            unit_ms / total,
            parts.draft / total,
        )
        if taught:
            self._apply()
