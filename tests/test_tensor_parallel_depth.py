"""Two tensor-parallel ranks act on one depth and one budget, also where one of them is wrong.

Each rank runs in a process of its own. The clock of one is wrong by a factor that changes at
random, and its reports are nonsense.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

from tests.conftest import HAS_GPU
from tests.depth_runs import AUTO, choose_by, random_depths, scheduler_of
from tests.engine import MICRO, engine, observed, run, tokens
from tests.test_equivalence_heads import batch
from vllm_dspark.integration.step_report import Startup, StepReport, TimedStep

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(HAS_GPU, reason="the two ranks are CPU ranks; the GPU suite has one GPU"),
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores, one for each rank"),
]

NONSENSE = StepReport(
    steps=(TimedStep(1, 1, 1, 1, 0, float("nan"), True), TimedStep(-1, 0, 0, 0, 9, 1.0, True)),
    survival=(2.0, float("nan")),
    age=(-1.0,),
    startup=Startup(depths=(0,), costs="no profile"),
)


def disturb(worker: Any) -> bool:
    """On every rank: note the depth of each step from now on. Make the second rank wrong, and say
    so."""
    from vllm.distributed import get_tensor_model_parallel_rank

    meter = worker.meter
    meter.depths = []
    if get_tensor_model_parallel_rank() == 0:
        return False
    ended, end = meter._clock.ended, meter.end

    def wrong_times() -> list[tuple[int, float]]:
        return [(number, ms * random.uniform(0, 100)) for number, ms in ended()]

    def wrong_report() -> StepReport:
        end()
        return NONSENSE

    meter._clock.ended, meter.end = wrong_times, wrong_report
    return True


def read_log(worker: Any) -> tuple[list[int], dict[str, Any], float]:
    """On every rank: depths, what was verified, and what a step costs by its model."""
    manager = worker.model_runner.adaptive_verification
    return (
        worker.meter.depths,
        manager.snapshot(),
        float(manager.costs.model.step_ms(9, 3, 9, 9, 2)),
    )


@pytest.fixture(scope="module")
def ran() -> dict[str, Any]:
    """What the target says, what two ranks say, and what each of them did."""
    with engine(MICRO) as llm:
        made: dict[str, Any] = {"reference": tokens(run(llm, batch(5)))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        options = AUTO | {"tensor_parallel_size": 2}
        with engine(MICRO, f"dspark:{MICRO / 'dspark-vanilla'}", **options) as llm:
            run(llm, batch(1))
            choose_by(llm, random_depths(7, seed=1))
            made["disturbed"] = llm.collective_rpc(disturb)
            with observed(llm) as seen:
                made["tokens"] = tokens(run(llm, batch(5)))
            made["accepted"] = seen[0].accepted
            made["ranks"] = llm.collective_rpc(read_log)
            scheduler = scheduler_of(llm)
            made["chosen"] = scheduler.controller.policy.chosen
            made["ignored"] = scheduler.controller.ignored
    return made


def test_output_is_the_targets(ran: dict[str, Any]) -> None:
    """Catches ranks that run batches of different shapes, which hangs or gives other tokens."""
    assert ran["tokens"] == ran["reference"]
    assert ran["accepted"] > 0


def test_ranks_act_on_one_decision(ran: dict[str, Any]) -> None:
    """Same depths, same budgets, same costs, though one clock is wrong: catches a rank that goes by
    a clock of its own."""
    assert ran["disturbed"] == [False, True]
    (depths, counted, cost), second = ran["ranks"]
    assert depths == ran["chosen"][: len(depths)]
    assert len(set(depths)) > 3
    assert second == (depths, counted, cost)
    assert counted["verified"] > 0
    assert ran["ignored"] == 0  # the rank that is wrong is not the one that reports
