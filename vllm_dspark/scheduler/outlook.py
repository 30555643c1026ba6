"""What each depth promises for a load, and how long that stands.

To predict it takes the host a while, and hardly anything changes from one step to the next. So a
prediction stands for a few steps: as long as about as many requests run and wait, K/V memory
leaves as many depths, and no probe is under way, which is there to see what changes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vllm_dspark.scheduler.cost_model import CostModel
from vllm_dspark.scheduler.cost_probing import Steady
from vllm_dspark.scheduler.goal import Goal
from vllm_dspark.scheduler.monotone import Floats

ALIKE = 8  # loads are about the same that differ by less than this part


class Outlook(NamedTuple):
    """Of one load.

    Attributes:
        steady: steps that go on as they are; its `current` is not filled in.
        load: requests that the next step runs.
        survival: float64 [γ], never rising.
        age: float64 [γ], steps since each position was last seen.
        values: of the D depths that may be drafted; see `Goal.values`.
        best: index of the largest value.
        cost: what predicted it, and how many regimes that had seen.
    """

    steady: Steady
    load: int
    survival: Floats
    age: Floats
    values: list[float]
    best: int
    cost: tuple[CostModel, int]

    @classmethod
    def of(
        cls,
        steps: tuple[int, int, int],
        depths: np.ndarray,
        survival: Floats,
        age: Floats,
        cost: CostModel,
        goal: Goal,
    ) -> Outlook:
        """Predict.

        Args:
            steps: requests that run, at least 1, those that the next step runs, and tokens of
                context of the former.
            depths: int64 [D] ascending, those that may be drafted.
            survival, age: see above.
            cost, goal: predict and value.
        """
        requests, load, context = steps
        emitted = np.cumsum([1.0, *survival])[depths]
        if load == requests:
            step_ms = next_ms = cost.steady_ms(np.array(requests), np.array(context), depths)
        else:
            loads = np.array([[requests], [load]])
            step_ms, next_ms = cost.steady_ms(loads, loads * context // requests, depths)
        values = goal.values(load * emitted / next_ms, load).tolist()
        steady = Steady(0, depths, requests, context, emitted, step_ms)
        regimes = cost, cost.regimes
        return cls(steady, load, survival, age, values, values.index(max(values)), regimes)

    def holds(self, requests: int, load: int, allowed: int, cost: CostModel) -> bool:
        """Whether it is about that of another load, with as many depths allowed."""
        return (
            len(self.values) == allowed
            and abs(requests - self.steady.requests) * ALIKE <= self.steady.requests
            and abs(load - self.load) * ALIKE <= self.load
            and self.cost == (cost, cost.regimes)
        )
