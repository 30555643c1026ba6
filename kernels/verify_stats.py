"""Batched verification, first launch: what the acceptance test needs of every row, tile by tile.

A program takes one tile of one row and keeps its largest logit and

    a greedy request     the word of that logit
    a sampled request    Σ 2^((l - m)·s), see `verify_math`; for a dense draft the same of q

so of the [N, V] logits only [N, tiles] numbers are stored. Logits are read once, in their own
dtype; bonus rows, which no test looks at, are not read at all.

Why these tiles. 4096 bf16 words for four warps are 64 bytes a thread, in four loads of 16 bytes
that are in flight together; about eight such programs fit on a multiprocessor, 64 KB on their way
in each, which is what it takes to keep an H100's memory busy. One request of 7 drafts and 151,936
words gives 266 programs, two for each of the 132 multiprocessors.

Rows after a request's first rejection are not needed, and which those are turns out while the
launch runs. Programs are launched in order of their position in the block, so with many requests
most rows of one position can be through before those of the next start. The program that finishes
a row as the last makes the acceptance test, and notes a rejection; programs of later rows that find
the note end before they read. The test that counts is made in the next launch, on the same numbers:
here the draft must fail by a margin far above any rounding, so no row is left out that is needed
there. Where all programs run at once, there is nobody to be told, and no test is made.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_dspark.kernels.verify_batch import DENSE, Batch, DenseDraft, tile_count, tile_words
from vllm_dspark.kernels.verify_math import (
    LOG2_E,
    accepts,
    finite_or_infinite,
    judged,
    row_argmax,
    target_logits,
    target_scale,
    uniform,
)
from vllm_dspark.kernels.verify_min_p import verify_min_p

NEVER = 1 << 30  # a request's note before any rejection
MARGIN = tl.constexpr(0.999)
# Programs that run at once on the largest device, 132 multiprocessors of eight, with room to spare.
AT_ONCE = 2048


@triton.jit
def _tile_sums(logit, scale):
    """Largest of a tile's logits and its sum of powers; 0 where every word is excluded."""
    peak = tl.max(logit, axis=0)
    power = tl.exp2((logit - peak) * scale)
    return peak, tl.sum(tl.where(logit > -float("inf"), power, 0.0), axis=0)


@triton.jit(do_not_specialize_on_alignment=["offsets_ptr", "slots_ptr"])
def verify_stats_kernel(
    stats_ptr,  # float32 [N, PLANES, tiles], out
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
    arrived_ptr,  # int32 [N], 0: programs that finished the row; None to make no test
    rejected_ptr,  # int32 [R], NEVER: the first step whose draft was seen to fail
    vocab,
    tiles,
    KIND: tl.constexpr,
    PLANES: tl.constexpr,
    WORDS: tl.constexpr,
    TILES: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    tile, request, step = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(offsets_ptr + request).to(tl.int64)
    drafts = tl.load(offsets_ptr + request + 1) - start - 1
    if step > drafts:
        return
    if arrived_ptr is not None:  # noqa: SIM102 (decided when compiling)
        if tl.load(rejected_ptr + request, volatile=True) < step:
            return
    row = start + step
    slot = tl.load(slots_ptr + request).to(tl.int64)
    draft = tl.load(tokens_ptr + row + 1, mask=step < drafts, other=-1).to(tl.int64)
    min_p = tl.full((), 0.0, tl.float32)
    if min_p_ptr is not None:
        min_p = tl.load(min_p_ptr + slot).to(tl.float32)
    # A row behind which nothing is tested counts only for what it says about min-p.
    if (draft < 0) & (min_p == 0.0):
        return

    word = tile * WORDS + tl.arange(0, WORDS)
    logit = target_logits(
        logits_ptr, logits_stride, processed_ptr, processed_stride, processed_row_ptr,
        row, word, word < vocab,
    )  # fmt: skip
    temperature = tl.load(temperature_ptr + slot).to(tl.float32)  # while the logits arrive
    out = stats_ptr + row * PLANES * tiles + tile
    if temperature == 0.0:
        peak, at = tl.max(logit, axis=0, return_indices=True)  # the lowest word among equals
        tl.store(out, peak)
        tl.store(out + tiles, (tile * WORDS + at).to(tl.float32))
    else:
        scale = target_scale(temperature, processed_ptr, processed_row_ptr, row)
        peak, total = _tile_sums(logit, scale)
        tl.store(out, peak)
        tl.store(out + tiles, total)
        if KIND == DENSE:
            other = tl.load(
                draft_ptr + slot * draft_stride + step * draft_step + word,
                mask=word < tl.where(draft >= 0, draft_width, 0),
                other=-float("inf"),
            )
            peak, total = _tile_sums(finite_or_infinite(other), LOG2_E / temperature)
            tl.store(out + 2 * tiles, peak)
            tl.store(out + 3 * tiles, total)

    if arrived_ptr is not None:
        tl.debug_barrier()  # all of this program's numbers are written before it is counted
        last = tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel") == tiles - 1
        if last & (draft >= 0) & (min_p == 0.0):
            # One row as a block of one. Sums of a request with min-p are not final yet.
            this = tl.arange(0, 1).to(tl.int64)
            wanted = this == 0
            if temperature == 0.0:
                _, best = row_argmax(stats_ptr, row + this, wanted, tiles, PLANES, TILES)
                fails = best != draft
            else:
                p, q, _, _, _, _ = judged(
                    stats_ptr, logits_ptr, logits_stride, processed_ptr, processed_stride,
                    processed_row_ptr, draft_ptr, ids_ptr, draft_stride, draft_step, draft_width,
                    row + this, step + this, draft + this, wanted, wanted, slot, temperature,
                    0.0, tiles, KIND, PLANES, TILES, CANDIDATES,
                )  # fmt: skip
                seed = tl.load(seeds_ptr + slot)
                u = uniform(seed, tl.load(positions_ptr + row + this).to(tl.int64))
                fails = accepts(p, q, u * MARGIN) == 0
            if tl.sum(fails.to(tl.int32), axis=0) > 0:
                tl.atomic_min(rejected_ptr + request, step)


def verify_stats(
    batch: Batch,
    stats: torch.Tensor,  # float32 [≥ N, planes, tiles], out: `planes_of` the batch or more
    arrived: torch.Tensor,  # int32 [≥ N], all 0, and left so by `verify_accept`
    rejected: torch.Tensor,  # int32 [≥ R], all NEVER, likewise
    *,
    skip: bool = True,
) -> None:
    """Fill `stats` for the rows that the acceptance test may come to.

    Planes are largest logit and sum (greedy: its word) of the target, then of a dense draft.

    Args:
        skip: rows after a rejection may be left out; what `stats` holds of them means nothing. It
            changes the time that this takes, and no result.
    """
    tiles = tile_count(batch.vocab_size)
    if skip:
        skip = batch.requests * tiles * batch.steps > AT_ONCE
    shape = {
        "PLANES": stats.shape[1],
        "WORDS": tile_words(batch.vocab_size),
        "TILES": triton.next_power_of_2(tiles),
    }
    # Bonus rows, one step further, say something about min-p only.
    steps = batch.steps + (batch.min_p is not None)
    if steps == 0:
        return
    grid = (tiles, batch.requests, steps)
    verify_stats_kernel[grid](
        stats,
        *batch.target_arguments(),
        *batch.draft_arguments(),
        *batch.request_arguments(),
        arrived if skip else None,
        rejected,
        batch.vocab_size,
        tiles,
        KIND=batch.kind,
        CANDIDATES=batch.candidates,
        num_warps=4,
        **shape,
    )
    if batch.min_p is not None:
        verify_min_p(batch, stats)


def planes_of(batch: Batch) -> int:
    """Planes of `stats`: two, and two more for a dense draft."""
    return 4 if isinstance(batch.draft, DenseDraft) else 2
