"""Weights of one tile of the row that a request's next token is drawn from (`residual`).

    after the last draft     w(x) = p(x)
    in place of a draft      w(x) = max(a·p(x) - q(x), 0), a = 1 unless verification is by blocks

Where q is all on the rejected draft, that is p without this word. Where q has K candidates, it is 0
elsewhere, and the few candidates of a tile are taken from it one by one.

The largest logit and the sum of a row are known where a draft was tested against it. For p itself
neither is needed: a tile's weights are taken relative to its own likeliest word.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_dspark.kernels.verify_batch import DENSE, ONE_HOT
from vllm_dspark.kernels.verify_math import (
    LOG2_E,
    finite_or_infinite,
    is_distribution,
    passes_min_p,
    probability,
    target_logits,
    target_noise_key,
    target_scale,
)


@triton.jit
def _powers(logit, scale):
    """Weights of a tile of p relative to its likeliest word, and the logarithm of that one's own.

    A tile without any word has weights 0, one with a logit of +inf has an infinite weight.
    """
    peak = tl.max(logit, axis=0)
    peak = tl.where(is_distribution(peak), peak, 0.0)  # neither -inf - -inf nor inf - inf
    return tl.exp2((logit - peak) * scale), peak * (scale / LOG2_E)


@triton.jit
def _without_candidates(
    weight, word, first, ids_ptr, logprobs_ptr, width, WORDS: tl.constexpr, CANDIDATES: tl.constexpr
):
    """max(weight - q, 0) of the words of a tile, from K candidates in any order.

    As many turns as candidates fall into the tile, one or two of 64: candidates are picked by
    ascending word.
    """
    candidate = tl.arange(0, CANDIDATES)
    inside = candidate < width
    logprob = tl.load(logprobs_ptr + candidate, mask=inside, other=-float("inf"))
    ids = tl.load(ids_ptr + candidate, mask=inside, other=-1)
    end = first + WORDS
    here = (ids >= first) & (ids < end) & (logprob > -float("inf"))
    taken = first - 1
    for _ in range(tl.sum(here.to(tl.int32), axis=0)):
        taken = tl.min(tl.where(here & (ids > taken), ids, end), axis=0)
        q = tl.sum(tl.where(here & (ids == taken), tl.exp(logprob), 0.0), axis=0)
        weight = tl.where(word == taken, tl.maximum(weight - q, 0.0), weight)
    return weight


@triton.jit
def tile_weights(
    choice_ptr,
    totals_ptr,
    emitted_ptr,
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
    positions_ptr,
    slots_ptr,
    temperature_ptr,
    min_p_ptr,
    seeds_ptr,
    vocab,
    request,
    row,
    tile,
    KIND: tl.constexpr,
    WORDS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """What both launches of `residual` need of a tile of the chosen row.

    Args:
        row: int64, of the logits.
        tile: int32, its words are tile · WORDS and those that follow.

    Returns:
        weight: float32 [WORDS], w(x) / f of a tile's words, in any unit that the whole row shares;
            a greedy request's logits.
        log_factor: float32, log f.
        temperature: float32.
        key: uint32, of the row's noise.
    """
    first = tile * WORDS
    word = first + tl.arange(0, WORDS)
    logit = target_logits(
        logits_ptr, logits_stride, processed_ptr, processed_stride, processed_row_ptr,
        row, word, word < vocab,
    )  # fmt: skip
    rejected = tl.load(choice_ptr + 2 * request + 1)
    slot = tl.load(slots_ptr + request).to(tl.int64)
    step = tl.load(emitted_ptr + request).to(tl.int64) - 1
    at = slot * draft_stride + step * draft_step
    if KIND == DENSE:  # before any branch, so that it is on its way together with the logits
        there = word < tl.where(rejected >= 0, draft_width, 0)
        other = tl.load(draft_ptr + at + word, mask=there, other=-float("inf"))
    temperature = tl.load(temperature_ptr + slot).to(tl.float32)
    key = target_noise_key(tl.load(seeds_ptr + slot), tl.load(positions_ptr + row).to(tl.int64))
    weight = logit
    log_factor = tl.full((), 0.0, tl.float32)
    if temperature != 0.0:
        scale = target_scale(temperature, processed_ptr, processed_row_ptr, row)
        peak = tl.load(totals_ptr + 5 * request)
        if min_p_ptr is not None:
            min_p = tl.load(min_p_ptr + slot).to(tl.float32)
            if min_p > 0.0:
                logit = tl.where(passes_min_p(logit, peak, scale, min_p), logit, -float("inf"))
        if KIND == ONE_HOT:
            weight, log_factor = _powers(tl.where(word == rejected, -float("inf"), logit), scale)
        elif rejected < 0:
            weight, log_factor = _powers(logit, scale)
        else:
            total = tl.load(totals_ptr + 5 * request + 1)
            factor = tl.load(totals_ptr + 5 * request + 4)
            weight = factor * probability(logit, peak, total, scale)
            if KIND == DENSE:
                own_peak = tl.load(totals_ptr + 5 * request + 2)
                own_total = tl.load(totals_ptr + 5 * request + 3)
                own_scale = LOG2_E / temperature
                q = probability(finite_or_infinite(other), own_peak, own_total, own_scale)
                weight = tl.maximum(weight - q, 0.0)
            else:
                weight = _without_candidates(
                    weight, word, first, ids_ptr + at, draft_ptr + at, draft_width,
                    WORDS, CANDIDATES,
                )  # fmt: skip
    return weight, log_factor, temperature, key
