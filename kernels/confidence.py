"""Confidences of a whole block in one launch, after its last draw.

    c_k = sigmoid((w · [h_k ; W1[x_(k-1)]] + b) / T_k)

c_k reads nothing but the token before, so it is kept off the chain of draws: R·γ programs at once
read the hidden states, where the launches of single positions would have R of them γ times over.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_dspark.kernels.head_weights import ConfidenceWeights


@triton.jit
def confidence_kernel(
    hidden_ptr,  # [R, γ, WIDTH], contiguous
    w1_ptr,  # [V_target, RANK]
    weight_ptr,  # [WIDTH + RANK], or [WIDTH] without WITH_EMBED
    bias_ptr,  # [1] or None
    temperatures_ptr,  # float32 [γ]
    anchors_ptr,  # int [R]
    tokens_ptr,  # int64 [R, γ], rows tokens_stride apart
    tokens_stride,
    out_ptr,  # float32 [R, γ], rows out_stride apart
    out_stride,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    WITH_EMBED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    k, depth = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        d = start + tl.arange(0, BLOCK)
        hidden = tl.load(hidden_ptr + (row * depth + k) * WIDTH + d, mask=d < WIDTH, other=0.0)
        weight = tl.load(weight_ptr + d, mask=d < WIDTH, other=0.0)
        total += hidden.to(tl.float32) * weight.to(tl.float32)
    logit = tl.sum(total, axis=0)
    if WITH_EMBED:
        if k == 0:
            previous = tl.load(anchors_ptr + row).to(tl.int64)
        else:
            previous = tl.load(tokens_ptr + row * tokens_stride + k - 1).to(tl.int64)
        j = tl.arange(0, RANK_BLOCK)
        embed = tl.load(w1_ptr + previous * RANK + j, mask=j < RANK, other=0.0)
        weight = tl.load(weight_ptr + WIDTH + j, mask=j < RANK, other=0.0)
        logit += tl.sum(embed.to(tl.float32) * weight.to(tl.float32), axis=0)
    if bias_ptr is not None:
        logit += tl.load(bias_ptr).to(tl.float32)
    temperature = tl.load(temperatures_ptr + k)
    tl.store(out_ptr + row * out_stride + k, tl.sigmoid(logit / temperature))


def confidence(
    hidden: torch.Tensor,  # [R, d, D], contiguous, any float
    w1: torch.Tensor,  # [V_target, r], contiguous
    weights: ConfidenceWeights,
    anchors: torch.Tensor,  # int [R], contiguous
    tokens: torch.Tensor,  # int64 [R, d or more], drafts side by side
    out: torch.Tensor,  # float32 [R, d or more], out
) -> None:
    """Probability that each draft survives given that those before it did; sums in float32.

    Raises:
        ValueError: shapes or strides that the kernel does not take.
    """
    rows, depth, width = hidden.shape
    rank = w1.shape[1]
    if weights.weight.shape not in ((width,), (width + rank,)):
        raise ValueError(f"weight is {tuple(weights.weight.shape)}, needed is D or D + r")
    if not (hidden.is_contiguous() and w1.is_contiguous() and anchors.is_contiguous()):
        raise ValueError("hidden, w1 and anchors must be contiguous")
    if tokens.stride(1) != 1 or out.stride(1) != 1 or min(tokens.shape[1], out.shape[1]) < depth:
        raise ValueError(f"tokens and out must have {depth} columns or more, side by side")
    if weights.temperatures.shape[0] < depth:
        raise ValueError(f"temperatures has {len(weights.temperatures)} of {depth} entries")
    confidence_kernel[(depth, rows)](
        hidden,
        w1,
        weights.weight,
        weights.bias,
        weights.temperatures,
        anchors,
        tokens,
        tokens.stride(0),
        out,
        out.stride(0),
        WIDTH=width,
        RANK=rank,
        RANK_BLOCK=triton.next_power_of_2(rank),
        WITH_EMBED=weights.weight.shape[0] != width,
        BLOCK=min(1024, triton.next_power_of_2(width)),
        num_warps=4,
    )
