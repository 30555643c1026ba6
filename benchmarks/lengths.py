"""How many tokens each request of a closed loop emits.

Requests of one length that start together also end together when nothing is drafted, so that
prefills share a step once in a while; with drafts, whose acceptance differs, one is in almost every
step. Lengths that differ put all arms into the same mixed state, which is that of a server.
"""

from __future__ import annotations

import numpy as np


def output_lengths(count: int, most: int, spread: float, seed: int) -> list[int]:
    """Lengths of `count` requests in their order: equal for equal arguments, and a prefix of those
    of a larger count.

    Args:
        most: tokens, at least 1.
        spread: lengths are uniform in (1 - spread) x most to most, both included; in [0, 1].
        seed: of the draws.
    """
    least = max(round((1 - spread) * most), 1)
    draws = np.random.default_rng(seed).random(count)
    return (least + np.floor(draws * (most - least + 1)).astype(int)).tolist()
