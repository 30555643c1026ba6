"""Stand-ins around the verification policy: a plain calibrator, plain prices, and policies that do
what must not be done or what no sane one would do."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_dspark.scheduler.fixed import FixedPolicy
from vllm_dspark.scheduler.verification import VerificationPolicy


class PlainCalibrator:
    """Takes confidences as they are and keeps what it is told.

    Attributes:
        observed: (confidence, accepted, verified, sampled, learn, request) of every call.
    """

    version = 0

    def __init__(self, prior: float = 0.5) -> None:
        self._prior = prior
        self.observed: list[tuple[Any, ...]] = []

    def observe(self, *observation: Any, learn: Any = None, request: Any = None) -> None:
        self.observed.append((*observation, learn, request))

    def calibrate(self, confidence: Any, sampled: Any) -> np.ndarray:
        confidence = np.asarray(confidence, dtype=np.float64)
        return np.where(np.isnan(confidence), self._prior, confidence)


class Prices:
    """Costs of k drafts read off a list, whatever else the step does; the last one goes on.

    Attributes:
        asked: arguments of every call.
    """

    def __init__(self, *step_ms: float) -> None:
        self._step_ms = np.array(step_ms)
        self.asked: list[tuple[int, ...]] = []

    def budget_curve(self, *shape: Any) -> np.ndarray:
        self.asked.append(shape)
        return self._step_ms[np.minimum(np.arange(shape[-1] + 1), len(self._step_ms) - 1)]


class LookAhead(VerificationPolicy):
    """What must not be done: the budget reads the block that it is for."""

    def _before_current(self, slots: Any) -> Any:
        return self._confidence[0, slots]


class RandomLengths(FixedPolicy):
    """Verifies a random prefix of every request's drafts, none and all of them included.

    Attributes:
        lengths: what was verified, one array a step.
    """

    def __init__(self, slots: int, gamma: int, seed: int = 0) -> None:
        super().__init__(slots, gamma)
        self._random = np.random.default_rng(seed)
        self.lengths: list[np.ndarray] = []

    def choose(self, slots: Any, draft_lengths: Any, *shape: Any) -> int:
        limits = self.limits(slots, draft_lengths)
        kind = self._random.integers(8)
        if kind == 0:
            lengths = limits  # the runner's own layout
        elif kind == 1:
            lengths = np.zeros_like(limits)  # no draft at all
        else:
            lengths = self._random.integers(limits + 1)
        self.lengths.append(lengths)
        return int(lengths.sum())

    def allocate(self, slots: Any, draft_lengths: Any, budget: int, current: bool = True) -> Any:
        assert budget == self.lengths[-1].sum()
        return self.lengths[-1]


class RandomBudget(VerificationPolicy):
    """Verifies a random number of drafts, none and all of them included; the ranking says whose."""

    def __init__(self, served: Any, seed: int = 0) -> None:
        super().__init__(len(served.sampled), served.gamma, served.calibrator, served.costs)
        self._random = np.random.default_rng(seed)

    def choose(self, slots: Any, draft_lengths: Any, *shape: Any) -> int:
        total = int(self.limits(slots, draft_lengths).sum())
        kind = self._random.integers(8)
        if kind < 2:
            return total * int(kind)
        return int(self._random.integers(total + 1))


def runner_of(llm: Any) -> Any:
    """vLLM's model runner, of an engine that runs in this process."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    return executor.driver_worker.worker.model_runner


def manager_of(llm: Any) -> Any:
    """The verification manager of such an engine; None without one."""
    return runner_of(llm).adaptive_verification
