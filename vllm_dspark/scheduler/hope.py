"""The least that steps may take which nobody has seen for long: what a cost probe hopes for.

It is a part less than predicted, or as much less as is open of what they take against those that
run: much where that was guessed, little where it was profiled. The host may take as little as the
doubt about it leaves open. Where nothing is drafted, all that was learned may have been the host's
doing: the device takes what was profiled, if that is not below a third of what is predicted.
"""

from __future__ import annotations

import numpy as np

from vllm_dspark.scheduler.corrected import CorrectedTimes, Counts
from vllm_dspark.scheduler.monotone import Floats
from vllm_dspark.scheduler.step_times import StepShape

HOPE = 0.15  # part that steps may take less than predicted, however sure that is
DOUBTS = 2.0  # standard deviations that they may take less
LEAST = 1 / 3  # share of the predicted time that they take at least


def hoped_ms(
    times: CorrectedTimes,
    profiled: CorrectedTimes,
    requests: int,
    context_tokens: int,
    depths: Counts,
    current: int,
) -> Floats:
    """See the module; of steps that verify as many drafts of each request as they draft.

    Args:
        times: what is predicted.
        profiled: what was, before anything was learned.
        requests, context_tokens: at least 0.
        depths: int64 [D], at most γ.
        current: index into depths, of the steps that run.

    Returns:
        float64 [D], ms.
    """
    tokens = requests * (1 + depths)
    step = tokens, np.array(requests), np.array(context_tokens), tokens, depths
    device_ms, profiled_ms = times.device_ms(*step), profiled.device_ms(*step)
    shapes = [
        StepShape(many, requests, context_tokens, many, depth)
        for many, depth in zip(tokens.tolist(), depths.tolist(), strict=True)
    ]
    doubts = np.array(times.spreads(shapes, shapes[current]))
    least_ms = np.clip(np.exp(-DOUBTS * doubts), LEAST, 1 - HOPE) * device_ms
    idle_ms = np.minimum(least_ms, np.maximum(profiled_ms, LEAST * device_ms))
    floor_ms = (1 - HOPE) * times.floor_ms(requests, depths)
    floor_ms *= np.exp(-DOUBTS * times.floor.doubt(requests))
    return np.maximum(np.where(depths > 0, least_ms, idle_ms), floor_ms)
