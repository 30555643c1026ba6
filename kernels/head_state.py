"""One step of a gated or recurrent Markov head: from the token just drawn to the vector that W2
turns into the next position's bias.

    gated   latent = sigmoid(a) * e                  a = (share of h) + M e
    rnn     s = sigmoid(g) * s + (1 - sigmoid(g)) * tanh(c),  latent = tanh(o)
                                                     [g ; c ; o] = (share of h) + M [s ; e]

The share of h was computed for the whole block before (`HeadWeights.hidden_part`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_dspark.kernels.product import add_product


@triton.jit
def tanh(x):
    """Hyperbolic tangent; `triton.language` has none that runs everywhere."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _mix(
    part,  # which of g, c, o; 0 for the gated head
    n,  # int64 [BLOCK_N]
    has_n,
    token,
    row,
    has_row,
    w1_ptr,
    share_ptr,
    share_stride,
    mixing_ptr,
    mixing_stride,
    state_ptr,
    RNN: tl.constexpr,
    FIRST: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    output = part * RANK + n
    total = tl.load(
        share_ptr + row[:, None] * share_stride + output[None, :],
        mask=has_row[:, None] & has_n[None, :],
        other=0.0,
    ).to(tl.float32)
    if RNN and not FIRST:  # the state before the first position is zero
        total = add_product(
            total, state_ptr, row, has_row, mixing_ptr, mixing_stride, output, has_n,
            RANK, BLOCK_K, PRECISION,
        )  # fmt: skip
    of_embedding = RANK if RNN else 0
    return add_product(
        total, w1_ptr, token, has_row, mixing_ptr + of_embedding, mixing_stride, output, has_n,
        RANK, BLOCK_K, PRECISION,
    )  # fmt: skip


@triton.jit
def advance_head(
    token,  # int64 [BLOCK_R], the token before the position
    row,  # int64 [BLOCK_R]
    has_row,  # bool [BLOCK_R]
    w1_ptr,  # [V_target, RANK]
    share_ptr,  # [R, RANK or 3 RANK], rows share_stride apart
    share_stride,
    mixing_ptr,  # [RANK, RANK] or [3 RANK, 2 RANK], rows mixing_stride apart
    mixing_stride,
    state_ptr,  # [R, RANK], RNN only
    next_state_ptr,  # [R, RANK], out, RNN only; another buffer, since all of state is read for each
    latent_ptr,  # [R, RANK], out
    RNN: tl.constexpr,
    FIRST: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the latent vectors of BLOCK_R requests, and their next states."""
    for start in range(0, RANK, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        has_n = n < RANK
        inside = has_row[:, None] & has_n[None, :]
        out = row[:, None] * RANK + n[None, :]
        gate = _mix(
            0, n, has_n, token, row, has_row, w1_ptr, share_ptr, share_stride, mixing_ptr,
            mixing_stride, state_ptr, RNN, FIRST, RANK, BLOCK_K, PRECISION,
        )  # fmt: skip
        gate = tl.sigmoid(gate)
        if RNN:
            candidate = _mix(
                1, n, has_n, token, row, has_row, w1_ptr, share_ptr, share_stride, mixing_ptr,
                mixing_stride, state_ptr, RNN, FIRST, RANK, BLOCK_K, PRECISION,
            )  # fmt: skip
            output = _mix(
                2, n, has_n, token, row, has_row, w1_ptr, share_ptr, share_stride, mixing_ptr,
                mixing_stride, state_ptr, RNN, FIRST, RANK, BLOCK_K, PRECISION,
            )  # fmt: skip
            state = (1.0 - gate) * tanh(candidate)
            if not FIRST:
                state += gate * tl.load(state_ptr + out, mask=inside, other=0.0).to(tl.float32)
            tl.store(next_state_ptr + out, state, mask=inside)
            latent = tanh(output)
        else:
            embed = tl.load(w1_ptr + token[:, None] * RANK + n[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
            latent = gate * embed
        tl.store(latent_ptr + out, latent, mask=inside)
