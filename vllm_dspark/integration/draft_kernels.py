"""The proposer's sequential stage by our Triton kernels."""

from __future__ import annotations

from typing import Any

import torch

from vllm_dspark.integration.candidate_mode import choose_kernels
from vllm_dspark.integration.processing import DraftFilters
from vllm_dspark.kernels import dispatch
from vllm_dspark.kernels.candidate import CandidateDrafter
from vllm_dspark.kernels.confidence import confidence
from vllm_dspark.kernels.dense import DenseDrafter
from vllm_dspark.kernels.dispatch import Choice, device_obstacle
from vllm_dspark.kernels.draws import Draws
from vllm_dspark.kernels.head_weights import ConfidenceWeights, HeadWeights
from vllm_dspark.kernels.verify_batch import CompactDraft


def draft_kernels(proposer: Any) -> DraftKernels | None:
    """Kernels for a proposer whose drafter is loaded; None if the reference serves. Says which,
    and why, in the log.

    Raises:
        DSparkConfigError: drafting from candidates needs them, and they cannot.
        ValueError: DSPARK_KERNELS holds an unknown word.
    """
    faster = dispatch.is_measured(proposer.device)
    choice = choose_kernels(proposer.dspark_config, "drawn", _obstacle(proposer), faster)
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
    if _probabilistic(proposer) and proposer.use_fp64_gumbel:
        return "the Gumbel noise is to be float64"
    w1, w2 = head.markov_w1.weight, head.markov_w2.weight
    if w1.dtype != w2.dtype:
        return f"the Markov head's tables are {w1.dtype} and {w2.dtype}"
    return device_obstacle(w1.device, w1.dtype)


def _probabilistic(proposer: Any) -> bool:
    if proposer.dspark_config.draft_candidates is None:
        return proposer.draft_logits is not None
    return bool(proposer.speculative_config.draft_sample_method == "probabilistic")


def _confidence_weights(head: Any, gamma: int) -> ConfidenceWeights:
    """Of a confidence head of vLLM's."""
    proj = head.proj
    if proj.weight.numel() > 0:
        return ConfidenceWeights.of(head, gamma)
    # vLLM's CPU backend keeps a packed copy alone. Ones and zeros bring the numbers back unchanged.
    ones = torch.eye(proj.input_size, dtype=proj.weight.dtype, device=proj.weight.device)
    weight = proj.quant_method.apply(proj, ones)[:, 0].contiguous()
    return ConfidenceWeights(weight, proj.bias, torch.ones(gamma, device=weight.device))


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

    Attributes:
        proposal: what drafts were drawn from, by slot and position, where that is candidates, and
            drafting is probabilistic. None: the proposer's `draft_logits` hold it, or a draft was
            the only word it could be.
        filters: of the requests, respected while drawing from candidates; given where `proposal`
            is.
    """

    proposal: CompactDraft | None = None
    filters: DraftFilters | None = None

    def __init__(self, proposer: Any) -> None:
        model = proposer.model
        offsets, words = model.draft_id_to_target_id, None
        if offsets is not None:
            words = torch.arange(offsets.shape[0], device=offsets.device) + offsets
            if proposer.draft_logits is not None:  # only the draft words' columns are written
                proposer.draft_logits.fill_(-torch.inf)
        head = HeadWeights.of(model.sequential_head, words)
        # Where the drafter writes what drafts were drawn from, as its `draw` takes it.
        self._kept: tuple[torch.Tensor, ...] = ()
        self._drafter: DenseDrafter | CandidateDrafter
        if proposer.dspark_config.draft_candidates is not None:
            self._drafter = self._from_candidates(proposer, head)
        else:
            if proposer.dspark_config.draft_quantization == "fp8":
                head = head.in_fp8()
            self._drafter = DenseDrafter(head, proposer.max_num_reqs)
            if proposer.draft_logits is not None:
                self._kept = (proposer.draft_logits,)
        self._confidence = None
        if proposer.use_confidence_head:
            self._confidence = _confidence_weights(
                model.model.confidence_head, proposer.num_speculative_steps
            )

    def _from_candidates(self, proposer: Any, head: HeadWeights) -> CandidateDrafter:
        device, count = head.w1.device, proposer.dspark_config.draft_candidates
        slots, gamma = proposer.max_num_reqs, proposer.num_speculative_steps
        if _probabilistic(proposer):
            ids = torch.zeros(slots, gamma, count, dtype=torch.int32, device=device)
            self.proposal = CompactDraft(ids, torch.full(ids.shape, -torch.inf, device=device))
            self._kept = self.proposal.ids, self.proposal.logprobs
            self.filters = DraftFilters(slots, device)
        # Of the LM head's logits: vLLM's processor of logits says where it is not the model's own.
        dtype = proposer.model.logits_processor.head_dtype or head.w1.dtype
        return CandidateDrafter(head, slots, gamma, count, dtype)

    def draw(
        self,
        proposer: Any,
        base_logits: torch.Tensor,  # [R, d, V]
        hidden: torch.Tensor,  # [R, d, D]
        anchors: torch.Tensor,  # int [R]
        slots: torch.Tensor,  # int64 [R, γ]
        positions: torch.Tensor,  # int64 [R, γ]
    ) -> None:
        """What `DSparkProposer._sample_sequential` writes: draft tokens, what they were drawn
        from, confidences."""
        rows = base_logits.shape[0]
        tokens = proposer.draft_tokens[:rows]
        draws = self._draws(proposer, slots, positions) if self._kept else None
        self._drafter.draw(base_logits, hidden, anchors, tokens, draws, *self._kept)
        if self._confidence is not None:
            out = proposer.draft_token_confidence_probs[:rows]
            confidence(hidden, self._drafter.head.w1, self._confidence, anchors, tokens, out)

    def _draws(self, proposer: Any, slots: torch.Tensor, positions: torch.Tensor) -> Draws:
        top_k, top_p = None, None
        if self.filters is not None:
            top_k, top_p = self.filters.top_k, self.filters.top_p
        # With noise of its own for every place in the block; see `DSparkProposer`.
        return Draws(slots, positions, proposer.temperature, proposer.seeds, True, top_k, top_p)
