"""What our half of the scheduler asks of vLLM's and hands to the controller; no engine."""

from __future__ import annotations

from collections import Counter, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from tests.scheduling import Scheduling, pair
from vllm_dspark.integration.step_report import StepReport, TimedStep


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair(tmp_path_factory.mktemp("pair"))


def asked(on: Scheduling) -> dict[str, Any]:
    """What the controller is told when the next step is scheduled."""
    told: dict[str, Any] = {}
    controller = on.scheduler.controller
    original = controller.choose

    def choose(**load: Any) -> int:
        told.update(load)
        return original(**load)

    controller.choose = choose
    try:
        on.scheduler.schedule()
    finally:
        del controller.choose
    return told


def test_no_more_requests_are_expected_than_may_be_active(folder: Path) -> None:
    """vLLM may let fewer run than fit into a batch; 0.33 does so for DSpark by itself. Catches a
    depth that is chosen for a load which never runs."""
    on = Scheduling(folder, max_num_seqs=8, max_num_active_seqs=2)
    on.starts()
    for i in range(6):
        on.add(str(i), [1, 2])
    on.step()
    assert len(on.scheduler.running) == 2
    policy = on.scheduler.controller.policy
    assert policy._expected(2, 4, 1.0) == 2


def test_who_waits_for_something_else_is_not_expected(folder: Path) -> None:
    """A request that vLLM has put aside, for a grammar or an adapter, takes no part soon; nor does
    any while the engine is paused."""
    on = Scheduling(folder, max_num_seqs=2)
    on.starts()
    requests = [on.add(str(i), [1, 2]) for i in range(6)]
    on.step()
    assert asked(on)["waiting"] == 4
    on.scheduler.deferred_waiting.update(requests[3:])
    assert asked(on)["waiting"] == 1
    on.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    assert asked(on)["waiting"] == 0


@pytest.mark.parametrize("depth", [0, 3])
def test_steps_that_run_nothing_are_not_counted(folder: Path, depth: int) -> None:
    """Of two steps under way the second may be empty: vLLM then leaves it at γ drafts, which none
    draws."""
    on = Scheduling(folder, dspark={"verification": "all", "depth": depth})
    scheduler, under_way = on.scheduler, deque[Any]()
    counted: Counter[int] = Counter()
    ran = empty = 0
    for i in range(5):
        on.add(str(i), [1, 2], most=6)
        while scheduler.has_requests() or under_way:
            if scheduler.has_requests():
                step = scheduler.schedule()
                under_way.append(step)
                ran += step.total_num_scheduled_tokens > 0
                empty += step.total_num_scheduled_tokens == 0
            if len(under_way) == 2 or not scheduler.has_requests():
                step = under_way.popleft()
                outputs = scheduler.update_from_output(step, on.output(step))
                for output in outputs.values():
                    if output.scheduler_stats is not None:
                        counted.update(output.scheduler_stats.speculation.steps)
    counted.update(scheduler._counts.take(0).steps)
    assert empty > 0
    assert counted == {depth: ran}


def test_rejections_by_a_grammar_count(folder: Path) -> None:
    """Where outcomes say what survives, a draft that a grammar rejects was drafted in vain. Catches
    a server of structured output that goes on to draft because nobody tells it otherwise."""
    on = Scheduling(folder, dspark={"verification": "all"})
    on.starts()
    request = on.add("a", [1, 2], most=200)
    on.step()
    before = on.scheduler.controller._survival.copy()
    steps = 0
    while steps < 20:
        step = on.scheduler.schedule()
        output = on.output(step)
        if step.scheduled_spec_decode_tokens:
            request.structured_output_request = object()
            on.scheduler._count_outcomes(step, output)
            request.structured_output_request = None
            steps += 1
        on.scheduler.update_from_output(step, output)
    assert on.scheduler.controller._survival[0] < before[0] / 2


def test_what_broken_logits_reject_does_not_count(folder: Path) -> None:
    """It says nothing about the drafter; the same rejection of a sound request does. Catches an
    engine that stops drafting because the target is broken."""
    on = Scheduling(folder, dspark={"verification": "all"})
    on.starts()
    on.add("a", [1, 2], most=100)
    on.step()
    step = on.scheduler.schedule()
    assert step.scheduled_spec_decode_tokens
    before = on.scheduler.controller._survival.copy()
    on.scheduler.broken = frozenset({"a"})
    on.scheduler._count_outcomes(step, on.output(step))
    np.testing.assert_array_equal(on.scheduler.controller._survival, before)
    on.scheduler.broken = frozenset()
    on.scheduler._count_outcomes(step, on.output(step))
    assert on.scheduler.controller._survival[0] < before[0]


def test_workers_hear_of_a_time_once(folder: Path) -> None:
    """A step that costs were learned from goes out with the next plan alone. Catches workers that
    learn from it again with every step."""
    on = Scheduling(folder)
    on.starts()
    on.add("a", [1, 2])
    on.step()
    timed = TimedStep(1, 1, 2, 1, 0, 5.0, True)
    on.scheduler._learn(StepReport(steps=(timed,)))
    assert [on.step()[0].dspark_plan.steps for _ in range(2)] == [(timed,), ()]


def test_room_is_reserved_for_the_depth_that_fits(folder: Path) -> None:
    """Where blocks are short, vLLM takes as many as the block that is drafted writes to. Catches
    room for the depth that was chosen before, which preempts the request after all."""
    on = Scheduling(folder)
    on.starts()
    on.add("a", [1, 2])
    on.step()
    on.scheduler._room.fitting_depth = lambda depths: depths[-1]
    step = on.scheduler.schedule()
    assert on.scheduler.controller.depth > 0
    assert step.num_spec_tokens_to_schedule == on.scheduler.num_lookahead_tokens == 0


def test_context_follows_the_requests(folder: Path) -> None:
    """Its sum is counted now and then: it may lag some steps behind, but not behind requests that
    come or go. Catches a mean of nobody, and one that is kept for good."""
    on = Scheduling(folder, asynchronous=False, dspark={"verification": "all", "depth": 0})
    scheduler = on.scheduler
    assert scheduler._context() == 0
    for count in (1, 2, 4):
        for _ in range(count - len(scheduler.running)):
            on.add(f"{len(scheduler.requests)}", range(20), most=100)
        on.step()
        assert scheduler._context() == sum(r.num_computed_tokens for r in scheduler.running)
    counted = scheduler._context()
    for _ in range(40):
        on.step()
        scheduler._context()
    assert scheduler._context() >= counted + 4 * (40 - 16)
    for name in list(scheduler.requests)[1:]:
        scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
    (left,) = scheduler.running
    assert scheduler._context() == left.num_computed_tokens
