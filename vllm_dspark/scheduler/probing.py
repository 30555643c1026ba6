"""When a step drafts deeper than it pays, to see whether it would pay by now.

Acceptance of a position is seen only where it is drafted and verified, so a shallow depth
keeps itself alive: what lies behind it is remembered from other text. A probe drafts deeper
for a step or a few. Three rules keep it cheap:

* It must promise something. With every position not seen for an interval taken to survive as
  its prefix does, the deeper block has to beat the current one; else nothing can be learned
  that would change the choice.
* It must be paid for. Every step earns a share of its time, and a probe spends what it takes
  longer than a normal step, as if all its further drafts were rejected. So probes never take
  more than that share of the time, whatever is accepted.
* It must stay worth while. Each probe doubles the interval to the next; a deeper choice or a
  load that changed by a factor of two starts over.

Such a change of load may be one of text, too: what was not seen since then is stale at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_dspark import checks
from vllm_dspark.scheduler.monotone import Floats

LOAD_CHANGE = 2.0


@dataclass(frozen=True)
class ProbeSettings:
    """How often and how long.

    Args:
        share: of the time, in [0, 1), that probes may take; 0 is never to probe.
        interval: steps after which an unseen position is stale, at least 1; also the steps
            between probes.
        settle: steps from a change of load to the first look, at least 1.
        longest: steps that the interval doubles up to.
        observations: blocks that a probe wants to see; it runs as many steps as that takes.
        most_steps: of one probe.

    Raises:
        ValueError: an argument, which it names, is outside of that.
    """

    share: float = 0.005
    interval: int = 256
    settle: int = 16
    longest: int = 2048
    observations: int = 32
    most_steps: int = 8

    def __post_init__(self) -> None:
        if checks.amount("share", self.share) >= 1:
            raise ValueError(f"share must lie in [0, 1), got {self.share}")
        for name in ("interval", "settle", "observations", "most_steps"):
            checks.whole(name, getattr(self, name), least=1)
        checks.whole("longest", self.longest, least=self.interval)


class Probing:
    """Decides on probes; deterministic, counts steps.

    Attributes:
        interval: steps, the current one.
        started: probes so far.
    """

    def __init__(self, settings: ProbeSettings) -> None:
        self.settings = settings
        self.interval = settings.interval
        self.started = 0
        self._credit_ms = 0.0
        self._wait = settings.interval
        self._probe: tuple[int, int] | None = None  # depth, steps left
        self._load = self._since = 0  # requests when that changed last, and steps since then

    def start_over(self) -> None:
        """The shortest interval again."""
        self.interval = self.settings.interval
        self._wait = min(self._wait, self.interval)

    def step(
        self,
        current: int,  # index into depths
        depths: npt.NDArray[np.int64],  # [D] ascending, those that may be drafted now
        requests: int,
        survival: Floats,  # [γ]
        age: Floats,  # [γ] steps
        step_ms: Floats,  # [D]
        margin: float,
        look: bool = True,
    ) -> int:
        """The depth to draft in this step: depths[current], or a deeper one to probe. Without a
        look nothing is begun."""
        depth = int(depths[current])
        self._since += 1
        if not self._load / LOAD_CHANGE < requests < self._load * LOAD_CHANGE:
            self._load, self._since = requests, 0
            self.start_over()
            self._wait = min(self._wait, self.settings.settle)
        now_ms = float(step_ms[current])
        longest_ms = (float(step_ms[-1]) - now_ms) * self.settings.most_steps
        self._credit_ms = min(self._credit_ms + self.settings.share * now_ms, max(longest_ms, 0.0))
        self._wait -= 1
        if self._probe is not None:
            at = int(np.searchsorted(depths, self._probe[0]))
            if current < at < depths.size and step_ms[at] - now_ms <= self._credit_ms:
                return self._draft(*self._probe, float(step_ms[at]) - now_ms)
            self._probe = None  # the load or K/V memory changed
        if not look or self._wait > 0 or current == depths.size - 1 or self.settings.share == 0:
            return depth
        steps = math.ceil(self.settings.observations / requests)
        steps = min(steps, self.settings.most_steps)
        stale = (age >= self.interval) | (age > self._since)
        if not stale.any():
            return depth
        hope = (1 + _accepted(survival, stale)[depths]) / step_ms
        now = (1 + survival[:depth].sum()) / now_ms
        unseen = np.concatenate([[False], np.logical_or.accumulate(stale)])[depths]
        worth = unseen & (hope > (1 + margin) * now)
        promising = np.flatnonzero(worth[current + 1 :])
        if not promising.size:
            return depth
        chosen = current + 1 + int(promising[0])
        extra_ms = float(step_ms[chosen]) - now_ms
        if steps * extra_ms > self._credit_ms:
            return depth
        self.started += 1
        self._wait = steps + self.interval
        self.interval = min(2 * self.interval, self.settings.longest)
        return self._draft(int(depths[chosen]), steps, extra_ms)

    def _draft(self, probe: int, left: int, extra_ms: float) -> int:
        """One step of a probe, of which `left` are to come with this one."""
        self._credit_ms -= max(extra_ms, 0.0)
        self._probe = (probe, left - 1) if left > 1 else None
        return probe


def _accepted(survival: Floats, stale: npt.NDArray[np.bool_]) -> Floats:
    """float64 [γ + 1], drafts accepted of the first 0, 1, …, γ, if stale positions survive as
    their prefix does."""
    prefix, total, totals = 1.0, 0.0, [0.0]
    for survives, unseen in zip(survival.tolist(), stale.tolist(), strict=True):
        prefix = prefix if unseen else survives
        total += prefix
        totals.append(total)
    return np.array(totals)
