"""Sizes of the shipped pairs. Everything a checkpoint's shape depends on is here."""

from __future__ import annotations

from dataclasses import dataclass

# Qwen3-8B's vocabulary. A pair can be blown up to that size because its dead word stands for
# every word it lacks (see `target.dead_word_bias`).
INFLATED_VOCAB_SIZE = 151_936


@dataclass(frozen=True)
class Preset:
    """One target with its drafters. Lengths are in tokens."""

    name: str
    vocab_size: int  # V, special words included
    hidden_size: int  # D
    head_dim: int
    num_heads: int
    num_kv_heads: int
    target_layers: int
    target_mlp: int
    draft_layers: int
    draft_mlp: int
    target_layer_ids: tuple[int, ...]  # m layers whose outputs the drafter reads
    markov_rank: int
    block_size: int  # gamma
    heads: tuple[str, ...]  # Markov heads that are trained unless the user says otherwise
    max_positions: int
    context: int  # length of a training window
    anchors: int  # blocks per training window
    batch_size: int  # windows of `context` tokens per target step
    draft_batch_size: int  # windows of `context` tokens per drafter step
    steps_target: int
    steps_drafter: int
    learning_rate_target: float
    learning_rate_drafter: float
    generated_rows: int  # windows sampled from the target for the drafter's training
    corpus_megabytes: float
    max_megabytes: float  # limit for the whole folder, 1 MB = 10^6 bytes

    def drafter_folder(self, head: str) -> str:
        """Subfolder of the target's folder that holds the drafter with this Markov head."""
        return "dspark" if len(self.heads) == 1 and head in self.heads else f"dspark-{head}"


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="tiny-python",
            vocab_size=2048,
            hidden_size=192,
            head_dim=128,
            num_heads=2,
            num_kv_heads=1,
            target_layers=5,
            target_mlp=512,
            draft_layers=2,
            draft_mlp=512,
            target_layer_ids=(0, 2, 3),
            markov_rank=64,
            block_size=7,
            heads=("vanilla",),
            max_positions=4096,
            context=512,
            anchors=64,
            batch_size=64,
            draft_batch_size=32,
            steps_target=8000,
            steps_drafter=6000,
            learning_rate_target=3e-3,
            learning_rate_drafter=2e-3,
            generated_rows=4096,
            corpus_megabytes=40.0,
            max_megabytes=8.0,
        ),
        Preset(
            name="micro-python",
            vocab_size=320,
            hidden_size=64,
            head_dim=32,
            num_heads=2,
            num_kv_heads=1,
            target_layers=3,
            target_mlp=128,
            draft_layers=1,
            draft_mlp=128,
            target_layer_ids=(0, 1),
            markov_rank=16,
            block_size=7,
            heads=("vanilla", "gated", "rnn"),
            max_positions=2048,
            context=256,
            anchors=32,
            batch_size=64,
            draft_batch_size=32,
            steps_target=5000,
            steps_drafter=3000,
            learning_rate_target=4e-3,
            learning_rate_drafter=3e-3,
            generated_rows=2048,
            corpus_megabytes=12.0,
            max_megabytes=1.2,
        ),
    )
}
