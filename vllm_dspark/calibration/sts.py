"""Sequential temperature scaling: one temperature per draft position, fitted left to right.

The scheduler multiplies confidences, so it is their product that has to be honest. With the
temperatures of positions 1..k−1 kept, T_k is chosen so that the expected calibration error of

    a_k = Π_{i ≤ k} σ(logit(c_i) / T_i)

against "the first k drafts were accepted" is smallest (arXiv 2607.05147, "Calibration").
T > 1 makes a confidence less extreme, T < 1 more so.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_dspark import checks
from vllm_dspark.calibration.metrics import binned_gap

# Below this an acceptance rate of one half is known no better than ±5 %, which is about the
# calibration error there is to correct.
MIN_OBSERVATIONS = 100
BINS = 15
LOWEST, HIGHEST = 0.1, 10.0
# Odd, so that T = 1 is on both grids.
COARSE, FINE = 61, 31


def fit_temperatures(
    confidence: npt.ArrayLike, accepted: npt.ArrayLike, verified: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """Temperatures that make the survival of every prefix honest on these rounds.

    Position k is fitted on the rows that verified at least k drafts, outcome
    `accepted >= k`. How many a row verified must not have depended on the drafts it verified
    (see `scheduler.budget`), else the rows left are no fair sample.

    The search is over temperatures 0.1 to 10: a log-spaced grid, then a finer one between the
    neighbours of its best point. Of equally good temperatures the one closest to 1 wins, so
    the error of a prefix never exceeds what T_k = 1 gives. A position that fewer than
    100 (`MIN_OBSERVATIONS`) rows verified keeps temperature 1.

    Args:
        confidence: [N, γ] of numbers, probabilities in [0, 1], raw: c_k of every round.
        accepted: int [N], drafts: round i accepted its first `accepted[i]`, ≤ `verified[i]`.
        verified: int [N], drafts: round i verified its first `verified[i]`, in 0..γ.

    Returns:
        float64 [γ], positive, without unit.

    Raises:
        ValueError: an argument, which it names, is outside of what is said above, empty or NaN.
    """
    odds, accepted, verified = _checked(confidence, accepted, verified)
    gamma = odds.shape[1]
    temperatures = np.ones(gamma)
    survival = np.ones(odds.shape[0])
    for k in range(1, gamma + 1):
        rows = np.flatnonzero(verified >= k)
        if rows.size >= MIN_OBSERVATIONS:
            observed = (accepted[rows] >= k).astype(np.float64)
            temperatures[k - 1] = _search(survival[rows], odds[rows, k - 1], observed)
        survival *= _scaled(odds[:, k - 1], temperatures[k - 1])
    return temperatures


def apply_temperatures(
    confidence: npt.ArrayLike, temperatures: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """c ← σ(logit(c) / T), column by column.

    Order within a column is preserved, though rounding may make neighbours equal. 0 and 1
    stay 0 and 1, temperature 1 changes nothing, and nothing becomes NaN.

    Args:
        confidence: [N, γ] of numbers, probabilities in [0, 1].
        temperatures: [γ] of numbers, positive and finite.

    Returns:
        float64 [N, γ], probabilities.

    Raises:
        ValueError: an argument, which it names, is outside of what is said above, empty or NaN.
    """
    confidence = checks.probabilities("confidence", confidence, 2, "[N, γ]").astype(np.float64)
    temperatures = checks.positives("temperatures", temperatures, "[γ]")
    if temperatures.shape != confidence.shape[1:]:
        raise ValueError(
            f"temperatures must have shape [γ] = {confidence.shape[1:]}, got {temperatures.shape}"
        )
    return np.where(temperatures == 1, confidence, _scaled(_odds(confidence), temperatures))


def _odds(confidence: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """exp(−logit(c)) = (1 − c) / c: inf at 0, and in order also after rounding."""
    with np.errstate(divide="ignore", over="ignore"):
        return (1 - confidence) / confidence


def _scaled(
    odds: npt.NDArray[np.float64], temperature: npt.NDArray[np.float64] | float
) -> npt.NDArray[np.float64]:
    """σ(logit(c) / T) = 1 / (1 + odds^(1/T)): odds of 0 and inf stay what they are."""
    with np.errstate(over="ignore", under="ignore", divide="ignore"):
        return 1 / (1 + odds ** np.divide(1.0, temperature))


def _search(
    survival: npt.NDArray[np.float64],
    odds: npt.NDArray[np.float64],
    observed: npt.NDArray[np.float64],
) -> float:
    """The temperature of one position; `survival` [n] is that of the prefix before it."""

    def best(log_temperatures: npt.NDArray[np.float64]) -> float:
        errors = [
            binned_gap(survival * _scaled(odds, float(np.exp(t))), observed, BINS)
            for t in log_temperatures
        ]
        return float(log_temperatures[int(np.argmin(errors))])

    def nearest_first(grid: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return grid[np.argsort(np.abs(grid), kind="stable")]

    coarse = np.linspace(np.log(LOWEST), np.log(HIGHEST), COARSE)
    coarse[COARSE // 2] = 0  # T = 1 exactly
    step = coarse[1] - coarse[0]
    middle = best(nearest_first(coarse))
    fine = middle + step * np.linspace(-1, 1, FINE)
    fine[FINE // 2] = middle
    return float(np.exp(best(nearest_first(fine[(fine >= coarse[0]) & (fine <= coarse[-1])]))))


def _checked(
    confidence: npt.ArrayLike, accepted: npt.ArrayLike, verified: npt.ArrayLike
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    confidence = checks.probabilities("confidence", confidence, 2, "[N, γ]")
    rounds, gamma = confidence.shape
    verified = checks.lengths("verified", verified, "[N]", rounds, gamma)
    accepted = checks.lengths("accepted", accepted, "[N]", rounds, gamma)
    if (accepted > verified).any():
        raise ValueError("accepted must not exceed verified")
    return _odds(confidence.astype(np.float64)), accepted, verified


def checked_temperatures(temperatures: npt.ArrayLike, gamma: int) -> npt.NDArray[np.float64]:
    """A copy of them, float64 [γ].

    Raises:
        ValueError: they are not [γ], or not in 0.1..10.
    """
    temperatures = checks.positives("temperatures", temperatures, "[γ]")
    if temperatures.shape != (gamma,):
        raise ValueError(f"temperatures must have shape [γ] = ({gamma},), got {temperatures.shape}")
    # Both ends are reached by exp(log(end)), which may round outwards.
    if temperatures.min() < LOWEST * 0.999 or temperatures.max() > HIGHEST * 1.001:
        raise ValueError(f"temperatures must lie in {LOWEST:g} to {HIGHEST:g}, got {temperatures}")
    return temperatures.copy()
