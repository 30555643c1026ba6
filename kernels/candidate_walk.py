"""Drafting from candidates: one program per request walks all γ positions.

At position k it adds the Markov bias to the K candidates' base logits, draws x_k from them, and
goes on to position k + 1 with x_k in hand:

    logit_i = value_i + latent · W2[id_i],   x_k = id of argmax(logit_i / temperature + noise_i)

The proposal is the distribution over the candidates that the request's filters let through, and
nothing else; verification reads exactly that. Its noise is that of the words' ids, as in dense
drafting, so with K = V both draw the same tokens.

Of W2 a request reads K rows a position, 32 KB at K = 64 and r = 256 in bf16, instead of a share
of all V. Rows are contiguous runs of r; which rows does not hang on the draws, so the loads of one
position are in flight together. What a gated or RNN head hands from one product to the next goes
through a few hundred bytes of scratch, which the program alone reads and writes, with barriers
between; its own matrix a program reads by itself, so with many requests these heads gain less.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_dspark.kernels.candidate_filter import passes_filters
from vllm_dspark.kernels.candidate_head import advance_one, times_rows
from vllm_dspark.kernels.draws import Draws
from vllm_dspark.kernels.gumbel import gumbel, noise_key
from vllm_dspark.kernels.head_weights import HeadWeights

_HEADS = {"vanilla": 0, "gated": 1, "rnn": 2}


@triton.jit
def candidate_walk_kernel(
    ids_ptr,  # int32 [R, d, K], draft words
    values_ptr,  # float32 [R, d, K]
    anchors_ptr,  # int [R]
    w1_ptr,
    w2_ptr,
    words_ptr,  # int64 [V] or None
    share_ptr,  # [R, d, RANK or 3 RANK] or None
    mixing_ptr,
    mixing_stride,
    scratch_ptr,  # [R, 2, RANK] or None
    slots_ptr,  # int64, rows slot_stride apart; None draws the likeliest word everywhere
    positions_ptr,  # likewise
    slot_stride,
    temperature_ptr,
    seeds_ptr,
    top_k_ptr,
    top_p_ptr,
    tokens_ptr,  # int64 [R, d or more], rows tokens_stride apart, out
    tokens_stride,
    draft_ids_ptr,  # int32 [slots, γ, K], out, or None
    logprobs_ptr,  # float32 [slots, γ, K], out, or None
    draft_stride,  # from one slot to the next
    depth,
    HEAD: tl.constexpr,
    BY_STEP: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, K)
    everyone = lane >= 0
    minus_infinity = -float("inf")
    token = tl.load(anchors_ptr + row).to(tl.int64)
    temperature = tl.full((), 0.0, tl.float32)
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + row * slot_stride).to(tl.int64)
        temperature = tl.load(temperature_ptr + slot, mask=slot >= 0, other=0.0)
        seed = tl.load(seeds_ptr + slot, mask=slot >= 0, other=0)
    if HEAD == 2:
        n = tl.arange(0, RANK_BLOCK)
        tl.store(scratch_ptr + row * 2 * RANK + n, tl.zeros_like(n), mask=n < RANK)
        tl.debug_barrier()
    for k in range(depth):
        at = (row * depth + k) * K + lane
        word = tl.load(ids_ptr + at).to(tl.int64)
        logit = tl.load(values_ptr + at)
        latent_ptr = w1_ptr + token * RANK
        if HEAD > 0:
            own = scratch_ptr + row * 2 * RANK
            share = share_ptr + (row * depth + k) * (RANK if HEAD == 1 else 3 * RANK)
            advance_one(
                latent_ptr, share, mixing_ptr, mixing_stride, own, HEAD == 2, RANK, RANK_BLOCK
            )
            latent_ptr = own + RANK
        logit += times_rows(latent_ptr, w2_ptr, word * RANK, everyone, RANK, K, BLOCK_K, AT_ONCE)
        logit = tl.where(logit == logit, logit, minus_infinity)
        named = word
        if words_ptr is not None:
            named = tl.load(words_ptr + word)

        score = logit
        logprob = logit
        drawn = temperature != 0.0
        if slots_ptr is not None:  # noqa: SIM102 (decided when the kernel is compiled)
            if drawn:
                logit = logit / temperature
                if top_k_ptr is not None:
                    top_k, top_p = tl.load(top_k_ptr + slot), tl.load(top_p_ptr + slot)
                    if (top_k < K) | (top_p < 1.0):
                        allowed = passes_filters(logit, top_k, top_p, K)
                        logit = tl.where(allowed, logit, minus_infinity)
                position = tl.load(positions_ptr + row * slot_stride + k) - 1
                score = logit + gumbel(noise_key(seed, position, k, BY_STEP), named)
                peak = tl.max(logit, axis=0)
                exponent = logit - tl.where(peak == minus_infinity, 0.0, peak)
                logprob = exponent - tl.log(tl.sum(tl.exp(exponent), axis=0))
        best, place = tl.max(score, axis=0, return_indices=True)  # the lowest word among equals
        # Greedy, or nothing to draw from: all of the probability is the token's.
        certain = tl.where(lane == place, 0.0, minus_infinity)
        logprob = tl.where(drawn & (best > minus_infinity), logprob, certain)
        token = tl.sum(tl.where(lane == place, named, 0), axis=0)
        tl.store(tokens_ptr + row * tokens_stride + k, token)
        if draft_ids_ptr is not None:
            out = slot * draft_stride + k * K + lane
            tl.store(draft_ids_ptr + out, named, mask=everyone & (slot >= 0))
            tl.store(logprobs_ptr + out, logprob, mask=everyone & (slot >= 0))


def candidate_walk(
    ids: torch.Tensor,  # int32 [R, d, K], contiguous: distinct draft words, ascending
    values: torch.Tensor,  # float32 [R, d, K], contiguous: their base logits
    anchors: torch.Tensor,  # int [R], contiguous
    head: HeadWeights,
    share: torch.Tensor | None,  # [R, d, r or 3r], contiguous; `HeadWeights.hidden_part`
    scratch: torch.Tensor | None,  # [R or more, 2, r], dtype of the head; not for vanilla
    draws: Draws | None,  # None: greedy
    tokens: torch.Tensor,  # int64 [R, d or more], out: target ids
    draft_ids: torch.Tensor | None = None,  # int32 [slots, γ, K], contiguous, out: target ids
    draft_logprobs: torch.Tensor | None = None,  # float32 [slots, γ, K], contiguous, out
) -> None:
    """Draw x_1..x_d of every request, and write the distribution that each was drawn from.

    It goes to the request's slot; rows with a negative slot are drawn greedily and write none.
    Log-probabilities are normalised over the candidates that pass the request's filters, -inf on
    the others. Where the token is not drawn (temperature 0, or every logit -inf) it has
    probability 1. Logits that are NaN count as -inf.

    Raises:
        ValueError: shapes or strides that the kernel does not take.
    """
    rows, depth, count = ids.shape
    _check(ids, values, anchors, head, share, scratch, draws, tokens)
    _check_proposal(depth, count, draws, draft_ids, draft_logprobs)
    candidate_walk_kernel[(rows,)](
        ids,
        values,
        anchors,
        head.w1,
        head.w2,
        head.words,
        share,
        head.mixing,
        0 if head.mixing is None else head.mixing.stride(0),
        scratch,
        None if draws is None else draws.slots,
        None if draws is None else draws.positions,
        0 if draws is None else draws.slots.stride(0),
        None if draws is None else draws.temperature,
        None if draws is None else draws.seeds,
        None if draws is None else draws.top_k,
        None if draws is None else draws.top_p,
        tokens,
        tokens.stride(0),
        draft_ids,
        draft_logprobs,
        0 if draft_ids is None else draft_ids.stride(0),
        depth,
        HEAD=_HEADS[head.kind],
        BY_STEP=draws is not None and draws.by_step,
        RANK=head.rank,
        RANK_BLOCK=triton.next_power_of_2(head.rank),
        K=count,
        BLOCK_K=32 if count > 64 else 64,
        AT_ONCE=4 if count <= 64 else 2,
        num_warps=4 if count * head.rank <= 64 * 256 and head.kind == "vanilla" else 8,
    )


def _check(
    ids: torch.Tensor,
    values: torch.Tensor,
    anchors: torch.Tensor,
    head: HeadWeights,
    share: torch.Tensor | None,
    scratch: torch.Tensor | None,
    draws: Draws | None,
    tokens: torch.Tensor,
) -> None:
    rows, depth, _ = ids.shape
    for name, tensor in (("ids", ids), ("values", values), ("anchors", anchors)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    if values.shape != ids.shape:
        raise ValueError(f"values is {tuple(values.shape)} and ids {tuple(ids.shape)}")
    if tokens.stride(1) != 1 or tokens.shape[1] < depth:
        raise ValueError(f"tokens must have {depth} columns or more, side by side")
    if draws is not None and depth > 1 and draws.slots.stride(1) != 1:
        raise ValueError("slots and positions of a request must lie side by side")
    if head.kind != "vanilla":
        if share is None or scratch is None or not share.is_contiguous():
            raise ValueError(f"the {head.kind} head needs a contiguous share and a scratch")
        if scratch.shape[0] < rows or scratch.dtype != head.w1.dtype:
            raise ValueError(f"scratch must have {rows} rows or more of {head.w1.dtype}")


def _check_proposal(
    depth: int,
    count: int,
    draws: Draws | None,
    draft_ids: torch.Tensor | None,
    draft_logprobs: torch.Tensor | None,
) -> None:
    if (draft_ids is None) != (draft_logprobs is None):
        raise ValueError("draft_ids and draft_logprobs are given together or not at all")
    if draft_ids is None or draft_logprobs is None:
        return
    if draws is None:
        raise ValueError("a proposal needs draws, which say whose it is")
    fits = draft_ids.shape[1] >= depth and draft_ids.shape[2] == count
    if not fits or draft_logprobs.shape != draft_ids.shape:
        raise ValueError(f"draft_ids and draft_logprobs must be [slots, {depth} or more, {count}]")
    if not (draft_ids.is_contiguous() and draft_logprobs.is_contiguous()):
        raise ValueError("draft_ids and draft_logprobs must be contiguous")
