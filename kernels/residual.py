"""Batched verification, last two launches: one token of the target's own for each request.

It is drawn from a single row, the one that `Choice` names, in proportion to w(x)
(`residual_weights`), by Gumbel-max in two stages: a tile of the vocabulary, then a word of it.

    W_t = Σ w(x) over tile t     t* = argmax log W_t + g(t)     P(t) = W_t / W
                                 x* = argmax log w(x) + g(x)    P(x | t) = w(x) / W_t,  x in t*

So P(x) = w(x) / W, exactly. g is Gumbel noise, a function of (seed, position, number). A word's
number is its own, a tile's is one that no word has, so the stages are independent. A greedy request
takes the largest logit in both, without noise, the lowest among equals.

Noise costs a hash and two logarithms, far more than a weight does. The first launch makes one for
each tile; the second one for each word of the tile that won, which it reads again. So this is
bound by memory. Only these R rows are read: rows behind a rejection cost nothing here, whether or
not the first launch of verification read them.

Why these tiles. 2048 bf16 words for four warps are two loads of 16 bytes a thread, and two more of
a dense draft, all in flight at once. With at most 48 registers a thread, ten such programs or more
fit on a multiprocessor, 40 to 80 KB on their way in all, which is what it takes to keep an H100's
memory busy. One request and 151,936 words give 75 programs, and the second launch 8 words a thread.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_dspark.kernels.gumbel import gumbel
from vllm_dspark.kernels.residual_weights import tile_weights
from vllm_dspark.kernels.verify_batch import Batch
from vllm_dspark.kernels.verify_verdict import Choice, Verdict

WORDS = 2048


def residual_tiles(vocab_size: int) -> tuple[int, int]:
    """Words of a tile, a power of two, and tiles of the vocabulary. A function of the vocabulary
    alone, so that a request's tokens do not depend on its neighbours."""
    words = min(WORDS, triton.next_power_of_2(vocab_size))
    return words, triton.cdiv(vocab_size, words)


@triton.jit
def _score(weight, noise):
    """log weight + noise; -inf where there is no weight."""
    return tl.where(
        weight > 0.0, tl.log(tl.where(weight > 0.0, weight, 1.0)) + noise, -float("inf")
    )


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def residual_kernel(
    score_ptr,  # float32 [R, tiles], out
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
    weight, log_factor, temperature, key = tile_weights(
        choice_ptr, totals_ptr, emitted_ptr, logits_ptr, logits_stride, processed_ptr,
        processed_stride, processed_row_ptr, draft_ptr, ids_ptr, draft_stride, draft_step,
        draft_width, positions_ptr, slots_ptr, temperature_ptr, min_p_ptr, seeds_ptr, vocab,
        request, row, tile, KIND, WORDS, CANDIDATES,
    )  # fmt: skip
    if temperature == 0.0:
        score = tl.max(weight, axis=0)
    else:
        noise = gumbel(key, tiles * WORDS + tile)
        score = _score(tl.sum(weight, axis=0), log_factor + noise)
    tl.store(score_ptr + request * tiles + tile, score)


@triton.jit(do_not_specialize_on_alignment=["failed_ptr", "slots_ptr"])
def residual_pick_kernel(
    tokens_ptr,
    failed_ptr,
    score_ptr,
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
    GAMMA: tl.constexpr,
    KIND: tl.constexpr,
    WORDS: tl.constexpr,
    TILES: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    request = tl.program_id(0)
    row = tl.load(choice_ptr + 2 * request).to(tl.int64)
    if row < 0:
        return
    each = tl.arange(0, TILES)
    scores = tl.load(score_ptr + request * tiles + each, mask=each < tiles, other=-float("inf"))
    _, tile = tl.max(scores, axis=0, return_indices=True)  # the lowest tile among equals
    weight, _, temperature, key = tile_weights(
        choice_ptr, totals_ptr, emitted_ptr, logits_ptr, logits_stride, processed_ptr,
        processed_stride, processed_row_ptr, draft_ptr, ids_ptr, draft_stride, draft_step,
        draft_width, positions_ptr, slots_ptr, temperature_ptr, min_p_ptr, seeds_ptr, vocab,
        request, row, tile, KIND, WORDS, CANDIDATES,
    )  # fmt: skip
    score = weight
    if temperature != 0.0:
        score = _score(weight, gumbel(key, tile * WORDS + tl.arange(0, WORDS)))
    best, at = tl.max(score, axis=0, return_indices=True)  # and the lowest of its words
    token = (tile * WORDS + at).to(tl.int64)
    rejected = tl.load(choice_ptr + 2 * request + 1).to(tl.int64)
    if best == -float("inf"):
        # Nothing is left of p but what rounding makes of p = q, so the draft was p's own choice.
        # From p itself nothing can be drawn where every word is excluded.
        token = tl.where(rejected >= 0, rejected, 0)
    if (best == float("inf")) | ((best == -float("inf")) & (rejected < 0)):
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
    words, tiles = residual_tiles(batch.vocab_size)
    score = torch.empty(batch.requests, tiles, device=batch.logits.device)
    arguments = (
        score,
        choice.row,
        choice.totals,
        verdict.emitted,
        *batch.target_arguments(),
        *batch.draft_arguments(),
        *batch.request_arguments()[2:],
        batch.vocab_size,
        tiles,
    )
    static = {
        "KIND": batch.kind,
        "WORDS": words,
        "CANDIDATES": batch.candidates,
    }
    residual_kernel[(tiles, batch.requests)](*arguments, num_warps=4, **static)
    residual_pick_kernel[(batch.requests,)](
        verdict.tokens,
        verdict.failed,
        *arguments,
        GAMMA=batch.gamma,
        TILES=triton.next_power_of_2(tiles),
        num_warps=8,
        **static,
    )
