"""A server whose host takes its time: a step takes what the device does or what launching it does,
whichever is longer. The controller starts from a profile of the device alone.

Device times are like an 8B model's on an H200. Launching a step that drafts takes 7.5 ms and 0.03
for each request, one that does not 2.5 and 0.012, so the host binds drafting below 64 requests.
Measured times carry 5 % of noise and one in fifty is thrice as long.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from vllm_dspark.scheduler.controller import DepthController
from vllm_dspark.scheduler.cost_model import CostModel, StepSample, StepShape
from vllm_dspark.scheduler.depth import Goal
from vllm_dspark.scheduler.running_survival import outcomes

GAMMA = 7
DEPTHS = (0, 1, 2, 3, 5, 7)
CONTEXT = 300
SURVIVAL = np.cumprod([0.56, 0.47, 0.57, 0.55, 0.55, 0.55, 0.55])
LOADS = (256, 1, 4, 16, 64, 128, 256)
STEPS = 500  # of each load
LAG = 2  # steps until a time is known

Host = Callable[[int, int], float]  # requests, depth → ms


def launching(requests: int, depth: int) -> float:
    """What the host takes, ms."""
    return 7.5 + 0.03 * requests if depth else 2.5 + 0.012 * requests


def nothing(requests: int, depth: int) -> float:
    """A host that is never in the way."""
    return 0.0


def verify_ms(tokens: int) -> float:
    """The target on the device."""
    sizes, times = [1, 16, 64, 128, 256, 2048], [5.3, 5.6, 6.9, 8.7, 13.5, 61.9]
    return float(np.interp(tokens, sizes, times))


def draft_ms(requests: int, depth: int) -> float:
    """The drafter on the device."""
    return 0.5 + 0.008 * requests * depth if depth else 0.0


class Phase(NamedTuple):
    """Some steps of one load."""

    requests: int
    share: float  # tokens per ms against the best of all depths that never change
    switches: int
    depths: list[int]  # drafted, step by step
    slow: float  # share of steps at depths that take over 1.5 times as long per token
    best: int  # depth
    probed: float  # share of steps that were probes


@dataclass
class Server:
    """One controller in front of it.

    Args:
        host: what launching takes.
        scale: of the device's times.
    """

    host: Host = launching
    scale: float = 1.0
    controller: DepthController = field(init=False)

    def __post_init__(self) -> None:
        self.controller = DepthController(GAMMA, Goal(), max_requests=256)
        self.controller.start(DEPTHS, self._profile())
        self._random = np.random.default_rng(0)
        self._drafted = 0  # by the step before
        self._late: list[tuple[StepShape, float]] = []

    def _profile(self) -> str:
        samples = [
            StepSample(
                StepShape(requests * (1 + depth), requests, requests * CONTEXT, requests, depth),
                self.scale * verify_ms(requests * (1 + depth)),
                self.scale * draft_ms(requests, depth),
            )
            for requests in (1, 2, 4, 8, 16, 32, 64, 128, 256)
            for depth in DEPTHS
        ]
        return CostModel(samples, (), GAMMA).to_json({})

    def step_ms(self, requests: int, depth: int, verified: int) -> float:
        """A step that verifies so many drafts of each request, then drafts."""
        device = verify_ms(requests * (1 + verified)) + draft_ms(requests, depth)
        return max(self.scale * device, self.host(requests, depth))

    def rates(self, requests: int) -> dict[int, float]:
        """Tokens per ms of each depth, if it never changes."""
        return {
            d: requests * (1 + SURVIVAL[:d].sum()) / self.step_ms(requests, d, d) for d in DEPTHS
        }

    def run(self, requests: int, steps: int = STEPS) -> Phase:
        """Serve one load."""
        depths, tokens, ms, probes = [], 0.0, 0.0, 0.0
        before = self.controller.snapshot()["switches"]
        for _ in range(steps):
            depth = self.controller.choose(
                requests=requests, waiting=0, context_tokens=requests * CONTEXT,
                free_kv_fraction=0.9,
            )  # fmt: skip
            probes += self.controller.snapshot()["probing"]
            taken = self.step_ms(requests, depth, self._drafted)
            tokens += requests * (1 + SURVIVAL[: self._drafted].sum())
            ms += taken
            self._report(requests, depth, taken)
            depths.append(depth)
        rates = self.rates(requests)
        best = max(rates, key=rates.__getitem__)
        slow = float(np.mean([rates[depth] < rates[best] / 1.5 for depth in depths]))
        switches = int(self.controller.snapshot()["switches"] - before)
        share = float(tokens / ms / rates[best])
        return Phase(requests, share, switches, depths, slow, best, probes / steps)

    def _report(self, requests: int, depth: int, taken: float) -> None:
        """As workers do: late, and without a step between drafting and not drafting."""
        random, before = self._random, self._drafted
        survives = random.random((requests, GAMMA)) < SURVIVAL / np.array([1.0, *SURVIVAL[:-1]])
        accepted = survives[:, :before].cumprod(axis=1).sum(axis=1)
        self.controller.observe_outcomes(outcomes(accepted, np.full(requests, before), GAMMA))
        measured = taken * random.lognormal(0, 0.05) * (3 if random.random() < 0.02 else 1)
        tokens = requests * (1 + before)
        shape = StepShape(tokens, requests, requests * CONTEXT, tokens, depth)
        if (depth > 0) == (before > 0):
            self._late.append((shape, measured))
        self._drafted = depth
        if len(self._late) > LAG:
            known, late_ms = self._late.pop(0)
            fields = known.tokens, known.requests, known.context_tokens, known.logits_rows
            self.controller.observe_step((*fields, known.depth), late_ms, True)
