"""Block verification: drafts accepted together (Sun et al. 2024, arXiv 2403.10444, algorithm 2).

With a_0 = 1, a_i = min(a_(i-1) · p_i(x_i) / q_i(x_i), 1), the prefix of i drafts is accepted if

    u_i ≤ h_i = d_i / (d_i + 1 - a_i),   d_i = Σ_x max(a_i·p_(i+1)(x) - q_(i+1)(x), 0)

for i < ℓ, and h_ℓ = a_ℓ; the longest such prefix, τ, counts. The next token is drawn from
max(a_τ·p_(τ+1) - q_(τ+1), 0), or from p_(ℓ+1) if τ = ℓ. The probability of τ ≥ i given x_1..x_i is
a_i: so it is at i = ℓ, and from i + 1 it follows for i. That step uses x_1..x_i alone, so it holds
for any rule by which ℓ was chosen without looking ahead, trimmed blocks included.

d_i = a_i - Σ_x min(a_i·p(x), q(x)), and the sum runs over the words that q gives anything: one word
for a one-hot draft, K candidates for a compact one. Only a dense draft needs the rows once more,
in launches of its own (`block_overlap`).

u_i is keyed by (seed, position, i). A position beyond τ is judged again in the next round, as an
earlier draft of its block; without i it would be judged by a number that is known to have failed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_dspark.kernels.verify_batch import DENSE, Batch, tile_count, tile_words
from vllm_dspark.kernels.verify_math import (
    LOG2_E,
    at_step,
    draft_rows,
    finite_or_infinite,
    judged,
    passes_min_p,
    probability,
    target_logits,
    target_scale,
    uniform,
)

LEAST_Q = tl.constexpr(1.1754943508222875e-38)  # keeps p / q finite


@triton.jit
def prefix_ratios(p, q, step, ends):
    """a_i before each row [P], float32: 1 at step 0. Steps beyond `ends` are 0."""
    ratio = tl.where(p > 0.0, p / tl.maximum(q, LEAST_Q), 0.0)
    before = tl.zeros_like(ratio)
    running = tl.full((), 1.0, tl.float32)
    for i in range(ends + 1):
        before = tl.where(step == i, running, before)
        running = tl.minimum(running * at_step(ratio, step, i), 1.0)
    return before


@triton.jit
def compact_overlap(
    logits_ptr, logits_stride, processed_ptr, processed_stride, processed_row_ptr, draft_ptr,
    ids_ptr, width, at, row, wanted, peak, total, scale, min_p, before, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Σ_x min(a·p(x), q(x)) of rows [P] over their candidates.

    Args:
        at: int64 [P], where the row's candidates begin.
    """
    candidate = tl.arange(0, CANDIDATES)
    inside = wanted[:, None] & (candidate < width)[None, :]
    place = at[:, None] + candidate[None, :]
    ids = tl.load(ids_ptr + place, mask=inside, other=0).to(tl.int64)
    logprob = tl.load(draft_ptr + place, mask=inside, other=-float("inf"))
    there = inside & (logprob > -float("inf"))
    logit = target_logits(
        logits_ptr, logits_stride, processed_ptr, processed_stride, processed_row_ptr,
        row[:, None], ids, there,
    )  # fmt: skip
    p = probability(logit, peak[:, None], total[:, None], scale[:, None])
    if min_p > 0.0:
        p = tl.where(passes_min_p(logit, peak[:, None], scale[:, None], min_p), p, 0.0)
    shared = tl.minimum(before[:, None] * p, tl.exp(logprob))
    return tl.sum(tl.where(there, shared, 0.0), axis=1)


@triton.jit
def block_accepted(seed, positions_ptr, start, before, overlap, step, ends):
    """τ, from a_i and the overlaps of the rows [P] behind each prefix."""
    left = tl.maximum(before - overlap, 0.0)  # below 0 by rounding alone
    least = left + 1.0 - before
    partial = tl.where(least > 0.0, left / tl.where(least > 0.0, least, 1.0), 1.0)
    h = tl.where(step == ends, before, partial)
    judged_row = (step > 0) & (step <= ends)
    position = tl.load(positions_ptr + start + step - 1, mask=judged_row, other=0).to(tl.int64)
    own_seed = seed ^ ((step - 1).to(tl.int64) << 32)
    passes = judged_row & (uniform(own_seed, position) <= h)
    return tl.max(tl.where(passes, step, 0), axis=0)


@triton.jit(do_not_specialize_on_alignment=["offsets_ptr", "slots_ptr"])
def block_prefix_kernel(
    before_ptr,  # float32 [N], out: a_i before the row
    totals_ptr,  # float32 [N, 4], out: largest logit and sum of the target, and of the draft
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
    offsets_ptr,
    tokens_ptr,
    positions_ptr,
    slots_ptr,
    temperature_ptr,
    min_p_ptr,
    seeds_ptr,
    tiles,
    STEPS: tl.constexpr,
    PLANES: tl.constexpr,
    TILES: tl.constexpr,
):
    request = tl.program_id(0)
    slot = tl.load(slots_ptr + request).to(tl.int64)
    temperature = tl.load(temperature_ptr + slot).to(tl.float32)
    if temperature == 0.0:
        return
    min_p = tl.full((), 0.0, tl.float32)
    if min_p_ptr is not None:
        min_p = tl.load(min_p_ptr + slot).to(tl.float32)
    _, _, step, row, draft, verified = draft_rows(offsets_ptr, tokens_ptr, request, STEPS)
    wanted = step < verified
    p, q, peak, total, own_peak, own_total = judged(
        stats_ptr, logits_ptr, logits_stride, processed_ptr, processed_stride, processed_row_ptr,
        draft_ptr, ids_ptr, draft_stride, draft_step, draft_width, row, step, draft, wanted,
        wanted, slot, temperature, min_p, tiles, DENSE, PLANES, TILES, 1,
    )  # fmt: skip
    tl.store(before_ptr + row, prefix_ratios(p, q, step, verified), mask=wanted)
    tl.store(totals_ptr + 4 * row, peak, mask=wanted)
    tl.store(totals_ptr + 4 * row + 1, total, mask=wanted)
    tl.store(totals_ptr + 4 * row + 2, own_peak, mask=wanted)
    tl.store(totals_ptr + 4 * row + 3, own_total, mask=wanted)


@triton.jit(do_not_specialize_on_alignment=["offsets_ptr", "slots_ptr"])
def block_overlap_kernel(
    overlap_ptr,  # float32 [N, tiles], out
    before_ptr,
    totals_ptr,
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
    offsets_ptr,
    tokens_ptr,
    positions_ptr,
    slots_ptr,
    temperature_ptr,
    min_p_ptr,
    seeds_ptr,
    vocab,
    tiles,
    WORDS: tl.constexpr,
):
    # No prefix ends before the first draft, so its row has no overlap to make.
    tile, request, step = tl.program_id(0), tl.program_id(1), tl.program_id(2) + 1
    start = tl.load(offsets_ptr + request).to(tl.int64)
    drafts = tl.load(offsets_ptr + request + 1) - start - 1
    row = start + step
    if step >= drafts:
        return
    slot = tl.load(slots_ptr + request).to(tl.int64)
    temperature = tl.load(temperature_ptr + slot).to(tl.float32)
    if (temperature == 0.0) | (tl.load(tokens_ptr + row + 1) < 0):
        return
    word = tile * WORDS + tl.arange(0, WORDS)
    logit = target_logits(
        logits_ptr, logits_stride, processed_ptr, processed_stride, processed_row_ptr,
        row, word, word < vocab,
    )  # fmt: skip
    other = tl.load(
        draft_ptr + slot * draft_stride + step * draft_step + word,
        mask=word < draft_width,
        other=-float("inf"),
    )
    scale = target_scale(temperature, processed_ptr, processed_row_ptr, row)
    peak, total = tl.load(totals_ptr + 4 * row), tl.load(totals_ptr + 4 * row + 1)
    own_peak, own_total = tl.load(totals_ptr + 4 * row + 2), tl.load(totals_ptr + 4 * row + 3)
    if min_p_ptr is not None:
        min_p = tl.load(min_p_ptr + slot).to(tl.float32)
        if min_p > 0.0:
            logit = tl.where(passes_min_p(logit, peak, scale, min_p), logit, -float("inf"))
    p = probability(logit, peak, total, scale)
    q = probability(finite_or_infinite(other), own_peak, own_total, LOG2_E / temperature)
    overlap = tl.minimum(tl.load(before_ptr + row) * p, q)
    tl.store(overlap_ptr + row * tiles + tile, tl.sum(overlap, axis=0))


def block_overlap(batch: Batch, stats: torch.Tensor) -> torch.Tensor:
    """Σ min(a·p, q) of the rows of a dense draft behind the first, tile by tile.

    Args:
        stats: of `verify_stats`, for all rows.

    Returns:
        float32 [N, tiles]. Other rows hold nothing.
    """
    tiles = tile_count(batch.vocab_size)
    rows = batch.logits.shape[0]
    overlap = torch.empty(rows, tiles, device=batch.logits.device)
    if batch.steps < 2:
        return overlap
    before = torch.empty(rows, device=batch.logits.device)
    totals = torch.empty(rows, 4, device=batch.logits.device)
    arguments = (
        *batch.target_arguments(), *batch.draft_arguments(), *batch.request_arguments(),
    )  # fmt: skip
    block_prefix_kernel[(batch.requests,)](
        before,
        totals,
        stats,
        *arguments,
        tiles,
        STEPS=triton.next_power_of_2(batch.gamma + 1),
        PLANES=stats.shape[1],
        TILES=triton.next_power_of_2(tiles),
        num_warps=4,
    )
    block_overlap_kernel[(tiles, batch.requests, batch.steps - 1)](
        overlap,
        before,
        totals,
        *arguments,
        batch.vocab_size,
        tiles,
        WORDS=tile_words(batch.vocab_size),
        num_warps=4,
    )
    return overlap
