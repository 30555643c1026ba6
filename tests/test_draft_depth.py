"""Blocks of fewer than γ drafts: what vLLM's code sees meanwhile, and what is drawn.

The sequential stage runs on our real model class, against the numpy reference of
`tests.test_proposer`. What calls it is a speculator that writes down what it is asked.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.test_proposer import (
    MAX_REQUESTS,
    UNTOUCHED,
    make_model,
    make_proposer,
    reference,
)
from vllm_dspark.integration import draft_depth
from vllm_dspark.integration.depth_hooks import one_length_line
from vllm_dspark.integration.depth_plan import DepthPlan
from vllm_dspark.integration.draft_depth import DraftDepth
from vllm_dspark.scheduler.goal import Goal

GAMMA = 7
DEPTHS = (1, 2, 3, 5, 7)


def make_plan(bonus: int = 0, whole_backbone: bool = False) -> DepthPlan:
    return DepthPlan(
        gamma=GAMMA,
        depths=DEPTHS,
        fixed=None,
        ours=True,
        bonus=bonus,
        whole_backbone=whole_backbone,
        goal=Goal(),
    )


def equip(proposer: Any, plan: DepthPlan) -> None:
    """What `DraftDepth.__init__` adds, and what it leaves to vLLM's."""
    proposer.plan = plan
    proposer.num_query_per_req = plan.queries(GAMMA)
    proposer.query_cudagraph_manager = None
    proposer._anchors = {d: torch.arange(MAX_REQUESTS) * plan.queries(d) for d in DEPTHS}


def lay_out(proposer: Any) -> None:
    """Fill the flat buffers as vLLM's kernel does for the attributes as they are."""
    columns, queries = proposer.num_speculative_steps, proposer.num_query_per_req
    predicting = torch.arange(queries - columns, queries)
    rows = torch.arange(MAX_REQUESTS)[:, None] * queries + predicting
    proposer.sample_indices = rows.flatten()
    proposer.sample_idx_mapping = torch.arange(MAX_REQUESTS).repeat_interleave(columns)
    proposer.sample_pos = torch.arange(MAX_REQUESTS * columns)


@pytest.mark.parametrize("whole_backbone", [False, True])
@pytest.mark.parametrize("bonus", [0, 1])
@pytest.mark.parametrize("head_type", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_block_is_drawn_from_its_own_rows(
    depth: int, head_type: str, bonus: int, whole_backbone: bool
) -> None:
    """d drafts for each request, from d positions of a block of d or of γ, in both layouts. Catches
    a stride of another depth anywhere, and columns written beyond the block."""
    proposer, hidden = make_proposer(make_model(head_type), 8, GAMMA, GAMMA + bonus)
    equip(proposer, make_plan(bonus, whole_backbone))
    with proposer.at_block(depth):
        lay_out(proposer)
        proposer._sample_sequential(8, hidden)
        tokens, _, confidences = reference(proposer, hidden.numpy(), 8)
    found = proposer.draft_tokens.numpy()
    np.testing.assert_array_equal(found[:8, :depth], tokens[:, :depth])
    assert (found[:8, depth:] == UNTOUCHED).all()
    assert (found[8:] == UNTOUCHED).all()
    probabilities = proposer.draft_token_confidence_probs.numpy()
    np.testing.assert_allclose(probabilities[:8, :depth], confidences[:, :depth], rtol=1e-6)
    assert (probabilities[:8, depth:] == UNTOUCHED).all()
    assert len(proposer.seen) == depth


def test_shallow_block_is_the_beginning_of_a_full_one() -> None:
    """On the same rows of the same backbone, d drafts are the first d of γ."""
    drawn = {}
    for depth in DEPTHS:
        proposer, hidden = make_proposer(make_model("rnn"), 8, GAMMA, GAMMA)
        equip(proposer, make_plan(whole_backbone=True))
        with proposer.at_block(depth):
            lay_out(proposer)
            proposer._sample_sequential(8, hidden)
        drawn[depth] = proposer.draft_tokens[:8, :depth].tolist()
    for depth in DEPTHS:
        assert drawn[depth] == [row[:depth] for row in drawn[GAMMA]]


class Manager:
    """Stands for CUDA graphs of one depth."""

    def __init__(self, queries: int) -> None:
        self.queries = queries
        self.graphs: dict[str, str] = {}


class Recorder:
    """A speculator with the attributes that vLLM's code takes its sizes from.

    Attributes:
        seen: those attributes at every call, and the call's name.
    """

    def __init__(self, vllm_config: Any, device: Any) -> None:
        self.max_num_reqs, self.num_speculative_steps = 4, GAMMA
        self.num_query_per_req = GAMMA
        self._anchor_idx = torch.arange(4) * GAMMA
        self.draft_token_confidence_probs = torch.zeros(4, GAMMA)
        self.draft_tokens = torch.zeros(4, GAMMA)
        self.query_cudagraph_manager: Any = None
        self.seen: list[Any] = []
        self.fails = False

    def note(self, name: str, **more: Any) -> None:
        now = SimpleNamespace(
            name=name,
            steps=self.num_speculative_steps,
            queries=self.num_query_per_req,
            anchors=self._anchor_idx.tolist(),
            probabilities=tuple(self.draft_token_confidence_probs.shape),
            manager=self.query_cudagraph_manager,
            **more,
        )
        self.seen.append(now)

    def propose(self, *args: Any, num_speculative_tokens: Any, **kwargs: Any) -> Any:
        self.note("propose", told=num_speculative_tokens, args=args, kwargs=kwargs)
        if self.fails:
            raise RuntimeError("a step fails")
        self._generate_draft()
        return self.draft_tokens

    def _generate_draft(self) -> None:
        self.note("draw")

    def init_cudagraph_manager(self, mode: str) -> None:
        self.query_cudagraph_manager = Manager(self.num_query_per_req)

    def capture(self) -> None:
        self.note("capture")
        self.query_cudagraph_manager.graphs[f"{self.num_query_per_req}"] = "graph"


class Speculator(DraftDepth, Recorder):
    """Ours on top of it."""


@pytest.fixture
def speculator(monkeypatch: pytest.MonkeyPatch) -> Any:
    plan = staticmethod(lambda vllm_config: make_plan())
    monkeypatch.setattr(DepthPlan, "of", plan)
    monkeypatch.setattr(draft_depth, "_free_bytes", lambda: 0)
    return Speculator(None, torch.device("cpu"))


def at_rest(speculator: Any) -> bool:
    """Whether all is as vLLM made it."""
    speculator.note("rest")
    rest = speculator.seen.pop()
    return (rest.steps, rest.queries, rest.anchors, rest.probabilities, speculator.drawn) == (
        GAMMA, GAMMA, [0, 7, 14, 21], (4, GAMMA), None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("told", "block"), [(1, 1), (2, 2), (3, 3), (4, 5), (5, 5), (6, 7), (7, 7)]
)
def test_propose_runs_a_block_of_its_depth(speculator: Any, told: int, block: int) -> None:
    """Every size that vLLM reads is that of the block; afterwards all is as before."""
    drafts = speculator.propose("batch", num_speculative_tokens=told, dummy_run=True)
    proposed, drawn = speculator.seen
    for call in (proposed, drawn):
        assert (call.steps, call.queries) == (block, block)
        assert call.anchors == [0, block, 2 * block, 3 * block]
        assert call.probabilities == (4, block)
    assert (proposed.told, proposed.args) == (block, ("batch",))
    assert proposed.kwargs == {"dummy_run": True}
    assert drafts.shape == (4, GAMMA)  # what the runner keeps by request
    assert at_rest(speculator)


STEP = (SimpleNamespace(num_reqs=3), "attention", "slots", "last", "states", "sampled")


@pytest.mark.parametrize("dummy_run", [False, True])
def test_depth_zero_draws_nothing(speculator: Any, dummy_run: bool) -> None:
    """vLLM is asked to keep the context up, outside of graphs, and its block pass is left out."""
    speculator.store_own = lambda *step: dummy_run  # in a dummy run there is nothing to store
    speculator.propose(*STEP, num_speculative_tokens=0, dummy_run=dummy_run)
    (proposed,) = speculator.seen
    assert (proposed.told, proposed.args) == (0, STEP)
    assert proposed.kwargs["is_profile"]
    assert at_rest(speculator)


def test_depth_zero_needs_vllm_for_nothing_that_is_stored(speculator: Any) -> None:
    stored = []

    def store_own(*step: Any) -> bool:
        stored.append((*step, speculator.drawn))
        return True

    speculator.store_own = store_own
    assert speculator.propose(*STEP, num_speculative_tokens=0).shape == (3, GAMMA)
    assert stored == [(STEP[0], "states", 0)]
    assert speculator.seen == []
    assert at_rest(speculator)


@pytest.mark.parametrize(("idle", "blocks"), [(None, [7]), (3, [3]), (0, [])])
def test_dummy_runs_name_no_depth(speculator: Any, idle: int | None, blocks: list[int]) -> None:
    """γ, or what is being profiled."""
    speculator.idle_depth = idle
    speculator.propose(*STEP, dummy_run=True)
    assert [call.steps for call in speculator.seen if call.name == "draw"] == blocks


@pytest.mark.parametrize("depth", [0, 2])
def test_failure_leaves_no_trace(speculator: Any, depth: int) -> None:
    """The next step finds full blocks again."""
    speculator.fails = True
    with pytest.raises(RuntimeError, match="a step fails"):
        speculator.propose(*STEP, num_speculative_tokens=depth)
    assert at_rest(speculator)


def test_every_depth_has_graphs_of_its_own(speculator: Any) -> None:
    """Captured for its own block, deepest first, replayed at its own depth."""
    speculator.init_cudagraph_manager("full")
    assert speculator.query_cudagraph_manager.queries == GAMMA
    speculator.capture()
    captured = [(call.steps, call.manager.queries) for call in speculator.seen]
    assert captured == [(d, d) for d in reversed(DEPTHS)]
    speculator.seen.clear()
    for depth in DEPTHS:
        speculator.propose("batch", num_speculative_tokens=depth)
    used = [call.manager for call in speculator.seen if call.name == "propose"]
    assert [manager.queries for manager in used] == list(DEPTHS)
    assert [list(manager.graphs) for manager in used] == [[str(d)] for d in DEPTHS]


def test_vllm_finds_all_managers_to_drop(speculator: Any) -> None:
    """To measure memory vLLM captures, sets every manager among the attributes to None, and starts
    again. One that it does not find would keep its graphs."""
    speculator.init_cudagraph_manager("full")
    first = [(name, m) for name, m in vars(speculator).items() if isinstance(m, Manager)]
    assert {m.queries for _, m in first} == set(DEPTHS)
    for name, _ in first:
        setattr(speculator, name, None)
    speculator.propose("batch", num_speculative_tokens=3)  # before there are new ones
    speculator.init_cudagraph_manager("full")
    again = {m for m in vars(speculator).values() if isinstance(m, Manager)}
    assert len(again) == len(DEPTHS)
    assert not again & {m for _, m in first}


@pytest.mark.parametrize(
    ("fixed", "said"),
    [
        (None, "depth stays 7: CUDA graphs of the target are captured for 7 drafts"),
        (7, "depth stays 7"),
        (3, "depth is 3, but CUDA graphs .* Fix: num_speculative_tokens 3 instead"),
        (0, "Fix: no speculation instead"),
    ],
)
def test_depths_without_graphs_are_told_of(fixed: int | None, said: str) -> None:
    assert re.search(said, one_length_line(GAMMA, fixed))
