"""The large pair's config.json files: the tiny ones, with the sizes of the shape."""

from __future__ import annotations

from typing import Any

from benchmarks.inflation.noise import SIGMA
from benchmarks.inflation.weights import Inflation, norm_factor


def target_config(inflation: Inflation) -> dict[str, Any]:
    """Rotary embedding and `max_position_embeddings` stay the tiny pair's: it was trained so."""
    shape = inflation.shape
    config = _resized(inflation.pair.target.config, inflation, shape.num_hidden_layers)
    config["tie_word_embeddings"] = shape.tie_word_embeddings
    return config


def drafter_config(inflation: Inflation) -> dict[str, Any]:
    """Block size and mask word stay the tiny drafter's."""
    shape = inflation.shape
    config = _resized(inflation.pair.drafter.config, inflation, shape.draft_layers)
    config["num_target_layers"] = shape.num_hidden_layers
    config["target_layer_ids"] = inflation.target_layer_ids
    config["markov_rank"] = shape.markov_rank
    return config


def _resized(config: dict[str, Any], inflation: Inflation, layers: int) -> dict[str, Any]:
    shape = inflation.shape
    return config | {
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": layers,
        "layer_types": ["full_attention"] * layers,
        "max_window_layers": layers,
        "vocab_size": shape.vocab_size,
        "rms_norm_eps": config["rms_norm_eps"]
        * norm_factor(config["hidden_size"], shape.hidden_size),
        "initializer_range": SIGMA,
        "dtype": "bfloat16",
    }
