"""Which depths an engine drafts, what they reserve, and when depth cannot follow the load."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dspark.config import DSparkConfig, DSparkConfigError
from vllm_dspark.integration.depth_plan import SCHEDULERS, DepthPlan, settle_depth

GAMMA = 7


def vllm_config(options: dict[str, Any] | None = None, gamma: int = GAMMA, **changes: Any) -> Any:
    """The parts of a VllmConfig that are read, changed as given."""
    config = SimpleNamespace(
        additional_config={"dspark": options or {}},
        num_lookahead_tokens=gamma,
        speculative_config=SimpleNamespace(
            num_speculative_tokens=gamma, num_speculative_tokens_per_batch_size=None
        ),
        scheduler_config=SimpleNamespace(scheduler_cls=None, async_scheduling=True),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, data_parallel_size=1),
        model_config=SimpleNamespace(is_moe=False, is_hybrid=False),
        kv_transfer_config=None,
    )
    for name, value in changes.items():
        owner = config
        *path, last = name.split("__")
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, last, value)
    return config


def settled(options: dict[str, Any] | None = None, **changes: Any) -> tuple[DepthPlan, str | None]:
    config = vllm_config(options, **changes)
    ours = DSparkConfig.from_additional_config(config.additional_config)
    ours.check_against(adaptive_verification=False)
    obstacle = settle_depth(config, ours)
    return DepthPlan.of(config), obstacle


def test_depth_follows_the_load_by_default() -> None:
    plan, obstacle = settled()
    assert obstacle is None
    assert plan.varies
    assert plan.depths == (1, 2, 3, 5, 7)
    assert plan.goal.kind == "throughput"
    assert plan.describe() == "0 to 7 by load, goal throughput"


@pytest.mark.parametrize(
    ("gamma", "depths"), [(1, (1,)), (2, (1, 2)), (4, (1, 2, 3, 4)), (5, (1, 2, 3, 5))]
)
def test_depths_end_with_a_full_block(gamma: int, depths: tuple[int, ...]) -> None:
    assert settled(gamma=gamma)[0].depths == depths


@pytest.mark.parametrize("asynchronous", [True, False])
def test_scheduler_is_the_one_for_how_steps_are_scheduled(asynchronous: bool) -> None:
    """A synchronous scheduler has no placeholders, an asynchronous one needs them."""
    config = vllm_config(scheduler_config__async_scheduling=asynchronous)
    settle_depth(config, DSparkConfig())
    assert config.scheduler_config.scheduler_cls == SCHEDULERS[asynchronous]


def test_schedulers_can_be_found_by_name() -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    assert issubclass(resolve_obj_by_qualname(SCHEDULERS[True]), AsyncScheduler)
    synchronous = resolve_obj_by_qualname(SCHEDULERS[False])
    assert issubclass(synchronous, Scheduler)
    assert not issubclass(synchronous, AsyncScheduler)


@pytest.mark.parametrize("bonus", [0, 1])
@pytest.mark.parametrize("block", ["depth", "full"])
def test_lookahead_is_what_a_block_writes(block: str, bonus: int) -> None:
    """Nothing at depth 0; otherwise the queries of the block that is run, the anchor's among
    them."""
    plan, _ = settled({"draft_block": block}, num_lookahead_tokens=GAMMA + bonus)
    run = {1: 1, 2: 2, 3: 3, 4: 5, 5: 5, 6: 7, 7: 7}
    assert plan.lookahead(0) == 0
    for depth, queries in run.items():
        expected = (queries if block == "depth" else GAMMA) + bonus
        assert plan.lookahead(depth) == expected
        assert plan.queries(plan.block(depth)) == expected
    assert plan.lookahead(GAMMA) == GAMMA + bonus  # what vLLM reserves


@pytest.mark.parametrize(("depth", "depths"), [(0, (7,)), (4, (4, 7)), (7, (7,))])
def test_fixed_depth(depth: int, depths: tuple[int, ...]) -> None:
    """γ stays among the blocks: warm-up and profiling draft it."""
    plan, obstacle = settled({"depth": depth})
    assert obstacle is None
    assert plan.fixed == depth
    assert plan.depths == depths
    assert plan.ours == (depth < GAMMA)
    assert not plan.varies
    assert plan.describe() == str(depth)


OBSTACLES: dict[str, dict[str, Any]] = {
    "num_speculative_tokens_per_batch_size": {
        "speculative_config__num_speculative_tokens_per_batch_size": [(1, 8, 3), (9, 64, 0)]
    },
    "scheduler_cls": {"scheduler_config__scheduler_cls": "somebody.Scheduler"},
    "additional_config": {"additional_config": SimpleNamespace(compute_hash=lambda: "theirs")},
    "pipeline": {"parallel_config__pipeline_parallel_size": 2},
    "data-parallel": {"parallel_config__data_parallel_size": 2, "model_config__is_moe": True},
    "connector": {"kv_transfer_config": object()},
    "recurrent": {"model_config__is_hybrid": True},
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_where_depth_cannot_follow_the_load(reason: str) -> None:
    """The reason is named, vLLM's scheduler stays, and a depth that is asked for is an error."""
    config = vllm_config(**OBSTACLES[reason])
    before = config.scheduler_config.scheduler_cls
    obstacle = settle_depth(config, DSparkConfig())
    assert obstacle is not None
    assert reason in obstacle
    assert config.scheduler_config.scheduler_cls is before
    assert not DepthPlan.of(config).varies
    for options in ({"depth": 2}, {"target_tokens_per_second_per_user": 30.0}):
        with pytest.raises(DSparkConfigError, match=reason):
            settle_depth(config, DSparkConfig(**options))


def test_dense_data_parallel_ranks_are_engines_of_their_own() -> None:
    assert settled(parallel_config__data_parallel_size=2)[0].varies


def test_schedule_of_vllms_own_is_drafted_block_by_block() -> None:
    plan, _ = settled(**OBSTACLES["num_speculative_tokens_per_batch_size"])
    assert plan.depths == (3, 7)
    assert plan.fixed is None
    assert plan.describe() == "by vLLM's schedule"


def test_schedule_of_vllms_own_drafts_no_more_than_a_block() -> None:
    """An entry above γ means γ. Catches a depth that the drafter has no positions for."""
    plan, _ = settled(speculative_config__num_speculative_tokens_per_batch_size=[(1, 8, 9)])
    assert plan.depths == (GAMMA,)


@pytest.mark.parametrize(
    ("options", "kind", "floor"),
    [
        ({}, "throughput", None),
        ({"goal": "latency"}, "latency", None),
        ({"target_tokens_per_second_per_user": 40}, "floor", 40.0),
    ],
)
def test_goals(options: dict[str, Any], kind: str, floor: float | None) -> None:
    plan, _ = settled(options)
    assert (plan.goal.kind, plan.goal.tokens_per_second_per_user) == (kind, floor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"depth": "deep"},
            "'depth' is 'deep': needed is \"auto\" or a whole number from 0 to γ\\.",
        ),
        ({"depth": -1}, "'depth' is -1"),
        ({"depth": True}, "'depth' is True"),
        ({"depth": 2.0}, "'depth' is 2.0"),
        ({"depth": GAMMA + 1}, "0 to 7"),
        ({"draft_block": "half"}, "draft_block"),
        ({"goal": "speed"}, "goal"),
        ({"target_tokens_per_second_per_user": 0}, "target_tokens_per_second_per_user"),
        ({"target_tokens_per_second_per_user": -5.0}, "target_tokens_per_second_per_user"),
        ({"target_tokens_per_second_per_user": float("inf")}, "target_tokens_per_second_per_user"),
        ({"target_tokens_per_second_per_user": float("nan")}, "target_tokens_per_second_per_user"),
        ({"target_tokens_per_second_per_user": "40"}, "target_tokens_per_second_per_user"),
        ({"goal": "latency", "target_tokens_per_second_per_user": 40}, "drop one of the two"),
        ({"goal": "latency", "depth": 2}, "drop one of the two"),
        ({"depth": 2, "target_tokens_per_second_per_user": 40}, "drop one of the two"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    """By name, before anything loads."""
    with pytest.raises(DSparkConfigError, match=message):
        settled(options)
