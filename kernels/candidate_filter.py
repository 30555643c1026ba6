"""A request's top-k and top-p among its candidates."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def passes_filters(
    logit,  # float32 [K], after temperature
    top_k,  # int32, at least 1
    top_p,  # float32, in (0, 1]
    K: tl.constexpr,
):
    """Which candidates the request may be given: those not below the top_k-th largest, and of
    these the largest until their probabilities sum to top_p. Equals stay or go together, as in
    vLLM's own filter. Nothing passes where every logit is -inf.

    Returns:
        bool [K].
    """
    place = tl.arange(0, K)
    ordered = tl.sort(logit, descending=True)
    kth = tl.sum(tl.where(place == tl.minimum(top_k, K) - 1, ordered, 0.0), axis=0)
    peak = tl.max(logit, axis=0)
    peak = tl.where(peak == -float("inf"), 0.0, peak)
    mass = tl.where(ordered >= kth, tl.exp(ordered - peak), 0.0)
    ahead = tl.cumsum(mass, axis=0) - mass
    inside = (ordered >= kth) & (ahead < top_p * tl.sum(mass, axis=0))
    return logit >= tl.min(tl.where(inside, ordered, float("inf")), axis=0)
