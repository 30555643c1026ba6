"""Where the host's time goes: spans around calls, each with the time that no span inside it has."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any


class Spans:
    """Exclusive times of wrapped calls, step by step, in one thread.

    Attributes:
        steps: a dict for each step that ended: µs by label.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._now: defaultdict[str, int] = defaultdict(int)
        self._inside = [0]  # ns in spans within each open one

    def wrap(self, owner: Any, name: str, label: str) -> None:
        """Time every call of `owner.name` from now on."""
        setattr(owner, name, self.timed(getattr(owner, name), label))

    def timed(self, call: Callable[..., Any], label: str) -> Callable[..., Any]:
        """`call`, with its time booked under `label`."""
        inside, clock = self._inside, time.thread_time_ns  # of nobody else on this core

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = clock()
            inside.append(0)
            try:
                return call(*args, **kwargs)
            finally:
                taken = clock() - began
                self._now[label] += taken - inside.pop()
                inside[-1] += taken

        return timed

    def end_step(self) -> None:
        """What was booked since the last call is a step."""
        self.steps.append({label: ns / 1000 for label, ns in self._now.items()})
        self._now.clear()
