"""The DSpark drafter: parallel backbone (DFlash) and sequential heads.

For an anchor at position p the queries are the anchor's embedding and gamma - 1 mask words, at
positions p .. p + gamma - 1. Query k (counted from 0) predicts the token at p + k + 1. Each
draft layer attends to

* the context: outputs of m target layers at positions < p, projected by `fc`, normed by
  `hidden_norm`, turned into keys and values by the layer's own `k_proj` and `v_proj`;
* the other queries of its block, in both directions.

Embedding and LM head are the target's. Parameter names are those of published checkpoints.
Shapes: B rows, S context tokens, A anchors, Q queries, D width, H heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)

from vllm_dspark.heads import ConfidenceHead, build_markov_head

KeysValues = tuple[torch.Tensor, torch.Tensor]  # each [B, kv heads, S, d]
Rotation = tuple[torch.Tensor, torch.Tensor]  # cos and sin, each [B, S, d]


class DraftAttention(nn.Module):
    """Qwen3 attention whose context keys and values do not come from its own input."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        query_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)
        self.q_norm = Qwen3RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        """[B, S, heads * d] → [B, S, heads, d]."""
        return projected.unflatten(-1, (-1, self.head_dim))

    def keys_values(self, states: torch.Tensor, rotation: Rotation) -> KeysValues:
        """Keys (normed, rotated) and values of `states` [B, S, D]."""
        keys = self.k_norm(self.split_heads(self.k_proj(states))).transpose(1, 2)
        values = self.split_heads(self.v_proj(states)).transpose(1, 2)
        return rotate(keys, rotation), values

    def forward(
        self,
        hidden: torch.Tensor,  # [B, Q, D]
        rotation: Rotation,  # of the queries
        context: KeysValues,
        mask: torch.Tensor | None,  # bool [B, 1, Q, S + Q], true where attended; None: all
    ) -> torch.Tensor:
        """Attention of the queries over context and queries: [B, Q, D]."""
        queries = self.q_norm(self.split_heads(self.q_proj(hidden))).transpose(1, 2)
        queries = rotate(queries, rotation)
        own_keys, own_values = self.keys_values(hidden, rotation)
        keys = torch.cat([context[0], own_keys], dim=2).repeat_interleave(self.groups, dim=1)
        values = torch.cat([context[1], own_values], dim=2).repeat_interleave(self.groups, dim=1)
        values = values.to(keys.dtype)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class DraftLayer(nn.Module):
    """Pre-norm layer: attention over context and block, then the MLP."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.self_attn = DraftAttention(config)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def keys_values(self, states: torch.Tensor, rotation: Rotation) -> KeysValues:
        """See `DraftAttention.keys_values`. Context states pass no norm of the layer's."""
        return self.self_attn.keys_values(states, rotation)

    def forward(
        self,
        hidden: torch.Tensor,
        rotation: Rotation,
        context: KeysValues,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `DraftAttention.forward`."""
        normed = self.input_layernorm(hidden)
        hidden = hidden + self.self_attn(normed, rotation, context, mask)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Drafter(nn.Module):
    """Everything a drafter's checkpoint holds.

    Args:
        config: as `export.drafter_config` makes it: Qwen3's fields of the draft layers plus
            `block_size`, `mask_token_id`, `target_layer_ids`, `markov_rank`, `markov_head_type`.
    """

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        width = config.hidden_size
        self.block_size: int = config.block_size
        self.mask_token_id: int = config.mask_token_id
        self.target_layer_ids: list[int] = list(config.target_layer_ids)
        self.fc = nn.Linear(len(self.target_layer_ids) * width, width, bias=False)
        self.hidden_norm = Qwen3RMSNorm(width, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(DraftLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(width, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)  # holds no weights
        self.markov_head = build_markov_head(
            config.markov_head_type,
            vocab_size=config.vocab_size,
            draft_vocab_size=config.vocab_size,
            rank=config.markov_rank,
            hidden_size=width,
        )
        self.confidence_head = ConfidenceHead(
            hidden_size=width, rank=config.markov_rank, with_markov=True
        )

    def context_keys_values(
        self,
        features: torch.Tensor,  # [B, S, m * D], see `target.target_features`
        positions: torch.Tensor,  # int [1 or B, S]
    ) -> list[KeysValues]:
        """What each layer attends to of the context. Positions do not mix: may be cached."""
        states = self.hidden_norm(self.fc(features))
        rotation = self.rotary_emb(states, positions)
        return [layer.keys_values(states, rotation) for layer in self.draft_layers()]

    def backbone(
        self,
        embeds: torch.Tensor,  # [B, Q, D] of anchors and mask words
        positions: torch.Tensor,  # int [B, Q]
        context: Sequence[KeysValues],
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Hidden states after the final norm, [B, Q, D]."""
        rotation = self.rotary_emb(embeds, positions)
        hidden = embeds
        for layer, keys_values in zip(self.layers, context, strict=True):
            hidden = layer(hidden, rotation, keys_values, mask)
        return self.norm(hidden)

    def draft_layers(self) -> list[DraftLayer]:
        """`layers`, by its element type."""
        return [layer for layer in self.layers if isinstance(layer, DraftLayer)]

    def query_ids(self, anchors: torch.Tensor) -> torch.Tensor:
        """Anchor tokens int [...] → anchor and mask words int [..., gamma]."""
        masks = anchors.new_full((*anchors.shape, self.block_size - 1), self.mask_token_id)
        return torch.cat([anchors[..., None], masks], dim=-1)

    @torch.no_grad()
    def draft(
        self,
        target: Qwen3ForCausalLM,
        anchor: int,
        position: int,
        context: Sequence[KeysValues],  # of the positions 0 .. position - 1, one row
    ) -> tuple[list[int], list[float]]:
        """The greedy block after an anchor: gamma tokens and their confidences in [0, 1]."""
        previous = torch.tensor([anchor], device=target.device)
        positions = torch.arange(position, position + self.block_size, device=target.device)
        embeds = target.model.embed_tokens(self.query_ids(previous))
        hidden = self.backbone(embeds, positions[None], context, mask=None)
        logits = target.lm_head(hidden)
        tokens, confidences = [], []
        state = self.markov_head.initial_state(self.markov_head.embed(previous))
        for k in range(self.block_size):
            embed = self.markov_head.embed(previous)
            confidences.append(self.confidence_head(hidden[:, k], embed).sigmoid())
            latent, state = self.markov_head.advance(embed, hidden[:, k], state)
            previous = (logits[:, k] + self.markov_head.bias(latent)).argmax(-1)
            tokens.append(previous)
        return torch.cat(tokens).tolist(), torch.cat(confidences).tolist()


def rotate(states: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """RoPE on [B, heads, S, d]."""
    rotated, _ = apply_rotary_pos_emb(states, states, *rotation)
    return rotated


def block_mask(anchors: torch.Tensor, num_tokens: int, block_size: int) -> torch.Tensor:
    """Who sees whom when A blocks share one row: bool [B, 1, A * gamma, S + A * gamma].

    A query sees the context strictly before its anchor's position, and its own block.
    """
    limit = anchors.repeat_interleave(block_size, dim=1)  # [B, A * gamma]
    context = torch.arange(num_tokens, device=anchors.device) < limit[..., None]
    block = torch.arange(limit.shape[1], device=anchors.device) // block_size
    same_block = (block[:, None] == block).expand(len(anchors), -1, -1)
    return torch.cat([context, same_block], dim=-1)[:, None]


def initialise(drafter: Drafter) -> Drafter:
    """Normal weights of variance 1 / (inputs), zero biases; layer outputs scaled by depth.

    W2 starts at zero, and so does the Markov bias.
    """
    for module in drafter.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    with torch.no_grad():
        for layer in drafter.draft_layers():
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.mul_((2 * len(drafter.layers)) ** -0.5)
        for parameter in drafter.markov_head.markov_w2.parameters():
            parameter.zero_()
    return drafter
