"""What a worker reports of its steps, and what it does with the plan that comes back."""

from __future__ import annotations

from typing import Any

from vllm_dspark.integration.step_clock import StepClock
from vllm_dspark.integration.step_report import Startup, StepPlan, StepReport, TimedStep
from vllm_dspark.scheduler.cost_model import StepShape
from vllm_dspark.scheduler.running_survival import RunningSurvival
from vllm_dspark.scheduler.verification import VerificationPolicy

_AWAITED = 64  # steps that a time is awaited for; it comes within a few


class StepMeter:
    """Of one worker.

    Args:
        gamma: γ.
        manager: the VerificationManager; None if this engine has none.
        clock: times steps.
        startup: to be sent with the first report.

    Attributes:
        depths: int, of every step so far, if it is a list; for tests. None costs nothing.
    """

    depths: list[int] | None = None

    def __init__(self, gamma: int, manager: Any, clock: StepClock, startup: Startup) -> None:
        self._manager, self._clock = manager, clock
        self._startup: Startup | None = startup
        self._costs = getattr(manager, "costs", None)
        # Without calibrated confidences the scheduler goes by outcomes.
        policy = getattr(manager, "policy", None)
        self._policy = policy if isinstance(policy, VerificationPolicy) else None
        self._survival = RunningSurvival(gamma)
        self._step = 0
        self._shapes: dict[int, tuple[StepShape, bool]] = {}  # of steps whose time is awaited
        self._verified_before = 0

    def begin(self, plan: StepPlan) -> None:
        """A step is about to be launched. Costs learn from what all ranks are told."""
        if self._costs is not None:
            for step in plan.steps:
                self._costs.observe(step.shape, step.ms, step.usual)
        self._verified_before = 0 if self._manager is None else self._manager.counters.verified
        self._clock.begin()

    def launched(self, scheduler_output: Any, input_batch: Any, depth: int) -> None:
        """The target is launched: by now it is known what the step works on.

        Args:
            scheduler_output: vLLM's.
            input_batch: the runner's.
            depth: drafts per request at the end of the step, 0 to γ.
        """
        if self._policy is not None:
            self._survival.step(self._policy.retired())
        if self.depths is not None:
            self.depths.append(depth)
        drafts = sum(map(len, scheduler_output.scheduled_spec_decode_tokens.values()))
        requests = input_batch.num_reqs
        others = scheduler_output.total_num_scheduled_tokens - drafts
        if scheduler_output.scheduled_new_reqs or others != requests:
            return  # a prefill among them is not what was profiled
        verified = drafts
        if self._manager is not None and drafts:
            verified = self._manager.counters.verified - self._verified_before
        context = int(input_batch.num_computed_tokens_np.sum())
        tokens = requests + verified
        usual = verified == drafts or self._costs is None or self._costs.trims_replay
        self._shapes[self._step] = StepShape(tokens, requests, context, tokens, depth), usual

    def end(self) -> StepReport:
        """The step is launched to its end.

        Returns:
            What steps before it have to tell. How long the current blocks took to draw is no
            business of their own verification.
        """
        steps = []
        for number, ms in self._clock.ended():
            known = self._shapes.pop(number, None)
            if known is not None:
                shape, usual = known
                steps.append(TimedStep.of(shape, ms, usual))
        self._shapes.pop(self._step - _AWAITED, None)  # of a time that never came
        self._clock.end(self._step)
        self._step += 1
        startup, self._startup = self._startup, None
        if self._policy is None:
            return StepReport(steps=tuple(steps), startup=startup)
        return StepReport(
            steps=tuple(steps),
            survival=tuple(self._survival.mean.round(4).tolist()),
            age=tuple(self._survival.age.tolist()),
            startup=startup,
        )
