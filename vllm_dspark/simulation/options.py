"""What `vllm-dspark simulate` is asked for, refused with the option's name before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path


class SimulationError(ValueError):
    """What was asked for cannot be simulated; the message says why and what to do."""


_FINITE = (
    "temperature", "sharpness", "noise", "overconfidence", "floor", "seconds", "launch_ms",
)  # fmt: skip
# What a validation has a use for; it takes all else from the sweep.
_VALIDATED = (
    "sweep", "validate", "temperature", "acceptance", "sharpness", "noise", "overconfidence",
    "prompt", "seed", "json", "blocks",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What the command line gave; None is not given.

    Raises:
        SimulationError: a number is out of its range, or an option would do nothing beside others.
    """

    profile: Path | None = None
    sweep: Path | None = None
    temperature: float | None = None  # of the sweep's runs
    acceptance: Sequence[float] = ()
    sharpness: float = 1.0
    noise: float = 0.5
    overconfidence: float = 0.0
    blocks: bool | None = None  # ours verifies by; as it does by default if None
    concurrency: Sequence[int] = ()
    rate: Sequence[float] = ()
    gpus: int = 1
    prompt: int = 64
    output: int | None = None
    fixed: Sequence[int] = ()
    floor: float | None = None  # tok/s per user
    requests: int = 8
    seconds: float = 60.0
    max_num_seqs: int | None = None
    launch_ms: float | None = None
    validate: bool = False
    seed: int = 0
    json: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        for name in _FINITE:
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise SimulationError(f"{_option(name)} must be a finite number, got {value}")
        if self.floor is not None and self.floor <= 0:
            raise SimulationError(
                f"--floor must be above 0, got {self.floor:g}. Fix: the tok/s that each user is "
                f"to have, such as 50; without a floor leave the option out"
            )
        if self.validate:
            self._check_validation()
        elif self.rate and self.concurrency:
            raise SimulationError("--concurrency and --rate: give one of them, not both")
        elif self.rate:
            self._check_unused("requests", "tells of --concurrency; --rate goes by --seconds")
        else:
            self._check_unused("seconds", "tells of arrivals. Fix: --rate, or leave it out")
        if self.sweep is None:
            self._check_unused(
                "temperature", "tells of a sweep. Fix: --sweep FILE, or leave it out"
            )
        elif self.profile is None:
            self._check_unused(
                "launch_ms", "is fitted to the sweep. Fix: leave it out, or give a --profile"
            )

    def _check_validation(self) -> None:
        names = [f.name for f in fields(self) if f.name not in _VALIDATED]
        unused = [name for name in names if self._is_given(name)]
        if unused:
            raise SimulationError(
                f"--validate predicts the sweep's arms as they ran, and has no use for "
                f"{', '.join(map(_option, unused))}. Fix: leave them out, or --validate"
            )
        if self.sweep is None:
            raise SimulationError("--validate needs a sweep. Fix: --sweep FILE")

    def _check_unused(self, name: str, why: str) -> None:
        if self._is_given(name):
            raise SimulationError(f"{_option(name)} would do nothing: it {why}")

    def _is_given(self, name: str) -> bool:
        """Whether it differs from its default."""
        (default,) = (f.default for f in fields(self) if f.name == name)
        return bool(getattr(self, name) != default)


def numbers(option: str, text: str, example: str, most: float = math.inf) -> tuple[float, ...]:
    """Numbers apart by commas, each above 0 and below `most`; none of an empty text.

    Args:
        example: of such a list, for the error.

    Raises:
        SimulationError: it is no such list; names the option.
    """
    fix = f"Fix: such as {option} {example}"
    try:
        found = tuple(float(part) for part in text.split(",") if part)
        if text and not found:
            raise ValueError
    except ValueError:
        raise SimulationError(f"{option} {text!r} is no list of numbers. {fix}") from None
    for value in found:
        if not 0 < value < most:  # NaN fails too
            limit = "be finite" if most == math.inf else f"below {most:g}"
            raise SimulationError(f"{option} must lie above 0 and {limit}, got {value:g}. {fix}")
    return found


def whole_numbers(option: str, text: str, example: str) -> tuple[int, ...]:
    """Whole numbers apart by commas, each at least 1; see `numbers`."""
    found = numbers(option, text, example)
    for value in found:
        if value != int(value):
            raise SimulationError(f"{option} must be whole, got {value}. Fix: {option} {example}")
    return tuple(int(value) for value in found)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
