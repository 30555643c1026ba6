"""Bytes of device memory that drawing a block of drafts must move, by method.

Counted is what does not fit into a cache between two uses: the base logits, W2, and whatever is
written for later. All of it per block of γ positions for R requests; b is the bytes of a number.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_dspark.kernels.candidates import group_size
from vllm_dspark.kernels.dense_scores import tile_count


@dataclass(frozen=True)
class Shape:
    """Sizes of a block.

    Attributes:
        requests: R.
        gamma: γ.
        vocab: V.
        rank: r.
        itemsize: b, bytes of a weight or logit.
        drawn: by temperature, with the proposal kept for verification; False is greedy.
    """

    requests: int
    gamma: int
    vocab: int = 151_936
    rank: int = 256
    itemsize: int = 2
    drawn: bool = False

    @property
    def logits(self) -> int:
        """Bytes of one position's logits, R·V·b."""
        return self.requests * self.vocab * self.itemsize

    @property
    def w2(self) -> int:
        """Bytes of W2, V·r·b."""
        return self.vocab * self.rank * self.itemsize


def built_in_bytes(shape: Shape) -> int:
    """vLLM's loop: the bias is written; it and the base logits are read, their sum written; that
    is read by argmax or the sampler, which copies it to the draft cache."""
    passes = 6 if shape.drawn else 5
    return shape.gamma * (shape.w2 + passes * shape.logits)


def dense_bytes(shape: Shape) -> int:
    """Our dense mode: base logits and W2 are read once per position, the best of every tile written
    and read, and the cache written where drafts are drawn."""
    passes = 2 if shape.drawn else 1
    tiles = 2 * shape.requests * tile_count(shape.vocab) * 8
    return shape.gamma * (shape.w2 + passes * shape.logits + tiles)


def candidate_bytes(shape: Shape, count: int) -> int:
    """Our candidate mode with K = `count`: base logits are read once, the groups' maxima written
    and read, K groups read again, and K rows of W2; ids and values of the candidates are written
    and read, the proposal written where drafts are drawn."""
    places, group = shape.requests * shape.gamma, group_size(count)
    groups = -(-shape.vocab // group)
    again = min(count * group, shape.vocab)
    each = shape.itemsize * (shape.vocab + 2 * groups + again + count * shape.rank) + 2 * count * 8
    return places * (each + (count * 8 if shape.drawn else 0))
