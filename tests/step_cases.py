"""A synthetic 8B server whose steps take what was seen on an H200, for cost and depth tests.

Without drafts 1, 16, 64 and 256 requests with 300 tokens of context take 5.6, 6.0, 7.2 and
13.1 ms; a verified token costs 26 µs at the margin of 256 requests; a draft block of 7 takes
0.7 ms for 1 request, 1.0 for 16 and 8.6 for 256, one of 1 takes 1.2 ms for 256.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vllm_dspark.scheduler.cost_model import CostModel, StepSample, StepShape

GAMMA = 7
DEPTHS = (0, 1, 2, 3, 5, 7)
CONTEXT = 300
CAPTURED = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))
# Conditional acceptance per position of the trained pair, and the survival of its prefixes.
ACCEPTANCE = np.array([0.70, 0.63, 0.57, 0.54, 0.52, 0.50, 0.47])
SURVIVAL = np.cumprod(ACCEPTANCE)


def shape(requests: int, depth: int, context: int = CONTEXT) -> StepShape:
    """A step that verifies `depth` drafts of each request, and drafts as many again."""
    tokens = requests * (1 + depth)
    return StepShape(tokens, requests, requests * context, tokens, depth)


def verify_ms(step: StepShape) -> float:
    padded = next((size for size in CAPTURED if size >= step.tokens), step.tokens)
    table = np.interp(
        padded,
        [1, 16, 64, 128, 256, 2048, 16384],
        [5.55, 5.65, 5.8, 6.0, 7.5, 54.1, 54.1 + 0.026 * 14336],
    )
    return float(table) + 0.007 * step.requests + 5e-5 * step.context_tokens


def draft_ms(step: StepShape) -> float:
    if step.depth == 0:
        return 0.0
    tokens = step.requests * step.depth
    return float(np.interp(tokens, [7, 112, 256, 1792, 7168], [0.7, 1.0, 1.2, 8.6, 34.5]))


def step_ms(step: StepShape) -> float:
    return verify_ms(step) + draft_ms(step)


def samples(
    contexts: Sequence[int] = (CONTEXT, 4000),
    depths: Sequence[int] = DEPTHS,
    noise: float = 0.0,
    repeats: int = 1,
) -> list[StepSample]:
    """A profile in realistic shapes."""
    random = np.random.default_rng(0)
    steps = [
        shape(requests, depth, context)
        for requests in (1, 2, 4, 8, 16, 32, 64, 128, 256)
        for depth in depths
        for context in contexts
    ]
    return [
        StepSample(
            step,
            verify_ms(step) * random.lognormal(0, noise),
            draft_ms(step) * random.lognormal(0, noise),
        )
        for step in steps
        for _ in range(repeats)
    ]


def model() -> CostModel:
    return CostModel(samples(), CAPTURED, GAMMA)


def predicted(cost: CostModel, step: StepShape) -> float:
    return float(
        cost.step_ms(step.tokens, step.requests, step.context_tokens, step.logits_rows, step.depth)
    )


def best_ms(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(200):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1000 * min(times)
