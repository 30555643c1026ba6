"""Step times as profiled, with the factors that measured steps taught put onto them."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


class Tables(NamedTuple):
    """A profile with factors put onto it; times in ms, before `whole`."""

    values: Floats  # of the target, at the knots of its table
    table: Floats  # the same, at every size that graphs are captured for
    context_ms: float
    draft: Floats
    draft_slope: Floats


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
        self._profiled = self._tables  # nothing is learned yet

    def _apply(self) -> None:
        """Factors differ from size to size and depth to depth: nothing may fall by them."""
        profile, correction = self.profile, self.correction
        factors = np.exp(correction.at_tokens(np.maximum(profile.verify.knots, 1)))
        values = np.maximum.accumulate(profile.verify.values * factors)
        by_depth = np.exp(correction.depth)
        self._tables = Tables(
            values,
            profile.verify.read(np.arange(profile.verify.limit + 1), values),
            profile.rates.context_ms + self._context_unit * correction.context,
            np.maximum.accumulate(profile.draft_table * by_depth[:, None], axis=0),
            np.maximum.accumulate(profile.draft_slope * by_depth),
        )
        self._whole = math.exp(correction.whole)
        self._applied = correction.parts.copy()

    def verify_ms(self, tokens: Counts, requests: Counts, context: Counts, rows: Counts) -> Floats:
        """The target's part, float64, ms."""
        rates = self.profile.rates
        linear = (
            self._tables.context_ms * context + rates.logits_ms * rows + rates.request_ms * requests
        )
        return self._whole * (self._table_ms(tokens, self._tables) + linear)

    def _table_ms(self, tokens: Counts, of: Tables) -> Floats:
        if tokens.size and tokens.max() < of.table.size:
            return of.table[tokens]
        return self.profile.verify.read(tokens, of.values)

    def draft_ms(self, requests: Counts, depth: Counts, context: Counts, rows: Counts) -> Floats:
        """The drafter's part, float64, ms."""
        rates = self.profile.rates
        linear = rates.row_ms * rows + rates.draft_context_ms * context * (depth > 0)
        return self._whole * (self._block_ms(requests, depth, self._tables) + linear)

    def device_ms(
        self, tokens: Counts, requests: Counts, context: Counts, rows: Counts, depth: Counts
    ) -> Floats:
        """Both parts, float64, ms."""
        return self.verify_ms(tokens, requests, context, rows) + self.draft_ms(
            requests, depth, context, tokens
        )

    def _block_ms(self, requests: Any, depth: Any, of: Tables) -> Any:
        """A draft pass of each depth."""
        within = np.minimum(requests, self._most_requests)
        return of.draft[depth, within] + of.draft_slope[depth] * (requests - within)

    def parts(self, shape: StepShape) -> Parts:
        """The prediction of one step, by parts."""
        return Parts(*(self._whole * part for part in self._parts(shape, self._tables)))

    def _parts(self, shape: StepShape, of: Tables) -> Parts:
        rates = self.profile.rates
        rest = rates.logits_ms * shape.logits_rows + rates.request_ms * shape.requests
        rest += of.context_ms * shape.context_tokens
        draft_rest = rates.row_ms * shape.tokens
        if shape.depth:
            draft_rest += rates.draft_context_ms * shape.context_tokens
        table = float(self._table_ms(np.asarray(shape.tokens), of))
        return Parts(
            table, rest, float(self._block_ms(shape.requests, shape.depth, of)), draft_rest
        )

    def spreads(self, shapes: Sequence[StepShape], other: StepShape) -> list[float]:
        """Standard deviations of the logarithm of what each step takes over what the other does, on
        the device: what profile, or guess, and measured times leave open."""
        others, *shares = (self._shares(step, self._padded(step)) for step in (other, *shapes))
        return [math.sqrt(self.correction.variance(of_one - others)) for of_one in shares]

    def _padded(self, shape: StepShape) -> int:
        return int(self.profile.verify.padded(np.asarray(shape.tokens)))

    def _shares(
        self, shape: StepShape, padded: int, verifies: bool = True, drafts: bool = True
    ) -> Floats:
        """What `Correction` takes: how the time of these parts goes with each correction.

        By the profile, whatever was learned since. Steps of one shape say the same thing however
        often they are seen. Shares that move along with what they teach would make each of them
        say something else, and the filter sure of what nobody saw.
        """
        parts = self._parts(shape, self._profiled)
        table, rest = (verifies * part for part in parts[:2])
        draft, draft_rest = (drafts * part for part in parts[2:])
        total = max(table + rest + draft + draft_rest, 1e-12)
        unit_ms = verifies * self._context_unit * shape.context_tokens
        return self.correction.shares(
            padded, shape.depth, table / total, unit_ms / total, draft / total
        )

    def floor_ms(self, requests: Any, depth: Any) -> Any:
        """What the host takes to launch the step, float64, ms."""
        return self.floor.ms(requests) * (depth > 0)

    def learn(
        self,
        shape: StepShape,
        measured_ms: float,
        parts: Parts,
        whole: bool = True,
        stands: int = 1,
    ) -> bool:
        """Correct by what these parts together were measured to take; nothing to learn from
        parts that are predicted to take no time.

        Args:
            shape, parts: of the step.
            measured_ms: what they took.
            whole: that is the time of the whole step, the host's part in it included.
            stands: steps that this one stands for.

        Returns:
            Whether it was believed.
        """
        total = sum(parts)
        if total <= 0:
            return False
        correction, floor = self.correction, self.floor
        verifies, padded = parts.table > 0, self._padded(shape)
        shares = self._shares(shape, padded, verifies, parts.draft + parts.draft_rest > 0)
        log_ratio = math.log(measured_ms / total)
        log_ratio -= float(shares[1:] @ (correction.parts - self._applied))
        kind = padded.bit_length() // 2, shape.depth, verifies
        longer: Longer | None = "device"
        if not shape.depth:
            floor.rest(stands)
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
        if not correction.learn(log_ratio, shares, kind, longer is None, stands):
            return False
        if correction.gate.regimes > regimes:
            floor.forget()
        self._whole = math.exp(correction.whole)
        if np.abs(correction.parts - self._applied).max() > STALE:
            self._apply()
        return True
