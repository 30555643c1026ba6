"""The drafter's training: many anchors per window, the target as the teacher.

Every window is read once by the frozen target, which gives the context features and the
distributions to match. All blocks of a window then go through the drafter in one forward pass
under `drafter.block_mask`. Tokens within a block are teacher-forced.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import Qwen3ForCausalLM

from .drafter import Drafter, block_mask
from .loss import DraftLoss, draft_loss
from .optimise import Progress, autocast, fit
from .presets import Preset
from .stream import even_windows, random_windows
from .target import LONG_EVERY, dead_word_bias, target_features

GENERATED_SHARE = 0.5  # of the windows, taken from the target's own text


@dataclass
class TrainingText:
    """Real text as a stream [tokens] and the target's own as rows [N, length], int32."""

    stream: torch.Tensor
    generated: torch.Tensor | None = None
    generated_share: float = GENERATED_SHARE

    def windows(self, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """`count` windows, mixed as `generated_share` says: int64 [count, length].

        Windows longer than the generated rows are all real text.
        """
        rows = self.generated
        if rows is None or length > rows.shape[1]:
            return random_windows(self.stream, count, length, generator)
        own = round(count * self.generated_share)
        pick = torch.randint(len(rows), (own,), generator=generator, device=rows.device)
        real = random_windows(self.stream, count - own, length, generator)
        return torch.cat([real, rows[pick, :length].long()])


def random_anchors(
    rows: int, count: int, length: int, block_size: int, generator: torch.Generator
) -> torch.Tensor:
    """Distinct anchor positions in 1 .. length - 1 - gamma, sorted: int64 [rows, count].

    The range leaves every anchor a context and every query a label. Fewer than `count` anchors
    come back where the window is too short for them.
    """
    candidates = length - 1 - block_size
    scores = torch.rand(rows, candidates, generator=generator, device=generator.device)
    return scores.topk(min(count, candidates), dim=1).indices.sort(dim=1).values + 1


def teacher_forced_hidden(
    drafter: Drafter,
    target: Qwen3ForCausalLM,
    tokens: torch.Tensor,  # int64 [B, S]
    features: torch.Tensor,  # [B, S, m * D]
    anchors: torch.Tensor,  # int64 [B, A]
) -> torch.Tensor:
    """Backbone output of every block: [B, A, gamma, D]."""
    offsets = torch.arange(drafter.block_size, device=tokens.device)
    positions = (anchors[..., None] + offsets).flatten(1)
    query_ids = drafter.query_ids(tokens.gather(1, anchors)).flatten(1)
    context_positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    hidden = drafter.backbone(
        target.model.embed_tokens(query_ids),
        positions,
        drafter.context_keys_values(features, context_positions),
        block_mask(anchors, tokens.shape[1], drafter.block_size),
    )
    return hidden.unflatten(1, (anchors.shape[1], drafter.block_size))


def window_loss(
    drafter: Drafter,
    target: Qwen3ForCausalLM,
    tokens: torch.Tensor,  # int64 [B, S]
    anchors: torch.Tensor,  # int64 [B, A]
    dead_bias: torch.Tensor,  # fp32 [V]
) -> DraftLoss:
    """Loss over the B * A blocks of some windows."""
    with torch.no_grad():
        read = target.model(tokens, output_hidden_states=True, use_cache=False)
        features = target_features(read.hidden_states, drafter.target_layer_ids)
        # Slot k is after position p + k, and predicts the token at p + k + 1.
        offsets = torch.arange(drafter.block_size, device=tokens.device)
        slots = (anchors[..., None] + offsets).flatten(1)  # [B, A * gamma]
        width = read.last_hidden_state.shape[-1]
        at_slots = read.last_hidden_state.gather(1, slots[..., None].expand(-1, -1, width))
        target_logits = target.lm_head(at_slots).float() + dead_bias
    shape = (-1, drafter.block_size)
    labels = tokens.gather(1, slots + 1).view(shape)
    previous = tokens.gather(1, slots).view(shape)

    hidden = teacher_forced_hidden(drafter, target, tokens, features, anchors).flatten(0, 1)
    head = drafter.markov_head
    draft_logits = target.lm_head(hidden).float() + head.block_bias(previous, hidden).float()
    return draft_loss(
        draft_logits + dead_bias,
        target_logits.view_as(draft_logits),
        labels,
        drafter.confidence_head(hidden, head.embed(previous)).float(),
    )


@torch.no_grad()
def held_out_acceptance(
    drafter: Drafter,
    target: Qwen3ForCausalLM,
    stream: torch.Tensor,
    preset: Preset,
    generator: torch.Generator,
    count: int = 32,
) -> tuple[float, list[float]]:
    """Mean loss, and mean 1 - TV_k per position [gamma], on held-out text."""
    bias = dead_word_bias(preset.vocab_size, stream.device)
    length = min(preset.context, stream.numel())
    losses, acceptances = [], []
    for tokens in even_windows(stream, count, length).split(8):
        anchors = random_anchors(len(tokens), preset.anchors, length, preset.block_size, generator)
        with autocast(stream.device):
            loss = window_loss(drafter, target, tokens, anchors, bias)
        losses.append(loss.total)
        acceptances.append(loss.acceptance)
    return float(torch.stack(losses).mean()), torch.stack(acceptances).mean(0).tolist()


def train_drafter(
    drafter: Drafter,
    target: Qwen3ForCausalLM,
    text: TrainingText,
    preset: Preset,
    *,
    steps: int,
    max_seconds: float,
    batch_size: int,
    generator: torch.Generator,
) -> Progress:
    """Train in place against the frozen `target`."""
    bias = dead_word_bias(preset.vocab_size, text.stream.device)

    def step_fn(step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        longer = 2 if step % LONG_EVERY == LONG_EVERY - 1 else 1
        tokens = text.windows(max(1, batch_size // longer), longer * preset.context, generator)
        anchors = random_anchors(
            len(tokens), longer * preset.anchors, tokens.shape[1], preset.block_size, generator
        )
        with autocast(tokens.device):
            loss = window_loss(drafter, target, tokens, anchors, bias)
        return loss.total, {
            "ce": loss.cross_entropy,
            "tv": loss.total_variation,
            "confidence": loss.confidence,
            "accept@1": loss.acceptance[0],
            f"accept@{preset.block_size}": loss.acceptance[-1],
        }

    drafter.train()
    progress = fit(
        step_fn,
        drafter,
        label=f"drafter {drafter.markov_head.head_type:7s}",
        steps=steps,
        max_seconds=max_seconds,
        learning_rate=preset.learning_rate_drafter,
        weight_decay=0.01,
    )
    drafter.eval()
    return progress
