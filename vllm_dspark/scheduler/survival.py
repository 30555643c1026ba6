"""Prefix survival: a_j = c_1···c_j, the probability that the first j drafts are all accepted."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_dspark import checks


def prefix_survival(confidence: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Survival of every prefix (arXiv 2607.05147, "Confidence-scheduled verification").

    Args:
        confidence: [R, γ] of numbers, probabilities in [0, 1]: c_j, that draft j is accepted
            given that drafts 1..j−1 were.

    Returns:
        float64 [R, γ], probabilities; never increases along a row, not even by rounding.

    Raises:
        ValueError: `confidence` is empty, NaN, outside [0, 1] or not of two dimensions.
    """
    checked = checks.probabilities("confidence", confidence, 2, "[R, γ]")
    return products(checked.astype(np.float64))


def products(confidence: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """`prefix_survival` of float64 that needs no check, in its place: column by column, which is
    quicker than `cumprod` along short rows."""
    for k in range(1, confidence.shape[1]):
        confidence[:, k] *= confidence[:, k - 1]
    return confidence
