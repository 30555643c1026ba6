"""Costs learned from times that were measured in this process, where no scheduler of ours does."""

from __future__ import annotations

from vllm_dspark.integration.verification.arrivals import Arrival, Arrivals
from vllm_dspark.integration.verification.costs import StepCosts
from vllm_dspark.scheduler.cost_model import StepShape


class StepTiming:
    """Of one manager.

    Args:
        costs: learn.
        arrivals: bring the times.
    """

    def __init__(self, costs: StepCosts, arrivals: Arrivals) -> None:
        self._costs, self._arrivals = costs, arrivals
        self._shapes: dict[int, tuple[StepShape, bool]] = {}  # of steps whose time is awaited
        self._late: tuple[StepShape, float, bool] | None = None

    def start(self, step: int, shape: StepShape, whole: bool) -> None:
        """A step begins that only decodes.

        Args:
            step: its number.
            shape: what it works on.
            whole: it verifies all drafts.
        """
        self._shapes[step] = shape, whole
        self._arrivals.start()

    def arrived(self, arrival: Arrival) -> None:
        """Let a step's time correct the costs, one step late: how long the current blocks took to
        draw is no business of their own budget."""
        late, self._late = self._late, None
        if late is not None:
            self._costs.observe(*late)
        known = self._shapes.pop(arrival.step, None)
        if known is not None and arrival.ms is not None:
            shape, replayed = known
            self._late = shape, arrival.ms, replayed
