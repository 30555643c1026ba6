"""What a pair computes on given text, in fp32, with one layer in memory at a time.

The modules are transformers' Qwen3 layers and those that the drafter was trained with.
Shapes: P prompts of S tokens, A anchors each, γ the block size, V words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)

from benchmarks.inflation.checkpoint import Checkpoint
from benchmarks.inflation.pair import Pair
from examples.training.drafter import Drafter, block_mask
from vllm_dspark.kernels.head_weights import fp8_rows

_ROWS = 16_384  # words of the LM head in memory at a time
Rounding = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Probe:
    """Text to compute on. Drafts are teacher-forced: a block's tokens are the text's."""

    tokens: torch.Tensor  # int64 [P, S]
    anchors: torch.Tensor  # int64 [P, A], positions in 1 .. S - γ


@dataclass(frozen=True)
class Outputs:
    """fp32, on the CPU."""

    logits: torch.Tensor  # [P, S, V]
    draft_logits: torch.Tensor  # [P, A, γ, V], Markov bias included
    confidences: torch.Tensor  # [P, A, γ], probabilities


def in_fp8(values: torch.Tensor) -> torch.Tensor:
    """What FP8 (E4M3) makes of rows [..., N] that have a scale each: float32, the same shape."""
    rounded, scale = fp8_rows(values)
    return rounded.float() * scale[..., None]


def _as_it_is(values: torch.Tensor) -> torch.Tensor:
    return values


@torch.no_grad()
def run_pair(
    pair: Pair, probe: Probe, device: torch.device, rounded: Rounding = _as_it_is
) -> Outputs:
    """Target and drafter on the probe. A large pair takes one layer, or one slice of its LM head,
    plus the drafter's heads, on `device`.

    Args:
        rounded: what becomes of factors, row by row, in the products of the drafter's block pass,
            of its LM head and of its Markov head's W2. Context K/V and the target stay exact.
    """
    with sdpa_kernel(SDPBackend.MATH):  # other kernels may round fp32 down on a GPU
        return _run_pair(pair, probe, device, rounded)


def _run_pair(pair: Pair, probe: Probe, device: torch.device, rounded: Rounding) -> Outputs:
    tokens, anchors = probe.tokens.to(device), probe.anchors.to(device)
    hidden, features = _run_target(pair, tokens, device)
    draft_hidden, drafter = _run_backbone(pair, tokens, anchors, features, device, rounded)

    offsets = torch.arange(drafter.block_size, device=device)
    slots = (anchors[..., None] + offsets).flatten(1)  # [P, A γ]
    previous = tokens.gather(1, slots).view(draft_hidden.shape[:-1])
    head = drafter.markov_head
    confidences = drafter.confidence_head(draft_hidden, head.embed(previous)).sigmoid()
    logits = _lm_head(pair, hidden, device)
    draft_logits = _lm_head(pair, draft_hidden, device, rounded)
    for table in head.markov_w2.parameters():
        table.data = rounded(table.data)
    draft_logits += head.block_bias(previous, draft_hidden).cpu()
    return Outputs(logits, draft_logits, confidences.cpu())


def _run_target(
    pair: Pair, tokens: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states after the final norm [P, S, D], and the drafter's features [P, S, m D]."""
    config = _qwen3_config(pair.target)
    rotation = _rotation(config, torch.arange(tokens.shape[1], device=device)[None])
    hidden = _embed(pair, tokens)
    features = {-1: hidden}
    for i in range(config.num_hidden_layers):
        layer = _loaded(
            lambda: Qwen3DecoderLayer(config, 0), pair.target, f"model.layers.{i}.", device
        )
        hidden = layer(hidden, position_embeddings=rotation)
        if i in pair.spec.target_layer_ids:
            features[i] = hidden
    norm = _loaded(
        lambda: Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps),
        pair.target,
        "model.norm.",
        device,
    )
    chosen = [features[i] for i in pair.spec.target_layer_ids]
    return norm(hidden), torch.cat(chosen, dim=-1)


def _run_backbone(
    pair: Pair,
    tokens: torch.Tensor,
    anchors: torch.Tensor,
    features: torch.Tensor,
    device: torch.device,
    rounded: Rounding,
) -> tuple[torch.Tensor, Drafter]:
    """Hidden states of every block [P, A, γ, D], and the drafter with its heads loaded."""
    config = _qwen3_config(pair.drafter)
    with torch.device("meta"):
        drafter = Drafter(config)
    weights = {
        name: pair.drafter.tensor(name).to(device).float()
        for name in pair.drafter.names
        if not name.startswith("layers.")
    }
    drafter.load_state_dict(weights, strict=False, assign=True)
    states = drafter.hidden_norm(drafter.fc(features))
    context = _rotation(config, torch.arange(tokens.shape[1], device=device)[None])
    positions = (anchors[..., None] + torch.arange(drafter.block_size, device=device)).flatten(1)
    block = _rotation(config, positions)
    mask = block_mask(anchors, tokens.shape[1], drafter.block_size)
    hidden = _embed(pair, drafter.query_ids(tokens.gather(1, anchors)).flatten(1))
    for i, layer in enumerate(drafter.draft_layers()):
        _load(layer, pair.drafter, f"layers.{i}.", device)
        keys_values = layer.keys_values(states, context)
        for product in [m for m in layer.modules() if isinstance(m, nn.Linear)]:
            product.weight.data = rounded(product.weight.data)
            product.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
        hidden = layer(hidden, block, keys_values, mask)
        layer.to("meta")  # frees it
    hidden = drafter.norm(hidden)
    return hidden.unflatten(1, (anchors.shape[1], drafter.block_size)), drafter


def _lm_head(
    pair: Pair, hidden: torch.Tensor, device: torch.device, rounded: Rounding = _as_it_is
) -> torch.Tensor:
    """Logits of [..., D] on the CPU."""
    states, pieces = rounded(hidden), []
    for start in range(0, pair.vocab_size, _ROWS):
        stop = min(start + _ROWS, pair.vocab_size)
        rows = pair.target.rows(pair.lm_head, start, stop).to(device).float()
        pieces.append((states @ rounded(rows).T).cpu())
    return torch.cat(pieces, dim=-1)


def _embed(pair: Pair, tokens: torch.Tensor) -> torch.Tensor:
    """fp32 [..., D] on the device of `tokens`, reading only the rows in use."""
    used, places = tokens.unique(return_inverse=True)
    rows = [pair.target.rows("model.embed_tokens.weight", i, i + 1) for i in used.tolist()]
    return torch.cat(rows).to(tokens.device).float()[places]


def _qwen3_config(checkpoint: Checkpoint) -> Qwen3Config:
    return Qwen3Config(**checkpoint.config, attn_implementation="sdpa")


def _rotation(config: Qwen3Config, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of int positions [B, S], fp32."""
    rotary = Qwen3RotaryEmbedding(config).to(positions.device)
    return rotary(torch.zeros((), device=positions.device), positions)


def _loaded(make: Any, checkpoint: Checkpoint, prefix: str, device: torch.device) -> Any:
    with torch.device("meta"):
        module = make()
    _load(module, checkpoint, prefix, device)
    return module


def _load(module: nn.Module, checkpoint: Checkpoint, prefix: str, device: torch.device) -> None:
    """Give a module on the meta device its weights, in fp32."""
    tensors = checkpoint.below(prefix)
    module.load_state_dict(
        {name: tensor.to(device).float() for name, tensor in tensors.items()}, assign=True
    )
