"""Batched verification, second launch: how many drafts of each request are accepted.

One program per request judges all of its rows side by side, from the tiles' numbers of the first
launch: u_i < p_i(x_i) / q_i(x_i) for a sampled request, x_i = argmax p_i for a greedy one. The
first draft that fails ends the accepted prefix; what stands behind it, even nonsense, has no say.
Verification by blocks judges sampled requests otherwise (`block_verify`).

It is known then which one row of the request the next token is drawn from, and how: from what the
rejected draft leaves of p, or, after the last draft, from p itself. That is noted for
`residual`, unless the token is known already: a greedy request takes the argmax in place of its
rejected draft.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_dspark.kernels.block_verify import (
    block_accepted,
    block_overlap,
    compact_overlap,
    prefix_ratios,
)
from vllm_dspark.kernels.verify_batch import COMPACT, DENSE, Batch, DenseDraft, tile_count
from vllm_dspark.kernels.verify_math import (
    accepts,
    at_step,
    draft_rows,
    is_distribution,
    judged,
    row_argmax,
    target_scale,
    uniform,
)
from vllm_dspark.kernels.verify_stats import NEVER
from vllm_dspark.kernels.verify_verdict import Choice, Verdict


@triton.jit
def store_verdict(
    tokens_ptr, counts_ptr, choice_ptr, requests, request, start, step, draft, accepted, verified,
    ends, own, GAMMA: tl.constexpr,
):  # fmt: skip
    """Write a request's part of a `Verdict` and of `Choice.row`.

    Args:
        ends: drafts before it could be judged.
        own: the token after the accepted ones, or -1 if it is to be drawn.
    """
    known = tl.where(step < accepted, draft, tl.where(step == accepted, own, -1))
    tl.store(tokens_ptr + request * (GAMMA + 1) + step, known, mask=step <= GAMMA)
    tl.store(counts_ptr + request, accepted + 1)
    # What could not be judged was not rejected.
    tl.store(counts_ptr + requests + request, tl.where(accepted < ends, verified - accepted, 0))
    tl.store(counts_ptr + 2 * requests + request, accepted)
    tl.store(counts_ptr + 3 * requests + request, 0)  # until a draw fails
    tl.store(choice_ptr + 2 * request, tl.where(own >= 0, -1, start + accepted))
    rejected = at_step(draft, step, accepted)
    tl.store(choice_ptr + 2 * request + 1, tl.where(accepted < ends, rejected, -1))


@triton.jit(
    do_not_specialize=["requests"],
    do_not_specialize_on_alignment=["offsets_ptr", "slots_ptr"],
)
def verify_accept_kernel(
    tokens_out_ptr,
    counts_ptr,
    choice_ptr,
    totals_ptr,
    stats_ptr,
    overlap_ptr,  # float32 [N, tiles] of `block_overlap`; only for a dense draft by blocks
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
    arrived_ptr,
    rejected_ptr,
    requests,
    tiles,
    NEVER: tl.constexpr,
    GAMMA: tl.constexpr,
    STEPS: tl.constexpr,  # the power of two above GAMMA
    KIND: tl.constexpr,
    PLANES: tl.constexpr,
    TILES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    slot = tl.load(slots_ptr + request).to(tl.int64)
    temperature = tl.load(temperature_ptr + slot).to(tl.float32)
    start, drafts, step, row, draft, verified = draft_rows(offsets_ptr, tokens_ptr, request, STEPS)
    wanted = step < verified

    own = tl.full((), -1, tl.int64)
    if temperature == 0.0:
        peak, best = row_argmax(stats_ptr, row, wanted, tiles, PLANES, TILES)
        # A row without a distribution ends the block; drawing from it is what fails.
        ends = tl.min(tl.where(wanted & (is_distribution(peak) == 0), step, verified), axis=0)
        accepted = tl.min(tl.where((step < ends) & (best != draft), step, ends), axis=0)
        if accepted < ends:
            own = at_step(best, step, accepted)
    else:
        min_p = tl.full((), 0.0, tl.float32)
        if min_p_ptr is not None:
            min_p = tl.load(min_p_ptr + slot).to(tl.float32)
        known = wanted | (step == tl.where(min_p > 0.0, verified, STEPS))
        p, q, peak, total, own_peak, own_total = judged(
            stats_ptr, logits_ptr, logits_stride, processed_ptr, processed_stride,
            processed_row_ptr, draft_ptr, ids_ptr, draft_stride, draft_step, draft_width, row,
            step, draft, wanted, known, slot, temperature, min_p, tiles, KIND, PLANES, TILES,
            CANDIDATES,
        )  # fmt: skip
        sane = is_distribution(peak) & (q == q)
        ends = tl.min(tl.where(wanted & (sane == 0), step, verified), axis=0)
        seed = tl.load(seeds_ptr + slot)
        factor = 1.0
        if BLOCK:
            before = prefix_ratios(p, q, step, ends)
            if KIND == DENSE:
                tile = tl.arange(0, TILES)
                behind = (step > 0) & (step < ends)
                parts = tl.load(
                    overlap_ptr + row[:, None] * tiles + tile[None, :],
                    mask=behind[:, None] & (tile < tiles)[None, :],
                    other=0.0,
                )
                overlap = tl.sum(parts, axis=1)
            elif KIND == COMPACT:
                scale = target_scale(temperature, processed_ptr, processed_row_ptr, row)
                overlap = compact_overlap(
                    logits_ptr, logits_stride, processed_ptr, processed_stride,
                    processed_row_ptr, draft_ptr, ids_ptr, draft_width,
                    slot * draft_stride + step * draft_step, row, wanted, peak, total, scale,
                    min_p, before, CANDIDATES,
                )  # fmt: skip
            else:
                overlap = before * p
            accepted = block_accepted(seed, positions_ptr, start, before, overlap, step, ends)
            factor = at_step(before, step, accepted)
        else:
            position = tl.load(positions_ptr + row, mask=wanted, other=0).to(tl.int64)
            passes = accepts(p, q, uniform(seed, position))
            accepted = tl.min(tl.where((step < ends) & (passes == 0), step, ends), axis=0)
        totals = totals_ptr + 5 * request
        tl.store(totals, at_step(peak, step, accepted))
        tl.store(totals + 1, at_step(total, step, accepted))
        tl.store(totals + 2, at_step(own_peak, step, accepted))
        tl.store(totals + 3, at_step(own_total, step, accepted))
        tl.store(totals + 4, factor)
    store_verdict(
        tokens_out_ptr, counts_ptr, choice_ptr, requests, request, start, step, draft, accepted,
        verified, ends, own, GAMMA,
    )  # fmt: skip
    # The first launch finds its notes blank next time.
    tl.store(arrived_ptr + row, 0, mask=step <= drafts)
    tl.store(rejected_ptr + request, NEVER)


def verify_accept(
    batch: Batch,
    stats: torch.Tensor,  # of `verify_stats`
    arrived: torch.Tensor,  # int32 [≥ N] and [≥ R], as there; blank again afterwards
    rejected: torch.Tensor,
    verdict: Verdict,  # out, except tokens that are drawn from `choice`
    choice: Choice,  # out
    *,
    by_block: bool = False,
) -> None:
    """Accept drafts, one by one or together, and choose the row of the token that follows."""
    tiles = tile_count(batch.vocab_size)
    overlap = None
    if by_block and isinstance(batch.draft, DenseDraft):
        overlap = block_overlap(batch, stats)
    verify_accept_kernel[(batch.requests,)](
        verdict.tokens,
        verdict.counts,
        choice.row,
        choice.totals,
        stats,
        overlap,
        *batch.target_arguments(),
        *batch.draft_arguments(),
        *batch.request_arguments(),
        arrived,
        rejected,
        batch.requests,
        tiles,
        NEVER=NEVER,
        GAMMA=batch.gamma,
        STEPS=triton.next_power_of_2(batch.gamma + 1),
        KIND=batch.kind,
        PLANES=stats.shape[1],
        TILES=triton.next_power_of_2(tiles),
        CANDIDATES=batch.candidates,
        BLOCK=by_block,
        num_warps=4,
    )
