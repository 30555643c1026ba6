"""CUDA graphs that store the drafter's context K/V of a whole step.

A draft graph stores that of the tokens which its requests verified at most. vLLM launches the rest
kernel by kernel: all of a step that drafts nothing, and the prompts of a step with prefills. Those
two dozen launches take the host longer than all of its other work for the drafter. Here they are
one replay, of a graph with room for the step's tokens; its spare rows write no K/V.

Needs vLLM 0.33, which stages the target's hidden states for its own draft graphs, and these graphs.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager


class ContextGraphManager(CudaGraphManager):
    """A graph for every capture size of the engine, up to a number of tokens.

    Args:
        most: tokens that there is room to stage.
    """

    def __init__(self, vllm_config: Any, device: torch.device, most: int) -> None:
        self._most = most
        super().__init__(vllm_config, device, CUDAGraphMode.FULL_DECODE_ONLY, decode_query_len=1)

    def _init_candidates(self) -> None:
        sizes = self.compilation_config.cudagraph_capture_sizes or ()
        self._sizes = sorted(size for size in sizes if size <= self._most)
        # The largest first, which needs most memory; the others share it.
        self._capture_descs = {CUDAGraphMode.FULL: [_graph(size) for size in self._sizes[::-1]]}

    def covering(self, tokens: int) -> BatchExecutionDescriptor | None:
        """The smallest graph with room for that many tokens, if there is one."""
        at = bisect_left(self._sizes, tokens)
        return _graph(self._sizes[at]) if self.graphs and at < len(self._sizes) else None


def _graph(tokens: int) -> BatchExecutionDescriptor:
    return BatchExecutionDescriptor(CUDAGraphMode.FULL, tokens, None)


class ContextGraphs:
    """Mixed into a speculator class of vLLM's DFlash family, before it.

    Attributes:
        context_graphs: None where vLLM launches kernel by kernel.
        drawn: see `DraftDepth`.
    """

    context_graphs: ContextGraphManager | None = None
    drawn: int | None
    _staged: BatchExecutionDescriptor | None = None  # what is to store the rows in _aux_staging

    # Of vLLM's speculator.
    vllm_config: Any
    device: torch.device
    model: Any
    hidden_states: torch.Tensor
    query_cudagraph_manager: Any
    block_tables: Any
    context_positions: torch.Tensor
    draft_kv_cache_group_ids: list[int]
    pcp_manager: Any
    _aux_staging: torch.Tensor | None = None
    _num_rejected: torch.Tensor | None = None
    _context_slot_mappings: torch.Tensor

    def init_context_graphs(self) -> None:
        """A manager, where there are draft graphs whose staged hidden states can be read."""
        self.context_graphs = None
        if self._aux_staging is not None and self.query_cudagraph_manager.cudagraph_mode:
            most = len(self._aux_staging)
            self.context_graphs = ContextGraphManager(self.vllm_config, self.device, most)

    def capture_context_graphs(self) -> int:
        """Capture them, and return how many there are. Writes no K/V."""
        if self.context_graphs is None:
            return 0
        self._context_slot_mappings.fill_(PAD_SLOT_ID)

        def create(graph: BatchExecutionDescriptor, warmup: bool) -> Any:
            return lambda mode: self._store_staged(graph.num_tokens)

        self.context_graphs.capture(create, "Capturing vllm-dspark's context K/V graphs")
        return len(self.context_graphs.graphs)

    def _store_staged(self, tokens: int) -> None:
        states = self.model.combine_hidden_states(self._aux_staging[:tokens])  # type: ignore[index]
        self.hidden_states[:tokens].copy_(states)
        super()._precompute_context_kv(0, tokens)  # type: ignore[misc]  # vLLM's, mixed in after

    def _stage(self, tokens: int, states: list[torch.Tensor] | None) -> bool:
        """Whether a graph takes the step's tokens, whose hidden states are staged then."""
        graphs = self.context_graphs
        self._staged = graphs.covering(tokens) if graphs is not None and states else None
        if self._staged is None:
            return False
        assert states is not None
        assert self._aux_staging is not None
        torch.cat([h[:tokens] for h in states], dim=-1, out=self._aux_staging[:tokens])
        return True

    def _replay_staged(self, tokens: int) -> None:
        """Store the K/V of the first `tokens` rows staged."""
        graph, self._staged = self._staged, None
        assert graph is not None
        assert self.context_graphs is not None
        self._context_slot_mappings[:, tokens : graph.num_tokens].fill_(PAD_SLOT_ID)
        self.context_graphs.run_fullgraph(graph)

    def store_own(self, input_batch: Any, aux: list[torch.Tensor] | None) -> bool:
        """Store the context K/V of a step that verified no drafts and draws none. Whether that was
        possible; else vLLM has to lay the step out first.

        Nothing of such a step can have been rejected: every token has the position and the slots
        that the target had for it. `_context_slot_mappings` has a row for every group of caches.

        Args:
            input_batch: vLLM's, of the target's step.
            aux: hidden states of it, [≥ N, D] of each layer that the drafter reads.
        """
        if self.context_graphs is None or self.pcp_manager is not None:
            return False
        tokens = input_batch.num_tokens
        if input_batch.num_draft_tokens or not self._stage(tokens, aux):
            return False
        slots = self.block_tables.slot_mappings
        self.context_positions[:tokens].copy_(input_batch.positions[:tokens])
        for own, group in zip(
            self._context_slot_mappings, self.draft_kv_cache_group_ids, strict=True
        ):
            own[:tokens].copy_(slots[group, :tokens])
        self._replay_staged(tokens)
        return True

    def _store_hidden_states(
        self, num_tokens: int, last: torch.Tensor, aux: list[torch.Tensor] | None, *rest: int
    ) -> None:
        """vLLM's; at depth 0 the graph combines them."""
        if self.drawn != 0 or not self._stage(num_tokens, aux):
            super()._store_hidden_states(num_tokens, last, aux, *rest)  # type: ignore[misc]

    def _precompute_context_kv(self, start: int, end: int, dummy_run: bool = False) -> None:
        """vLLM's, by a graph where the rows are staged."""
        if self._staged is None:
            super()._precompute_context_kv(start, end, dummy_run)  # type: ignore[misc]
        else:
            self._replay_staged(0 if dummy_run else end)

    def _prepare_graph_replay(
        self,
        input_batch: Any,
        num_graph_reqs: int,
        last: torch.Tensor,
        aux: list[torch.Tensor] | None,
        num_rejected: torch.Tensor,
        dummy_run: bool,
    ) -> None:
        """vLLM's. Where a step has more tokens than the draft graph stores, ours stores all; the
        draft graph then stores its own once more, as they are."""
        tokens = input_batch.num_tokens
        covered = tokens <= self._num_graph_context_tokens(num_graph_reqs)  # type: ignore[attr-defined]
        plain = covered or dummy_run or self._num_rejected is not None
        if plain or not self._stage(tokens, aux):
            super()._prepare_graph_replay(  # type: ignore[misc]
                input_batch, num_graph_reqs, last, aux, num_rejected, dummy_run
            )
        else:
            self._replay_staged(tokens)
