"""`vllm_dspark_*` on /metrics: what is decided, and how well it is predicted.

A stat logger that runs in the process that answers HTTP, and reads what `speculation_stats` brings
there. No plugin of vLLM's for such: that turns stats on where an operator has them off. In the same
registry and with the same labels as vLLM's own metrics, several front ends included.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_dspark.integration.speculation_stats import SpeculationStats

LABELS = ["model_name", "engine"]

_COUNTERS = {
    "depth_switches": ("switches", "Changes of the draft depth, probes aside."),
    "probe_steps": ("probes", "Steps that drafted another depth than the best known, to learn."),
    "drafting_requests": ("requests", "Requests with drafts to verify, summed over steps."),
    "scheduled_drafts": ("scheduled", "Drafts that steps could have verified."),
    "verified_drafts": ("verified", "Drafts that were verified; the others were left out."),
    "accepted_drafts": ("accepted", "Drafts that were verified and accepted."),
    "ignored_reports": ("ignored", "Reports of the workers that made no sense."),
}


@cache
def families() -> dict[str, Any]:
    """Metrics by name without prefix; made once per process, as the registry demands."""
    made: dict[str, Any] = {
        name: Counter(f"vllm_dspark_{name}", text, LABELS) for name, (_, text) in _COUNTERS.items()
    }
    made["steps"] = Counter("vllm_dspark_steps", "Steps by draft depth.", [*LABELS, "depth"])
    gauges = {
        "depth": ("Draft depth of the last step.", LABELS),
        "cost_error_percent": ("Median error of predicted step times, percent.", LABELS),
        "calibration_error": ("Expected calibration error of confidences.", [*LABELS, "regime"]),
    }
    for name, (text, labels) in gauges.items():
        made[name] = Gauge(f"vllm_dspark_{name}", text, labels, multiprocess_mode="mostrecent")
    return made


class DSparkStatLogger(AggregateStatLoggerBase):
    """Shows what engines that serve DSpark by us say of themselves.

    Args: those of vLLM's AggregateStatLoggerBase.
    """

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        self._model = vllm_config.model_config.served_model_name
        for index in engine_indexes:  # so that a scrape before the first request sees them
            self._count(SpeculationStats(), index)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """See vLLM's; called for every step's outputs."""
        stats = getattr(scheduler_stats, "speculation", None)
        if stats is None:
            return
        self._count(stats, engine_idx)
        made, labels = families(), (self._model, str(engine_idx))
        made["depth"].labels(*labels).set(stats.depth)
        if stats.cost_error_percent is not None:
            made["cost_error_percent"].labels(*labels).set(stats.cost_error_percent)
        for regime, error in stats.calibration_error.items():
            made["calibration_error"].labels(*labels, regime).set(error)

    def _count(self, stats: SpeculationStats, engine: int) -> None:
        made, labels = families(), (self._model, str(engine))
        for name, (field, _) in _COUNTERS.items():
            made[name].labels(*labels).inc(getattr(stats, field))
        for depth, steps in stats.steps.items():
            made["steps"].labels(*labels, str(depth)).inc(steps)

    def log_engine_initialized(self) -> None:
        """Nothing: the start-up line says it."""
