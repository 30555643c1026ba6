"""Confidences corrected while serving, from what verification observed.

Per regime (greedy and sampled requests) and position k a calibrated confidence is

    σ(slope_k · logit(c_k) + intercept_k),    slope_k = s_k / T_k,

with T_k from sequential temperature scaling (`sts`) or 1, and s_k, intercept_k learned by Platt
scaling (`platt`) of the conditional outcome "x_k was accepted, given that x_1..x_{k−1} were", on
the observations still remembered (`memory`). Why this and not something richer: two numbers a
position are known to about a percent from the thousand observations that a memory quick enough
for a changing workload can hold, a slope above 0 keeps the order that the head was trained for,
and a kernel applies it in one line. Deep positions are observed less often; each is pulled
towards the map of the position before it, the first one towards T_1 alone.

A confidence may be anything in [0, 1] that rises with acceptance and is known before x_k is
drawn. For a drafter without a confidence head that is the largest of its own probabilities at
position k, under sampled drafting too; the learned map makes a confidence of it. The probability
of the token that was drawn is not: verification that depends on the draw changes what is emitted,
and it need not rise with acceptance, because rejection sampling keeps a token that the drafter
thinks unlikely whenever the target does not.

Which drafts were verified depends on their confidence. That does not bias the maps, which are
conditional on it, but the prior is that of verified drafts.

To learn takes as long for one request as for many, so it can be done for several steps at once:
what is remembered is about the same, and maps are at most that many steps behind.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_dspark import checks
from vllm_dspark.calibration import platt, sts
from vllm_dspark.calibration.memory import LIMIT, LOGIT_LIMIT, Memory, PositionMetrics
from vllm_dspark.calibration.rounds import Rounds, join, shaped

Floats = npt.NDArray[np.float64]

# Calibrated confidences stay inside of [MARGIN, 1 − MARGIN], also in float32.
MARGIN = 1e-5
# Conditional acceptance before anything was observed, and what it weighs in observations:
# published drafters have 0.77 to 0.93 at position 1 (arXiv 2607.05147).
FIRST_GUESS, GUESS_WEIGHT = 0.8, 20.0
# Observations between Newton steps, and requests that are worth learning from at once.
STEP_EVERY = 32
NEWTON_STEPS = 4  # at most, where several steps are learned from at once
# A new version is due when a calibrated logit moves by this much for some |logit(c)| ≤ 4, a
# percent of probability at most, or a prior by this much.
LOGIT_CHANGE, PRIOR_CHANGE = 0.04, 0.005


class OnlineCalibrator:
    """Calibrates confidences [R, γ] and learns from verified rounds.

    Attributes:
        version: rises with every change of `affine` and `prior`.
        ignored: confidences and rounds that made no sense and taught nothing.

    Args:
        gamma: γ, the number of positions, at least 1.
        temperatures: [γ] of `sts.fit_temperatures`; None for 1 everywhere.
        steps: that are learned from at once, at least 1. If they hold fewer than `STEP_EVERY`
            requests together, learning waits until they do.

    Raises:
        ValueError: `gamma` or `steps` is below 1, or `temperatures` are not [γ] or not in 0.1..10.
    """

    REGIMES = ("greedy", "sampled")

    def __init__(
        self, gamma: int, temperatures: npt.ArrayLike | None = None, steps: int = 1
    ) -> None:
        self.gamma = checks.whole("gamma", gamma, least=1)
        self._steps = checks.whole("steps", steps, least=1)
        self._temperatures = np.ones(self.gamma)
        if temperatures is not None:
            self._temperatures = sts.checked_temperatures(temperatures, self.gamma)
        shape = len(self.REGIMES), self.gamma
        self._memory = Memory(*shape)
        self._fit = np.ones(shape), np.zeros(shape)  # s and intercept
        self._since_step = 0
        self._waiting: list[Rounds] = []
        self._rounds = 0  # in those
        self._turn = 0  # counts those that were learned from
        self.version = 0
        self.ignored = 0
        self._slope, self._intercept = self._map()
        self._prior = self._memory.running_mean(FIRST_GUESS, GUESS_WEIGHT)

    def observe(
        self,
        confidence: npt.ArrayLike,
        accepted: npt.ArrayLike,
        verified: npt.ArrayLike,
        sampled: npt.ArrayLike,
        learn: npt.ArrayLike | None = None,
        request: npt.ArrayLike | None = None,
    ) -> None:
        """Learn from one round of R requests; R may be 0.

        Row i observes position k (from 0) if k < verified[i] and k ≤ accepted[i]: a draft that
        was trimmed, or that follows a rejected one, was not judged. Nonsense (a confidence that
        is no probability; not 0 ≤ accepted ≤ verified ≤ γ) is skipped and counted in `ignored`.

        Args:
            confidence: float [R, γ], as the drafter gave it, before any calibration.
            accepted, verified: int [R], drafts.
            sampled: bool [R], temperature above 0.
            learn: bool [R], False for requests under a constraint, such as structured output,
                whose rejections say nothing about the drafter; None for all True.
            request: int [R], a number of its own for each request, never used again, such as
                a running count. None gives up the bound on one request's influence, not that
                on one step's.

        With `steps` above 1 arrays are kept until they were learned from, and must not change. Of
        more requests than may weigh in full (see `memory`) only some are looked at, in turn.

        Raises:
            ValueError: naming an argument of another shape or type.
        """
        rounds = Rounds.of(self.gamma, confidence, accepted, verified, sampled, learn, request)
        if not len(rounds.sampled):
            return
        if self._waiting and (self._waiting[-1].request is None) != (rounds.request is None):
            self._learn_waiting()
        self._waiting.append(rounds)
        self._rounds += len(rounds.sampled)
        if len(self._waiting) >= self._steps and (self._rounds >= STEP_EVERY or self._steps == 1):
            self._learn_waiting()

    def _learn_waiting(self) -> None:
        """Remember what the waiting steps observed, and learn from it."""
        steps, self._waiting, self._rounds = self._waiting, [], 0
        rounds, later = join(steps, int(LIMIT), self._turn)
        self._turn += 1
        accepted, verified = rounds.accepted, rounds.verified
        possible = (accepted >= 0) & (accepted <= verified) & (verified <= self.gamma)
        taught = np.where(possible & rounds.learn, verified, 0).astype(np.int64)
        judged = np.minimum(taught, np.where(taught, accepted, 0).astype(np.int64) + 1)
        # Flat indices from here on: they are several times quicker than pairs.
        draft = np.flatnonzero(np.arange(self.gamma) < judged[:, None])
        seen = rounds.confidence.take(draft).astype(np.float64)
        valid = (seen >= 0) & (seen <= 1)  # NaN is neither
        self.ignored += int((rounds.learn & ~possible).sum()) + int((~valid).sum())
        draft, seen = draft[valid], seen[valid]
        if draft.size:
            row = draft // self.gamma
            position = draft - row * self.gamma
            cell = rounds.sampled.take(row) * self.gamma + position
            logit = _logit(seen)
            predicted = self._calibrated(self._slope.take(cell), self._intercept.take(cell), logit)
            outcome = position < accepted.take(row)
            self._memory.remember(cell, logit, outcome, predicted, row, rounds.request, later)
            self._since_step += draft.size
            if self._since_step >= STEP_EVERY:
                self._since_step = 0
                self._learn(min(len(steps), NEWTON_STEPS))

    def calibrate(self, confidence: npt.ArrayLike, sampled: npt.ArrayLike) -> Floats:
        """Probability of each draft to be accepted, given that those before it are.

        Args:
            confidence: float [R, γ], as the drafter gave it; R may be 0. What is no
                probability, NaN among it, is given the prior.
            sampled: bool [R], temperature above 0.

        Returns:
            float64 [R, γ], strictly between 0 and 1, in a column and regime in the order of
            `confidence`, though rounding may make neighbours equal.

        Raises:
            ValueError: naming an argument of another shape or type.
        """
        confidence = shaped("confidence", confidence, (-1, self.gamma), "fiu").astype(np.float64)
        regime = shaped("sampled", sampled, confidence.shape[:1], "b").astype(np.int64)
        if not confidence.size:
            return confidence
        slope, intercept = self._slope.take(regime, axis=0), self._intercept.take(regime, axis=0)
        if confidence.min() >= 0 and confidence.max() <= 1:  # NaN is neither
            return self._calibrated(slope, intercept, _logit(confidence))
        valid = (confidence >= 0) & (confidence <= 1)
        logit = _logit(np.where(valid, confidence, 0.5))
        calibrated = self._calibrated(slope, intercept, logit)
        return np.where(valid, calibrated, self._prior[regime])

    def affine(self) -> tuple[Floats, Floats]:
        """Slope and intercept, float64 [2, γ] each, rows as in `REGIMES`.

        `calibrate` is σ(slope · logit(c) + intercept), with logit(c) cut to ±`LOGIT_LIMIT` and
        the result to [`MARGIN`, 1 − `MARGIN`]. Slopes lie in 0.01..50.
        """
        return self._slope.copy(), self._intercept.copy()

    def prior(self, sampled: bool) -> Floats:
        """Acceptance at each position given acceptance before it, float64 [γ], inside (0, 1).

        The running mean over what is remembered, to 0.005. A position with few observations
        leans on the one before it, the first one on 0.8.
        """
        return self._prior[int(sampled)].copy()

    def survival_prior(self, sampled: bool) -> Floats:
        """Survival to expect of a new request, float64 [γ]: cumulative product of `prior`."""
        return np.cumprod(self._prior[int(sampled)])

    def metrics(self) -> dict[str, list[PositionMetrics]]:
        """By regime, one entry a position, over what is remembered."""
        return dict(zip(self.REGIMES, self._memory.metrics(self._prior), strict=True))

    def _calibrated(self, slope: Floats, intercept: Floats, logit: Floats) -> Floats:
        probability = platt.sigmoid(slope * logit + intercept)
        np.maximum(probability, MARGIN, out=probability)
        return np.minimum(probability, 1 - MARGIN, out=probability)

    def _map(self) -> tuple[Floats, Floats]:
        slope, intercept = self._fit
        return slope / self._temperatures, intercept

    def _learn(self, most: int) -> None:
        """Newton steps until they lead no further, `most` of them, and a new version if they led
        away from the last one."""
        memory = self._memory
        logit = memory.mean_logits() / self._temperatures[:, None]
        for _ in range(most):
            slope, intercept = before = self._fit
            towards = np.ones_like(slope), np.zeros_like(intercept)
            towards[0][:, 1:], towards[1][:, 1:] = slope[:, :-1], intercept[:, :-1]
            self._fit = platt.newton_step(*before, towards, memory.count, memory.accepts, logit)
            if _change(self._fit, before) <= LOGIT_CHANGE:
                break
        new = self._map()
        prior = memory.running_mean(FIRST_GUESS, GUESS_WEIGHT)
        change = _change(new, (self._slope, self._intercept))
        if change > LOGIT_CHANGE or np.abs(prior - self._prior).max() > PRIOR_CHANGE:
            (self._slope, self._intercept), self._prior = new, prior
            self.version += 1


def _change(new: tuple[Floats, Floats], old: tuple[Floats, Floats]) -> float:
    """Of a calibrated logit where |logit(c)| is 4, the largest."""
    return float((np.abs(new[0] - old[0]) * 4 + np.abs(new[1] - old[1])).max())


def _logit(confidence: Floats) -> Floats:
    """log(c / (1 − c)), cut to ±`LOGIT_LIMIT`."""
    with np.errstate(divide="ignore", under="ignore"):
        logit: Floats = np.log(confidence / (1 - confidence))
    np.maximum(logit, -LOGIT_LIMIT, out=logit)
    return np.minimum(logit, LOGIT_LIMIT, out=logit)
