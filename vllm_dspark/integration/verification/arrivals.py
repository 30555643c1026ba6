"""Confidences and outcomes on their way to the host, and how long steps took.

Every step sends one table, a row a request: emitted tokens, rejected drafts, γ confidences. On a
CPU it is there at once. On a GPU it is copied on a stream of its own into pinned memory, an event
says when it is there, and nobody waits for it.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle

import numpy as np
import numpy.typing as npt
import torch

# A step this old has ended: before the engine schedules a step, it waits for the tokens of the one
# two steps before, whose device work starts when all of the third has ended.
SETTLED = 3
_RING = 8  # tables in memory; in flight are fewer than SETTLED


@dataclass(frozen=True)
class Arrival:
    """What a step sent."""

    step: int
    slots: npt.NDArray[np.int64]  # [R]
    emitted: npt.NDArray[np.int64]  # [R], tokens; 0 in the middle of a prefill
    rejected: npt.NDArray[np.int64]  # [R], drafts that were verified and not accepted
    depth: int  # of the block that the step drew; 0 for none
    confidence: npt.NDArray[np.float32]  # [R, γ] of that block, NaN beyond its depth
    ms: float | None  # since the step before was sent, on the device, where that was measured

    @cached_property
    def accepted(self) -> npt.NDArray[np.int64]:
        """int64 [R], drafts: all that was emitted but the target's own token."""
        return np.maximum(self.emitted - 1, 0)

    @property
    def verified(self) -> npt.NDArray[np.int64]:
        """int64 [R], drafts."""
        return self.accepted + self.rejected


class Timed:
    """Which steps have a time: it runs from the end of the step before, so that what the host takes
    in between counts. Both steps must be such that are to be timed, and follow on each other."""

    def __init__(self) -> None:
        self._started = False
        self._before: int | None = None  # the last step that was to be timed

    def start(self) -> None:
        """The step that begins is to be timed."""
        self._started = True

    def end(self, step: int) -> bool:
        """Whether step `step`, which ends, has a time."""
        follows = self._started and self._before == step - 1
        self._before = step if self._started else None
        self._started = False
        return follows


class Arrivals:
    """The line where device and host are the same: what is sent has arrived."""

    def __init__(self) -> None:
        self._line: list[Arrival] = []
        self._timed = Timed()
        self._sent = 0.0  # when the step before was, seconds

    def start(self) -> None:
        """A step that is to be timed begins."""
        self._timed.start()

    def send(
        self,
        step: int,
        slots: npt.NDArray[np.int64],
        outcomes: torch.Tensor,
        confidence: torch.Tensor,
        depth: int,
    ) -> None:
        """A step ends.

        Args:
            step: its number; numbers rise.
            slots: int [R].
            outcomes: int [2, R], emitted tokens and rejected drafts.
            confidence: float [R, γ]. All may be overwritten as soon as this returns.
            depth: drafts of the block, 0 to γ.
        """
        now = time.perf_counter()
        ms = (now - self._sent) * 1e3 if self._timed.end(step) else None
        self._sent = now
        emitted, rejected = outcomes.numpy().astype(np.int64)
        table = confidence.to(torch.float32, copy=True).numpy()
        if depth < table.shape[1]:
            table[:, depth:] = np.nan
        self._line.append(Arrival(step, slots.copy(), emitted, rejected, depth, table, ms))

    def collect(self, step: int) -> list[Arrival]:
        """What has arrived when step `step` is planned, oldest first."""
        arrived, self._line = self._line, []
        return arrived


class DeviceArrivals(Arrivals):
    """The line from a GPU.

    Args:
        rows: requests that a step can have.
        gamma: γ.
        device: the GPU.
        alone: whether this process decides for itself. Tensor-parallel ranks must decide alike,
            and whether a copy has arrived is a matter of timing. They take each table once it is
            `SETTLED` steps old, when it is there in any case, and no times, which differ.
    """

    def __init__(self, rows: int, gamma: int, device: torch.device, alone: bool) -> None:
        self._alone = alone
        self._ring = [_Table(rows, 2 + gamma, device) for _ in range(_RING)]
        # Ends of steps, each kept until that of the step after is known.
        ends = (torch.cuda.Event(enable_timing=True) for _ in range(2 * _RING))
        self._ends = cycle(tuple(ends))
        self._sent_at: torch.cuda.Event | None = None  # of the step before
        self._free = deque(self._ring)
        self._flying: deque[_Table] = deque()
        self._stream = torch.cuda.Stream(device)
        self._timed = Timed()

    def start(self) -> None:
        """As `Arrivals.start`."""
        if self._alone:
            self._timed.start()

    def send(
        self,
        step: int,
        slots: npt.NDArray[np.int64],
        outcomes: torch.Tensor,
        confidence: torch.Tensor,
        depth: int,
    ) -> None:
        """As `Arrivals.send`; two small copies on the device and one to the host."""
        table = self._next()
        self._free.popleft()
        table.step, table.slots, table.depth = step, slots.copy(), depth
        table.before = self._sent_at if self._timed.end(step) else None
        table.ended = self._sent_at = next(self._ends)
        rows = len(slots)
        table.device[:rows, :2] = outcomes.T
        table.device[:rows, 2:] = confidence
        table.ended.record()
        self._stream.wait_event(table.ended)
        with torch.cuda.stream(self._stream):
            table.host[:rows].copy_(table.device[:rows], non_blocking=True)
            table.arrived.record(self._stream)
        self._flying.append(table)

    def collect(self, step: int) -> list[Arrival]:
        """As `Arrivals.collect`. Waits for nothing that could still be under way."""
        arrived = []
        while self._flying and self._has_arrived(self._flying[0], step):
            table = self._flying.popleft()
            self._free.append(table)
            arrived.append(table.read())
        return arrived

    def _next(self) -> _Table:
        """The table that is filled next. Should all be in flight, the oldest is given up."""
        if not self._free:
            lost = self._flying.popleft()
            lost.arrived.synchronize()
            self._free.append(lost)
        return self._free[0]

    def _has_arrived(self, table: _Table, step: int) -> bool:
        if self._alone:
            return bool(table.arrived.query())
        if table.step > step - SETTLED:
            return False
        table.arrived.synchronize()
        return True


class _Table:
    """Memory and events of one table."""

    step = 0
    slots: npt.NDArray[np.int64]
    depth = 0
    before: torch.cuda.Event | None = None  # end of the step before, if this one has a time
    ended: torch.cuda.Event

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.device = torch.empty((rows, columns), dtype=torch.float32, device=device)
        self.host = torch.empty((rows, columns), dtype=torch.float32, pin_memory=True)
        self.arrived = torch.cuda.Event()

    def read(self) -> Arrival:
        """A copy of what has arrived."""
        table = self.host[: len(self.slots)].numpy().copy()
        table[:, 2 + self.depth :] = np.nan
        counts = table[:, :2].astype(np.int64)
        ms = None if self.before is None else self.before.elapsed_time(self.ended)
        emitted, rejected = counts.T
        return Arrival(self.step, self.slots, emitted, rejected, self.depth, table[:, 2:], ms)
