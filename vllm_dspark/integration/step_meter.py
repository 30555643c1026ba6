"""What a worker reports of its steps, and what it does with the plan that comes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_dspark.calibration.memory import PositionMetrics
from vllm_dspark.calibration.online import OnlineCalibrator
from vllm_dspark.integration.step_clock import StepClock
from vllm_dspark.integration.step_report import Startup, StepPlan, StepReport, TimedStep
from vllm_dspark.scheduler.running_survival import RunningSurvival
from vllm_dspark.scheduler.verification import VerificationPolicy

_AWAITED = 64  # steps that a time is awaited for; it comes within a few
_CALIBRATION_EVERY = 128  # steps between two looks at the calibrator


class StepMeter:
    """Of one worker.

    Args:
        gamma: γ.
        manager: the VerificationManager; None if this engine has none.
        clock: times steps.
        startup: to be sent with the first report.
        every: steps between two reports of what survives; the first report has one.

    Attributes:
        depths: int, of every step so far, if it is a list; for tests. None costs nothing.
    """

    depths: list[int] | None = None

    def __init__(
        self, gamma: int, manager: Any, clock: StepClock, startup: Startup, every: int = 1
    ) -> None:
        self._manager, self._clock, self._every = manager, clock, every
        self._startup: Startup | None = startup
        self._costs = getattr(manager, "costs", None)
        # Without calibrated confidences the scheduler goes by outcomes.
        policy = getattr(manager, "policy", None)
        self._policy = policy if isinstance(policy, VerificationPolicy) else None
        self._survival = RunningSurvival(gamma)
        self._step = 0
        self._drafting: bool | None = None  # of the step before; None if it held a prefill
        self._shapes: dict[int, TimedStep] = {}  # of steps whose time is awaited
        self._verified_before = 0
        self._drafts: tuple[int, ...] = ()  # of the step, see StepReport

    def begin(self, plan: StepPlan) -> None:
        """A step is about to be launched. Costs learn from what all ranks are told."""
        if self._costs is not None:
            if plan.model is not None:
                self._costs.follow(plan.model)
            for step in plan.steps:
                if plan.model is None or not step.usual:
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
        if self.depths is not None:
            self.depths.append(depth)
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        drafts = sum(map(len, scheduled.values()))
        verified = drafts
        if self._manager is not None and drafts:
            verified = self._manager.counters.verified - self._verified_before
        if drafts:
            self._drafts = len(scheduled), drafts, verified
        requests = input_batch.num_reqs
        before, self._drafting = self._drafting, None
        others = scheduler_output.total_num_scheduled_tokens - drafts
        if scheduler_output.scheduled_new_reqs or others != requests:
            return  # a prefill among them is not what was profiled
        self._drafting = depth > 0
        if before != self._drafting:
            return  # it began where another kind of step ended, whose host may have run ahead
        context = int(input_batch.num_computed_tokens_np.sum())
        tokens = requests + verified
        usual = verified == drafts or self._costs is None or self._costs.trims_replay
        self._shapes[self._step] = TimedStep(tokens, requests, context, tokens, depth, 0.0, usual)

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
                steps.append(known._replace(ms=ms))
        self._shapes.pop(self._step - _AWAITED, None)  # of a time that never came
        self._clock.end(self._step)
        self._step += 1
        startup, self._startup = self._startup, None
        drafts, self._drafts = self._drafts, ()
        if self._policy is None or (startup is None and self._step % self._every):
            return StepReport(steps=tuple(steps), startup=startup, drafts=drafts)
        self._survival.step(self._policy.retired(), self._every)
        return StepReport(
            steps=tuple(steps),
            survival=tuple(self._survival.mean.round(4).tolist()),
            age=tuple(self._survival.age.tolist()),
            startup=startup,
            drafts=drafts,
            calibration=self._calibration_error(),
        )

    def _calibration_error(self) -> tuple[float | None, ...]:
        """By regime, once in a while; empty in between."""
        calibrator = getattr(self._policy, "calibrator", None)
        if self._step % _CALIBRATION_EVERY or not isinstance(calibrator, OnlineCalibrator):
            return ()
        return tuple(map(mean_error, calibrator.metrics().values()))


def mean_error(positions: Sequence[PositionMetrics]) -> float | None:
    """Expected calibration error over all positions of a regime, by observations."""
    known = [(p.ece, p.observations) for p in positions if p.ece is not None]
    weight = sum(observations for _, observations in known)
    return sum(ece * observations for ece, observations in known) / weight if weight else None
