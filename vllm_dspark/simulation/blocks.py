"""Verification by blocks (`vllm_dspark.kernels.block_verify`) of drafts whose acceptance is known.

What a block lets through depends on how much likelier the target finds each draft than the drafter
does, ρ = p(x) / q(x). One by one, a draft is accepted with the mean of min(ρ, 1). Over what the
drafter draws, ρ has mean 1; it is taken to be lognormal, so that acceptance α says all of it:

    ln ρ ~ N(-σ²/2, σ),   α = 2 Φ(-σ/2)

What is left of p behind a prefix, d = E max(a·ρ - 1, 0), is an option's price then (Black and
Scholes 1973):

    d = a Φ(s) - Φ(s - σ),   s = ln(a) / σ + σ/2
"""

from __future__ import annotations

import numpy as np

from vllm_dspark.simulation.policies import Floats, Ints

_LEAST, _MOST = 1e-9, 1 - 1e-9  # of an acceptance, and least of what is divided by


def accepted_by_block(random: np.random.Generator, acceptance: Floats, verified: Ints) -> Ints:
    """Drafts of each block that are let through.

    Args:
        acceptance: [R, γ], of each draft if verified one by one, given that those before it are.
        verified: [R], drafts of each block, 0 to γ.

    Returns:
        int64 [R].
    """
    spread = -2 * _quantile(np.clip(acceptance, _LEAST, _MOST) / 2)
    ratio = np.exp(spread * random.standard_normal(spread.shape) - spread**2 / 2)
    luck = random.random(spread.shape)
    accepted = np.zeros(len(verified), dtype=np.int64)
    before = np.ones(len(verified))
    for i in range(int(verified.max(initial=0))):
        before = np.minimum(before * ratio[:, i], 1.0)
        threshold = before
        if i + 1 < spread.shape[1]:
            left = _left(before, spread[:, i + 1])
            partial = left / np.maximum(left + 1 - before, _LEAST)
            threshold = np.where(verified == i + 1, before, partial)
        passes = (verified > i) & (luck[:, i] < threshold)
        accepted[passes] = i + 1
    return accepted


def _left(before: Floats, spread: Floats) -> Floats:
    """d behind a prefix, by what the next draft's ratio may be."""
    at = np.log(np.maximum(before, _LEAST)) / spread + spread / 2
    return np.maximum(before * _normal(at) - _normal(at - spread), 0.0)


def _normal(x: Floats) -> Floats:
    """Φ."""
    import torch  # takes a second, which simulations without blocks need not wait for

    found: Floats = torch.special.ndtr(torch.from_numpy(x)).numpy()
    return found


def _quantile(share: Floats) -> Floats:
    """Φ⁻¹."""
    import torch

    found: Floats = torch.special.ndtri(torch.from_numpy(share)).numpy()
    return found
