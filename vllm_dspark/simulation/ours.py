"""Our own policy: the classes that serve, fed as our scheduler and workers feed them.

`DepthController` chooses the depth, `VerificationPolicy` the number of drafts and whose, on
confidences that `OnlineCalibrator` corrects and costs that a `CostModel` corrects. Confidences and
outcomes reach the host two steps late, as from a GPU, where the ranking reads the current block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from vllm_dspark.calibration.online import OnlineCalibrator
from vllm_dspark.scheduler.budget import allocate
from vllm_dspark.scheduler.controller import DepthController
from vllm_dspark.scheduler.depth import Goal
from vllm_dspark.scheduler.running_survival import RunningSurvival
from vllm_dspark.scheduler.survival import prefix_survival
from vllm_dspark.scheduler.verification import VerificationPolicy
from vllm_dspark.simulation.engine import Engine
from vllm_dspark.simulation.policies import Batch, Ints, Outcome, Queue

STEPS_LATE = 2


def usual_depths(gamma: int) -> tuple[int, ...]:
    """Those that the plugin captures graphs for, and 0."""
    return tuple(sorted({0, gamma, *(depth for depth in (1, 2, 3, 5) if depth < gamma)}))


class Ours:
    """See the module.

    Args:
        gamma: γ.
        engine: that it runs on. Its costs are the profile; what steps take corrects them.
        goal: what the depth is chosen for.
        depths: that can be drafted; `usual_depths` if None.
        by_block: see `Policy`.

    Attributes:
        controller: DepthController.
    """

    def __init__(
        self,
        gamma: int,
        engine: Engine,
        goal: Goal | None = None,
        depths: Sequence[int] | None = None,
        by_block: bool = False,
    ) -> None:
        self.by_block = by_block
        slots = engine.most_requests
        self.controller = DepthController(gamma, goal or Goal(), max_requests=slots)
        self.controller.start(depths or usual_depths(gamma), engine.cost.to_json({}))
        self._calibrator = OnlineCalibrator(gamma)
        self._policy = VerificationPolicy(slots, gamma, self._calibrator, self.controller.cost)
        self._survival = RunningSurvival(gamma)
        self._current = np.full((slots, gamma), np.nan)
        self._late: deque[Outcome] = deque()

    def admit(self, step: int, slot: int) -> None:
        """See `Policy`."""
        self._policy.add_request(slot, step, sampled=True)
        self._current[slot] = np.nan

    def depth(self, queue: Queue) -> int:
        """See `Policy`."""
        return self.controller.choose(
            requests=queue.requests,
            waiting=queue.waiting,
            context_tokens=queue.context_tokens,
            free_kv_fraction=1.0,
        )

    def lengths(self, batch: Batch) -> Ints:
        """See `Policy`."""
        self._collect(batch.step)
        slots, drafts = batch.slots, batch.drafts
        lengths = np.zeros_like(drafts)
        if drafts.any():
            budget = self._policy.choose(
                slots, drafts, batch.base_tokens, batch.sampling, batch.context_tokens, batch.depth
            )
            sampled = self._policy.sampled[slots]
            calibrated = self._calibrator.calibrate(self._current[slots], sampled)
            lengths = allocate(prefix_survival(calibrated), drafts, budget)
        self._survival.step(self._policy.retired())
        return lengths

    def ended(self, outcome: Outcome) -> None:
        """See `Policy`."""
        batch = outcome.batch
        if batch.depth:
            self._policy.drafted(batch.step, outcome.drew, batch.depth)
            self._current[outcome.drew] = outcome.confidence
            self._current[outcome.drew, batch.depth :] = np.nan
        self._late.append(outcome)
        shape = outcome.shape
        if not outcome.prefills:
            fields = shape.tokens, shape.requests, shape.context_tokens, shape.logits_rows
            self.controller.observe_step((*fields, shape.depth), outcome.ms, usual=True)
        known = self._survival
        self.controller.observe_survival(known.mean.tolist(), known.age.tolist())

    def _collect(self, step: int) -> None:
        """Tell the policy what has arrived by the time that this step is planned."""
        while self._late and self._late[0].batch.step <= step - STEPS_LATE:
            outcome = self._late.popleft()
            batch = outcome.batch
            self._policy.outcomes_arrived(
                batch.step, batch.slots, outcome.accepted, outcome.verified
            )
            if batch.depth:
                known = outcome.confidence.astype(np.float32)
                known[:, batch.depth :] = np.nan
                self._policy.confidences_arrived(batch.step, outcome.drew, known)
