"""Reports and plans survive the way that vLLM's own objects take, and stay small."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.logging_utils.dump_input import prepare_object_to_dump
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from vllm_dspark.integration.step_report import (
    Startup,
    StepPlan,
    StepReport,
    TimedStep,
    attach_plan,
    attach_report,
    take_plan,
    take_report,
)
from vllm_dspark.scheduler.cost_model import CostModel, StepShape

STEP = TimedStep(128, 16, 4800, 128, 7, 7.25, True)
REPORT = StepReport(
    steps=(STEP,), survival=(0.7, 0.44, 0.25, 0.14, 0.07, 0.04, 0.02), age=(0.0,) * 7
)


def output() -> ModelRunnerOutput:
    return ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})


@pytest.mark.parametrize("wrapped", [False, True])
def test_report_survives_pickling(wrapped: bool) -> None:
    """With the output itself, and with one that is still on its way from the device."""
    sent = output()
    attach_report(SimpleNamespace(model_runner_output=sent) if wrapped else sent, REPORT)
    arrived = pickle.loads(pickle.dumps(sent))
    assert take_report(arrived) == REPORT
    assert arrived.req_ids == ["a"]


def test_report_is_small() -> None:
    """What it adds to every step's output: catches arrays or tables that creep in."""
    plain = len(pickle.dumps(output()))
    sent = output()
    attach_report(sent, REPORT)
    assert len(pickle.dumps(sent)) - plain < 400


def test_plan_survives_pickling() -> None:
    sent = SchedulerOutput.make_empty()
    attach_plan(sent, StepPlan((STEP, STEP)))
    assert take_plan(pickle.loads(pickle.dumps(sent))) == StepPlan((STEP, STEP))


def test_model_stays_in_its_process() -> None:
    """The scheduler's own is handed on as it is, and to other processes not at all."""
    model = CostModel.default(7)
    sent = SchedulerOutput.make_empty()
    attach_plan(sent, StepPlan((STEP,), model))
    plan = take_plan(sent)
    assert plan is not None
    assert plan.model is model
    assert take_plan(pickle.loads(pickle.dumps(sent))) == StepPlan((STEP,))


def test_failed_step_prints_no_cost_tables() -> None:
    """vLLM prints what a step was scheduled with. Catches a hundred kilobytes of them around the
    error that an operator looks for."""
    model = CostModel.default(7)
    printed = prepare_object_to_dump(StepPlan((), model))
    assert "CostModel(gamma=7)" in printed
    assert len(printed) < 200


def test_nothing_new_is_not_sent() -> None:
    sent = output()
    attach_report(sent, StepReport())
    assert vars(sent) == vars(output())
    assert take_report(sent) == StepReport()


@pytest.mark.parametrize("lost", [None])
def test_step_that_failed_or_is_answered_elsewhere(lost: Any) -> None:
    attach_report(lost, REPORT)
    assert take_report(lost) == StepReport()


def test_only_our_scheduler_plans() -> None:
    """vLLM's warm-up steps come without a plan."""
    assert take_plan(SchedulerOutput.make_empty()) is None


def test_something_else_in_our_place() -> None:
    sent = output()
    vars(sent)["dspark_report"] = "nonsense"
    assert take_report(sent) == StepReport()


def test_startup_travels_once_with_costs() -> None:
    sent = output()
    report = StepReport(startup=Startup((0, 1, 7), "{}"))
    attach_report(sent, report)
    assert take_report(pickle.loads(pickle.dumps(sent))).startup == Startup((0, 1, 7), "{}")


def test_timed_step_is_a_shape_and_a_time() -> None:
    assert STEP.shape == StepShape(128, 16, 4800, 128, 7)
    with pytest.raises(ValueError, match="tokens"):
        _ = STEP._replace(tokens=-1).shape
