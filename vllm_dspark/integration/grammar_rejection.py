"""Drafts that a grammar rejects, verified exactly.

vLLM does not judge such a draft and draws from the target's p in its place. But allowed drafts were
accepted by min(1, p/q), and with p in the place of all others the words that q prefers come too
often. The row that judges the draft holds p under the grammar, where its probability is 0: rejected
like any other, it is followed by the residual, which is exact. Drafts behind it stay unjudged, for
their rows know no grammar.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import (
    RejectionSampler,
    gather_draft_sampled,
)


class GrammarRejectionSampler(RejectionSampler):
    """vLLM's, exact where a grammar rejects a draft that was drawn. See the module."""

    @classmethod
    def of(cls, theirs: RejectionSampler) -> GrammarRejectionSampler:
        """One with all that vLLM's was made with, a watermark's key among it."""
        made = cls.__new__(cls)
        made.__dict__.update(theirs.__dict__)
        return made

    def __call__(
        self,
        logits: torch.Tensor,  # [N, V], under the grammar
        input_batch: Any,
        draft_logits: torch.Tensor | None = None,  # [slots, γ, V]
        invalid_drafts: torch.Tensor | None = None,  # bool [N]
    ) -> SamplerOutput:
        """See vLLM's."""
        if invalid_drafts is not None:
            tokens = gather_inputs(input_batch, self.sampler)[0]
            invalid_drafts = unjudged(invalid_drafts, logits, tokens)
        return super().__call__(logits, input_batch, draft_logits, invalid_drafts)


def unjudged(
    invalid_drafts: torch.Tensor, logits: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Which drafts are not to be judged: those that vLLM calls invalid, but for the first one of a
    block, where its row forbids it.

    Args:
        invalid_drafts: bool [N], rows of a request's drafts from some position on.
        logits: float [N, V], row i is what the draft of row i + 1 is judged by.
        tokens: int [N], input tokens; negative for placeholders.

    Returns:
        bool [N].
    """
    unjudged = invalid_drafts.clone()
    by = logits[:-1].gather(1, tokens[1:, None].clamp(min=0).long())[:, 0]
    unjudged[1:] &= invalid_drafts[:-1] | (by != -torch.inf)
    return unjudged


def gather_inputs(input_batch: Any, sampler: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Input token and position of each row of a batch with drafts, [N] each; -1 for drafts that are
    placeholders."""
    return gather_draft_sampled(
        input_batch.input_ids,
        input_batch.positions,
        input_batch.logits_indices,
        input_batch.expanded_idx_mapping,
        input_batch.expanded_local_pos,
        sampler.req_states.prefill_len.gpu,
    )
