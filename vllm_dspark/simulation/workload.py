"""Requests: how long they are, and when what happened to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vllm_dspark import checks


@dataclass(frozen=True)
class Lengths:
    """Tokens of requests.

    Args:
        prompt, output: mean tokens, at least 1.
        spread: lengths are uniform in mean · (1 ± spread); in [0, 1).

    Raises:
        ValueError: an argument, which it names, is outside of that.
    """

    prompt: int = 512
    output: int = 256
    spread: float = 0.0

    def __post_init__(self) -> None:
        checks.whole("prompt", self.prompt, least=1)
        checks.whole("output", self.output, least=1)
        if checks.amount("spread", self.spread) >= 1:
            raise ValueError(f"spread must lie in [0, 1), got {self.spread}")

    def draw(self, random: np.random.Generator) -> Iterator[Request]:
        """Requests without end, of the same lengths for the same generator."""
        while True:
            factors = 1 + self.spread * random.uniform(-1, 1, size=2)
            prompt, output = np.maximum(np.rint(factors * (self.prompt, self.output)), 1)
            yield Request(int(prompt), int(output))


@dataclass
class Request:
    """One request; times in ms on the simulated clock, NaN until they are known."""

    prompt: int
    output: int
    arrived: float = float("nan")
    first: float = float("nan")  # its first token
    ended: float = float("nan")

    @property
    def per_token_ms(self) -> float:
        """Between its tokens; NaN if it has a single one."""
        if self.output == 1:
            return float("nan")
        return (self.ended - self.first) / (self.output - 1)
