"""Milliseconds of a step, predicted: a profile, and what measured steps taught since.

`StepTimes` says what the parts of a step are and holds their profile, `Correction` the factors
that were learned:

    verify = whole · (token factor · table(tokens) + (context_ms + learned) · context + …)
    draft  = whole · (depth factor · table of depth(requests) + …)
    step   = verify + draft, or what the host takes to launch a step that drafts, if that is more

A prediction never falls as tokens, requests, context, logits rows or depth grow, corrected or
not.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from vllm_dspark import checks
from vllm_dspark.scheduler.corrected import CorrectedTimes, Counts, Parts
from vllm_dspark.scheduler.hope import hoped_ms
from vllm_dspark.scheduler.monotone import Floats
from vllm_dspark.scheduler.profile_text import from_text, to_text
from vllm_dspark.scheduler.roofline import roofline
from vllm_dspark.scheduler.step_times import StepSample, StepShape, StepTimes, captured_sizes

__all__ = ["CostModel", "StepSample", "StepShape"]

ERROR_WINDOW = 256  # predictions


class CostModel:
    """Predicts what a step takes, and corrects itself by what steps took.

    Args:
        samples: profiled steps, each shape as often as it ran; the median counts. Context
            tokens get a rate of their own only if the profile holds two context lengths.
        capture_sizes: tokens of captured graphs, in any order; empty where nothing is padded.
        gamma: γ, drafts of a full block, at least 1.

    Attributes:
        timed: observed steps that could teach something, of each depth 0..γ.
        refused: those of them that were too far off to be believed.

    Raises:
        ValueError: an argument, which it names, is outside of that, or no sample drafts.
    """

    def __init__(
        self, samples: Sequence[StepSample], capture_sizes: Sequence[int], gamma: int
    ) -> None:
        gamma = checks.whole("gamma", gamma, least=1)
        self._start(StepTimes.fit(samples, captured_sizes(capture_sizes), gamma))

    def _start(self, profile: StepTimes) -> None:
        self._times, self._profiled = CorrectedTimes(profile), CorrectedTimes(profile)
        self.timed, self.refused = [0] * (profile.gamma + 1), [0] * (profile.gamma + 1)
        self._errors: deque[float] = deque(maxlen=ERROR_WINDOW)

    @classmethod
    def default(cls, gamma: int, capture_sizes: Sequence[int] = (), **hardware: float) -> CostModel:
        """A guess where nothing was profiled; observed steps repair its scale.

        Args:
            gamma, capture_sizes: as above.
            hardware: sizes and speeds, keyword arguments of `roofline`.

        Raises:
            ValueError: an argument, which it names, is not positive.
        """
        gamma = checks.whole("gamma", gamma, least=1)
        return cls._of(roofline(gamma, captured_sizes(capture_sizes), **hardware))

    @classmethod
    def _of(cls, profile: StepTimes) -> CostModel:
        model = cls.__new__(cls)
        model._start(profile)
        return model

    @property
    def gamma(self) -> int:
        """γ, drafts of a full block."""
        return self._times.profile.gamma

    @property
    def error(self) -> float:
        """Median absolute error, percent of the measured time, of the last 256 predictions made
        before their observation; NaN before the first."""
        return float(np.median(self._errors)) if self._errors else math.nan

    @property
    def regimes(self) -> int:
        """How often measured times became others for good, which put in doubt what was learned."""
        return self._times.correction.gate.regimes + self._times.floor.regimes

    def verify_ms(
        self,
        tokens: npt.ArrayLike,
        requests: npt.ArrayLike,
        context_tokens: npt.ArrayLike,
        logits_rows: npt.ArrayLike,
    ) -> Floats:
        """The target's part: forward pass, LM head, sampling and rejection.

        Args:
            tokens, requests, context_tokens, logits_rows: ints, at least 0, that broadcast.

        Returns:
            float64 of the broadcast shape, ms.

        Raises:
            ValueError: an argument, which it names, is outside of that.
        """
        return self._times.verify_ms(
            _counts("tokens", tokens),
            _counts("requests", requests),
            _counts("context_tokens", context_tokens),
            _counts("logits_rows", logits_rows),
        )

    def draft_ms(
        self,
        requests: npt.ArrayLike,
        depth: npt.ArrayLike,
        context_tokens: npt.ArrayLike,
        context_rows: npt.ArrayLike,
    ) -> Floats:
        """The drafter's part; at depth 0 it only keeps its context K/V up to date.

        Args:
            requests, depth, context_tokens: ints, at least 0, depth ≤ γ, that broadcast.
            context_rows: ints, tokens whose context K/V is written: those of the step.

        Returns:
            float64 of the broadcast shape, ms.

        Raises:
            ValueError: an argument, which it names, is outside of that.
        """
        return self._times.draft_ms(
            _counts("requests", requests),
            _counts("depth", depth, self.gamma),
            _counts("context_tokens", context_tokens),
            _counts("context_rows", context_rows),
        )

    def step_ms(
        self,
        tokens: npt.ArrayLike,
        requests: npt.ArrayLike,
        context_tokens: npt.ArrayLike,
        logits_rows: npt.ArrayLike,
        depth: npt.ArrayLike,
    ) -> Floats:
        """The whole step: `verify_ms` plus `draft_ms`, whose arguments these are, or what the host
        takes to launch it, if that is more."""
        tokens, requests = _counts("tokens", tokens), _counts("requests", requests)
        depth = _counts("depth", depth, self.gamma)
        device_ms = self._times.device_ms(
            tokens,
            requests,
            _counts("context_tokens", context_tokens),
            _counts("logits_rows", logits_rows),
            depth,
        )
        return np.maximum(device_ms, self._times.floor_ms(requests, depth))

    def steady_ms(self, requests: Counts, context_tokens: Counts, depths: Counts) -> Floats:
        """`step_ms` of steps that verify as many drafts of each request as they draft.

        Args:
            requests, context_tokens, depths: int64 that broadcast, at least 0, depths ≤ γ; not
                checked, for every step asks.

        Returns:
            float64 of the broadcast shape, ms.
        """
        tokens = requests * (1 + depths)
        device_ms = self._times.device_ms(tokens, requests, context_tokens, tokens, depths)
        return np.maximum(device_ms, self._times.floor_ms(requests, depths))

    def hoped_ms(self, requests: int, context_tokens: int, depths: Counts, current: int) -> Floats:
        """The least that steps may take which nobody has seen for long, of those of `steady_ms`.

        See `hope`.

        Args:
            requests, context_tokens: at least 0.
            depths: int64 [D], at most γ.
            current: index into depths, of the steps that run.

        Returns:
            float64 [D], ms.
        """
        return hoped_ms(self._times, self._profiled, requests, context_tokens, depths, current)

    def budget_curve(
        self,
        base_tokens: int,
        requests: int,
        context_tokens: int,
        base_logits_rows: int,
        depth: int,
        drafts: int,
    ) -> Floats:
        """What `budget.choose_budget` takes as `step_ms`.

        Args:
            base_tokens, base_logits_rows: of the step without drafts.
            requests, context_tokens: of the step, whatever is admitted.
            depth: drafted in the step, 0..γ.
            drafts: the most that can be admitted.

        Returns:
            float64 [drafts + 1], ms, non-decreasing: entry k is `step_ms` of the step that
            admits k drafts, which add k tokens and k logits rows.

        Raises:
            ValueError: an argument, which it names, is no int of at least 0, or depth > γ.
        """
        admitted = np.arange(checks.whole("drafts", drafts, least=0) + 1)
        tokens = admitted + checks.whole("base_tokens", base_tokens, least=0)
        rows = admitted + checks.whole("base_logits_rows", base_logits_rows, least=0)
        return self.step_ms(tokens, requests, context_tokens, rows, depth)

    def observe(
        self,
        shape: StepShape,
        measured_ms: float,
        graph: bool = True,
        draft_ms: float | None = None,
        stands: int = 1,
    ) -> bool:
        """Learn from what a step took.

        Args:
            shape: of the step; depth ≤ γ.
            measured_ms: from the end of the step before to the end of this one, so that what the
                host takes in between counts; positive and finite.
            graph: whether the step ran in the way that was profiled for its size. False teaches
                nothing and counts in no error: prefill, compilation, an eager fallback.
            draft_ms: the drafter's part of `measured_ms`, where it was measured apart.
            stands: steps that this one stands for, itself among them: doubt returns as if they
                had been observed.

        Returns:
            Whether it was believed.

        Raises:
            ValueError: an argument, which it names, is outside of that.
        """
        if type(measured_ms) is not float or not 0 < measured_ms < math.inf:
            checks.positives("measured_ms", [measured_ms], "a number of ms")
        if shape.depth > self.gamma:
            raise ValueError(f"depth must lie in 0..{self.gamma}, got {shape.depth}")
        if draft_ms is not None and not 0 <= draft_ms < measured_ms:
            raise ValueError(f"draft_ms must lie in 0..measured_ms, got {draft_ms}")
        if not graph:
            return False
        self.timed[shape.depth] += 1
        parts = self._times.parts(shape)
        predicted_ms = max(sum(parts), self._times.floor_ms(shape.requests, shape.depth))
        self._errors.append(100 * abs(predicted_ms / measured_ms - 1))
        if not draft_ms:
            believed = self._times.learn(shape, measured_ms, parts, stands=stands)
            self.refused[shape.depth] += not believed
            return believed
        verify = parts._replace(draft=0.0, draft_rest=0.0)
        draft = Parts(0.0, 0.0, parts.draft, parts.draft_rest)
        verified = self._times.learn(shape, measured_ms - draft_ms, verify, whole=False)
        return self._times.learn(shape, draft_ms, draft, whole=False) and verified

    def anon_repr(self) -> str:
        """What vLLM prints of it when an engine fails, in the place of all of its tables."""
        return f"CostModel(gamma={self.gamma})"

    def to_json(self, key: Mapping[str, str]) -> str:
        """The profile, for a cache. What was learned since belongs to the run and is left out.

        Args:
            key: what the profile holds for: model, GPU, vLLM, configuration.
        """
        return to_text(self._times.profile, key)

    @classmethod
    def from_json(cls, text: str, key: Mapping[str, str]) -> CostModel:
        """What `to_json` gave for the same key.

        Raises:
            ValueError: it is no such text, or of another format or key; it says which.
        """
        return cls._of(from_text(text, key))


def _counts(name: str, values: npt.ArrayLike, most: int | None = None) -> Counts:
    """int64 of any shape."""
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold integers, got dtype {array.dtype}")
    if array.size and array.min() < 0:
        raise ValueError(f"{name} must be at least 0, got {array.min()}")
    if most is not None and array.size and array.max() > most:
        raise ValueError(f"{name} must lie in 0..{most}, got {array.max()}")
    return array.astype(np.int64, copy=False)
