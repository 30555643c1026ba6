"""Counting in the scheduler what its stats will say; see `speculation_stats`."""

from __future__ import annotations

import math
from collections import Counter

from vllm_dspark.calibration.online import OnlineCalibrator
from vllm_dspark.integration.speculation_stats import SpeculationStats
from vllm_dspark.integration.step_report import StepReport
from vllm_dspark.scheduler.controller import DepthController

_ERROR_EVERY = 16  # stats


class SpeculationCounts:
    """Since the last stats.

    Args:
        controller: chooses the depth.
    """

    def __init__(self, controller: DepthController) -> None:
        self._controller = controller
        self._steps: Counter[int] = Counter()
        self._probes = 0
        self._drafts = [0, 0, 0]
        self._calibration: dict[str, float] = {}
        self._switches = self._ignored = 0  # until the last stats
        self._takes = 0

    def scheduled(self, depth: int) -> None:
        """A step that drafts `depth` tokens per request was scheduled."""
        self._steps[depth] += 1
        policy = self._controller.policy
        self._probes += bool(policy and policy.probing and depth != policy.depth)

    def reported(self, report: StepReport) -> None:
        """The workers reported."""
        for i, count in enumerate(report.drafts):
            self._drafts[i] += count
        if report.calibration:
            known = zip(OnlineCalibrator.REGIMES, report.calibration, strict=True)
            self._calibration = {name: error for name, error in known if error is not None}

    def take(self, accepted: int) -> SpeculationStats:
        """What has come together, to start from nothing again.

        Args:
            accepted: drafts, since the last stats.
        """
        controller = self._controller
        switches = controller.policy.switches if controller.policy else 0
        requests, scheduled, verified = self._drafts
        stats = SpeculationStats(
            depth=controller.depth,
            steps=dict(self._steps),
            switches=max(switches - self._switches, 0),  # another policy starts from none
            probes=self._probes,
            requests=requests,
            scheduled=scheduled,
            verified=verified,
            accepted=accepted,
            ignored=controller.ignored - self._ignored,
            cost_error_percent=self._cost_error(),
            calibration_error=self._calibration,
        )
        self._switches, self._ignored = switches, controller.ignored
        self._steps.clear()
        self._probes, self._drafts, self._calibration = 0, [0, 0, 0], {}
        return stats

    def _cost_error(self) -> float | None:
        """Percent, once in a while: a median takes its time."""
        self._takes += 1
        if self._takes % _ERROR_EVERY != 1:
            return None
        error = self._controller.cost.error
        return error if math.isfinite(error) else None
