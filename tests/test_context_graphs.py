"""Which context K/V graphs store, and which rows they leave alone. What they store, only a GPU can
tell (`test_depth_gpu`)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from vllm_dspark.integration.context_graphs import ContextGraphManager, ContextGraphs

SIZES, SLOT, ROOM = [4, 8, 16], 7, 32
STATES = [torch.arange(20.0)[:, None] + layer for layer in (0, 100)]  # of two target layers
Stored = tuple[str, int, int]


class Manager(ContextGraphManager):
    """With graphs of those sizes, which note what they would read."""

    def __init__(self, speculator: Any) -> None:
        self._sizes = SIZES
        self.graphs = {size: None for size in SIZES}
        self._speculator = speculator

    def run_fullgraph(self, desc: Any) -> None:
        speculator = self._speculator
        slots = speculator._context_slot_mappings[0, : desc.num_tokens].tolist()
        real = slots.count(SLOT)
        assert slots == [SLOT] * real + [PAD_SLOT_ID] * (desc.num_tokens - real)
        expected = torch.cat([h[:real] for h in STATES], dim=-1)
        assert torch.equal(speculator._aux_staging[:real], expected)
        speculator.stored.append(("graph", real, desc.num_tokens))


class Theirs:
    """What is vLLM's of a speculator: it notes what it launches."""

    def _store_hidden_states(self, num_tokens: int, last: Any, aux: Any, *rest: int) -> None:
        self.combined = num_tokens

    def _precompute_context_kv(self, start: int, end: int, dummy_run: bool = False) -> None:
        self.stored.append(("launches", start, end))  # type: ignore[attr-defined]

    def _prepare_graph_replay(self, *arguments: Any) -> None:
        self.stored.append(("vLLM's", 0, 0))  # type: ignore[attr-defined]

    def _num_graph_context_tokens(self, requests: int) -> int:
        return 2 * requests


class Speculator(ContextGraphs, Theirs):
    def __init__(self, drawn: int, graphs: bool = True) -> None:
        self.drawn, self.stored = drawn, list[Stored]()
        self._aux_staging = torch.full((ROOM, 2), torch.nan)
        self._context_slot_mappings = torch.full((1, ROOM), SLOT)
        self.context_positions = torch.zeros(ROOM, dtype=torch.int64)
        self.context_graphs = Manager(self) if graphs else None
        self.draft_kv_cache_group_ids = [1]
        slots = torch.full((3, ROOM), -5)  # of other groups
        self.block_tables = SimpleNamespace(slot_mappings=slots)
        self.pcp_manager = None

    def keep_context(self, tokens: int, dummy_run: bool = False) -> list[Stored]:
        """As vLLM does at depth 0."""
        self._store_hidden_states(tokens, STATES[0], STATES)
        self._precompute_context_kv(0, tokens, dummy_run)
        return self.stored

    def prepare(self, tokens: int, requests: int, dummy_run: bool = False) -> list[Stored]:
        """As vLLM does before a draft graph of so many requests."""
        batch = SimpleNamespace(num_tokens=tokens)
        self._prepare_graph_replay(batch, requests, STATES[0], STATES, torch.zeros(1), dummy_run)
        return self.stored


def step_of(tokens: int, drafts: int = 0) -> SimpleNamespace:
    """A step of the target, as long as its buffers are."""
    positions = torch.arange(100, 100 + ROOM)
    return SimpleNamespace(num_tokens=tokens, num_draft_tokens=drafts, positions=positions)


@pytest.mark.parametrize(("tokens", "size"), [(1, 4), (5, 8), (16, 16)])
def test_a_step_that_never_speculated_is_stored_where_the_target_stored_it(
    tokens: int, size: int
) -> None:
    """The slots are those of the drafter's group; `Manager` sees to it that they reach the graph,
    and that nothing is left in it of the step before."""
    speculator = Speculator(0)
    speculator._context_slot_mappings.fill_(3)
    speculator.block_tables.slot_mappings[1, :tokens] = SLOT
    assert speculator.store_own(step_of(tokens), STATES)
    assert speculator.stored == [("graph", tokens, size)]
    assert speculator.context_positions[:tokens].tolist() == list(range(100, 100 + tokens))
    assert speculator._staged is None


@pytest.mark.parametrize("changes", [{"graphs": False}, {"tokens": 17}, {"drafts": 1}, {"pcp": 1}])
def test_what_vllm_has_to_lay_out_is_left_to_it(changes: dict[str, Any]) -> None:
    """No graph, or too small ones; drafts that were verified, which may be rejected; prompts that
    ranks share."""
    speculator = Speculator(0, changes.get("graphs", True))
    speculator.pcp_manager = changes.get("pcp")
    step = step_of(changes.get("tokens", 5), changes.get("drafts", 0))
    assert not speculator.store_own(step, STATES)
    assert speculator.stored == []
    assert speculator._staged is None


@pytest.mark.parametrize(("tokens", "size"), [(1, 4), (4, 4), (5, 8), (16, 16)])
def test_without_drafts_the_next_larger_graph_stores_all(tokens: int, size: int) -> None:
    assert Speculator(0).keep_context(tokens) == [("graph", tokens, size)]


def test_dummy_run_stores_nothing() -> None:
    assert Speculator(0).keep_context(5, dummy_run=True) == [("graph", 0, 8)]


@pytest.mark.parametrize("graphs", [True, False])
def test_vllm_launches_what_no_graph_has_room_for(graphs: bool) -> None:
    """A long prompt, or an engine without such graphs."""
    speculator = Speculator(0, graphs)
    tokens = 17 if graphs else 5
    assert speculator.keep_context(tokens) == [("launches", 0, tokens)]
    assert speculator.combined == tokens


def test_beside_drafts_what_the_draft_graph_has_no_room_for_is_stored_with_the_rest() -> None:
    """The staged rows are those that the draft graph reads, too."""
    assert Speculator(3).prepare(tokens=7, requests=3) == [("graph", 7, 8)]


@pytest.mark.parametrize(
    ("tokens", "requests", "dummy_run"), [(6, 3, False), (7, 3, True), (17, 3, False)]
)
def test_beside_drafts_the_rest_is_vllms(tokens: int, requests: int, dummy_run: bool) -> None:
    """Enough room in the draft graph; a dummy run; too many tokens for ours."""
    assert Speculator(3).prepare(tokens, requests, dummy_run) == [("vLLM's", 0, 0)]


def test_draft_passes_outside_of_graphs_are_vllms() -> None:
    assert Speculator(3).keep_context(5) == [("launches", 0, 5)]


def test_no_graph_serves_before_they_are_captured() -> None:
    speculator = Speculator(0)
    assert speculator.context_graphs is not None
    speculator.context_graphs.graphs = {}
    assert speculator.keep_context(5) == [("launches", 0, 5)]
