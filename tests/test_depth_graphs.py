"""Which depths have CUDA graphs and are profiled: those that steps can have, and no others.

Where the target's graphs replay one length alone, drafts of fewer than γ would never be verified in
a graph, so that depth stays γ: graphs of the other depths would take memory from the KV cache, and
time at every start, for nothing.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config.compilation import CUDAGraphMode

from tests.test_draft_depth import DEPTHS, GAMMA, Manager, make_plan
from tests.test_draft_depth import speculator as speculator
from tests.test_seams import RUNNER
from tests.test_seams import vllm as vllm
from tests.vllm_sources import Sources
from vllm_dspark.config import DSparkConfigError
from vllm_dspark.integration.depth_hooks import DepthHooks, make_meter
from vllm_dspark.integration.draft_depth import of_one_length, plan_within
from vllm_dspark.integration.proposer import DSparkProposer
from vllm_dspark.integration.verification import hooks


def graphs(mode: str = "FULL_DECODE_ONLY", mixed: bool = False) -> Any:
    """The runner's manager of the target's graphs, as far as it is read."""
    return SimpleNamespace(cudagraph_mode=CUDAGraphMode[mode], varlen_decode=mixed)


@pytest.mark.parametrize(
    ("mode", "mixed", "expected"),
    [
        ("NONE", False, False),
        ("PIECEWISE", False, False),
        ("FULL", False, False),  # for any batch, prefills included
        ("FULL_DECODE_ONLY", False, True),
        ("FULL_AND_PIECEWISE", False, True),
        ("FULL_DECODE_ONLY", True, False),
        ("FULL_AND_PIECEWISE", True, False),
    ],
)
def test_which_graphs_are_of_one_length(mode: str, mixed: bool, expected: bool) -> None:
    assert of_one_length(graphs(mode, mixed)) is expected
    assert not of_one_length(None)


def test_full_blocks_alone_have_graphs_beside_a_target_of_one_length(speculator: Any) -> None:
    """One manager, one capture; and no depth of which there is none."""
    speculator.target_graphs = graphs
    speculator.init_cudagraph_manager("full")
    managers = {m for m in vars(speculator).values() if isinstance(m, Manager)}
    assert [manager.queries for manager in managers] == [GAMMA]
    speculator.capture()
    assert [call.steps for call in speculator.seen] == [GAMMA]
    speculator.seen.clear()
    speculator.propose("batch", num_speculative_tokens=3)
    assert speculator.seen[0].manager in managers


def test_every_start_looks_anew(speculator: Any) -> None:
    """vLLM makes managers twice, the first time to measure what graphs take."""
    for mixed, depths in ((False, (GAMMA,)), (True, DEPTHS)):
        speculator.target_graphs = lambda mixed=mixed: graphs(mixed=mixed)
        speculator.init_cudagraph_manager("full")
        assert speculator.plan.depths == depths
        assert speculator.plan.varies is mixed


@pytest.mark.parametrize(
    "changes", [{"fixed": 3, "depths": (3, 7)}, {"ours": False, "depths": (2, 7)}]
)
def test_depths_that_somebody_chose_keep_their_graphs(changes: dict[str, Any]) -> None:
    """`depth: 3`, and vLLM's own schedule of depths."""
    plan = replace(make_plan(), **changes)
    assert plan_within(plan, graphs()) == plan


@pytest.mark.parametrize("mixed", [False, True])
def test_only_depths_that_can_be_chosen_are_profiled(
    mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the scheduler is told of the same."""
    monkeypatch.setattr(hooks, "profile_source", lambda runner, mode: None)
    proposer = DSparkProposer.__new__(DSparkProposer)
    proposer.plan = plan_within(make_plan(), graphs(mixed=mixed))
    runner = SimpleNamespace(
        speculator=proposer,
        adaptive_verification=SimpleNamespace(mode="host", depths=()),
        rejection_sampler=None,
        cudagraph_manager=graphs(mixed=mixed),
        num_speculative_steps=GAMMA,
        device=torch.device("cpu"),
    )
    hooks.connect(runner)
    assert runner.adaptive_verification.depths == ((0, *DEPTHS) if mixed else ())
    startup = make_meter(runner)._startup
    assert startup is not None
    assert startup.depths == ((0, *DEPTHS) if mixed else (GAMMA,))


class Worker:
    """What the hooks are mixed into."""

    def load_model(self) -> None:
        """The runner is there already."""


class HookedWorker(DepthHooks, Worker):
    """As our workers are made."""


def test_the_drafter_sees_the_graphs_that_the_runner_has_now(speculator: Any) -> None:
    """Those that vLLM makes to measure memory go, and others come."""
    worker = HookedWorker()
    worker.model_runner = SimpleNamespace(speculator=speculator, cudagraph_manager=None)
    worker.load_model()
    assert speculator.target_graphs() is None
    worker.model_runner.cudagraph_manager = made = graphs()
    assert speculator.target_graphs() is made
    worker.model_runner.speculator = None  # a rank that does not draft
    worker.load_model()


def test_the_runner_makes_the_targets_manager_first(vllm: Sources) -> None:
    """The drafter looks at it when it makes its own."""
    module = vllm.module(RUNNER.partition(":")[0])
    assert module is not None
    makes = [
        ast.unparse(node)
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef)
        and ".speculator.init_cudagraph_manager(" in ast.unparse(node)
    ]
    assert len(makes) == 1
    target, _, rest = makes[0].partition("self.cudagraph_manager = ModelCudaGraphManager(")
    assert ".speculator.init_cudagraph_manager(" not in target
    assert ".speculator.init_cudagraph_manager(" in rest


def test_updates_of_drafter_weights_are_refused_before_any_is_touched() -> None:
    """Catches a server that says done, and drafts on with copies of the old ones."""
    with pytest.raises(DSparkConfigError, match="start a server on the new drafter"):
        HookedWorker().start_draft_weight_update()
