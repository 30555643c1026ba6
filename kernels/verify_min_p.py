"""Batched verification: sums of the words that min-p leaves.

What min-p excludes is known once a row's largest logit is, which takes all of its tiles. So
requests with min-p have a second launch behind `verify_stats`. A tile whose own largest logit is
below the threshold, as most are, is not read again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_dspark.kernels.verify_batch import Batch, tile_count, tile_words
from vllm_dspark.kernels.verify_math import passes_min_p, target_logits, target_scale


@triton.jit(do_not_specialize_on_alignment=["offsets_ptr", "slots_ptr"])
def verify_min_p_kernel(
    stats_ptr,
    logits_ptr,
    logits_stride,
    processed_ptr,
    processed_stride,
    processed_row_ptr,
    offsets_ptr,
    slots_ptr,
    temperature_ptr,
    min_p_ptr,
    vocab,
    tiles,
    PLANES: tl.constexpr,
    WORDS: tl.constexpr,
    TILES: tl.constexpr,
):
    tile, request, step = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots_ptr + request).to(tl.int64)
    temperature = tl.load(temperature_ptr + slot).to(tl.float32)
    min_p = tl.load(min_p_ptr + slot).to(tl.float32)
    if (temperature == 0.0) | (min_p == 0.0):
        return
    start = tl.load(offsets_ptr + request).to(tl.int64)
    row = start + step
    if row >= tl.load(offsets_ptr + request + 1):
        return
    out = stats_ptr + row * PLANES * tiles
    each = tl.arange(0, TILES)
    peak = tl.max(tl.load(out + each, mask=each < tiles, other=-float("inf")), axis=0)
    own = tl.load(out + tile)
    scale = target_scale(temperature, processed_ptr, processed_row_ptr, row)
    if passes_min_p(own, peak, scale, min_p):
        word = tile * WORDS + tl.arange(0, WORDS)
        logit = target_logits(
            logits_ptr, logits_stride, processed_ptr, processed_stride, processed_row_ptr,
            row, word, word < vocab,
        )  # fmt: skip
        power = tl.exp2((logit - own) * scale)
        left = tl.where(passes_min_p(logit, peak, scale, min_p), power, 0.0)
        tl.store(out + tiles + tile, tl.sum(left, axis=0))
    else:
        tl.store(out + tiles + tile, 0.0)


def verify_min_p(
    batch: Batch,  # with min-p
    stats: torch.Tensor,  # float32 [≥ N, planes, tiles], in and out: sums of the target's rows
) -> None:
    """Make the sums right for requests with min-p, bonus rows included."""
    tiles = tile_count(batch.vocab_size)
    verify_min_p_kernel[(tiles, batch.requests, batch.steps + 1)](
        stats,
        *batch.target_arguments(),
        batch.offsets,
        batch.slots,
        batch.temperature,
        batch.min_p,
        batch.vocab_size,
        tiles,
        PLANES=stats.shape[1],
        WORDS=tile_words(batch.vocab_size),
        TILES=triton.next_power_of_2(tiles),
        num_warps=4,
    )
