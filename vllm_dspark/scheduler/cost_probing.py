"""When a step drafts otherwise than it pays, to see what that costs by now.

What a depth costs is seen only where it is drafted. Where the host binds the steps that draft,
their times say nothing of the device's, so what depth 0 takes, which no host holds up, is the
first to go wrong: a slow host looks like a slow device until depth 0 was seen once. A probe runs
another depth for a few steps, until its times arrived. Three rules keep it cheap:

* It must be in doubt and promise something: hardly any times of that depth were believed for an
  interval, and with the least that it may take it beats the current one; see
  `CostModel.hoped_ms`.
* Each interval to the next probe is twice as long as the one before; a depth 0 in doubt does not
  wait for it. A load that changed by a factor of two, a new regime, or a probe that found what
  nobody predicted start over.
* Every step earns a share of a step, and a probe spends what it runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_dspark import checks
from vllm_dspark.scheduler.cost_model import CostModel
from vllm_dspark.scheduler.monotone import Floats

LOAD_CHANGE = 2.0
LOOK_EVERY = 32  # steps between looks while nothing promises anything
SURPRISE = 0.05  # relative, of a predicted time


@dataclass(frozen=True)
class CostProbeSettings:
    """How often and how long.

    Args:
        share: of the steps, in [0, 1), that probes may take; 0 is never to probe.
        settle: steps from a change to the first look, at least 1.
        interval: steps from a probe to the next, at least 1; also those after which a depth that
            was not timed is in doubt.
        longest: steps that the interval doubles up to.
        times: measured ones that a probe wants to see, at least 1.
        most_steps: of one probe.
        saved: steps that may be earned beforehand; so many there are at the start. A profile that
            was measured leaves most of them; one that was guessed needs them for its first loads.

    Raises:
        ValueError: an argument, which it names, is outside of that.
    """

    share: float = 0.008
    settle: int = 8
    interval: int = 256
    longest: int = 4096
    times: int = 3
    most_steps: int = 8
    saved: int = 96

    def __post_init__(self) -> None:
        if checks.amount("share", self.share) >= 1:
            raise ValueError(f"share must lie in [0, 1), got {self.share}")
        for name in ("settle", "interval", "times", "most_steps"):
            checks.whole(name, getattr(self, name), least=1)
        checks.whole("longest", self.longest, least=self.interval)
        checks.whole("saved", self.saved, least=self.most_steps)


class Steady(NamedTuple):
    """What there is to choose from: steps that go on as they are."""

    current: int  # index into depths
    depths: npt.NDArray[np.int64]  # [D] ascending, those that may be drafted now
    requests: int
    context_tokens: int
    tokens: Floats  # [D], emitted by a request in a step
    step_ms: Floats  # [D], predicted


@dataclass
class _Probe:
    """One in progress."""

    at: int  # index into depths
    depth: int
    timed: int  # times of that depth when it began
    refused: int  # of them
    left: int  # steps
    predicted_ms: float


class CostProbing:
    """Decides on probes; deterministic, counts steps.

    Attributes:
        interval: steps, the current one.
        started: probes so far.
    """

    def __init__(self, settings: CostProbeSettings) -> None:
        self.settings = settings
        self.interval = settings.interval
        self.started = 0
        self._step = 0
        self._look = self._next = 0  # steps of the next look, and of that at other depths than 0
        self._credit = float(settings.saved)  # steps
        self._probe: _Probe | None = None
        self._load = 0
        self._regimes = 0
        self._believed: list[int] = []  # times of each depth when it was last out of doubt
        self._sure: list[float] = []  # step at which that was

    def step(self, steady: Steady, cost: CostModel, margin: float) -> int | None:
        """The depth to draft in this step as a probe; None for no probe.

        Args:
            steady: what there is to choose from.
            cost: predicted it.
            margin: relative gain that counts.
        """
        if self.settings.share == 0:
            return None
        self._step += 1
        self._credit = min(self._credit + self.settings.share, float(self.settings.saved))
        changed = not self._load / LOAD_CHANGE < steady.requests < self._load * LOAD_CHANGE
        if changed or self._regimes != cost.regimes:
            self._load, self._regimes = steady.requests, cost.regimes
            self._believed = believed(cost)
            self._sure = [-math.inf] * len(self._believed)
            self._probe = None
            self._start_over()
        if self._probe is not None and not self._goes_on(self._probe, steady, cost):
            self._probe = None
        if self._probe is None and self._step >= self._look:
            self._probe = self._begin(steady, cost, margin)
        if self._probe is None:
            return None
        self._probe.left -= 1
        self._credit -= 1
        return self._probe.depth

    def _start_over(self) -> None:
        """The shortest interval again, and a look soon."""
        self.interval = self.settings.interval
        self._look = self._next = self._step + self.settings.settle

    def _begin(self, steady: Steady, cost: CostModel, margin: float) -> _Probe | None:
        """A look: a new probe, if one is worth while."""
        settings = self.settings
        self._look = self._step + LOOK_EVERY
        self._take_down(cost)
        if self._credit < settings.most_steps:
            return None
        at = self._hopeful(steady, cost, margin)
        if at is None:
            return None
        self.started += 1
        self._next = self._step + self.interval
        self.interval = min(2 * self.interval, settings.longest)
        depth = int(steady.depths[at])
        known = cost.timed[depth], cost.refused[depth]
        return _Probe(at, depth, *known, settings.most_steps, float(steady.step_ms[at]))

    def _goes_on(self, probe: _Probe, steady: Steady, cost: CostModel) -> bool:
        """Whether a probe goes on: K/V memory is there, and it has not seen enough."""
        if probe.at >= steady.depths.size:
            return False
        if probe.left and cost.timed[probe.depth] < probe.timed + self.settings.times:
            return True
        self._take_down(cost)
        moved = abs(math.log(float(steady.step_ms[probe.at]) / probe.predicted_ms)) > SURPRISE
        if moved or cost.refused[probe.depth] > probe.refused + 1:
            self._start_over()
        return False

    def _take_down(self, cost: CostModel) -> None:
        """Which depths are out of doubt by now."""
        for depth, times in enumerate(believed(cost)):
            if times >= self._believed[depth] + self.settings.times:
                self._believed[depth], self._sure[depth] = times, self._step

    def _hopeful(self, steady: Steady, cost: CostModel, margin: float) -> int | None:
        """Index of the depth to probe: 0 before all others, then what promises most."""
        current, depths, requests, context_tokens, tokens, step_ms = steady
        worth = np.array([self._step - self._sure[depth] >= self.interval for depth in depths])
        worth[1:] &= self._step >= self._next
        worth[current] = False
        if not worth.any():
            return None
        hope = tokens / cost.hoped_ms(requests, context_tokens, depths, current)
        worth &= hope > (1 + margin) * tokens[current] / step_ms[current]
        if not worth.any():
            return None
        return 0 if worth[0] else int(np.where(worth, hope, 0.0).argmax())


def believed(cost: CostModel) -> list[int]:
    """Times that taught something, of each depth."""
    return [timed - refused for timed, refused in zip(cost.timed, cost.refused, strict=True)]
