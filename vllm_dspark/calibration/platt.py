"""Platt scaling of many positions at once: one damped Newton step on binned observations.

A map turns a logit z into the probability σ(s·z + b). Of a position's observations, bin j holds
their weight n_j, the weight y_j of those accepted and their mean logit z_j. Minimised is

    F(s, b) = Σ_j [n_j log(1 + e^{u_j}) − y_j u_j] + λ_s/2 (s − s⁰)² + λ_b/2 (b − b⁰)²,
    u_j = s·z_j + b,

the log-loss with a pull towards (s⁰, b⁰) (Platt 1999; "regularised" by a known map instead of
by smoothed labels, so that no observations at all give that map).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

SLOPE_RANGE = 0.1, 5.0
# The pull in units of curvature. An observation of a draft with an acceptance of about 0.8 adds
# 0.16 to that of b, and as much times z² to that of s: 20 observations outweigh either pull
# where the logits have a spread of one and a half.
INTERCEPT_PULL = 3.0
SLOPE_PULL = 8.0


def sigmoid(u: Floats) -> Floats:
    """σ(u), for |u| < 700."""
    return 1 / (1 + np.exp(-u))


def newton_step(
    slope: Floats,  # [..., γ] s, within SLOPE_RANGE
    intercept: Floats,  # [..., γ] b
    towards: tuple[Floats, Floats],  # s⁰ and b⁰, [..., γ] each
    count: Floats,  # [..., γ, bins] n_j
    accepts: Floats,  # [..., γ, bins] y_j
    logit: Floats,  # [..., γ, bins] z_j, finite, also in empty bins
) -> tuple[Floats, Floats]:
    """(s, b) after one step, which never raises F and keeps s within `SLOPE_RANGE`.

    The step is the minimum of F's quadratic model with s in its range, cut to log(1 + d)/d of
    its length, where d is the largest change of any u_j. With that length Newton's method
    descends from anywhere, because the curvature of the log-loss grows at most by e^|change of
    u| (generalised self-concordance; Bach, arXiv 0910.4627, lemma 1), and near the minimum,
    where d → 0, it is the whole step.
    """
    probability = sigmoid(slope[..., None] * logit + intercept[..., None])
    residual = accepts - count * probability
    curvature = count * probability * (1 - probability)
    slope_force = _along(residual, logit) - SLOPE_PULL * (slope - towards[0])
    intercept_force = residual.sum(-1) - INTERCEPT_PULL * (intercept - towards[1])
    moment = curvature * logit
    mixed = moment.sum(-1)
    by_slope = _along(moment, logit) + SLOPE_PULL
    by_intercept = curvature.sum(-1) + INTERCEPT_PULL

    # The pulls keep the determinant positive.
    determinant = by_slope * by_intercept - mixed**2
    full = (by_intercept * slope_force - mixed * intercept_force) / determinant
    slope_step = np.clip(slope + full, *SLOPE_RANGE) - slope
    intercept_step = (intercept_force - mixed * slope_step) / by_intercept

    change = np.abs(slope_step[..., None] * logit + intercept_step[..., None])
    largest = np.maximum((change * (count > 0)).max(-1), 1e-9)
    length = np.log1p(largest) / largest
    return (
        np.clip(slope + length * slope_step, *SLOPE_RANGE),  # rounding alone leaves the range
        intercept + length * intercept_step,
    )


def _along(values: Floats, logit: Floats) -> Floats:
    """Σ_j values_j · logit_j."""
    return np.einsum("...j,...j->...", values, logit)
