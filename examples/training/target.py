"""The target: transformers' own Qwen3, small, trained on next-token cross-entropy.

**Dead word.** A pair of V words can be inflated to a vocabulary of N words by copying the rows
of its last, dead word N - V times, without changing what it computes. For that the softmax
over V words has to count the dead word n = N - V + 1 times, since

    n exp(u) = exp(u + log n),

so log n is added to the dead word's logit in every softmax while training. The text never
contains the dead word: training pushes its mass, copies included, towards zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from .optimise import Progress, autocast, fit
from .presets import INFLATED_VOCAB_SIZE, Preset
from .stream import even_windows, random_windows

LONG_EVERY = 4  # one step in this many trains on windows of twice the length


def dead_word_bias(
    vocab_size: int, device: torch.device, inflated: int = INFLATED_VOCAB_SIZE
) -> torch.Tensor:
    """fp32 [V] to add to logits: log of how many words the last word stands for, else 0."""
    bias = torch.zeros(vocab_size, device=device)
    bias[-1] = math.log(inflated - vocab_size + 1)
    return bias


def target_config(preset: Preset, *, eos_token_id: int, pad_token_id: int) -> Qwen3Config:
    """Qwen3 of the preset's sizes, embeddings tied."""
    return Qwen3Config(
        vocab_size=preset.vocab_size,
        hidden_size=preset.hidden_size,
        intermediate_size=preset.target_mlp,
        num_hidden_layers=preset.target_layers,
        num_attention_heads=preset.num_heads,
        num_key_value_heads=preset.num_kv_heads,
        head_dim=preset.head_dim,
        max_position_embeddings=preset.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        initializer_range=preset.hidden_size**-0.5,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )


def build_target(config: Qwen3Config) -> Qwen3ForCausalLM:
    """Freshly initialised target in fp32, residual outputs scaled down by depth."""
    model = Qwen3ForCausalLM(config).float()
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.mul_((2 * config.num_hidden_layers) ** -0.5)
    return model


def load_target(folder: Path, device: torch.device) -> Qwen3ForCausalLM:
    """An exported target, its bf16 weights held in fp32, frozen."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.requires_grad_(False).eval().to(device)


def target_features(
    hidden_states: Sequence[torch.Tensor], layer_ids: Sequence[int]
) -> torch.Tensor:
    """Outputs of the chosen layers side by side: [..., S, m * D].

    `hidden_states` is what transformers returns: the embedding first, then each layer's output.
    Its last entry has been through the final norm, so the last layer cannot be chosen.
    """
    if max(layer_ids) >= len(hidden_states) - 2:
        raise ValueError(f"layer {max(layer_ids)} is the last: its bare output is not returned")
    return torch.cat([hidden_states[i + 1] for i in layer_ids], dim=-1)


def next_token_loss(
    model: Qwen3ForCausalLM, tokens: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy in nats per token of int windows [B, S + 1]."""
    hidden = model.model(tokens[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden).float() + bias
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(
    model: Qwen3ForCausalLM, stream: torch.Tensor, length: int, count: int = 64
) -> float:
    """Nats per token on `count` windows of `length` tokens spread over `stream`."""
    length = min(length, stream.numel() - 1)
    bias = dead_word_bias(model.config.vocab_size, stream.device)
    losses = []
    for windows in even_windows(stream, count, length + 1).split(8):
        with autocast(stream.device):
            losses.append(next_token_loss(model, windows, bias))
    return float(torch.stack(losses).mean())


def train_target(
    model: Qwen3ForCausalLM,
    stream: torch.Tensor,
    preset: Preset,
    *,
    steps: int,
    max_seconds: float,
    batch_size: int,
    generator: torch.Generator,
    compile_model: bool = False,
) -> Progress:
    """Train in place on random windows of `stream`, some of them of twice the length."""
    bias = dead_word_bias(preset.vocab_size, stream.device)
    loss_fn = torch.compile(next_token_loss) if compile_model else next_token_loss

    def step_fn(step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        longer = 2 if step % LONG_EVERY == LONG_EVERY - 1 else 1
        windows = random_windows(
            stream, max(1, batch_size // longer), longer * preset.context + 1, generator
        )
        with autocast(stream.device):
            return loss_fn(model, windows, bias), {}

    model.train()
    progress = fit(
        step_fn,
        model,
        label="target ",
        steps=steps,
        max_seconds=max_seconds,
        learning_rate=preset.learning_rate_target,
        weight_decay=0.1,
    )
    model.eval()
    return progress
