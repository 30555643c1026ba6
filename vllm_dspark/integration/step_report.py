"""What travels with every step, beside vLLM's own: a report up, a plan down.

The rank that returns tokens sends a `StepReport` to the scheduler, on vLLM's ModelRunnerOutput.
The scheduler sends one `StepPlan` to all ranks, on vLLM's SchedulerOutput. Both are dataclasses
that vLLM pickles as they are, so an attribute of our own goes with them; a few hundred bytes.

Clocks differ between ranks, and ranks must decide alike. So no rank learns from a clock of its own:
measured times go up with the report and come back with the plan, the same for all, in one order.
A worker in the scheduler's own process need not learn twice: the plan hands it the model itself,
which what is sent to other processes leaves out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vllm_dspark.scheduler.cost_model import CostModel, StepShape

# Learning takes the host as long for one step as for several: it is done for as many at once, and
# a number of drafts that was chosen stands that long where it has stopped changing.
EVERY = 8  # steps
_REPORT = "dspark_report"
_PLAN = "dspark_plan"


class TimedStep(NamedTuple):
    """How long a step took that only decoded."""

    tokens: int  # the fields of a StepShape
    requests: int
    context_tokens: int
    logits_rows: int
    depth: int
    ms: float
    usual: bool  # it ran in the way that steps of its size were profiled

    @property
    def shape(self) -> StepShape:
        """What the step worked on.

        Raises:
            ValueError: a field is no int of at least 0.
        """
        return StepShape(*self[:5])


class Startup(NamedTuple):
    """What only the workers know, once."""

    depths: tuple[int, ...]  # that can be drafted at the price of their size, in 0..γ
    costs: str | None  # `CostModel.to_json` of what was profiled, if anything was
    finds_broken: bool = False  # they say whose logits are broken, see `broken_logits`


class StepReport(NamedTuple):
    """From the workers. Empty fields are nothing new."""

    steps: tuple[TimedStep, ...] = ()  # ended, not the one that it travels with
    survival: tuple[float, ...] = ()  # [γ], see RunningSurvival
    age: tuple[float, ...] = ()  # [γ], steps
    startup: Startup | None = None
    # Of this step: requests with drafts, drafts that were scheduled, and that are verified.
    drafts: tuple[int, ...] = ()
    # Expected calibration error by regime of OnlineCalibrator; None where nothing is remembered.
    calibration: tuple[float | None, ...] = ()


class StepPlan(NamedTuple):
    """To the workers. The depth is not in it: it is vLLM's `num_spec_tokens_to_schedule`."""

    steps: tuple[TimedStep, ...] = ()  # to learn costs from, on every rank
    model: CostModel | None = None  # that learned from them already; None in another process

    def __reduce__(self) -> tuple[type[StepPlan], tuple[tuple[TimedStep, ...]]]:
        return StepPlan, (self.steps,)


def attach_report(output: Any, report: StepReport) -> None:
    """Send a report with what `sample_tokens` returned: vLLM's output itself, or one that is still
    on its way from the device and wraps it. Without any, the step failed or another rank
    answers."""
    output = getattr(output, "model_runner_output", output)
    if output is not None and report != StepReport():
        setattr(output, _REPORT, report)


def take_report(model_runner_output: Any) -> StepReport:
    """What came with a ModelRunnerOutput."""
    report = getattr(model_runner_output, _REPORT, None)
    return report if isinstance(report, StepReport) else StepReport()


def attach_plan(scheduler_output: Any, plan: StepPlan) -> None:
    """Send a plan with a SchedulerOutput."""
    setattr(scheduler_output, _PLAN, plan)


def take_plan(scheduler_output: Any) -> StepPlan | None:
    """What came with a SchedulerOutput; None if our scheduler did not make it."""
    return getattr(scheduler_output, _PLAN, None)
