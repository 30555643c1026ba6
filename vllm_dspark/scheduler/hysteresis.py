"""When a better draft depth is moved to."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_dspark import checks


@dataclass(frozen=True)
class Hysteresis:
    """When a better depth is moved to.

    Args:
        margin: relative gain that counts, at least 0.
        patience: consecutive steps that must show it, at least 1.
        urgent: relative gain that needs no patience.
        regret: steps that staying may lose to better depths, in sum over consecutive steps,
            however small the gain; at least 0. Not counted at depth 0, where nothing is seen of
            the drafts that are to be gained from.
        dwell: steps that a choice stays, at least 0, unless the load changes by a factor of two
            or the choice is slower than depth 0.

    Raises:
        ValueError: an argument, which it names, is outside of that.
    """

    margin: float = 0.03
    patience: int = 8
    urgent: float = 0.10
    regret: float = 1.0
    dwell: int = 32

    def __post_init__(self) -> None:
        checks.amount("margin", self.margin)
        checks.amount("urgent", self.urgent)
        checks.amount("regret", self.regret)
        checks.whole("patience", self.patience, least=1)
        checks.whole("dwell", self.dwell, least=0)
