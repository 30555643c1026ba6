"""What the walk over candidates needs of a Markov head, for one request by itself.

`head_state` does the same for 16 requests at once by matrix instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_dspark.kernels.head_state import tanh


@triton.jit
def times_rows(
    vector_ptr,  # [RANK]
    matrix_ptr,
    row_offset,  # int64 [N], where the matrix's rows begin
    has_row,  # bool [N]
    RANK: tl.constexpr,
    N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Float32 [N]: rows of a matrix times a vector, with the loads of AT_ONCE blocks in flight."""
    total = tl.zeros((N,), tl.float32)
    for start in tl.range(0, RANK, BLOCK_K, loop_unroll_factor=AT_ONCE):
        j = start + tl.arange(0, BLOCK_K)
        vector = tl.load(vector_ptr + j, mask=j < RANK, other=0.0).to(tl.float32)
        rows = tl.load(
            matrix_ptr + row_offset[:, None] + j[None, :],
            mask=has_row[:, None] & (j < RANK)[None, :],
            other=0.0,
        )
        total += tl.sum(rows.to(tl.float32) * vector[None, :], axis=1)
    return total


@triton.jit
def advance_one(
    embed_ptr,  # [RANK], W1 of the token before
    share_ptr,  # [RANK or 3 RANK]
    mixing_ptr,
    mixing_stride,
    scratch_ptr,  # [2, RANK]: state, latent
    RNN: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
):
    """`advance_head` for one request; see there for the formulas."""
    BLOCK_K: tl.constexpr = 32 if RANK_BLOCK <= 256 else 16
    n = tl.arange(0, RANK_BLOCK)
    has = n < RANK
    offset = n.to(tl.int64) * mixing_stride
    if RNN:
        gate = tl.load(share_ptr + n, mask=has, other=0.0).to(tl.float32)
        candidate = tl.load(share_ptr + RANK + n, mask=has, other=0.0).to(tl.float32)
        output = tl.load(share_ptr + 2 * RANK + n, mask=has, other=0.0).to(tl.float32)
        part = tl.cast(mixing_stride, tl.int64) * RANK  # from g's rows to c's, from those to o's
        for half in tl.static_range(2):  # the columns for the state, then those for the embedding
            vector_ptr = embed_ptr if half else scratch_ptr
            at = mixing_ptr + half * RANK
            gate += times_rows(vector_ptr, at, offset, has, RANK, RANK_BLOCK, BLOCK_K, 1)
            at += part
            candidate += times_rows(vector_ptr, at, offset, has, RANK, RANK_BLOCK, BLOCK_K, 1)
            at += part
            output += times_rows(vector_ptr, at, offset, has, RANK, RANK_BLOCK, BLOCK_K, 1)
        gate = tl.sigmoid(gate)
        state = tl.load(scratch_ptr + n, mask=has, other=0.0).to(tl.float32)
        state = gate * state + (1.0 - gate) * tanh(candidate)
        latent = tanh(output)
        tl.debug_barrier()  # everyone has read the state
        tl.store(scratch_ptr + n, state, mask=has)
    else:
        gate = tl.load(share_ptr + n, mask=has, other=0.0).to(tl.float32)
        gate += times_rows(embed_ptr, mixing_ptr, offset, has, RANK, RANK_BLOCK, BLOCK_K, 1)
        embed = tl.load(embed_ptr + n, mask=has, other=0.0).to(tl.float32)
        latent = tl.sigmoid(gate) * embed
        tl.debug_barrier()  # everyone has read the latent of the position before
    tl.store(scratch_ptr + RANK + n, latent, mask=has)
    tl.debug_barrier()
