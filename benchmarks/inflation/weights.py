"""The large pair's tensors, made one shard at a time. The package's docstring has the maths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.inflation.axes import (
    Axis,
    absent,
    concatenate,
    leading,
    place,
    query_heads,
    spread_ids,
    spread_layers,
    twice,
    words,
)
from benchmarks.inflation.noise import Noise
from benchmarks.inflation.pair import Pair
from benchmarks.inflation.shapes import LayerSizes, Shape

Tensors = dict[str, torch.Tensor]
Shard = Callable[[], Tensors]  # makes the tensors of one file, when called

# Matrix of a layer → its outputs, its inputs (fields of `LayerAxes`), and whether it is faint.
_LAYER = {
    "self_attn.q_proj.weight": ("queries", "hidden", False),
    "self_attn.k_proj.weight": ("keys", "hidden", False),
    "self_attn.v_proj.weight": ("keys", "hidden", False),
    "self_attn.o_proj.weight": ("hidden", "queries", True),
    "mlp.gate_proj.weight": ("units", "hidden", False),
    "mlp.up_proj.weight": ("units", "hidden", False),
    "mlp.down_proj.weight": ("hidden", "units", True),
}
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")


@dataclass(frozen=True)
class LayerAxes:
    """The axes of one model's layer matrices."""

    hidden: Axis
    queries: Axis
    keys: Axis
    units: Axis

    @classmethod
    def between(cls, small: LayerSizes, large: LayerSizes) -> LayerAxes:
        """From tiny sizes to large ones of the same head_dim."""
        return cls(
            hidden=twice(small.hidden_size, large.hidden_size),
            queries=query_heads(
                small.num_attention_heads,
                small.num_key_value_heads,
                large.num_attention_heads,
                large.num_key_value_heads,
                large.head_dim,
            ),
            keys=leading(
                small.num_key_value_heads * small.head_dim,
                large.num_key_value_heads * large.head_dim,
            ),
            units=leading(small.intermediate_size, large.intermediate_size),
        )


def norm_factor(small_width: int, large_width: int) -> float:
    """The mean square over the large width is this often that over the tiny one: 2d/D."""
    return 2 * small_width / large_width


class Inflation:
    """What becomes of a pair at a shape.

    Args:
        pair: passes `require_inflatable` with this shape.
        seed: of all random weights.
    """

    def __init__(self, pair: Pair, shape: Shape, seed: int) -> None:
        self.pair, self.shape, self._noise = pair, shape, Noise(seed)
        self.real_layers = spread_layers(pair.layers, shape.num_hidden_layers)
        self.real_draft_layers = spread_layers(pair.spec.num_layers, shape.draft_layers)
        mapped = [i if i < 0 else self.real_layers[i] for i in pair.spec.target_layer_ids]
        inserted = set(range(shape.num_hidden_layers - 1)) - set(self.real_layers)
        self.target_layer_ids = spread_ids(mapped, inserted, shape.draft_target_layers)
        self._id_of = dict(zip(mapped, range(len(mapped)), strict=True))
        self._target_axes = LayerAxes.between(LayerSizes.of(pair.target.config), shape)
        self._draft_axes = LayerAxes.between(LayerSizes.of(pair.drafter.config), shape)
        self._words = words(pair.vocab_size, shape.vocab_size)
        self._rank = leading(pair.spec.rank, shape.markov_rank)

    def word_shards(self) -> list[Shard]:
        """The target's embedding, and its LM head where the shape does not tie the two."""
        embed = "model.embed_tokens.weight"
        shards: list[Shard] = [partial(self._words_by_hidden, embed, embed, faint=True)]
        if not self.shape.tie_word_embeddings:
            shards.append(
                partial(self._words_by_hidden, "lm_head.weight", self.pair.lm_head, faint=False)
            )
        return shards

    def layer_shards(self) -> list[Shard]:
        """The target's layers, a shard each, the final norm with the last."""
        last = self.shape.num_hidden_layers - 1
        return [
            partial(self._target_layer, layer, ["model.norm.weight"] if layer == last else [])
            for layer in range(self.shape.num_hidden_layers)
        ]

    def drafter_shards(self) -> list[Shard]:
        """The drafter's heads and norms in one shard, its layers in a shard each."""
        layers = range(self.shape.draft_layers)
        return [self._draft_heads, *(partial(self._draft_layer, layer) for layer in layers)]

    def _words_by_hidden(self, name: str, source: str, faint: bool) -> Tensors:
        small = self.pair.target.tensor(source)
        return {name: self._matrix(name, small, self._words, self._target_axes.hidden, faint)}

    def _target_layer(self, layer: int, norms: list[str]) -> Tensors:
        source: Tensors | None = None
        if layer in self.real_layers:
            source = self.pair.target.below(f"model.layers.{self.real_layers.index(layer)}.")
        tensors = self._layer(f"model.layers.{layer}.", source, self._target_axes)
        for norm in norms:
            tensors[norm] = self._norm(self.pair.target.tensor(norm))
        return tensors

    def _draft_layer(self, layer: int) -> Tensors:
        source: Tensors | None = None
        if layer in self.real_draft_layers:
            source = self.pair.drafter.below(f"layers.{self.real_draft_layers.index(layer)}.")
        return self._layer(f"layers.{layer}.", source, self._draft_axes)

    def _draft_heads(self) -> Tensors:
        """`fc`, the norms, the Markov head and the confidence head."""
        hidden, rank = self._draft_axes.hidden, self._rank
        small, large = hidden.small, hidden.large
        # Of a real layer's output `fc` reads the first copy, of an inserted layer's nothing.
        features = concatenate(
            leading(small, large) if layer in self._id_of else absent(large)
            for layer in self.target_layer_ids
        )
        matrices = {
            "fc.weight": (hidden, features, True),
            "markov_head.markov_w1.weight": (self._words, rank, True),
            "markov_head.markov_w2.weight": (self._words, rank, False),
            "confidence_head.proj.weight": (leading(1, 1), concatenate((hidden, rank)), False),
        }
        biases = {"confidence_head.proj.bias": leading(1, 1)}
        if self.pair.spec.head_type == "gated":
            matrices["markov_head.gate_proj.weight"] = (rank, concatenate((hidden, rank)), False)
            biases["markov_head.gate_proj.bias"] = rank
        if self.pair.spec.head_type == "rnn":
            gates = concatenate((rank, rank, rank))
            inputs = concatenate((rank, rank, hidden))
            matrices["markov_head.joint_proj.weight"] = (gates, inputs, True)
            biases["markov_head.joint_proj.bias"] = gates
        source = self.pair.drafter.tensor
        tensors = {name: self._norm(source(name)) for name in ("hidden_norm.weight", "norm.weight")}
        for name, (outputs, inputs, faint) in matrices.items():
            tensors[name] = self._matrix(name, source(name), outputs, inputs, faint)
        for name, axis in biases.items():
            tensors[name] = torch.zeros(axis.large, dtype=torch.bfloat16)
            place(tensors[name][None], source(name)[None], leading(1, 1), axis)
        return tensors

    def _layer(
        self, prefix: str, source: Mapping[str, torch.Tensor] | None, axes: LayerAxes
    ) -> Tensors:
        """A real layer from its tiny tensors by local name, an inserted one from None."""
        tensors: Tensors = {}
        for name, (outputs, inputs, faint) in _LAYER.items():
            small = None if source is None else source[name]
            tensors[prefix + name] = self._matrix(
                prefix + name, small, getattr(axes, outputs), getattr(axes, inputs), faint
            )
        for name in _NORMS:
            tensors[prefix + name] = self._norm(None if source is None else source[name])
        for name in _HEAD_NORMS:
            ones = torch.ones(self.shape.head_dim, dtype=torch.bfloat16)
            tensors[prefix + name] = ones if source is None else source[name].clone()
        return tensors

    def _matrix(
        self, name: str, small: torch.Tensor | None, outputs: Axis, inputs: Axis, faint: bool
    ) -> torch.Tensor:
        """bf16 [outputs.large, inputs.large]: random, with the tiny matrix at its places."""
        large = self._noise.tensor(name, (outputs.large, inputs.large), faint=faint)
        if small is not None:
            place(large, small, outputs, inputs)
        return large

    def _norm(self, small: torch.Tensor | None) -> torch.Tensor:
        """bf16 [D]: hi and lo of the scaled weight, then ones; all ones for an inserted layer."""
        large = torch.ones(self.shape.hidden_size, dtype=torch.bfloat16)
        if small is not None:
            width = len(small)
            scaled = small.double() * norm_factor(width, self.shape.hidden_size) ** 0.5
            high = scaled.to(torch.bfloat16)
            large[:width] = high
            large[width : 2 * width] = (scaled - high.double()).to(torch.bfloat16)
        return large
