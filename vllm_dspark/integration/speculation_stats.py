"""What the scheduler tells the front end of speculation, on its way there.

vLLM sends `SchedulerStats` with every step's outputs from the engine's process to the one that
answers /metrics. Ours is a subclass with one field more. Its reader takes what it knows of and
drops the rest, so the front end's decoder is told of our subclass.

Counts are of the steps since the last stats: each of several front ends is sent some of them, and
their sums come out right.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import msgspec
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats


@dataclass
class SpeculationStats:
    """What was decided since the last stats, and how well it was predicted."""

    depth: int = 0  # of the last step
    steps: dict[int, int] = field(default_factory=dict)  # by depth
    switches: int = 0  # of the depth, probes aside
    probes: int = 0  # steps
    requests: int = 0  # with drafts to verify, over all steps
    scheduled: int = 0  # drafts
    verified: int = 0  # drafts
    accepted: int = 0  # drafts
    ignored: int = 0  # reports of the workers that made no sense
    # Median of the last predictions of a step's time; None between two looks at it.
    cost_error_percent: float | None = None
    # By regime, of what is remembered: |predicted − observed| acceptance, see `ece`.
    calibration_error: dict[str, float] = field(default_factory=dict)


@dataclass
class DSparkSchedulerStats(SchedulerStats):
    """vLLM's, and ours."""

    speculation: SpeculationStats | None = None


def with_speculation(stats: SchedulerStats, speculation: SpeculationStats) -> DSparkSchedulerStats:
    """The same stats, with ours."""
    return DSparkSchedulerStats(**vars(stats), speculation=speculation)


@cache
def outputs_type() -> type[msgspec.Struct]:
    """vLLM's EngineCoreOutputs with our stats. It travels as an array, so fields keep their
    order."""
    entries: list[Any] = []
    for entry in msgspec.structs.fields(EngineCoreOutputs):
        kind = entry.type
        if entry.name == "scheduler_stats":
            kind = DSparkSchedulerStats | None
        default: dict[str, Any] = {"default": entry.default}
        if entry.default is msgspec.NODEFAULT:
            default = {"default_factory": entry.default_factory}
        entries.append((entry.name, kind, msgspec.field(**default)))
    return msgspec.defstruct(
        "DSparkEngineCoreOutputs",
        entries,
        bases=(EngineCoreOutputs,),
        array_like=True,
        omit_defaults=True,
        gc=False,
    )
