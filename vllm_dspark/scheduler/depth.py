"""How many tokens a step drafts per request: the draft depth, one for the whole step.

In a steady state of R requests at depth d, each step verifies the d drafts that the step
before made, and drafts d more. With prefix survival a_1 ≥ a_2 ≥ …, the cost model predicts

    Θ(d) = R (1 + a_1 + … + a_d) / step_ms(R, d)   tokens per ms,

with all drafts verified; trimming them can only raise it. Of equal Θ the smaller depth wins.
Which Θ is taken, and when the choice may change:

* *Load.* Drafts made now are verified in the next step, with the requests that run then. So
  waiting requests count as running, as far as `max_requests` and K/V memory let them in. They
  are taken to need as much context and memory as those that run.
* *Goal.* See `Goal`.
* *K/V memory.* Drafts take K/V slots. As free memory falls from `kv_low` to `kv_stop`, the
  largest depth allowed shrinks from γ to 0, so that speculation never causes a preemption.
* *Hysteresis.* See `Hysteresis`. A depth that is predicted to be slower than none is left at
  once, so no choice is worse than depth 0 by the model; a probe is none of those.
* *Probing.* See `cost_probing` for what depths cost, and `probing` for what survives.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vllm_dspark import checks
from vllm_dspark.scheduler.cost_model import CostModel
from vllm_dspark.scheduler.cost_probing import CostProbeSettings, CostProbing
from vllm_dspark.scheduler.goal import Goal
from vllm_dspark.scheduler.hysteresis import Hysteresis
from vllm_dspark.scheduler.monotone import Floats
from vllm_dspark.scheduler.outlook import Outlook
from vllm_dspark.scheduler.probing import LOAD_CHANGE, ProbeSettings, Probing

__all__ = ["CostProbeSettings", "DepthPolicy", "Goal", "Hysteresis", "ProbeSettings"]


class DepthPolicy:
    """Chooses the draft depth, step by step. Deterministic: it counts its calls, no clock.

    Args:
        gamma: γ, drafts of a full block, at least 1.
        depths: those that can be drafted, in 0..γ, 0 among them.
        goal: see `Goal`.
        max_requests: the most that can run at once; None is as many as there are.
        hysteresis: see `Hysteresis`.
        probes: see `ProbeSettings`.
        cost_probes: see `CostProbeSettings`.
        kv_low, kv_stop: fractions of free K/V memory, 0 ≤ kv_stop < kv_low ≤ 1.
        stands: steps that a prediction stands at most, at least 1; see `outlook`. Survival, age
            and context of the steps in between are not looked at.

    Attributes:
        depth: int, chosen last, probes aside.
        probing: bool, whether the last step drafts another depth than that, as a probe.
        switches: int, changes of `depth` so far.

    Raises:
        ValueError: an argument, which it names, is outside of that.
    """

    def __init__(
        self,
        gamma: int,
        depths: Sequence[int],
        goal: Goal | None = None,
        *,
        max_requests: int | None = None,
        hysteresis: Hysteresis | None = None,
        probes: ProbeSettings | None = None,
        cost_probes: CostProbeSettings | None = None,
        kv_low: float = 0.10,
        kv_stop: float = 0.02,
        stands: int = 1,
    ) -> None:
        self.gamma = checks.whole("gamma", gamma, least=1)
        distinct = sorted({checks.whole("depths", depth, least=0) for depth in depths})
        if not distinct or distinct[0] != 0 or distinct[-1] > gamma:
            raise ValueError(f"depths must lie in 0..{gamma}, 0 among them, got {list(depths)}")
        if not 0 <= kv_stop < kv_low <= 1:
            raise ValueError(f"kv_stop {kv_stop} < kv_low {kv_low} must both lie in [0, 1]")
        if max_requests is not None:
            checks.whole("max_requests", max_requests, least=1)
        self._depths = np.array(distinct)
        self.goal = goal or Goal()
        self.hysteresis = hysteresis or Hysteresis()
        self.probes = Probing(probes or ProbeSettings())
        self.cost_probes = CostProbing(cost_probes or CostProbeSettings())
        self._max_requests = max_requests
        self._kv_low, self._kv_stop = kv_low, kv_stop
        self._stands = checks.whole("stands", stands, least=1)
        self._outlook: Outlook | None = None
        self._left = 0  # steps that it stands
        self._current: int | None = None  # index into depths
        self._load = self._since = self._better_for = 0
        self._lost = 0.0  # steps, see `Hysteresis.regret`
        self._age = np.full(gamma, np.inf)
        self.probing = False
        self.switches = 0

    @property
    def depth(self) -> int:
        return int(self._depths[self._current or 0])

    def choose(
        self,
        *,
        requests: int,
        waiting: int,
        survival: npt.ArrayLike,
        context_tokens: int,
        free_kv_fraction: float,
        cost: CostModel,
        age: npt.ArrayLike | None = None,
    ) -> int:
        """The depth of this step.

        Args:
            requests: that run in the step; with none, nothing is decided or counted.
            waiting: requests that wait to run, at least 0.
            survival: [γ] of numbers, probabilities: running mean of the calibrated survival of
                each prefix. It has to forget by steps, not by observations, else what a probe
                sees after a long time drowns in what was known before. Positions are seen at
                different times, so it may rise along the block by chance: a rise is cut off.
            context_tokens: of the running requests, in sum, at least 0.
            free_kv_fraction: of K/V memory, in [0, 1].
            cost: predicts what a step takes.
            age: [γ] of numbers, at least 0, steps since each position was last seen verified.
                If not given, steps since one was last drafted.

        Returns:
            One of `depths`.

        Raises:
            ValueError: an argument, which it names, is outside of that.
        """
        requests = checks.whole("requests", requests, least=0)
        if not 0 <= checks.amount("free_kv_fraction", free_kv_fraction) <= 1:
            raise ValueError(f"free_kv_fraction must lie in [0, 1], got {free_kv_fraction}")
        load = self._expected(requests, checks.whole("waiting", waiting, least=0), free_kv_fraction)
        allowed = self._allowed(free_kv_fraction)
        outlook, self._left = self._outlook, self._left - 1
        new = (
            outlook is None
            or self._left <= 0
            or self.probing
            or not outlook.holds(requests, load, allowed, cost)
        )
        if outlook is None or new:
            seen = self._checked(survival, age)
            context = checks.whole("context_tokens", context_tokens, least=0)
            if requests == 0:
                return self.depth
            if self.goal.kind == "latency":
                self._current = self._depths.size - 1
                return self.depth
            steps = requests, load, context
            outlook = Outlook.of(steps, self._depths[:allowed], *seen, cost, self.goal)
            self._outlook, self._left = outlook, self._stands
        chosen = self._step(outlook, new)
        self.probing = chosen != self.depth
        if age is None:
            self._age += 1
            self._age[:chosen] = 0
        return chosen

    def _step(self, outlook: Outlook, new: bool) -> int:
        """The depth of one more step, as it looks."""
        self._settle(outlook.values, outlook.best, outlook.load)
        current, margin = self._current or 0, self.hysteresis.margin
        steady = outlook.steady._replace(current=current)
        chosen = self.cost_probes.step(steady, outlook.cost[0], margin)
        if chosen is not None:
            return chosen
        return self.probes.step(
            current,
            steady.depths,
            steady.requests,
            outlook.survival,
            outlook.age,
            steady.step_ms,
            margin,
            look=new,
        )

    def _checked(self, survival: npt.ArrayLike, age: npt.ArrayLike | None) -> tuple[Floats, Floats]:
        survival = checks.probabilities("survival", survival, 1, "[γ]")
        if survival.shape != (self.gamma,):
            raise ValueError(f"survival must have shape [γ] = ({self.gamma},)")
        seen = self._age
        if age is not None:
            seen = checks.numbers("age", age, 1, "[γ]").astype(np.float64)
            if seen.shape != (self.gamma,) or not (seen >= 0).all():
                raise ValueError(f"age must have shape ({self.gamma},), at least 0, got {seen}")
        return np.minimum.accumulate(survival).astype(np.float64, copy=False), seen

    def _expected(self, requests: int, waiting: int, free_kv_fraction: float) -> int:
        """Requests that the next step runs."""
        room = max(free_kv_fraction - self._kv_low, 0.0)
        used = 1 - free_kv_fraction
        if used * waiting > room * requests:  # at the memory that each running one uses
            waiting = int(room * requests / used)
        if self._max_requests is not None:
            waiting = min(waiting, max(self._max_requests - requests, 0))
        return requests + waiting

    def _allowed(self, free_kv_fraction: float) -> int:
        """How many of `depths` K/V memory leaves."""
        if free_kv_fraction >= self._kv_low:
            return self._depths.size
        room = (free_kv_fraction - self._kv_stop) / (self._kv_low - self._kv_stop)
        deepest = np.floor(self.gamma * max(room, 0.0))
        return int(np.searchsorted(self._depths, deepest, side="right"))

    def _settle(self, values: list[float], best: int, load: int) -> None:
        """Stay, or move to the best depth."""
        current, rules = self._current, self.hysteresis
        self._since += 1
        if current is None or current >= len(values) or values[current] < values[0]:
            self._move(best, load)
            return
        better = values[best] > (1 + rules.margin) * values[current]
        self._better_for = self._better_for + 1 if better else 0
        lost = current > 0 and values[best] > values[current]
        self._lost = self._lost + 1 - values[current] / values[best] if lost else 0.0
        changed = not self._load / LOAD_CHANGE < load < self._load * LOAD_CHANGE
        if self._since > rules.dwell or changed:
            urgent = values[best] > (1 + rules.urgent) * values[current]
            if urgent or self._better_for >= rules.patience or self._lost > rules.regret:
                self._move(best, load)

    def _move(self, best: int, load: int) -> None:
        if self._current is not None and best != self._current:
            self.switches += 1
            if best > self._current:
                self.probes.start_over()
        if best != self._current:
            self._since, self._load = 0, load
        self._current, self._better_for, self._lost = best, 0, 0.0
