"""Our proposer: vLLM's DSpark speculator with the sequential stage replaced.

The parallel part stays vLLM's: context K/V, the backbone's block pass, CUDA graph capture.
Ours is what follows: from hidden states h_1..h_γ and base logits U_1..U_γ, drawing x_1..x_γ left
to right from softmax(U_k + B_k), for every published Markov head (`vllm_dspark.heads`). Triton
kernels do it (`draft_kernels`), or the torch code here, their reference in the engine.

The noise that draws x_k goes by seed, position and k. By seed and position alone, as in vLLM
0.32, x_2 of one block would share its noise with x_1 of the next if that is one token further.
Confidences of the first decide how many drafts of the second are verified, and how many are drafted
after it; so would the drafts themselves then, and what is emitted would lean towards some.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.sample import gumbel
from vllm.v1.worker.gpu.spec_decode.dspark.speculator import DSparkSpeculator

from vllm_dspark.config import DSparkConfig, DSparkConfigError
from vllm_dspark.integration.candidate_mode import without_draft_logits
from vllm_dspark.integration.draft_depth import DraftDepth
from vllm_dspark.integration.draft_kernels import DraftKernels, draft_kernels
from vllm_dspark.integration.draft_quantization import quantize_drafter
from vllm_dspark.integration.models import our_architecture
from vllm_dspark.kernels.verify_batch import CompactDraft

# vLLM 0.33 mixes k into the seed by itself, in the same way.
_MIXED_BY_VLLM = hasattr(gumbel, "spec_step_seed")


class DSparkProposer(DraftDepth, DSparkSpeculator):
    """Proposer for method dspark.

    Drafters of architectures that vLLM serves with model-specific code (inside DeepSeek-V4 and
    others) keep vLLM's sequential stage too.

    Attributes:
        verification: the engine's VerificationManager; None until there is one.
        peak_confidence: the confidence of a draft is the largest probability of the distribution
            that it is drawn from, for want of a head. Not that of the draft itself, which would
            let the draft decide whether it is verified.
        kernels: our kernels for the sequential stage; None where the reference below serves.
    """

    seeds: torch.Tensor  # int64 [slots], vLLM's
    verification: Any = None
    peak_confidence = False
    kernels: DraftKernels | None = None

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        config = DSparkConfig.from_additional_config(vllm_config.additional_config)
        dense = config.draft_candidates is None
        super().__init__(vllm_config if dense else without_draft_logits(vllm_config), device)
        # vLLM's speculator has a copy of the configuration for itself.
        self.speculative_config = vllm_config.speculative_config
        self.vllm_config.speculative_config = vllm_config.speculative_config
        self.dspark_config = config

    def load_draft_model(
        self, target_model: torch.nn.Module, target_attn_layer_names: set[str]
    ) -> torch.nn.Module:
        """Load the drafter as one of our model classes where its architecture has one.

        Raises:
            DSparkConfigError: adaptive verification finds nothing to go by.
        """
        with our_architecture(self.draft_model_config):
            model = super().load_draft_model(target_model, target_attn_layer_names)
        if self.dspark_config.draft_quantization == "fp8":
            quantize_drafter(model)
        inner: Any = model.model
        has_head = getattr(inner, "confidence_head", None) is not None
        adaptive = self.dspark_config.verification == "adaptive"
        if adaptive or self.dspark_config.confidence == "always":
            self.use_confidence_head = has_head
        # vLLM would estimate confidences from logits and calibrate them. That is our part.
        self.use_acceptance_estimator = False
        self.peak_confidence = adaptive and not has_head
        if self.peak_confidence and getattr(model, "sequential_head", None) is None:
            raise DSparkConfigError(
                "adaptive verification was asked for, but this drafter has no confidence head and "
                "vLLM draws its drafts. Fix: "
                '--additional-config \'{"dspark": {"verification": "all"}}\'.'
            )
        return model

    def load_kernels(self) -> None:
        """Choose what draws from the drafter, which is loaded."""
        self.kernels = draft_kernels(self)

    @property
    def proposal(self) -> CompactDraft | None:
        """What drafts were drawn from where that is candidates; see `DraftKernels`."""
        return None if self.kernels is None else self.kernels.proposal

    def follow(self, sampling_states: Any) -> None:
        """Respect the filters in a sampler's states, while drawing from candidates."""
        if self.kernels is not None and self.kernels.filters is not None:
            self.kernels.filters.follow(sampling_states)

    def propose(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See `DraftDepth`. What graphs read of the requests is brought up to date first."""
        if self.kernels is not None and self.kernels.filters is not None:
            self.kernels.filters.refresh()
        return super().propose(*args, **kwargs)

    def observe_verification(
        self, idx_mapping: torch.Tensor, num_sampled: torch.Tensor, num_rejected: torch.Tensor
    ) -> None:
        """The target's verdict on the last block, int [R] each, before the next is drawn."""
        super().observe_verification(idx_mapping, num_sampled, num_rejected)
        if self.verification is not None:
            self.verification.observe(num_sampled, num_rejected)

    def _sample_logits(
        self, logits: torch.Tensor, idx_map: torch.Tensor, sample_pos: torch.Tensor, step: int
    ) -> torch.Tensor:
        """A draft of each request, with noise of the place that it has in its block; see vLLM's."""
        greedy = self.draft_logits is None
        if greedy or _MIXED_BY_VLLM or self.draft_watermarker is not None:  # has noise of its own
            return super()._sample_logits(logits, idx_map, sample_pos, step)
        seeds = self.seeds
        self.seeds = seeds ^ (step << 32)
        try:
            return super()._sample_logits(logits, idx_map, sample_pos, step)
        finally:
            self.seeds = seeds

    def _sample_sequential(self, num_reqs: int, head_hidden: torch.Tensor) -> None:
        """Draw the block and estimate its confidences.

        Runs inside the draft's CUDA graph: fixed shapes, persistent buffers, no host work.

        Args:
            num_reqs: R, requests in the batch, CUDA graph padding included.
            head_hidden: [tokens, D], the backbone's output; row `sample_indices[r·n + k]` is
                position k of request r, with n predicting positions in the backbone's block.

        Writes:
            The first d columns, d ≤ n drafts being drawn (see `DraftDepth`): draft_tokens [R, γ],
            target vocabulary; draft_logits, or the kernels' proposal, where drafting is
            probabilistic;
            draft_token_confidence_probs [R, γ] where confidences are used.
        """
        head = getattr(self.model, "sequential_head", None)
        if head is None:
            super()._sample_sequential(num_reqs, head_hidden)
            return
        positions = self.num_speculative_steps
        depth = positions if self.drawn is None else self.drawn
        rows = num_reqs * positions
        row = self.sample_indices[:rows].view(num_reqs, positions)[:, :depth]
        hidden = head_hidden[row.flatten()]  # [R·d, D]
        base_logits = self.model.compute_draft_logits(hidden)  # [R·d, V]
        base_logits = base_logits.view(num_reqs, depth, -1)
        block_hidden = hidden.view(num_reqs, depth, -1)
        request = self.sample_idx_mapping[:rows].view(num_reqs, positions)
        position = self.sample_pos[:rows].view(num_reqs, positions)

        previous = self.input_buffers.input_ids[self._anchor_idx[:num_reqs]]
        if self.kernels is not None:
            self.kernels.draw(self, base_logits, block_hidden, previous, request, position)
            return
        state: torch.Tensor | None = None
        embeds = []
        peaks = []
        for k in range(depth):
            embed = head.embed(previous)  # [R, r]
            if k == 0:
                state = head.initial_state(embed)
            latent, state = head.advance(embed, block_hidden[:, k], state)
            logits = base_logits[:, k] + head.bias(latent)
            if self.peak_confidence:
                peaks.append(logits.float().log_softmax(dim=-1).amax(dim=-1).exp())
            previous = self._sample_logits(logits, request[:, k], position[:, k], k)
            self.draft_tokens[:num_reqs, k] = previous
            embeds.append(embed)

        if self.peak_confidence:
            self.draft_token_confidence_probs[:num_reqs, :depth] = torch.stack(peaks, dim=1)
        if self.use_confidence_head:
            confidence = self.model.compute_confidence(
                hidden, torch.stack(embeds, dim=1).flatten(0, 1)
            )
            confidence = confidence.view(num_reqs, depth)
            self.draft_token_confidence_probs[:num_reqs, :depth] = confidence
