"""Our proposer: vLLM's DSpark speculator with the sequential stage replaced.

The parallel part stays vLLM's: context K/V, the backbone's block pass, CUDA graph capture.
Ours is what follows: from hidden states h_1..h_γ and base logits U_1..U_γ, drawing x_1..x_γ left
to right from softmax(U_k + B_k), for every published Markov head (`vllm_dspark.heads`).
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.spec_decode.dspark.speculator import DSparkSpeculator

from vllm_dspark.config import DSparkConfig
from vllm_dspark.integration.models import our_architecture


class DSparkProposer(DSparkSpeculator):
    """Proposer for method dspark.

    Drafters of architectures that vLLM serves with model-specific code (inside DeepSeek-V4 and
    others) keep vLLM's sequential stage too.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.dspark_config = DSparkConfig.from_additional_config(vllm_config.additional_config)

    def load_draft_model(
        self, target_model: torch.nn.Module, target_attn_layer_names: set[str]
    ) -> torch.nn.Module:
        """Load the drafter as one of our model classes where its architecture has one."""
        with our_architecture(self.draft_model_config):
            model = super().load_draft_model(target_model, target_attn_layer_names)
        inner: Any = model.model
        has_head = getattr(inner, "confidence_head", None) is not None
        if self.dspark_config.confidence == "always":
            self.use_confidence_head = has_head
        return model

    def _sample_sequential(self, num_reqs: int, head_hidden: torch.Tensor) -> None:
        """Draw the block and estimate its confidences.

        Runs inside the draft's CUDA graph: fixed shapes, persistent buffers, no host work.

        Args:
            num_reqs: R, requests in the batch, CUDA graph padding included.
            head_hidden: [tokens, D], the backbone's output; row `sample_indices[r·γ + k]` is
                position k of request r.

        Writes:
            draft_tokens [R, γ], target vocabulary; draft_logits where drafting is
            probabilistic; draft_token_confidence_probs [R, γ] where confidences are used.
        """
        head = getattr(self.model, "sequential_head", None)
        if head is None:
            super()._sample_sequential(num_reqs, head_hidden)
            return
        gamma = self.num_speculative_steps
        rows = num_reqs * gamma
        hidden = head_hidden[self.sample_indices[:rows]]  # [R·γ, D]
        base_logits = self.model.compute_draft_logits(hidden)  # [R·γ, V]
        base_logits = base_logits.view(num_reqs, gamma, -1)
        block_hidden = hidden.view(num_reqs, gamma, -1)
        request = self.sample_idx_mapping[:rows].view(num_reqs, gamma)
        position = self.sample_pos[:rows].view(num_reqs, gamma)

        previous = self.input_buffers.input_ids[self._anchor_idx[:num_reqs]]
        state: torch.Tensor | None = None
        embeds = []
        for k in range(gamma):
            embed = head.embed(previous)  # [R, r]
            if k == 0:
                state = head.initial_state(embed)
            latent, state = head.advance(embed, block_hidden[:, k], state)
            logits = base_logits[:, k] + head.bias(latent)
            previous = self._sample_logits(logits, request[:, k], position[:, k], k)
            self.draft_tokens[:num_reqs, k] = previous
            embeds.append(embed)

        if self.use_confidence_head:
            confidence = self.model.compute_confidence(
                hidden, torch.stack(embeds, dim=1).flatten(0, 1)
            )
            self.draft_token_confidence_probs[:num_reqs] = confidence.view(num_reqs, gamma)
