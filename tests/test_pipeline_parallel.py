"""Two pipeline stages, each in a process of its own: all drafts are verified, exactly.

Trimming drafts is refused, by vLLM's own adaptive verification too: the stages before the last one
run a step before anybody could tell them its lengths.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import HAS_GPU
from tests.engine import MICRO, Request, engine, observed, options, run, tokens
from tests.test_equivalence_heads import PROMPTS
from vllm_dspark.config import DSparkConfigError
from vllm_dspark.integration.engine_config import settle_pipeline

DRAFTER = f"dspark:{MICRO / 'dspark-vanilla'}"
REQUESTS = [
    Request(prompt, {"max_tokens": 16 - 2 * i, "ignore_eos": True}, arrives=2 * i)
    for i, prompt in enumerate(PROMPTS[:3])
]


@pytest.mark.engine
@pytest.mark.skipif(HAS_GPU, reason="the two stages are CPU processes; the GPU suite has one GPU")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores, one for each stage")
def test_two_stages_equal_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches drafts that do not reach the first stage, hidden states of its layers that do not
    reach the drafter in the last, and scheduling that hands out drafts too early."""
    with engine(MICRO) as llm:
        reference = tokens(run(llm, REQUESTS))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with engine(MICRO, DRAFTER, pipeline_parallel_size=2) as llm:
        config = llm.llm_engine.vllm_config
        assert config.scheduler_config.async_scheduling
        assert config.additional_config["dspark"]["verification"] == "all"
        with observed(llm) as seen:
            outputs = run(llm, REQUESTS)
    assert tokens(outputs) == reference
    assert 0 < seen[0].accepted < seen[0].drafted


@pytest.mark.parametrize(
    "asked",
    [
        {"additional_config": {"dspark": {"verification": "adaptive"}}},
        {"speculative_config": {"enable_adaptive_verification": True}},
    ],
    ids=["ours", "vllms"],
)
def test_trimming_is_refused_before_anything_starts(asked: dict[str, Any]) -> None:
    """While the configuration is made: no process was started, no weight loaded."""
    from vllm.engine.arg_utils import EngineArgs

    speculative = {"method": "dspark", "model": str(MICRO / "dspark-vanilla")}
    asked = asked | {"speculative_config": speculative | asked.get("speculative_config", {})}
    arguments = options(pipeline_parallel_size=2, disable_log_stats=True) | asked
    with pytest.raises(ValueError, match=r"pipeline ranks.*Fix: .*verification.*all"):
        EngineArgs(model=str(MICRO), **arguments).create_engine_config()


@pytest.mark.parametrize(
    ("stages", "asynchronous", "cpu", "backend", "settled"),
    [
        (1, False, True, "uni", False),
        (1, False, False, "mp", False),
        (2, True, False, "mp", True),
        (2, False, True, "mp", True),
        (2, False, True, "ray", None),
        (2, False, False, "mp", None),
    ],
)
def test_stages_are_scheduled_asynchronously(
    monkeypatch: pytest.MonkeyPatch,
    stages: int, asynchronous: bool, cpu: bool, backend: str, settled: bool | None,
) -> None:  # fmt: skip
    """None is refused: vLLM would fail in the first step that has drafts."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: cpu)
    scheduler = SimpleNamespace(async_scheduling=asynchronous)
    config = SimpleNamespace(
        scheduler_config=scheduler,
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=stages, distributed_executor_backend=backend
        ),
    )
    if settled is None:
        with pytest.raises(DSparkConfigError, match=r"synchronous.*Fix: --async-scheduling"):
            settle_pipeline(config)
    else:
        settle_pipeline(config)
        assert scheduler.async_scheduling is settled
