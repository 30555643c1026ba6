"""The engine with the kernels' references in their place, for machines without a GPU.

Triton's interpreter takes seconds for a step of ours; the references draw and accept the same
tokens in milliseconds. `python -m benchmarks.reference_kernels` is a child for `EngineProcess`.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import engine_child
from vllm_dspark.kernels.block_verify_reference import block_verify_reference
from vllm_dspark.kernels.candidate import CandidateDrafter
from vllm_dspark.kernels.candidate_reference import candidate_reference
from vllm_dspark.kernels.dense import DenseDrafter
from vllm_dspark.kernels.dense_reference import dense_reference
from vllm_dspark.kernels.draws import Draws
from vllm_dspark.kernels.verify import Method, Verifier
from vllm_dspark.kernels.verify_batch import Batch
from vllm_dspark.kernels.verify_reference import verify_reference
from vllm_dspark.kernels.verify_verdict import Verdict


class ReferenceDense(DenseDrafter):
    """`DenseDrafter` by its reference."""

    def draw(
        self,
        base_logits: torch.Tensor,
        hidden: torch.Tensor,
        anchors: torch.Tensor,
        tokens: torch.Tensor,
        draws: Draws | None = None,
        cache: torch.Tensor | None = None,
    ) -> None:
        """See `DenseDrafter.draw`; of drafters whose words are the target's."""
        dtype = None if cache is None else cache.dtype
        drawn, logits = dense_reference(base_logits, hidden, anchors, self.head, draws, dtype)
        depth = drawn.shape[1]
        tokens[:, :depth] = drawn
        if cache is not None and draws is not None:
            kept, slots = _with_slot(draws)
            cache[slots, :depth] = logits[kept].to(cache.dtype)


class ReferenceCandidates(CandidateDrafter):
    """`CandidateDrafter` by its reference."""

    def draw(
        self,
        base_logits: torch.Tensor,
        hidden: torch.Tensor,
        anchors: torch.Tensor,
        tokens: torch.Tensor,
        draws: Draws | None = None,
        draft_ids: torch.Tensor | None = None,
        draft_logprobs: torch.Tensor | None = None,
    ) -> None:
        """See `CandidateDrafter.draw`."""
        found = candidate_reference(base_logits, hidden, anchors, self.head, self.count, draws)
        depth = base_logits.shape[1]
        tokens[:, :depth] = found[0]
        if draws is not None and draft_ids is not None and draft_logprobs is not None:
            kept, slots = _with_slot(draws)
            draft_ids[slots, :depth] = found[1][kept]
            draft_logprobs[slots, :depth] = found[2][kept].float()


class ReferenceVerifier(Verifier):
    """`Verifier` by its reference."""

    def verify(self, batch: Batch, method: Method = "standard") -> Verdict:
        """See `Verifier.verify`."""
        judge = block_verify_reference if method == "block" else verify_reference
        verdict = Verdict.empty(batch.requests, batch.gamma, batch.logits.device)
        verdict.tokens.fill_(-1)
        for request, outcome in enumerate(judge(batch)):
            accepted = len(outcome.tokens) - 1
            verdict.tokens[request, : accepted + 1] = torch.tensor(outcome.tokens)
            rejected = outcome.verified - accepted
            counts = (accepted + 1, rejected, accepted, int(outcome.failed))
            verdict.counts[:, request] = torch.tensor(counts, dtype=torch.int32)
        return verdict


def _with_slot(draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that do not only pad, and their slots."""
    kept = draws.slots[:, 0] >= 0
    return kept, draws.slots[kept, 0]


def install() -> None:
    """Let engines that start in this process have the references."""
    from vllm_dspark.integration import draft_kernels, rejection

    replaced: tuple[tuple[Any, str, Any], ...] = (
        (draft_kernels, "DenseDrafter", ReferenceDense),
        (draft_kernels, "CandidateDrafter", ReferenceCandidates),
        (rejection, "Verifier", ReferenceVerifier),
    )
    for module, name, reference in replaced:
        setattr(module, name, reference)


if __name__ == "__main__":
    install()
    engine_child.main()
