"""How honest and how sharp predicted probabilities are, against what was observed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_dspark import checks


def expected_calibration_error(
    predicted: npt.ArrayLike, observed: npt.ArrayLike, bins: int = 15
) -> float:
    """Mean gap between prediction and outcome, over bins of equal width weighted by their count.

    ECE = Σ_b (n_b / n) |mean predicted in b − mean observed in b|, with bin b = [b, b+1) / bins
    and 1 in the last one (Naeini et al. 2015; Guo et al., arXiv 1706.04599).

    Args:
        predicted: [n] of numbers, probabilities in [0, 1].
        observed: [n], each 0 or 1, or bool.
        bins: how many, at least 1.

    Returns:
        A probability, 0 for perfect calibration.

    Raises:
        ValueError: an argument, which it names, is outside of what is said above, empty or NaN.
    """
    predicted, observed = _checked(predicted, observed)
    bins = checks.whole("bins", bins, least=1)
    return binned_gap(predicted, observed, bins)


def binned_gap(
    predicted: npt.NDArray[np.float64], observed: npt.NDArray[np.float64], bins: int
) -> float:
    """`expected_calibration_error` without its checks, for a search that calls it often."""
    # bins · p can round up to the next edge; what matters is that the last bin takes 1.
    index = np.minimum((predicted * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(index, weights=predicted - observed, minlength=bins)
    return float(np.abs(gaps).sum() / predicted.size)


def brier_score(predicted: npt.ArrayLike, observed: npt.ArrayLike) -> float:
    """Mean squared difference between prediction and outcome (Brier 1950).

    Args:
        predicted, observed: as in `expected_calibration_error`.

    Returns:
        A number in [0, 1], 0 is best.

    Raises:
        ValueError: as in `expected_calibration_error`.
    """
    predicted, observed = _checked(predicted, observed)
    return float(np.mean((predicted - observed) ** 2))


def roc_auc(predicted: npt.ArrayLike, observed: npt.ArrayLike) -> float:
    """Probability that an accepted draft is predicted above a rejected one, ties counting half.

    From the rank sum of the accepted ones, tied predictions sharing their mean rank
    (Mann and Whitney 1947).

    Args:
        predicted, observed: as in `expected_calibration_error`; both outcomes must occur.

    Returns:
        A probability: 0.5 says nothing about the outcome, 1 separates it.

    Raises:
        ValueError: as in `expected_calibration_error`, or `observed` is all 0 or all 1.
    """
    predicted, observed = _checked(predicted, observed)
    ones = int(observed.sum())
    zeros = observed.size - ones
    if not ones or not zeros:
        raise ValueError(f"observed must hold both 0 and 1, got only {1 if ones else 0}")
    _, group, sizes = np.unique(predicted, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(sizes) - (sizes - 1) / 2  # from 1
    rank_sum = mean_rank[group][observed == 1].sum()
    return float((rank_sum - ones * (ones + 1) / 2) / (ones * zeros))


def _checked(
    predicted: npt.ArrayLike, observed: npt.ArrayLike
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    probability: npt.NDArray[Any] = checks.probabilities("predicted", predicted, 1, "[n]")
    outcome = checks.numbers("observed", observed, 1, "[n]", kinds="fiub")
    if outcome.shape != probability.shape:
        raise ValueError(f"observed has shape {outcome.shape}, predicted {probability.shape}")
    if not ((outcome == 0) | (outcome == 1)).all():
        raise ValueError("observed must hold 0 and 1 only")
    return probability.astype(np.float64, copy=False), outcome.astype(np.float64)
