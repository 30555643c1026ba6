"""How long steps take, from the end of the step before to their own end.

Launching counts like running: where the host takes longer than the device, the device waits between
steps, and what lies between the ends of two steps is what either of them took. A step has no time
if none came right before it: the first, and the first after one that began and never ended, for
there was nothing to run.

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
        """A step begins. One that began and never ended had nothing to run."""

    def end(self, step: int) -> None:
        """Step `step`, which began last, is launched to its end."""

    def ended(self) -> list[tuple[int, float]]:
        """Steps that ended since the last call and have a time, and their ms, in order."""


class HostClock:
    """Where host and device are the same."""

    def __init__(self) -> None:
        self._before: float | None = None  # end of the step before, seconds
        self._begun = False
        self._ended: list[tuple[int, float]] = []

    def begin(self) -> None:
        """See `StepClock`."""
        if self._begun:
            self._before = None
        self._begun = True

    def end(self, step: int) -> None:
        """See `StepClock`."""
        now = time.perf_counter()
        if self._before is not None:
            self._ended.append((step, (now - self._before) * 1e3))
        self._before, self._begun = now, False

    def ended(self) -> list[tuple[int, float]]:
        """See `StepClock`."""
        ended, self._ended = self._ended, []
        return ended


class DeviceClock:
    """Of the current CUDA stream. One event a step and no kernel."""

    def __init__(self) -> None:
        self._free = deque(torch.cuda.Event(enable_timing=True) for _ in range(_MOST + 1))
        # Step, its end, and whether the step before came right before it.
        self._flying: deque[tuple[int, torch.cuda.Event, bool]] = deque()
        self._before: torch.cuda.Event | None = None  # end of the step before the first of those
        self._begun = self._linked = False

    def begin(self) -> None:
        """See `StepClock`."""
        if self._begun:
            self._linked = False
        self._begun = True

    def end(self, step: int) -> None:
        """See `StepClock`."""
        while not self._free:  # nobody asked for long: the oldest is given up
            self._pass()
        event = self._free.popleft()
        event.record()
        self._flying.append((step, event, self._linked))
        self._linked, self._begun = True, False

    def ended(self) -> list[tuple[int, float]]:
        """See `StepClock`."""
        times = []
        while self._flying and self._flying[0][1].query():
            step, event, linked = self._flying[0]
            if linked and self._before is not None:
                times.append((step, self._before.elapsed_time(event)))
            self._pass()
        return times

    def _pass(self) -> None:
        """The oldest step becomes the one before."""
        if self._before is not None:
            self._free.append(self._before)
        _, self._before, _ = self._flying.popleft()
