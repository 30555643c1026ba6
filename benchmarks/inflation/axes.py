"""Where the places of a tiny matrix's axis are in the large matrix that holds it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

Run = tuple[slice, slice]  # places in the tiny axis, places in the large one


@dataclass(frozen=True)
class Axis:
    """One axis: its two lengths, and which tiny places are where. A run of one tiny place may
    fill many large ones. Large places in no run hold nothing of the tiny matrix."""

    small: int
    large: int
    runs: tuple[Run, ...]


def leading(small: int, large: int) -> Axis:
    """The tiny places come first, padding behind them."""
    return Axis(small, large, ((slice(0, small), slice(0, small)),))


def twice(small: int, large: int) -> Axis:
    """Two copies, then padding: the residual stream."""
    copies = (slice(0, small), slice(small, 2 * small))
    return Axis(small, large, tuple((slice(0, small), copy) for copy in copies))


def absent(large: int) -> Axis:
    """Padding alone."""
    return Axis(0, large, ())


def words(small: int, large: int) -> Axis:
    """The tiny vocabulary, then copies of its last word."""
    last = slice(small - 1, small)
    return Axis(small, large, ((slice(0, small), slice(0, small)), (last, slice(small, large))))


def query_heads(
    small_heads: int, small_kv: int, large_heads: int, large_kv: int, head_dim: int
) -> Axis:
    """Each query head at the places of its own KV head's group; KV heads keep their numbers."""
    small_group, large_group = (
        heads // kv * head_dim for heads, kv in ((small_heads, small_kv), (large_heads, large_kv))
    )
    runs = tuple(
        (
            slice(group * small_group, (group + 1) * small_group),
            slice(group * large_group, group * large_group + small_group),
        )
        for group in range(small_kv)
    )
    return Axis(small_heads * head_dim, large_heads * head_dim, runs)


def concatenate(axes: Iterable[Axis]) -> Axis:
    """Axes side by side, as `torch.cat` joins what lies along them."""
    small = large = 0
    runs: list[Run] = []
    for axis in axes:
        runs += [(_moved(s, small), _moved(t, large)) for s, t in axis.runs]
        small, large = small + axis.small, large + axis.large
    return Axis(small, large, tuple(runs))


def _moved(places: slice, by: int) -> slice:
    return slice(places.start + by, places.stop + by)


def place(large: torch.Tensor, small: torch.Tensor, outputs: Axis, inputs: Axis) -> None:
    """Write a tiny matrix [outputs.small, inputs.small] into a large one, in place.

    Raises:
        ValueError: a matrix does not have its axes' lengths.
    """
    for matrix, lengths in (
        (small, (outputs.small, inputs.small)),
        (large, (outputs.large, inputs.large)),
    ):
        if tuple(matrix.shape) != lengths:
            raise ValueError(f"a matrix of shape {list(matrix.shape)}, needed is {list(lengths)}")
    for small_rows, large_rows in outputs.runs:
        for small_columns, large_columns in inputs.runs:
            large[large_rows, large_columns] = small[small_rows, small_columns]


def spread_layers(small: int, large: int) -> list[int]:
    """Places of the real layers among `large`, the first and the last included: [small]."""
    return [i * (large - 1) // max(small - 1, 1) for i in range(small)]


def spread_ids(ids: Sequence[int], inserted: Iterable[int], count: int) -> list[int]:
    """`ids`, filled up to `count` with inserted layers as far as possible from those there are.

    Strictly increasing, as a drafter's `target_layer_ids` have to be.
    """
    chosen, free = list(ids), sorted(inserted)
    while len(chosen) < count:
        best = max(free, key=lambda layer: (min(abs(layer - i) for i in chosen), -layer))
        free.remove(best)
        chosen.append(best)
    return sorted(chosen)
