"""How long steps take, from the launch of the target to the end of drafting.

On a CPU the host's clock. On a GPU events in the stream, read once they have passed: nothing waits.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

import torch

_MOST = 8  # steps in flight whose time is awaited; more than vLLM has


class StepClock(Protocol):
    """Times steps one after the other."""

    def begin(self) -> None:
        """A step begins. One that began and never ended is forgotten."""

    def end(self, step: int) -> None:
        """Step `step`, which began last, is launched to its end."""

    def ended(self) -> list[tuple[int, float]]:
        """Steps that ended since the last call, and their ms, in order."""


class HostClock:
    """Where host and device are the same."""

    def __init__(self) -> None:
        self._began = 0.0
        self._ended: list[tuple[int, float]] = []

    def begin(self) -> None:
        """See `StepClock`."""
        self._began = time.perf_counter()

    def end(self, step: int) -> None:
        """See `StepClock`."""
        self._ended.append((step, (time.perf_counter() - self._began) * 1e3))

    def ended(self) -> list[tuple[int, float]]:
        """See `StepClock`."""
        ended, self._ended = self._ended, []
        return ended


class DeviceClock:
    """Of the current CUDA stream. Two events a step and no kernel."""

    def __init__(self) -> None:
        pairs = (_event() for _ in range(_MOST))
        self._free = deque((began, _event()) for began in pairs)
        self._flying: deque[tuple[int, torch.cuda.Event, torch.cuda.Event]] = deque()

    def begin(self) -> None:
        """See `StepClock`."""
        if not self._free:  # nobody asked for long: the oldest is given up
            _, *pair = self._flying.popleft()
            self._free.append((pair[0], pair[1]))
        self._free[0][0].record()

    def end(self, step: int) -> None:
        """See `StepClock`."""
        began, ended = self._free.popleft()
        ended.record()
        self._flying.append((step, began, ended))

    def ended(self) -> list[tuple[int, float]]:
        """See `StepClock`."""
        times = []
        while self._flying and self._flying[0][2].query():
            step, began, ended = self._flying.popleft()
            times.append((step, began.elapsed_time(ended)))
            self._free.append((began, ended))
        return times


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
