"""On a GPU, with full CUDA graphs: every depth replays graphs of its own, output stays exact in
fp32, and the context K/V is kept up while nothing is drafted."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.child import ask
from tests.depth_runs import (
    ChosenDepths,
    by_anchor,
    choose_by,
    proposals,
    random_depths,
    scheduled,
    scheduler_of,
    worker_of,
)
from tests.engine import TINY, Request, engine, observed, run, tokens
from tests.test_gpu import GRAPHS as FEW_GRAPHS
from tests.test_gpu import REQUESTS, speculation
from tests.verification_cases import manager_of
from vllm_dspark.integration.step_clock import DeviceClock
from vllm_dspark.scheduler.fixed import FixedPolicy

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

GAMMA = 7
DEPTHS = (1, 2, 3, 5, 7)
SKIPPED = 100
# Sizes that cover 16 requests at every depth.
SIZES = [1, 2, 4, *range(8, 129, 8)]
GRAPHS: dict[str, Any] = FEW_GRAPHS | {
    "compilation_config": FEW_GRAPHS["compilation_config"] | {"cudagraph_capture_sizes": SIZES}
}


def options(dtype: str = "float32", **ours: Any) -> dict[str, Any]:
    return GRAPHS | {"dtype": dtype, "additional_config": {"dspark": {"depth": "auto"} | ours}}


@contextmanager
def log_lines() -> Iterator[list[str]]:
    """What the package logs meanwhile."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("vllm.dspark"), Collector()
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def graphs_of(llm: Any, depth: int) -> Any:
    """vLLM's manager of the draft graphs of a depth."""
    return getattr(worker_of(llm).model_runner.speculator, f"depth_{depth}_cudagraph_manager")


@contextmanager
def replays(llm: Any) -> Iterator[Counter[Any]]:
    """Counts full-graph replays of the target, under "target", and of the draft, by depth; and
    draft passes outside of graphs, under "eager"."""
    runner = worker_of(llm).model_runner
    proposer = runner.speculator
    seen: Counter[Any] = Counter()
    managers: dict[Any, Any] = {depth: graphs_of(llm, depth) for depth in DEPTHS}
    kept = {}

    def counted(label: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
        seen[label] += 1
        return original(*args, **kwargs)

    for label, manager in {"target": runner.cudagraph_manager, **managers}.items():
        kept[label] = manager, manager.run_fullgraph
        manager.run_fullgraph = partial(counted, label, manager.run_fullgraph)
    draw = type(proposer)._sample_sequential
    proposer._sample_sequential = partial(counted, "eager", partial(draw, proposer))
    try:
        yield seen
    finally:
        del proposer._sample_sequential
        for manager, original in kept.values():
            manager.run_fullgraph = original


@pytest.fixture(scope="module")
def reference() -> list[list[int]]:
    """What the target says by itself, in fp32."""
    with engine(TINY, dtype="float32", **GRAPHS) as llm:
        return tokens(run(llm, REQUESTS))


@pytest.mark.parametrize("drafting", ["greedy", "probabilistic"])
def test_fp32_tokens_equal_at_random_depths(reference: list[list[int]], drafting: str) -> None:
    """Twelve requests that arrive one after the other, another depth nearly every step. Catches
    buffers laid out for another depth, and context rows that no graph stores."""
    with log_lines() as lines, engine(TINY, speculation(drafting), **options()) as llm:
        free, total = torch.cuda.mem_get_info()
        print(*lines, f"in use after start-up: {(total - free) >> 20} MiB", sep="\n")
        assert any("draft graphs, for depths 1, 2, 3, 5, 7" in line for line in lines)
        assert tokens(run(llm, REQUESTS)) == reference  # as it serves
        print("as it serves:", scheduler_of(llm).controller.snapshot())
        choose_by(llm, random_depths(GAMMA, seed=3))
        with observed(llm) as seen, replays(llm) as graphs, scheduled(llm) as steps:
            for _ in range(3):
                assert tokens(run(llm, REQUESTS)) == reference
        captured = {depth for depth in DEPTHS if graphs_of(llm, depth).graphs}
    print("captured:", captured, "replays:", dict(graphs))
    assert {step.num_spec_tokens_to_schedule for step in steps} == set(range(GAMMA + 1))
    assert seen[0].accepted > 100
    assert {depth for depth in DEPTHS if graphs[depth]} == captured


def test_every_depth_replays_its_graphs() -> None:
    """In bf16, with the attention backend of real engines: no draft pass of any batch leaves its
    graph, and hardly a step of the target does."""
    with log_lines() as lines, engine(TINY, speculation("greedy"), **options("bfloat16")) as llm:
        print(*lines, sep="\n")
        run(llm, REQUESTS[:1])
        assert scheduler_of(llm).controller.policy is not None
        choose_by(llm, random_depths(GAMMA, seed=3))
        with observed(llm) as seen, replays(llm) as graphs, scheduled(llm) as steps:
            for _ in range(3):
                outputs = run(llm, REQUESTS)
                assert [len(t) for t in tokens(outputs)] == [
                    r.params["max_tokens"] for r in REQUESTS
                ]
    print("replays:", dict(graphs), "of", len(steps), "steps")
    assert {depth for depth in DEPTHS if graphs[depth]} == set(DEPTHS)
    assert graphs["eager"] == 0
    assert graphs["target"] > 0.7 * len(steps)
    assert seen[0].accepted > 100


def test_full_backbone_is_exact_and_replays(reference: list[list[int]]) -> None:
    """The switch: γ queries at any depth, of which the first are drawn from."""
    with engine(TINY, speculation("greedy"), **options(draft_block="full")) as llm:
        run(llm, REQUESTS[:1])
        choose_by(llm, random_depths(GAMMA, seed=4))
        with observed(llm) as seen, replays(llm) as graphs:
            for _ in range(3):
                assert tokens(run(llm, REQUESTS)) == reference
        captured = {depth for depth in DEPTHS if graphs_of(llm, depth).graphs}
    assert {depth for depth in DEPTHS if graphs[depth]} == captured
    assert seen[0].accepted > 20


def test_drafting_resumes_as_if_it_had_never_stopped() -> None:
    """After a hundred steps without drafts, proposals at the anchors of both runs are the same. One
    in twenty may differ: context K/V is computed in batches of other shapes, which rounds
    differently, and two words can be as likely."""
    request = Request("import os\n\n\ndef function(", {"max_tokens": 300, "ignore_eos": True})
    runs = []
    with engine(TINY, speculation("greedy"), **options()) as llm:
        run(llm, REQUESTS[:1])
        manager_of(llm).policy = FixedPolicy(16, GAMMA)
        for skipped in (0, SKIPPED):
            choose_by(llm, ChosenDepths(partial(after, skipped)))
            with proposals(llm) as seen:
                (output,) = run(llm, [request])
            runs.append((tokens([output])[0], by_anchor(seen)))
    (words, never), (words_skipped, resumed) = runs
    assert words == words_skipped
    assert min(resumed) > SKIPPED
    both = sorted(never.keys() & resumed.keys())
    assert len(both) >= 20
    equal = [resumed[anchor] == never[anchor] for anchor in both]
    assert np.mean(equal) > 0.95


def test_context_graphs_store_what_vllm_stores() -> None:
    """Prompts that come while others decode, and steps that draft nothing: all of the context K/V
    is stored by graphs, and drafts are those that vLLM's own launches lead to, but for words that
    rounding decides."""
    drafts = []
    with engine(TINY, speculation("greedy"), **options()) as llm:
        run(llm, REQUESTS[:1])
        speculator = worker_of(llm).model_runner.speculator
        launched = Counter[str]()
        replay = speculator.context_graphs.run_fullgraph
        model, original = speculator.model, speculator.model.precompute_and_store_context_kv

        def counted(label: str, function: Any, *args: Any) -> None:
            launched[label] += 1
            function(*args)

        def own(*step: Any) -> bool:
            stored: bool = type(speculator).store_own(speculator, *step)
            launched["own"] += stored
            return stored

        speculator.store_own = own
        model.precompute_and_store_context_kv = partial(counted, "launches", original)
        speculator.context_graphs.run_fullgraph = partial(counted, "replays", replay)
        for graphs in (speculator.context_graphs, None):
            speculator.context_graphs = graphs
            choose_by(llm, random_depths(GAMMA, seed=6))
            with proposals(llm) as seen:
                run(llm, REQUESTS)
            order = {name: i for i, name in enumerate(dict.fromkeys(name for name, *_ in seen))}
            drafts.append({(order[name], at): found for name, at, found in seen if found})
            if graphs is not None:
                assert launched["replays"] > len(REQUESTS)
                assert launched["launches"] == 0
                assert launched["own"] > 3
        assert launched["launches"] > len(REQUESTS)
    by_graph, by_launch = drafts
    both = by_graph.keys() & by_launch.keys()
    assert len(both) > 100
    assert np.mean([by_graph[key] == by_launch[key] for key in both]) > 0.95


def after(skipped: int, step: int) -> int:
    return GAMMA if step >= skipped else 0


def test_costs_are_profiled_and_corrected() -> None:
    """Start-up profiles every depth; measured steps reach scheduler and worker alike."""
    with engine(TINY, speculation("greedy"), **options()) as llm:
        costs = manager_of(llm).costs
        assert costs.profiled
        drafting = [float(costs.model.draft_ms(8, depth, 0, 8)) for depth in (0, *DEPTHS)]
        print("draft ms of 8 requests at depths 0, 1, 2, 3, 5, 7:", np.round(drafting, 3))
        assert drafting == sorted(drafting)
        assert drafting[0] < drafting[-1]
        run(llm, REQUESTS[:1])
        choose_by(llm, random_depths(GAMMA, seed=5))
        with scheduled(llm) as steps:
            for _ in range(4):
                run(llm, REQUESTS)
            run(llm, REQUESTS[:1])
        told = [step for output in steps for step in output.dspark_plan.steps]
        controller = scheduler_of(llm).controller
        print("steps told:", len(told), "error %:", controller.cost.error)
        assert len(told) > 20
        assert all(0 < step.ms < 1000 for step in told)
        assert controller.cost.error < 90
        assert controller.ignored == 0


def test_tokens_equal_where_depth_is_fixed(reference: list[list[int]]) -> None:
    """No drafts at all, and a depth whose block is not among the usual ones."""
    for depth in (0, 4):
        with engine(TINY, speculation("greedy"), **options(depth=depth)) as llm:
            with observed(llm) as seen:
                assert tokens(run(llm, REQUESTS)) == reference
        assert (seen[0].drafted > 0) == (depth > 0)


def test_clock_waits_for_nothing() -> None:
    """Steps that are still under way are not asked for, and times come in order."""
    clock = DeviceClock()
    torch.cuda.synchronize()
    told: list[tuple[int, float]] = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(40):
            clock.begin()
            torch.cuda._sleep(1_000_000)
            clock.end(step)
            told += clock.ended()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    told += clock.ended()
    numbers = [number for number, _ in told]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 39
    assert all(ms > 0.1 for _, ms in told)


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_nothing_is_compiled_while_serving(kernels: str) -> None:
    """Another depth every step, batches of all sizes, greedy and sampled. In a process of its own,
    which has no kernel yet; one on disk counts as compiled, too."""
    pytest.importorskip("vllm.utils.jit_monitor", reason="vLLM tells from 0.33 on")
    code = f"""
        from dataclasses import replace
        from tests.depth_runs import choose_by, random_depths
        from tests.engine import TINY, engine, run
        from tests.test_depth_gpu import GAMMA, REQUESTS, options, speculation
        from vllm.utils import jit_monitor

        compiled = []
        jit_monitor._handle_jit_event = lambda **event: compiled.append(event["fn_name"])
        heats = (0.0, 0.7, 1.0)
        requests = [
            replace(r, params=r.params | {{"temperature": heats[i % 3]}})
            for i, r in enumerate(REQUESTS)
        ]
        ours = options("bfloat16", kernels={kernels!r})
        with engine(TINY, speculation("probabilistic"), **ours) as llm:
            compiled.clear()
            run(llm, requests[:1])
            choose_by(llm, random_depths(GAMMA, seed=5))
            run(llm, requests)
        assert jit_monitor.is_active()
        answer = sorted(set(compiled))
    """
    paths = (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", ""))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    assert ask(code, environment) == []
