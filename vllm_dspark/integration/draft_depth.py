"""Drafting fewer tokens than γ: what a step of some depth changes in vLLM's speculator.

vLLM's speculator drafts γ tokens per request and keeps, where asked for fewer, the first few. Here
a block of d drafts has d predicting positions: backbone, LM head and sequential stage run on those
alone. vLLM's code takes its sizes from a handful of attributes, so a step of depth d runs it with
these set for d and puts them back. Flat buffers (`sample_indices` and its like) then have d entries
per request instead of γ. What is kept by request (`draft_tokens`, `draft_logits`) keeps its γ
columns, of which the first d are written.

Every depth has CUDA graphs of its own, made by vLLM's manager. A graph stores the context K/V of
d + 1 tokens per request: what a step verifies at most once the step before had that depth. What
there is beyond, `context_graphs` stores. Where the target's own graphs take steps of γ drafts a
request alone, no other depth would pay, and none has graphs.

At depth 0 the context K/V is stored and nothing is drafted, so that drafting can go on at any time
as if it had never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from vllm_dspark.integration.context_graphs import ContextGraphs
from vllm_dspark.integration.depth_plan import DepthPlan


class DraftDepth(ContextGraphs):
    """Mixed into a speculator class of vLLM's DFlash family, before it.

    Attributes:
        plan: what depths there are; full blocks alone once it is known that no others are drafted.
        target_graphs: the runner's manager of the target's graphs; None where there is none.
        drawn: drafts per request that the step in progress draws, 0 to γ; None between steps.
        idle_depth: what dummy runs draft, which name no depth; γ if None.
    """

    drawn: int | None = None
    idle_depth: int | None = None

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)  # type: ignore[call-arg]  # vLLM's, mixed in after
        self.target_graphs: Callable[[], Any] = lambda: None
        self.plan = self._whole_plan = DepthPlan.of(vllm_config)
        self._anchors = {
            block: torch.arange(self.max_num_reqs, device=device) * self.plan.queries(block)
            for block in self.plan.depths
        }

    # Of vLLM's speculator.
    max_num_reqs: int
    query_cudagraph_manager: Any
    draft_token_confidence_probs: torch.Tensor
    draft_tokens: torch.Tensor

    @contextmanager
    def at_block(self, block: int) -> Iterator[None]:
        """While active, vLLM's code drafts blocks of `block` drafts, one of `plan.depths`."""
        plan = self.plan
        columns = plan.columns(block)
        changed = {
            "drawn": block,
            "num_speculative_steps": columns,
            "num_query_per_req": plan.queries(block),
            "_anchor_idx": self._anchors[block],
            "draft_token_confidence_probs": self.draft_token_confidence_probs[:, :columns],
            "query_cudagraph_manager": getattr(self, _graphs(block), None),
        }
        kept = {name: getattr(self, name) for name in changed}
        vars(self).update(changed)
        try:
            yield
        finally:
            vars(self).update(kept)

    def propose(
        self, *args: Any, num_speculative_tokens: int | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Draft `num_speculative_tokens` per request; arguments are those of vLLM's speculator.

        Returns:
            int64 [R, γ]; what lies behind the drafts is left over from other steps.
        """
        depth = num_speculative_tokens
        if depth is None:
            depth = self.plan.depths[-1] if self.idle_depth is None else self.idle_depth
        if depth == 0:
            return self._keep_context(*args, **kwargs)
        block = self.plan.block(depth)
        with self.at_block(block):
            return super().propose(  # type: ignore[misc]  # vLLM's, mixed in after
                *args, num_speculative_tokens=block, **kwargs
            )

    def _keep_context(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Store the context K/V of the step's tokens, and draft nothing."""
        kwargs["is_profile"] = True  # for 0.32, which knows no depth 0: no graph either
        self.drawn = 0
        try:
            if not kwargs.get("dummy_run") and self.store_own(input_batch, aux_hidden_states):
                return self.draft_tokens[: input_batch.num_reqs]
            return super().propose(  # type: ignore[misc]  # vLLM's, mixed in after
                input_batch,
                attn_metadata,
                slot_mappings,
                last_hidden_states,
                aux_hidden_states,
                *args,
                num_speculative_tokens=0,
                **kwargs,
            )
        finally:
            self.drawn = None

    def _generate_draft(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's, but nothing at depth 0."""
        if self.drawn != 0:
            super()._generate_draft(*args, **kwargs)  # type: ignore[misc]  # vLLM's, as above

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """A manager for every depth. vLLM finds them among the attributes when it drops what it
        captured to measure memory, so each has one of its own. The target's manager was made right
        before."""
        self.plan = plan_within(self._whole_plan, self.target_graphs())
        for block in self.plan.depths:
            with self.at_block(block):
                super().init_cudagraph_manager(  # type: ignore[misc]  # vLLM's, as above
                    cudagraph_mode
                )
                setattr(self, _graphs(block), self.query_cudagraph_manager)
        self.query_cudagraph_manager = getattr(self, _graphs(self.plan.depths[-1]))
        self.init_context_graphs()

    def capture(self) -> None:
        """Capture the graphs of every depth, the deepest first, which needs most memory; the
        others share it."""
        before, began = _free_bytes(), time.perf_counter()
        graphs = 0
        for block in reversed(self.plan.depths):
            with self.at_block(block):
                super().capture()  # type: ignore[misc]  # vLLM's, mixed in after
                graphs += len(self.query_cudagraph_manager.graphs)
        context = self.capture_context_graphs()
        if graphs:
            seconds = time.perf_counter() - began
            _log(self.plan.depths, graphs, context, seconds, before - _free_bytes())


def of_one_length(graphs: Any) -> bool:
    """Whether full CUDA graphs of the target are captured for γ drafts a request alone, and not for
    any mix of lengths, which takes attention backends that can replay it.

    Args:
        graphs: vLLM's manager of them; None where there is none.
    """
    if graphs is None or not graphs.cudagraph_mode.has_full_cudagraphs():
        return False
    return bool(graphs.cudagraph_mode.separate_routine() and not graphs.varlen_decode)


def plan_within(plan: DepthPlan, graphs: Any) -> DepthPlan:
    """What is left of a plan in a worker. Where the target's graphs are captured for γ drafts a
    request alone, a step with fewer would leave them, and costs more than it saves: depth does not
    follow the load then, and stays γ. A depth that was asked for stays what it is.

    Args:
        graphs: as in `of_one_length`.
    """
    if plan.varies and of_one_length(graphs):
        return replace(plan, fixed=plan.gamma, depths=(plan.gamma,))
    return plan


def _graphs(block: int) -> str:
    return f"depth_{block}_cudagraph_manager"


def _free_bytes() -> int:
    """Of device memory, as the driver sees it."""
    return int(torch.accelerator.get_memory_info()[0])


def _log(depths: tuple[int, ...], graphs: int, context: int, seconds: float, taken: int) -> None:
    from vllm.logger import init_logger

    init_logger("vllm.dspark").info(
        "vllm-dspark: %d draft graphs, for depths %s, and %d for context K/V, captured in %.1f s, "
        "%.0f MiB",
        graphs,
        ", ".join(map(str, depths)),
        context,
        seconds,
        taken / (1 << 20),
    )
