"""The proposer's sequential stage by our Triton kernels."""

from __future__ import annotations

import os
from typing import Any

import torch

from vllm_dspark.kernels.confidence import confidence
from vllm_dspark.kernels.dense import DenseDrafter
from vllm_dspark.kernels.dispatch import Choice, choose, device_obstacle
from vllm_dspark.kernels.draws import Draws
from vllm_dspark.kernels.head_weights import ConfidenceWeights, HeadWeights


def draft_kernels(proposer: Any) -> DraftKernels | None:
    """Kernels for a proposer whose drafter is loaded; None if the reference serves. Says which,
    and why, in the log.

    Raises:
        ValueError: DSPARK_KERNELS holds an unknown word.
    """
    choice = choose(proposer.dspark_config.kernels, os.environ, _obstacle(proposer))
    _log(choice)
    return DraftKernels(proposer) if choice.triton else None


def _obstacle(proposer: Any) -> str | None:
    head = getattr(proposer.model, "sequential_head", None)
    if head is None:
        return "vLLM's own head draws this drafter's tokens"
    if proposer.peak_confidence:
        return "there is no confidence head, and peak confidences come from the reference"
    if getattr(proposer, "draft_watermarker", None) is not None:
        return "drafts are watermarked"
    if proposer.draft_logits is not None and proposer.use_fp64_gumbel:
        return "the Gumbel noise is to be float64"
    w1, w2 = head.markov_w1.weight, head.markov_w2.weight
    if w1.dtype != w2.dtype:
        return f"the Markov head's tables are {w1.dtype} and {w2.dtype}"
    return device_obstacle(w1.device, w1.dtype)


def _log(choice: Choice) -> None:
    from vllm.logger import init_logger

    init_logger("vllm.dspark").info_once(
        "vllm-dspark: drafts are drawn by %s: %s",
        "Triton kernels" if choice.triton else "the reference",
        choice.why,
    )


class DraftKernels:
    """Draws with a proposer's weights into its buffers.

    On every tensor-parallel rank the base logits are gathered and the Markov head is whole, so all
    draw the same tokens.
    """

    def __init__(self, proposer: Any) -> None:
        from vllm.v1.worker.gpu.sample import gumbel

        # vLLM 0.33 always does. Verification by blocks looks at drafts that it then drops: drawn
        # again, with the same noise, they would be known to have failed.
        by_blocks = proposer.speculative_config.rejection_sample_method == "block"
        self._by_step = by_blocks or hasattr(gumbel, "spec_step_seed")
        model = proposer.model
        offsets, words = model.draft_id_to_target_id, None
        if offsets is not None:
            words = torch.arange(offsets.shape[0], device=offsets.device) + offsets
            if proposer.draft_logits is not None:  # only the draft words' columns are written
                proposer.draft_logits.fill_(-torch.inf)
        self._drafter = DenseDrafter(
            HeadWeights.of(model.sequential_head, words), proposer.max_num_reqs
        )
        self._confidence = None
        if proposer.use_confidence_head:
            self._confidence = ConfidenceWeights.of(
                model.model.confidence_head, proposer.num_speculative_steps
            )

    def draw(
        self,
        proposer: Any,
        base_logits: torch.Tensor,  # [R, d, V]
        hidden: torch.Tensor,  # [R, d, D]
        anchors: torch.Tensor,  # int [R]
        slots: torch.Tensor,  # int64 [R, γ]
        positions: torch.Tensor,  # int64 [R, γ]
    ) -> None:
        """What `DSparkProposer._sample_sequential` writes: draft tokens, draft logits,
        confidences."""
        rows = base_logits.shape[0]
        draws = None
        if proposer.draft_logits is not None:
            draws = Draws(
                slots, positions, proposer.temperature, proposer.seeds, by_step=self._by_step
            )
        tokens = proposer.draft_tokens[:rows]
        self._drafter.draw(base_logits, hidden, anchors, tokens, draws, proposer.draft_logits)
        if self._confidence is not None:
            out = proposer.draft_token_confidence_probs[:rows]
            confidence(hidden, self._drafter.head.w1, self._confidence, anchors, tokens, out)
