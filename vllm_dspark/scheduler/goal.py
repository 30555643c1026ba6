"""What the draft depth is chosen for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from vllm_dspark import checks
from vllm_dspark.scheduler.monotone import Floats


@dataclass(frozen=True)
class Goal:
    """What the depth is chosen for.

    Args:
        kind: "throughput" takes the largest Θ. "floor" takes the largest Θ among the depths
            that give each request `tokens_per_second_per_user`, and the fastest depth where
            none does. A request's speed is Θ / R, so for a given load both rank depths alike:
            the floor makes leaving a depth that misses it urgent. "latency" is always the
            deepest, whatever the load and the K/V memory.
        tokens_per_second_per_user: tokens per second, above 0; for "floor" alone.

    Raises:
        ValueError: the floor is missing, out of place or not positive, or `kind` is unknown.
    """

    kind: Literal["throughput", "floor", "latency"] = "throughput"
    tokens_per_second_per_user: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("throughput", "floor", "latency"):
            raise ValueError(f"kind must be throughput, floor or latency, got {self.kind!r}")
        floor = self.tokens_per_second_per_user
        if (self.kind == "floor") != (floor is not None):
            raise ValueError(
                f"tokens_per_second_per_user goes with the floor goal alone, got {floor!r} "
                f"with {self.kind}"
            )
        if floor is not None:
            checks.positives("tokens_per_second_per_user", [floor], "a number")

    def values(self, rates: Floats, load: int) -> Floats:
        """What depths are ranked by.

        Args:
            rates: float64 [D], Θ of each depth, tokens per ms.
            load: requests, at least 1.

        Returns:
            float64 [D]: Θ, or 0 where the floor rules a depth out.
        """
        floor = self.tokens_per_second_per_user
        if floor is None:
            return rates
        meets = 1000 * rates / load >= floor
        return np.where(meets, rates, 0.0) if meets.any() else rates
