"""What the verification kernels share: reading rows, and probabilities from tiles' sums.

The distribution of a row is p(x) = 2^((l_x - m)·s) / Σ_y 2^((l_y - m)·s) with m the row's largest
logit and s = log2(e) / temperature. The difference to the largest logit is taken before the
scaling, where it is exact or nearly so; that keeps p right to a few roundings at low temperatures,
where l·s is large.

A logit that is no number is read as +inf. A row whose largest logit is +inf, or -inf because every
word is excluded, has no distribution: its request fails, and no other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_dspark.kernels.gumbel import DRAFT_SALT, noise_key
from vllm_dspark.kernels.verify_batch import COMPACT, DENSE

LOG2_E = tl.constexpr(1.4426950408889634)
# The smallest positive value of `tl.rand`, which can be 0.
LEAST_UNIFORM = tl.constexpr(4.6566128730773926e-10)


@triton.jit
def finite_or_infinite(value):
    """float32 `value` with NaN as +inf."""
    value = value.to(tl.float32)
    return tl.where(value == value, value, float("inf"))


@triton.jit
def at_step(values, step, this):
    """values[this] of a vector [P] indexed by `step`; what stands elsewhere has no say."""
    return tl.sum(tl.where(step == this, values, tl.zeros_like(values)), axis=0)


@triton.jit
def draft_rows(offsets_ptr, tokens_ptr, request, STEPS: tl.constexpr):
    """A request's rows, side by side.

    Returns:
        First row and number of drafts, int64; then int64 [STEPS] each: step, row (never beyond the
        request's own), draft, -1 where there is none; and how many drafts there are before a
        placeholder.
    """
    start = tl.load(offsets_ptr + request).to(tl.int64)
    drafts = tl.load(offsets_ptr + request + 1) - start - 1
    step = tl.arange(0, STEPS).to(tl.int64)
    row = start + tl.minimum(step, drafts)
    draft = tl.load(tokens_ptr + row + 1, mask=step < drafts, other=-1).to(tl.int64)
    return start, drafts, step, row, draft, tl.min(tl.where(draft < 0, step, STEPS), axis=0)


@triton.jit
def is_distribution(peak):
    """Whether a row with this largest logit has a distribution."""
    return (peak > -float("inf")) & (peak < float("inf"))


@triton.jit
def target_logits(
    logits_ptr, logits_stride, processed_ptr, processed_stride, processed_row_ptr, row, word, mask
):
    """Logits of `word` in `row`, float32, from `processed` where the row is there; -inf outside of
    `mask`. `row` is int64 and broadcasts against `word`.
    """
    if processed_ptr is None:
        value = tl.load(logits_ptr + row * logits_stride + word, mask=mask, other=-float("inf"))
        value = value.to(tl.float32)
    else:
        # Both loads stand there, and the one that is not meant is masked out, which costs nothing.
        own, _ = tl.broadcast(tl.load(processed_row_ptr + row).to(tl.int64), word)
        raw = tl.load(
            logits_ptr + row * logits_stride + word, mask=mask & (own < 0), other=-float("inf")
        )
        ready = tl.load(
            processed_ptr + own * processed_stride + word,
            mask=mask & (own >= 0),
            other=-float("inf"),
        )
        value = tl.where(own >= 0, ready, raw.to(tl.float32))
    return finite_or_infinite(value)


@triton.jit
def target_scale(temperature, processed_ptr, processed_row_ptr, row):
    """s of target rows: processed ones went through the temperature already. Shaped like `row`."""
    scale = tl.where(row >= 0, LOG2_E / temperature, 0.0)
    if processed_ptr is not None:
        scale = tl.where(tl.load(processed_row_ptr + row) >= 0, LOG2_E, scale)
    return scale


@triton.jit
def row_totals(
    stats_ptr, plane, row, wanted, scale, tiles, PLANES: tl.constexpr, TILES: tl.constexpr
):
    """Largest logit and sum of a distribution of rows [P], from their tiles' (`verify_stats`).

    Args:
        plane: 0 for the target, 2 for the draft.
        wanted: bool [P]; others give -inf and 0.
        scale: float32 [P].

    Returns:
        float32 [P] each. The sum is no number where the largest logit is +inf.
    """
    tile = tl.arange(0, TILES)
    at = stats_ptr + (row * PLANES + plane)[:, None] * tiles + tile[None, :]
    inside = wanted[:, None] & (tile < tiles)[None, :]
    # Not from the L1 cache: in the launch that makes them, other multiprocessors wrote some.
    peaks = tl.load(at, mask=inside, other=-float("inf"), cache_modifier=".cg")
    sums = tl.load(at + tiles, mask=inside, other=0.0, cache_modifier=".cg")
    peaks = finite_or_infinite(peaks)  # rows that were left out hold anything
    peak = tl.max(peaks, axis=1)
    weight = tl.exp2((peaks - peak[:, None]) * scale[:, None])
    return peak, tl.sum(tl.where(peaks > -float("inf"), sums * weight, 0.0), axis=1)


@triton.jit
def row_argmax(stats_ptr, row, wanted, tiles, PLANES: tl.constexpr, TILES: tl.constexpr):
    """Largest logit float32 [P] and its word int64 [P], the lowest among equals, of greedy rows."""
    tile = tl.arange(0, TILES)
    at = stats_ptr + (row * PLANES)[:, None] * tiles + tile[None, :]
    inside = wanted[:, None] & (tile < tiles)[None, :]
    peaks = tl.load(at, mask=inside, other=-float("inf"), cache_modifier=".cg")
    words = tl.load(at + tiles, mask=inside, other=0.0, cache_modifier=".cg")
    peak, best = tl.max(finite_or_infinite(peaks), axis=1, return_indices=True)
    word = tl.sum(tl.where(tile[None, :] == best[:, None], words, 0.0), axis=1)
    return peak, word.to(tl.int64)


@triton.jit
def probability(logit, peak, total, scale):
    """p of a word; 0 where it is excluded. Not a number where there is no distribution."""
    return tl.exp2((logit - peak) * scale) / total


@triton.jit
def passes_min_p(logit, peak, scale, min_p):
    """Whether a word's probability is at least min_p times the likeliest word's."""
    return (logit - peak) * scale >= tl.log2(min_p)


@triton.jit
def draft_probability(
    draft_ptr,
    ids_ptr,
    draft_stride,
    draft_step,
    draft_width,
    slot,
    step,
    word,
    wanted,
    peak,
    total,
    scale,
    KIND: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """q of `word` at `step` of a request's block, float32 [P]; step, word, wanted, peak, total [P].

    Args:
        peak, total: of the draft's own logits where they are dense, else not used.
        scale: float32, log2(e) / temperature.
    """
    at = slot * draft_stride + step.to(tl.int64) * draft_step
    if KIND == DENSE:
        logit = tl.load(
            draft_ptr + at + word, mask=wanted & (word < draft_width), other=-float("inf")
        )
        q = probability(finite_or_infinite(logit), peak, total, scale)
    elif KIND == COMPACT:
        candidate = tl.arange(0, CANDIDATES)
        inside = wanted[:, None] & (candidate < draft_width)[None, :]
        ids = tl.load(ids_ptr + at[:, None] + candidate[None, :], mask=inside, other=-1)
        logprob = tl.load(
            draft_ptr + at[:, None] + candidate[None, :], mask=inside, other=-float("inf")
        )
        q = tl.sum(tl.where(ids == word[:, None], tl.exp(logprob), 0.0), axis=1)
    else:
        q = tl.where(wanted, 1.0, 0.0)
    return q


@triton.jit
def accepts(p, q, u):
    """The test of Leviathan et al. 2023: u < p / q, with neither division nor logarithm, so that
    p = q passes for certain. A word that the target excludes never passes."""
    return (p >= u * q) & (p > 0.0)


@triton.jit
def uniform(seed, position):
    """u in (0, 1), float32, shaped like `position`; vLLM's own for this seed and position."""
    return tl.maximum(tl.rand(seed, position), LEAST_UNIFORM)


@triton.jit
def target_noise_key(seed, position):
    """`noise_key` of a token that the target draws: the salt is for drafts only."""
    return noise_key(seed, position - DRAFT_SALT, 0, False)


@triton.jit
def judged(
    stats_ptr,
    logits_ptr,
    logits_stride,
    processed_ptr,
    processed_stride,
    processed_row_ptr,
    draft_ptr,
    ids_ptr,
    draft_stride,
    draft_step,
    draft_width,
    row,
    step,
    draft,
    wanted,
    known,
    slot,
    temperature,
    min_p,
    tiles,
    KIND: tl.constexpr,
    PLANES: tl.constexpr,
    TILES: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """p and q of the drafts of a sampled request's rows [P], and the rows' totals.

    Args:
        row, step, draft: int64 [P], row of the logits, place in the block, word.
        wanted: bool [P], rows with a draft; others give p = q = 0.
        known: bool [P], rows whose totals are asked for and were made.

    Returns:
        float32 [P] each: p, q, largest logit and sum of the target, of the dense draft (else 0).
    """
    scale = target_scale(temperature, processed_ptr, processed_row_ptr, row)
    peak, total = row_totals(stats_ptr, 0, row, known, scale, tiles, PLANES, TILES)
    logit = target_logits(
        logits_ptr, logits_stride, processed_ptr, processed_stride, processed_row_ptr,
        row, draft, wanted,
    )  # fmt: skip
    p = tl.where(wanted, probability(logit, peak, total, scale), 0.0)
    if min_p > 0.0:
        p = tl.where(passes_min_p(logit, peak, scale, min_p), p, 0.0)
    own_scale = LOG2_E / temperature
    own_peak, own_total = tl.zeros_like(p), tl.zeros_like(p)
    if KIND == DENSE:
        scales = tl.where(wanted, own_scale, 0.0)
        own_peak, own_total = row_totals(stats_ptr, 2, row, wanted, scales, tiles, PLANES, TILES)
    q = draft_probability(
        draft_ptr, ids_ptr, draft_stride, draft_step, draft_width, slot, step, draft, wanted,
        own_peak, own_total, own_scale, KIND, CANDIDATES,
    )  # fmt: skip
    return p, q, peak, total, own_peak, own_total
