"""Step times guessed from sizes and speeds, for when nothing was profiled.

Reading the weights and the arithmetic on the tokens are added, not overlapped: what was seen
lies closer to the sum than to the larger of the two. The defaults are an 8B model in bf16 on
one H200, at the share of its peaks that was seen. Ratios between sizes matter here; the online
correction repairs the scale.
"""

from __future__ import annotations

import numpy as np

from vllm_dspark import checks
from vllm_dspark.scheduler.step_times import Rates, StepTimes

LARGEST = 8192  # tokens; the table is extrapolated beyond, with the same slope
BYTES_PER_PARAMETER = 2.0
DOUBT = 3.0  # against a measured profile


def roofline(
    gamma: int,
    captured: tuple[int, ...],
    *,
    parameter_bytes: float = 16.4e9,
    draft_parameter_bytes: float | None = None,
    context_bytes: float = 147456.0,
    bandwidth: float = 3.0e12,
    flops: float = 6.3e14,
) -> StepTimes:
    """A profile made up of two lines and a rate.

    Args:
        gamma: γ, drafts of a full block.
        captured: ascending sizes, in tokens, of captured graphs.
        parameter_bytes: read by a step of the target.
        draft_parameter_bytes: read by a draft pass, its shared LM head included; 15 % of the
            target's where not given.
        context_bytes: K/V per token of context, all layers.
        bandwidth: bytes per second, achieved.
        flops: floating-point operations per second, achieved.

    Raises:
        ValueError: an amount, which it names, is not positive and finite.
    """
    if draft_parameter_bytes is None:
        draft_parameter_bytes = 0.15 * parameter_bytes
    amounts = {
        "parameter_bytes": parameter_bytes,
        "draft_parameter_bytes": draft_parameter_bytes,
        "context_bytes": context_bytes,
        "bandwidth": bandwidth,
        "flops": flops,
    }
    for name, amount in amounts.items():
        checks.positives(name, [amount], "a number")
    sizes = 2.0 ** np.arange(np.log2(LARGEST) + 1)

    def pass_ms(weights: float, tokens: np.ndarray) -> np.ndarray:
        arithmetic = 2 * weights / BYTES_PER_PARAMETER * tokens / flops
        return 1000 * (weights / bandwidth + arithmetic)

    draft = {
        depth: (sizes, pass_ms(draft_parameter_bytes, sizes * depth))
        for depth in range(1, gamma + 1)
    }
    rates = Rates(context_ms=1000 * context_bytes / bandwidth)
    verify = sizes, pass_ms(parameter_bytes, sizes)
    return StepTimes(verify, draft, rates, captured, gamma, DOUBT)
