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
        regret: what staying may cost where less than `margin` is to be gained: steps that were
            lost to the better depth, summed up over consecutive ones. None is without end. Not
            at depth 0, where nothing is seen of the drafts that are to be gained from.
        dwell: steps that a choice stays, at least 0, unless the load changes by a factor of two
            or the choice is slower than depth 0.

    Raises:
        ValueError: an argument, which it names, is outside of that.
    """

    margin: float = 0.03
    patience: int = 8
    urgent: float = 0.10
    regret: float | None = 1.0
    dwell: int = 32

    def __post_init__(self) -> None:
        checks.amount("margin", self.margin)
        checks.amount("urgent", self.urgent)
        if self.regret is not None:
            checks.amount("regret", self.regret)
        checks.whole("patience", self.patience, least=1)
        checks.whole("dwell", self.dwell, least=0)
