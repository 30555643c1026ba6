"""What the parts of a step take, as profiled: the cost model before any correction.

A step runs the target over its tokens, samples from its logits rows, then keeps the drafter's
context K/V up to date and drafts a block of `depth` tokens for every request:

    verify = table(tokens) + context_ms · context tokens + logits_ms · rows + request_ms · requests
    draft  = table of its depth(requests) + row_ms · tokens  (+ draft_context_ms · context tokens
             where depth > 0)

Both tables have the stairs of captured graphs, and nothing ever falls as a step grows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_dspark import checks
from vllm_dspark.scheduler.monotone import Floats, StairTable, fit_tables


@dataclass(frozen=True)
class StepShape:
    """What a step works on; ints, at least 0.

    Raises:
        ValueError: a field, which it names, is not one.
    """

    tokens: int  # through the target: drafts that are verified, and all others
    requests: int
    context_tokens: int  # read by attention, summed over requests
    logits_rows: int  # of the LM head, sampling and rejection
    depth: int  # tokens drafted per request, 0..γ

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is not int or value < 0:  # quickly, for each step is one
                checks.whole(name, value, least=0)


@dataclass(frozen=True)
class StepSample:
    """A profiled step.

    Raises:
        ValueError: a time is negative or not finite, or `verify_ms` is 0.
    """

    shape: StepShape
    verify_ms: float  # target forward, LM head, sampling, rejection
    draft_ms: float  # context K/V, draft backbone, sequential stage

    def __post_init__(self) -> None:
        checks.positives("verify_ms", [self.verify_ms], "a number of ms")
        checks.amount("draft_ms", self.draft_ms)


@dataclass(frozen=True)
class Rates:
    """Milliseconds for each one more, at least 0."""

    context_ms: float = 0.0
    logits_ms: float = 0.0
    request_ms: float = 0.0
    draft_context_ms: float = 0.0
    row_ms: float = 0.0


class StepTimes:
    """Profiled tables and rates.

    Args:
        verify: sizes (tokens) and times (ms) of the target's part.
        draft: the same by depth, sizes in requests; at least one depth above 0.
        rates: what is linear.
        captured: ascending sizes, in tokens, of captured graphs. A draft pass of depth d is
            captured for the requests that fill them: ⌈size / d⌉.
        gamma: γ, drafts of a full block.
        doubt: how far the ratios between parts may be off; 1 is measured, more is guessed.

    Attributes:
        draft_table: float64 [γ + 1, 1 + most requests profiled or captured], ms; never falls
            along either axis. A depth that was not profiled lies between its neighbours. One
            that has none on a side costs what its neighbour does for as many query tokens;
            drafting nothing costs no time.
        draft_slope: float64 [γ + 1], ms for each request beyond that.
    """

    def __init__(
        self,
        verify: tuple[Floats, Floats],
        draft: Mapping[int, tuple[Floats, Floats]],
        rates: Rates,
        captured: Sequence[int],
        gamma: int,
        doubt: float = 1.0,
    ) -> None:
        self.verify = StairTable(*verify, captured)
        self.rates = rates
        self.gamma, self.doubt = gamma, doubt
        self.captured = tuple(captured)
        self.draft = {
            depth: StairTable(*table, captured_requests(captured, depth))
            for depth, table in sorted(draft.items())
        }
        most = int(max(table.knots[-1] for table in self.draft.values()))
        requests = np.arange(most + 2)
        by_depth = np.stack([self._draft_row(depth, requests) for depth in range(gamma + 1)])
        by_depth = np.maximum.accumulate(np.maximum.accumulate(by_depth, axis=0), axis=1)
        self.draft_table = by_depth[:, :-1]
        self.draft_slope = np.maximum.accumulate(by_depth[:, -1] - by_depth[:, -2])

    def _draft_row(self, depth: int, requests: npt.NDArray[np.int64]) -> Floats:
        if depth in self.draft:
            return self.draft[depth].read(requests)
        if depth == 0:
            return np.zeros(requests.size)
        sizes = StairTable([1.0], [0.0], captured_requests(self.captured, depth)).padded(requests)
        above = min((d for d in self.draft if d > depth), default=0)
        below = max(d for d in (0, *self.draft) if d < depth)
        if above and below:
            low, high = self.draft[below].between(sizes), self.draft[above].between(sizes)
            row = low + (high - low) * (depth - below) / (above - below)
        else:
            near = above or below
            row = self.draft[near].between(sizes * (depth / near))
        # Padding may run more query tokens at a smaller depth; what was profiled has precedence.
        return np.minimum(row, self.draft[above].read(requests)) if above else row

    @classmethod
    def fit(cls, samples: Sequence[StepSample], captured: Sequence[int], gamma: int) -> StepTimes:
        """Least squares of relative errors over the median time of each profiled shape.

        Raises:
            ValueError: no samples, none that drafts, or a depth beyond γ.
        """
        if not samples:
            raise ValueError("samples is empty")
        times: dict[StepShape, list[tuple[float, float]]] = defaultdict(list)
        for sample in samples:
            times[sample.shape].append((sample.verify_ms, sample.draft_ms))
        tokens, requests, context, rows, depth = np.array(
            [[getattr(shape, field.name) for field in fields(shape)] for shape in times]
        ).T
        if depth.max() > gamma or depth.max() == 0:
            raise ValueError(
                f"samples must draft: depths in 0..{gamma}, one above 0, got {depth.max()} at most"
            )
        verify_ms, draft_ms = np.array([np.median(runs, axis=0) for runs in times.values()]).T
        zeros = np.zeros_like(depth)
        padded = StairTable([1.0], [0.0], captured).padded(tokens)
        verify = fit_tables(
            zeros, padded, np.stack([context, rows, requests], axis=1) * 1.0, verify_ms, verify_ms
        )
        for d in np.unique(depth):
            pad = StairTable([1.0], [0.0], captured_requests(captured, int(d))).padded
            requests[depth == d] = pad(requests[depth == d])
        amounts = np.stack([context * (depth > 0), tokens], axis=1) * 1.0
        draft = fit_tables(depth, requests, amounts, draft_ms, verify_ms + draft_ms)
        rates = Rates(*map(float, (*verify.rates, *draft.rates)))
        return cls(verify.tables[0], draft.tables, rates, captured, gamma)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return {
            "gamma": self.gamma,
            "doubt": self.doubt,
            "captured": list(self.captured),
            "rates": vars(self.rates).copy(),
            "verify": [self.verify.sizes.tolist(), self.verify.times.tolist()],
            "draft": {d: [t.sizes.tolist(), t.times.tolist()] for d, t in self.draft.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StepTimes:
        """What `to_dict` gave.

        Raises:
            ValueError: something in it is missing, falls, or is no number.
        """
        try:
            gamma = checks.whole("gamma", data["gamma"], least=1)
            rates = {name: checks.amount(name, value) for name, value in data["rates"].items()}
            draft = {int(depth): _table(table) for depth, table in data["draft"].items()}
            if not draft or not 0 < max(draft) <= gamma:
                raise ValueError(f"depths must lie in 0..{gamma}, one above 0, got {list(draft)}")
            captured = captured_sizes(data["captured"])
            doubt = checks.amount("doubt", data["doubt"])
            return cls(_table(data["verify"]), draft, Rates(**rates), captured, gamma, doubt)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"not a step-time profile: {error!r}") from None


def captured_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """Ascending, each once.

    Raises:
        ValueError: one is no integer of at least 1.
    """
    return tuple(sorted({checks.whole("capture_sizes", size, least=1) for size in sizes}))


def captured_requests(captured: Sequence[int], depth: int) -> tuple[int, ...]:
    """The numbers of requests that a draft pass of `depth` query tokens each is captured for.

    Keeping the context up to date runs outside of graphs: depth 0 is never padded.
    """
    return tuple(sorted({math.ceil(size / depth) for size in captured})) if depth else ()


def _table(pair: Any) -> tuple[Floats, Floats]:
    sizes, times = (checks.numbers("table", part, 1, "[K]").astype(np.float64) for part in pair)
    falls = (np.diff(sizes) <= 0).any() or (np.diff(times) < 0).any()
    if sizes.shape != times.shape or falls or not np.isfinite([sizes, times]).all():
        raise ValueError("table must have as many times as sizes, both ascending and finite")
    if sizes[0] < 0 or times[0] < 0:
        raise ValueError("table must not be negative")
    return sizes, times
