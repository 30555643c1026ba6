"""Our arm against the others at one temperature. Every figure is a median over repeats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, get_args

from benchmarks.results_format import Arm, Kind, Sweep


class Ratio(NamedTuple):
    """Our throughput over the best of some other arms, at one concurrency."""

    value: float
    other: str  # the best of them that was measured
    complete: bool  # all of them were measured; otherwise the best may be another


class Comparison:
    """One temperature of a sweep.

    Args:
        ours: name of the arm to compare with the rest; None for a sweep that has no such arm.
            Further arms of kind "ours" are shown, but are nobody's rival.
    """

    def __init__(self, sweep: Sweep, temperature: float, ours: str | None) -> None:
        self.sweep = sweep
        self.temperature = temperature
        self.ours = ours
        self.concurrencies = sweep.concurrencies(temperature)

    @property
    def arms(self) -> dict[str, Arm]:
        """All arms by name: by kind, then by γ, ours last."""
        kinds = get_args(Kind)
        by_kind = sorted(
            self.sweep.arms.items(),
            key=lambda item: (kinds.index(item[1].kind), item[1].gamma or 0),
        )
        arms = dict(by_kind)
        if self.ours is not None:
            arms[self.ours] = arms.pop(self.ours)
        return arms

    def of_kind(self, *kinds: Kind) -> list[str]:
        """Names of the arms of these kinds."""
        return [name for name, arm in self.arms.items() if arm.kind in kinds]

    def rivals(self) -> list[str]:
        """Names of the arms that are not ours."""
        return self.of_kind("none", "fixed", "built-in adaptive")

    def gamma_one(self) -> str | None:
        """Name of the arm that always verifies one draft; None if there is none."""
        return next((n for n in self.of_kind("fixed") if self.arms[n].gamma == 1), None)

    def value(self, arm: str, concurrency: int, field: str = "tokens_per_second") -> float | None:
        """Median of `field` over repeats; None where it was not measured."""
        return self.sweep.arms[arm].median(concurrency, self.temperature, field)

    def complete(self, concurrency: int) -> bool:
        """Whether every arm was measured at this concurrency."""
        return all(self.value(name, concurrency) is not None for name in self.arms)

    def ratio(self, concurrency: int, others: Sequence[str]) -> Ratio | None:
        """Our tok/s over the best of `others`; None if ours or all of them are missing."""
        own = self.value(self.ours, concurrency) if self.ours is not None else None
        measured = {name: self.value(name, concurrency) for name in others}
        rates = {name: rate for name, rate in measured.items() if rate is not None}
        if own is None or not rates:
            return None
        best = max(rates, key=lambda name: rates[name])
        return Ratio(own / rates[best], best, complete=len(rates) == len(others))


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers. Raises ValueError if there are none."""
    if not values:
        raise ValueError("no values")
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def choose_ours(sweep: Sweep, wanted: str | None) -> str | None:
    """Name of the arm to compare: `wanted`, or else the only one of kind "ours", or None.

    Raises:
        ValueError: `wanted` is no arm of kind "ours", or there are several and none is wanted.
    """
    found = [name for name, arm in sweep.arms.items() if arm.kind == "ours"]
    if wanted is not None and wanted not in found:
        raise ValueError(f'no arm {wanted!r} of kind "ours"; there are {found}')
    if wanted is None and len(found) > 1:
        raise ValueError(f'several arms of kind "ours": {found}; name one of them')
    return wanted or (found[0] if found else None)
