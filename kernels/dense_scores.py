"""Dense drafting, first launch of a position: the best word of every tile of the vocabulary.

    logits = U_k + latent · W2ᵀ,   score = logits / temperature + Gumbel noise

A program takes BLOCK_R requests by BLOCK_V words and keeps the largest score and its word; of the
[R, V] logits nothing is stored, except where the draft cache asks for them.

Why these tiles. W2 (78 MB at V = 151,936 and r = 256 in bf16, half of that in FP8) is read at every
position, and in bf16 it is larger than the L2 cache, so with few requests its bandwidth is the
floor. 1,187 programs of 128 words, each a contiguous 64 KB of W2, keep two or three of them loading
on every multiprocessor.
With many requests the programs that share a tile of W2 are neighbours in launch order, so that all
but the first find it in L2; what they move from there is the bound of greedy drafting, and wide
tiles read W1's rows less often. 64 rows is also what one warp group's matrix instruction takes on
Hopper. Drawing takes twice the warps, and with many requests up to three times as long: not for its
logarithms, since a bound in place of most words' noise left the time as it was. Tiles whose rows
are all greedy make no noise, nor do the empty rows beside a single request.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_dspark.kernels.draws import Draws
from vllm_dspark.kernels.gumbel import gumbel, noise_key
from vllm_dspark.kernels.product import add_product

BLOCK_V = 128


@triton.jit(do_not_specialize=["rows", "step"])
def dense_scores_kernel(
    base_ptr,  # [R, V], rows base_stride apart
    base_stride,
    table_ptr,  # [*, RANK]: W1, or one latent vector per row
    index_ptr,  # int [R], rows of the table, index_stride apart; None for the row itself
    index_stride,
    w2_ptr,  # [V, RANK]
    scale_ptr,  # float32 [V], what rows of w2 are multiplied by; or None
    words_ptr,  # int64 [V] or None
    cache_ptr,  # [slots, V_target], slots cache_stride apart; or None
    cache_stride,
    slots_ptr,  # int64 [R], slot_stride apart; None draws the likeliest word everywhere
    positions_ptr,  # likewise
    slot_stride,
    temperature_ptr,  # float32 [slots]
    seeds_ptr,  # int64 [slots]
    best_ptr,  # float32 [R, tiles], out
    where_ptr,  # int32 [R, tiles], out
    rows,
    vocab,
    tiles,
    step,
    ONE: tl.constexpr,  # there is one row
    BY_STEP: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_blocks = tl.cdiv(rows, BLOCK_R)
    tile = tl.program_id(0) // row_blocks
    # Rows of the product, which has 16 at least, and those that are drawn for.
    wide = ((tl.program_id(0) % row_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    row = tl.arange(0, 1).to(tl.int64) if ONE else wide
    word = (tile * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
    has_row, has_word = row < rows, word < vocab
    inside = has_row[:, None] & has_word[None, :]

    # Asked for before the product, so that it arrives meanwhile; so is what the draws go by.
    base = tl.load(
        base_ptr + row[:, None] * base_stride + word[None, :], mask=inside, other=-float("inf")
    )
    index = wide
    if index_ptr is not None:
        index = tl.load(index_ptr + wide * index_stride, mask=wide < rows, other=0).to(tl.int64)
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + row * slot_stride, mask=has_row, other=-1).to(tl.int64)
        real = slot >= 0
        temperature = tl.load(temperature_ptr + slot, mask=real, other=0.0)
        seed = tl.load(seeds_ptr + slot, mask=real, other=0)
        position = tl.load(positions_ptr + row * slot_stride, mask=has_row, other=1) - 1
    logits = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    logits = add_product(
        logits, table_ptr, index, wide < rows, w2_ptr, RANK, word, has_word, RANK, BLOCK_K,
        PRECISION,
    )  # fmt: skip
    if ONE:
        logits = tl.sum(logits, axis=0, keep_dims=True)  # all others are 0
    if scale_ptr is not None:
        logits *= tl.load(scale_ptr + word, mask=has_word, other=0.0)[None, :]
    logits += base.to(tl.float32)
    logits = tl.where(logits == logits, logits, -float("inf"))  # what is no number is not drawn

    named = word
    if words_ptr is not None:
        named = tl.load(words_ptr + word, mask=has_word, other=0)
    score = logits
    if slots_ptr is not None:
        if cache_ptr is not None:
            # Rounded to what verification will read: that is the distribution drawn from.
            kept = logits.to(cache_ptr.dtype.element_ty)
            tl.store(
                cache_ptr + slot[:, None] * cache_stride + named[None, :],
                kept,
                mask=inside & real[:, None],
            )
            logits = kept.to(tl.float32)
        drawn = temperature != 0.0
        score = logits
        if tl.max(drawn.to(tl.int32), axis=0) > 0:
            key = noise_key(seed, position, step, BY_STEP)
            noise = gumbel(key[:, None], named[None, :])
            heat = tl.where(drawn, temperature, 1.0)
            score = tl.where(drawn[:, None], logits / heat[:, None] + noise, logits)

    best, at = tl.max(score, axis=1, return_indices=True)  # the lowest word among equals
    out = row * tiles + tile
    tl.store(best_ptr + out, best, mask=has_row)
    tl.store(where_ptr + out, tile * BLOCK_V + at, mask=has_row)


def tile_count(vocab_size: int) -> int:
    """Tiles of the vocabulary, the columns that `best` and `where` need."""
    return triton.cdiv(vocab_size, BLOCK_V)


def product_precision(weights: torch.Tensor) -> str:
    """How `tl.dot` multiplies: float32 weights exactly, not rounded to tf32."""
    return "ieee" if weights.dtype == torch.float32 else "tf32"


def dense_scores(
    base: torch.Tensor,  # [R, V], any float; words contiguous
    table: torch.Tensor,  # [*, r], contiguous
    index: torch.Tensor | None,  # int [R], rows of the table; None: row i is that of request i
    w2: torch.Tensor,  # [V, r], contiguous, dtype of the table or FP8
    draws: Draws | None,  # None: the likeliest word everywhere
    step: int,  # k, the position in the block
    best: torch.Tensor,  # float32 [R or more, tiles], out
    where: torch.Tensor,  # int32, likewise
    *,
    scale: torch.Tensor | None = None,  # float32 [V], of each row of w2, which is FP8 then
    words: torch.Tensor | None = None,  # int64 [V], the target's id of each draft word
    cache: torch.Tensor | None = None,  # [slots, γ, V_target], any float, out; needs `draws`
) -> None:
    """Largest score of each tile, and its draft word (the lowest among equals).

    Logits that are NaN count as -inf. With a cache, logits before temperature go to
    `cache[slot, step]`, and are drawn from as rounded there; columns that no draft word maps to
    are left alone. Rows with a negative slot are drawn greedily and cache nothing.

    Raises:
        ValueError: shapes or strides that the kernel does not take.
    """
    rows, vocab = base.shape
    rank = w2.shape[1]
    for name, tensor in (("table", table), ("w2", w2), ("best", best), ("where", where)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    if base.stride(1) != 1 or (cache is not None and cache.stride(2) != 1):
        raise ValueError("the words of base and of cache must lie side by side")
    if w2.shape[0] != vocab or table.shape[1] != rank:
        raise ValueError(f"base {base.shape}, table {table.shape} and w2 {w2.shape} do not fit")
    if (table.dtype if scale is None else torch.float8_e4m3fn) != w2.dtype:
        raise ValueError(
            f"w2 is {w2.dtype}, needed is float8_e4m3fn with a scale, and {table.dtype} without"
        )
    if scale is not None and (scale.shape != (vocab,) or not scale.is_contiguous()):
        raise ValueError(f"scale must be contiguous, [{vocab}]")
    tiles = tile_count(vocab)
    if best.shape[1] != tiles or best.shape[0] < rows or where.shape != best.shape:
        raise ValueError(f"best and where must be [{rows} or more, {tiles}]")
    if cache is not None and draws is None:
        raise ValueError("a cache needs draws, which say whose column is written")
    block_r = min(max(16, triton.next_power_of_2(rows)), 64)
    at = None if cache is None else cache[:, step]
    dense_scores_kernel[(triton.cdiv(rows, block_r) * tiles,)](
        base,
        base.stride(0),
        table,
        index,
        0 if index is None else index.stride(0),
        w2,
        scale,
        words,
        at,
        0 if at is None else at.stride(0),
        None if draws is None else draws.slots[:, step],
        None if draws is None else draws.positions[:, step],
        0 if draws is None else draws.slots.stride(0),
        None if draws is None else draws.temperature,
        None if draws is None else draws.seeds,
        best,
        where,
        rows,
        vocab,
        tiles,
        step,
        ONE=rows == 1,
        BY_STEP=draws is not None and draws.by_step,
        RANK=rank,
        BLOCK_R=block_r,
        BLOCK_V=BLOCK_V,
        BLOCK_K=64 if rank % 64 == 0 else 32,
        PRECISION=product_precision(table),
        **_launch(block_r, table.element_size(), draws is not None),
    )


def _launch(block_r: int, itemsize: int, drawn: bool) -> dict[str, int]:
    """Warps and stages of a program, by measurement on an H200 at Qwen3-8B's sizes. Float32 takes
    twice the registers."""
    if itemsize == 4:
        return {"num_warps": 8, "num_stages": 2}
    if drawn and block_r == 64:
        return {"num_warps": 8, "num_stages": 4}
    return {"num_warps": 4, "num_stages": 3}
