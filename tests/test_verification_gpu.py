"""On a GPU: device and host mode with full CUDA graphs, exact in fp32, lossless by sampling, and
without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import test_losslessness as exact
from tests.engine import TINY, Request, engine, observed, run, tokens
from tests.test_gpu import GRAPHS, REQUESTS, speculation
from tests.verification_cases import Prices, RandomBudget, RandomLengths, manager_of, runner_of
from vllm_dspark.integration.verification.allocation_kernel import KernelAllocation

pytestmark = pytest.mark.gpu


@contextmanager
def replays(llm: Any) -> Iterator[list[tuple[int, int]]]:
    """Full graphs that the target replays: tokens that they are for, requests."""
    graphs = runner_of(llm).cudagraph_manager
    original = graphs.run_fullgraph
    seen: list[tuple[int, int]] = []

    def run_fullgraph(description: Any) -> Any:
        seen.append((description.num_tokens, description.num_reqs))
        return original(description)

    graphs.run_fullgraph = run_fullgraph
    try:
        yield seen
    finally:
        graphs.run_fullgraph = original


def options(mode: str, kernels: str = "auto", **changes: Any) -> dict[str, Any]:
    chosen = {"verification": "adaptive", "verification_mode": mode, "kernels": kernels}
    return GRAPHS | {"dtype": "float32", "additional_config": {"dspark": chosen}} | changes


@pytest.fixture(scope="module")
def reference() -> list[list[int]]:
    """What the target says by itself, in fp32."""
    with engine(TINY, dtype="float32", **GRAPHS) as llm:
        return tokens(run(llm, REQUESTS))


@pytest.mark.engine
@pytest.mark.parametrize(
    ("mode", "drafting", "kernels"),
    [
        ("device", "greedy", "auto"),
        ("device", "probabilistic", "auto"),
        ("device", "probabilistic", "triton"),
        ("host", "greedy", "auto"),
    ],
)
def test_fp32_tokens_equal(
    reference: list[list[int]], mode: str, drafting: str, kernels: str
) -> None:
    """Twelve requests that arrive one after the other: as it serves, and with random budgets from
    none to all. Catches boundaries that differ between host, device and graph."""
    with engine(TINY, speculation(drafting), **options(mode, kernels)) as llm:
        manager = manager_of(llm)
        assert manager.mode == mode
        if kernels == "triton":
            assert isinstance(manager._allocation, KernelAllocation)
        with observed(llm) as seen, replays(llm) as graphs:
            assert tokens(run(llm, REQUESTS)) == reference
        served = manager.snapshot()
        adapted = manager.policy.calibrator.version
        manager.policy = RandomBudget(manager.policy) if mode == "device" else RandomLengths(16, 7)
        for _ in range(2):
            assert tokens(run(llm, REQUESTS)) == reference
        counted = manager.snapshot()
    assert seen[0].accepted_length > 1.5
    assert adapted > 0
    assert served["rounds"] > 20
    assert len(graphs) > 20
    assert len(set(graphs)) > 1
    verified = counted["verified"] - served["verified"]
    assert 0.2 < verified / (counted["scheduled"] - served["scheduled"]) < 0.8
    assert counted["whole"] > served["whole"]


@pytest.mark.engine
@pytest.mark.parametrize("mode", ["device", "host"])
def test_trimmed_batches_replay_full_graphs(mode: str) -> None:
    """Lengths of all kinds in every batch, in graphs that were captured for none in particular."""
    requests = [Request(r.prompt, r.params) for r in REQUESTS]
    with engine(TINY, speculation("greedy"), **options(mode)) as llm:
        manager = manager_of(llm)
        manager.policy.costs = Prices(*(1 + 0.02 * k + 0.3 * (k // 9) for k in range(85)))
        before = manager.snapshot()
        with replays(llm) as graphs:
            run(llm, requests)
        after = manager.snapshot()
    trimmed = (after["rounds"] - before["rounds"]) - (after["whole"] - before["whole"])
    assert trimmed > 10
    assert len(graphs) >= after["rounds"] - before["rounds"] - 2


@pytest.mark.engine
def test_eager_means_host(reference: list[list[int]]) -> None:
    """Which vLLM's own manager refuses."""
    changes: dict[str, Any] = {"enforce_eager": True, "compilation_config": None}
    eager = options("auto", **changes)
    eager.pop("compilation_config")
    with engine(TINY, speculation("greedy"), **eager) as llm:
        manager = manager_of(llm)
        assert manager.mode == "host"
        assert tokens(run(llm, REQUESTS)) == reference
        manager.policy = RandomLengths(16, 7)
        assert tokens(run(llm, REQUESTS)) == reference


@pytest.mark.engine
def test_bf16_in_device_mode() -> None:
    """The attention backend of real engines. bf16 rounds differently for different batch shapes,
    so tokens may differ; lengths and acceptance must not."""
    with engine(TINY, speculation("greedy"), **options("device", dtype="bfloat16")) as llm:
        manager = manager_of(llm)
        outputs = tokens(run(llm, REQUESTS))
        with observed(llm) as seen:
            manager.policy = RandomBudget(manager.policy)
            outputs += tokens(run(llm, REQUESTS))
        counted = manager.snapshot()
    assert [len(t) for t in outputs] == [r.params["max_tokens"] for r in REQUESTS] * 2
    assert seen[0].accepted > 0
    assert counted["verified"] < counted["scheduled"]


@pytest.mark.engine
@pytest.mark.parametrize("mode", ["device", "host"])
def test_sampled_output_follows_the_target(tmp_path: Path, mode: str) -> None:
    """As `tests.test_losslessness_adaptive`: requests compete for a budget that jumps over stairs,
    chi-square over all continuations of three words."""
    exact.write_pair(tmp_path)
    regime = exact.REGIMES["temperature 1"]
    config = {
        "method": "dspark",
        "draft_sample_method": "probabilistic",
        "num_speculative_tokens": exact.GAMMA,
    }
    with engine(tmp_path, config, **options(mode, skip_tokenizer_init=True)) as llm:
        manager = manager_of(llm)
        manager.policy.costs = Prices(*(1 + 0.03 * k + 0.35 * (k // 5) for k in range(33)))
        samples = exact.sample(llm, regime, 2000)
        counted = manager.snapshot()
    assert 0.1 < counted["verified"] / counted["scheduled"] < 0.9
    joint = exact.exact_joint(tmp_path, regime)
    assert exact.p_value(samples, joint) > exact.SIGNIFICANCE
    for position in range(exact.POSITIONS):
        others = tuple(i for i in range(exact.POSITIONS) if i != position)
        assert exact.p_value(samples[:, [position]], joint.sum(others)) > exact.SIGNIFICANCE
