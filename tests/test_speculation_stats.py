"""Stats of speculation: counted in the scheduler, sent to the front end, shown on /metrics."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_dspark.calibration.memory import PositionMetrics
from vllm_dspark.integration.chosen import serves_dspark
from vllm_dspark.integration.front_end import wrap_client_init, wrap_stat_loggers_init
from vllm_dspark.integration.metrics import DSparkStatLogger
from vllm_dspark.integration.speculation_counts import SpeculationCounts
from vllm_dspark.integration.speculation_stats import (
    SpeculationStats,
    outputs_type,
    with_speculation,
)
from vllm_dspark.integration.step_meter import mean_error
from vllm_dspark.integration.step_report import StepReport
from vllm_dspark.scheduler.controller import DepthController
from vllm_dspark.scheduler.cost_model import CostModel
from vllm_dspark.scheduler.depth import Goal

GAMMA = 3
STATS = SpeculationStats(
    depth=2, steps={0: 3, 2: 5}, switches=1, probes=2, requests=7, scheduled=14, verified=9,
    accepted=4, ignored=0, cost_error_percent=3.5, calibration_error={"sampled": 0.02},
)  # fmt: skip


def config(method: str | None = "dspark", **options: Any) -> Any:
    """An engine's configuration, as far as it is read here."""
    speculative = None if method is None else SimpleNamespace(method=method)
    return SimpleNamespace(
        speculative_config=speculative,
        additional_config={"dspark": options},
        model_config=SimpleNamespace(served_model_name="served"),
    )


def test_stats_survive_the_way_to_the_front_end() -> None:
    """All of vLLM's fields and ours, between fields before and behind."""
    theirs = SchedulerStats(num_running_reqs=3, kv_cache_usage=0.5)
    theirs.running_lora_adapters = {"a": 1}
    sent = EngineCoreOutputs(
        engine_index=1, scheduler_stats=with_speculation(theirs, STATS), weight_version="v"
    )
    buffers = MsgpackEncoder().encode(sent)
    arrived: Any = MsgpackDecoder(outputs_type()).decode(buffers)
    assert isinstance(arrived, EngineCoreOutputs)
    assert arrived.scheduler_stats == sent.scheduler_stats
    assert arrived.scheduler_stats.speculation == STATS
    assert (arrived.engine_index, arrived.weight_version) == (1, "v")
    assert arrived.timestamp == sent.timestamp


def test_a_reader_that_does_not_know_of_ours_reads_the_rest() -> None:
    """The coordinator of data-parallel engines, for one."""
    sent = EngineCoreOutputs(scheduler_stats=with_speculation(SchedulerStats(7), STATS))
    arrived: Any = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(sent))
    assert type(arrived.scheduler_stats) is SchedulerStats
    assert arrived.scheduler_stats.num_running_reqs == 7


def test_stats_of_another_engine_are_read_all_the_same() -> None:
    buffers = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=SchedulerStats(2)))
    arrived: Any = MsgpackDecoder(outputs_type()).decode(buffers)
    assert arrived.scheduler_stats.num_running_reqs == 2
    assert arrived.scheduler_stats.speculation is None


@pytest.mark.parametrize(
    ("method", "options", "ours"),
    [("dspark", {}, True), ("dspark", {"enabled": False}, False), ("mtp", {}, False),
     (None, {}, False)],
)  # fmt: skip
def test_only_our_engines_have_their_client_changed(
    method: str | None, options: dict[str, Any], ours: bool
) -> None:
    class Client:
        def __init__(self, vllm_config: Any, log_stats: bool) -> None:
            self.vllm_config = vllm_config
            self.decoder: Any = "vLLM's"

    client = object.__new__(Client)
    wrap_client_init(Client.__init__)(client, config(method, **options), log_stats=True)
    assert (client.decoder != "vLLM's") is ours
    assert serves_dspark(config(method, **options)) is ours


def shown(name: str, **labels: str) -> float | None:
    """A value on /metrics."""
    return REGISTRY.get_sample_value(
        f"vllm_dspark_{name}", {"model_name": "served", "engine": "5", **labels}
    )


def test_metrics_add_up() -> None:
    """Counts of several stats are summed, gauges are the last; both by engine."""
    one = DSparkStatLogger(config(), [5])
    assert shown("verified_drafts_total") is not None  # before the first stats
    start = shown("verified_drafts_total") or 0.0
    for _ in range(2):
        one.record(with_speculation(SchedulerStats(), STATS), None, engine_idx=5)
    one.record(SchedulerStats(), None, engine_idx=5)
    one.record(None, None, engine_idx=5)
    assert shown("verified_drafts_total") == start + 18
    assert shown("steps_total", depth="0") == 6
    assert shown("steps_total", depth="2") == 10
    assert shown("depth") == 2
    assert shown("cost_error_percent") == 3.5
    assert shown("calibration_error", regime="sampled") == 0.02
    assert shown("calibration_error", regime="greedy") is None
    DSparkStatLogger(config(), [5])  # another engine in the same process
    assert shown("verified_drafts_total") == start + 18


@pytest.mark.parametrize(
    ("method", "enabled", "ours"),
    [("dspark", True, True), ("dspark", False, False), ("eagle", True, False), (None, True, False)],
)
def test_other_engines_get_no_logger_of_ours(method: str | None, enabled: bool, ours: bool) -> None:
    """The loggers that vLLM was given stay, in their place."""
    made: list[Any] = []

    def original(self: Any, vllm_config: Any, engines: Any, loggers: Any, *rest: Any) -> None:
        made.extend([engines, loggers, *rest])

    wrap_stat_loggers_init(original)(None, config(method, enabled=enabled), [6], ["theirs"], True)
    assert made == [[6], ["theirs"] + [DSparkStatLogger] * ours, True]


def started() -> DepthController:
    """A controller that chooses among three depths."""
    controller = DepthController(GAMMA, Goal())
    controller.start((0, 1, 3), CostModel.default(GAMMA).to_json({}))
    return controller


def test_counts_start_over_with_every_stats() -> None:
    controller = started()
    counts = SpeculationCounts(controller)
    for depth in (3, 3, 0):
        counts.scheduled(depth)
    counts.reported(StepReport(drafts=(2, 6, 4)))
    counts.reported(StepReport(drafts=(1, 3, 3), calibration=(None, 0.04)))
    controller.observe_survival([2.0] * GAMMA, [0.0] * GAMMA)  # no probabilities
    assert controller.observe_step((4, 4, 40, 4, 0), 5.0, True)
    stats = counts.take(accepted=5)
    assert stats.steps == {3: 2, 0: 1}
    assert (stats.requests, stats.scheduled, stats.verified, stats.accepted) == (3, 9, 7, 5)
    assert stats.calibration_error == {"sampled": 0.04}
    assert stats.ignored == 1
    assert stats.cost_error_percent == controller.cost.error > 0
    nothing = counts.take(accepted=0)
    assert nothing == SpeculationStats(depth=controller.depth)


def test_switches_and_probes_are_counted() -> None:
    """At a load where drafting does not pay, a probe is a step like any other but for its name."""
    controller = started()
    counts = SpeculationCounts(controller)
    switched = probed = 0
    for n in range(3000):
        requests = 1 if n < 200 else 900
        controller.observe_survival([0.5, 0.2, 0.1], [float(n)] * GAMMA)
        depth = controller.choose(
            requests=requests, waiting=0, context_tokens=100 * requests, free_kv_fraction=1.0
        )
        counts.scheduled(depth)
        if n % 100 == 99:
            stats = counts.take(0)
            switched, probed = switched + stats.switches, probed + stats.probes
    assert controller.policy is not None
    assert switched == controller.policy.switches > 0
    controller.policy.switches = 0  # as those of a policy in its place: counters never fall
    assert counts.take(accepted=0).switches == 0
    controller.policy.switches = 2
    assert counts.take(accepted=0).switches == 2
    assert 0 < probed < 100


def test_cost_error_is_told_once_in_a_while() -> None:
    """With the first stats and every sixteenth after them, once there is an error. Catches a median
    that is taken anew for each, and one that is not a number."""
    controller = started()
    assert SpeculationCounts(controller).take(0).cost_error_percent is None
    assert controller.observe_step((4, 4, 40, 4, 0), 5.0, True)
    counts = SpeculationCounts(controller)
    told = [counts.take(0).cost_error_percent is not None for _ in range(33)]
    assert [n for n, known in enumerate(told) if known] == [0, 16, 32]


def test_a_probe_is_of_another_depth() -> None:
    """While the policy probes, steps of the depth that it stands at are none. Catches a count of
    every step in that time."""
    controller = started()
    counts = SpeculationCounts(controller)
    assert controller.policy is not None
    controller.policy.probing = True
    for depth in (controller.policy.depth, controller.policy.depth + 1):
        counts.scheduled(depth)
    assert counts.take(0).probes == 1


def test_calibration_error_goes_by_observations() -> None:
    def position(observations: float, ece: float | None) -> PositionMetrics:
        return PositionMetrics(observations, None if ece is None else 0.0, ece, 0.5)

    assert mean_error([position(30, 0.1), position(10, 0.5), position(0, None)]) == pytest.approx(
        0.2
    )
    assert mean_error([position(0, None)]) is None
