"""Batched verification, last two launches: one token of the target's own for each request.

It is drawn from a single row, the one that `Choice` names:

    after the last draft     p
    in place of a draft      r(x) ∝ max(a·p(x) - q(x), 0), a = 1 unless verification is by blocks

Gumbel-max draws from weights as they are: the argmax of log w(x) + g(x), with g a function of
(seed, position, word). Where q is all on the rejected draft, r is p without that word. Where q has
K candidates, it is 0 elsewhere, and the few candidates of a tile are taken into it one by one.

Only these R rows are read, tile by tile, so rows behind a rejection cost nothing here, whether or
not the first launch read them. The second launch takes the best of the tiles.

Hash and logarithms of the noise make this a matter of arithmetic, not of bandwidth, so tiles are
small: 1024 words for four warps are one load of 16 bytes and about fifty registers a thread, and
one request alone still keeps all multiprocessors at work.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_dspark.kernels.gumbel import gumbel
from vllm_dspark.kernels.verify_batch import DENSE, ONE_HOT, Batch
from vllm_dspark.kernels.verify_math import (
    LOG2_E,
    finite_or_infinite,
    passes_min_p,
    probability,
    target_logits,
    target_noise_key,
    target_scale,
)
from vllm_dspark.kernels.verify_verdict import Choice, Verdict

WORDS = 1024  # a best word is the best of the tiles' best, wherever they are cut


@triton.jit
def _compact_tile(ids_ptr, logprobs_ptr, width, word, CANDIDATES: tl.constexpr):
    """q of a tile's words, from K candidates in any order.

    As many turns as candidates fall into the tile, two or so of 64: candidates are picked by
    ascending word.
    """
    candidate = tl.arange(0, CANDIDATES)
    inside = candidate < width
    logprob = tl.load(logprobs_ptr + candidate, mask=inside, other=-float("inf"))
    first, last = tl.min(word, axis=0), tl.max(word, axis=0)
    ids = tl.load(ids_ptr + candidate, mask=inside, other=-1)
    here = (ids >= first) & (ids <= last) & (logprob > -float("inf"))
    q = tl.zeros_like(word).to(tl.float32)
    taken = first - 1
    for _ in range(tl.sum(here.to(tl.int32), axis=0)):
        taken = tl.min(tl.where(here & (ids > taken), ids, last + 1), axis=0)
        of_taken = tl.sum(tl.where(here & (ids == taken), tl.exp(logprob), 0.0), axis=0)
        q = tl.where(word == taken, of_taken, q)
    return q


@triton.jit
def residual_kernel(
    best_ptr,  # float32 [R, tiles], out
    word_ptr,  # int32 [R, tiles], out
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
    tiles,
    KIND: tl.constexpr,
    WORDS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    tile, request = tl.program_id(0), tl.program_id(1)
    row = tl.load(choice_ptr + 2 * request).to(tl.int64)
    if row < 0:
        return
    word = tile * WORDS + tl.arange(0, WORDS)
    logit = target_logits(
        logits_ptr, logits_stride, processed_ptr, processed_stride, processed_row_ptr,
        row, word, word < vocab,
    )  # fmt: skip
    rejected = tl.load(choice_ptr + 2 * request + 1)
    slot = tl.load(slots_ptr + request).to(tl.int64)
    temperature = tl.load(temperature_ptr + slot).to(tl.float32)
    score = logit
    if temperature != 0.0:
        position = tl.load(positions_ptr + row).to(tl.int64)
        noise = gumbel(target_noise_key(tl.load(seeds_ptr + slot), position), word)
        scale = target_scale(temperature, processed_ptr, processed_row_ptr, row)
        peak = tl.load(totals_ptr + 5 * request)
        if min_p_ptr is not None:
            min_p = tl.load(min_p_ptr + slot).to(tl.float32)
            if min_p > 0.0:
                logit = tl.where(passes_min_p(logit, peak, scale, min_p), logit, -float("inf"))
        score = tl.where(word == rejected, -float("inf"), logit * (scale / LOG2_E) + noise)
        if KIND != ONE_HOT:  # noqa: SIM102 (decided when compiling)
            if rejected >= 0:
                total = tl.load(totals_ptr + 5 * request + 1)
                factor = tl.load(totals_ptr + 5 * request + 4)
                step = tl.load(emitted_ptr + request).to(tl.int64) - 1
                at = slot * draft_stride + step * draft_step
                if KIND == DENSE:
                    other = tl.load(
                        draft_ptr + at + word, mask=word < draft_width, other=-float("inf")
                    )
                    own_peak = tl.load(totals_ptr + 5 * request + 2)
                    own_total = tl.load(totals_ptr + 5 * request + 3)
                    own_scale = LOG2_E / temperature
                    q = probability(finite_or_infinite(other), own_peak, own_total, own_scale)
                else:
                    q = _compact_tile(ids_ptr + at, draft_ptr + at, draft_width, word, CANDIDATES)
                left = factor * probability(logit, peak, total, scale) - q
                weight = tl.where(left > 0.0, left, 1.0)
                score = tl.where(left > 0.0, tl.log(weight) + noise, -float("inf"))
    best, at_word = tl.max(score, axis=0, return_indices=True)  # the lowest word among equals
    tl.store(best_ptr + request * tiles + tile, best)
    tl.store(word_ptr + request * tiles + tile, tile * WORDS + at_word)


@triton.jit
def residual_pick_kernel(
    tokens_ptr,
    emitted_ptr,
    failed_ptr,
    choice_ptr,
    best_ptr,
    word_ptr,
    tiles,
    GAMMA: tl.constexpr,
    TILES: tl.constexpr,
):
    request = tl.program_id(0)
    if tl.load(choice_ptr + 2 * request) < 0:
        return
    tile = tl.arange(0, TILES)
    best = tl.load(best_ptr + request * tiles + tile, mask=tile < tiles, other=-float("inf"))
    top, at = tl.max(best, axis=0, return_indices=True)
    token = tl.load(word_ptr + request * tiles + at).to(tl.int64)
    rejected = tl.load(choice_ptr + 2 * request + 1).to(tl.int64)
    if top == -float("inf"):
        # Nothing is left of p but what rounding makes of p = q, so the draft was p's own choice.
        # From p itself nothing can be drawn where every word is excluded.
        token = tl.where(rejected >= 0, rejected, 0)
    failed = (top == float("inf")) | ((top == -float("inf")) & (rejected < 0))
    if failed:
        token = tl.zeros_like(token)
        tl.store(failed_ptr + request, 1)
    step = tl.load(emitted_ptr + request) - 1
    tl.store(tokens_ptr + request * (GAMMA + 1) + step, token)


def residual(
    batch: Batch,
    choice: Choice,  # of the acceptance test
    verdict: Verdict,  # in and out: tokens that are to be drawn are filled in, failures are noted
) -> None:
    """Draw the token after each request's accepted drafts, where it is not known already."""
    words = min(WORDS, triton.next_power_of_2(batch.vocab_size))
    tiles = triton.cdiv(batch.vocab_size, words)
    best = torch.empty(batch.requests, tiles, device=batch.logits.device)
    word = torch.empty_like(best, dtype=torch.int32)
    residual_kernel[(tiles, batch.requests)](
        best,
        word,
        choice.row,
        choice.totals,
        verdict.emitted,
        *batch.target_arguments(),
        *batch.draft_arguments(),
        *batch.request_arguments()[2:],
        batch.vocab_size,
        tiles,
        KIND=batch.kind,
        WORDS=words,
        CANDIDATES=batch.candidates,
        num_warps=4,
    )
    residual_pick_kernel[(batch.requests,)](
        verdict.tokens,
        verdict.emitted,
        verdict.failed,
        choice.row,
        best,
        word,
        tiles,
        GAMMA=batch.gamma,
        TILES=triton.next_power_of_2(tiles),
        num_warps=1,
    )
