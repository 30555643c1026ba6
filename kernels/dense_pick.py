"""Dense drafting, second launch of a position: from the best word of every tile to the token.

A gated or RNN head then needs its latent vector for the next position, which is made in the same
launch. Such a head's programs take 16 requests each, so that its matrix is read once for 16 of
them; the vanilla head's take one each, which is quickest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_dspark.kernels.dense_scores import product_precision
from vllm_dspark.kernels.head_state import advance_head
from vllm_dspark.kernels.head_weights import HeadWeights


@triton.jit(do_not_specialize=["rows"])
def dense_pick_kernel(
    best_ptr,  # float32 [R, tiles]; None takes the tokens as they are
    where_ptr,  # int32 [R, tiles]
    words_ptr,  # int64 [V] or None
    token_ptr,  # int [R], token_stride apart: out, or in where there is nothing to pick
    token_stride,
    w1_ptr,
    share_ptr,
    share_stride,
    mixing_ptr,
    mixing_stride,
    state_ptr,
    next_state_ptr,
    latent_ptr,
    rows,
    tiles,
    ADVANCE: tl.constexpr,
    RNN: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    has_row = row < rows
    if best_ptr is not None:
        top = tl.full((BLOCK_R,), -float("inf"), tl.float32)
        top_tile = tl.zeros((BLOCK_R,), tl.int32)
        for start in range(0, tiles, BLOCK_T):
            tile = start + tl.arange(0, BLOCK_T)
            score = tl.load(
                best_ptr + row[:, None] * tiles + tile[None, :],
                mask=has_row[:, None] & (tile < tiles)[None, :],
                other=-float("inf"),
            )
            best, at = tl.max(score, axis=1, return_indices=True)
            better = best > top  # among equals the tile before stays: the lowest word
            top = tl.where(better, best, top)
            top_tile = tl.where(better, start + at, top_tile)
        token = tl.load(where_ptr + row * tiles + top_tile, mask=has_row, other=0).to(tl.int64)
        if words_ptr is not None:
            token = tl.load(words_ptr + token, mask=has_row, other=0)
        tl.store(token_ptr + row * token_stride, token, mask=has_row)
    else:
        token = tl.load(token_ptr + row * token_stride, mask=has_row, other=0).to(tl.int64)
    if ADVANCE:
        advance_head(
            token, row, has_row, w1_ptr, share_ptr, share_stride, mixing_ptr, mixing_stride,
            state_ptr, next_state_ptr, latent_ptr, RNN, best_ptr is None, RANK, BLOCK_N, BLOCK_K,
            PRECISION,
        )  # fmt: skip


def dense_pick(
    best: torch.Tensor | None,  # float32 [R or more, tiles]; None: before the first position
    where: torch.Tensor | None,  # int32, likewise
    tokens: torch.Tensor,  # int [R]: the tokens picked, out; the anchors before the first position
    head: HeadWeights,
    share: torch.Tensor | None,  # [R, r or 3r], next position's; None: there is none to prepare
    latent: torch.Tensor | None = None,  # [R or more, r], out
    states: tuple[torch.Tensor, torch.Tensor] | None = None,  # [R or more, r]: in; out. RNN only
) -> None:
    """Pick each row's token among its tiles', and prepare the next position of a gated or RNN head.

    The best score wins, the lowest word among equals. A row without any score above -inf gets
    draft word 0, as argmax would give.

    Raises:
        ValueError: there is nothing to pick and nothing to prepare, or buffers do not fit.
    """
    rows, advance = tokens.shape[0], share is not None
    if best is None and not advance:
        raise ValueError("nothing to pick and nothing to prepare")
    for name, tensor in (("best", best), ("where", where), ("latent", latent)):
        if tensor is not None and (not tensor.is_contiguous() or tensor.shape[0] < rows):
            raise ValueError(f"{name} must be contiguous, with {rows} rows or more")
    if advance and (head.mixing is None or latent is None):
        raise ValueError("a share of the hidden state needs a gated or RNN head and a latent")
    if advance and head.kind == "rnn" and states is None:
        raise ValueError("the RNN head needs its states")
    state, next_state = states or (None, None)
    block_r = 16 if advance else 1
    dense_pick_kernel[(triton.cdiv(rows, block_r),)](
        best,
        where,
        head.words,
        tokens,
        tokens.stride(0),
        head.w1,
        share,
        0 if share is None else share.stride(0),
        head.mixing,
        0 if head.mixing is None else head.mixing.stride(0),
        state,
        next_state,
        latent,
        rows,
        0 if best is None else best.shape[1],
        ADVANCE=advance,
        RNN=head.kind == "rnn",
        RANK=head.rank,
        BLOCK_R=block_r,
        BLOCK_T=64 if advance else 1024,
        BLOCK_N=32,
        BLOCK_K=64 if head.rank % 64 == 0 else 32,
        PRECISION=product_precision(head.w1),
        num_warps=4,
    )
