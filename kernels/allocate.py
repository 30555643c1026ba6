"""Whose drafts are verified: ranking, lengths and layout of a step in one launch.

    c_j ← sigmoid(slope_j · logit(c_j) + intercept_j)     calibrated confidence
    a_j = c_1 ··· c_j                                     survival

The B candidates with the largest a are admitted; among equals the lower row, then the lower
position. Along a row a never increases, so what is admitted of a row is a prefix.

Nothing is sorted. Survivals are floats in [0, 1], whose bits order alike as integers; the B-th
largest is searched for, by counting the candidates that reach two trials at a time. That is 19
counts at most, over candidates that stay in registers. All above the value are admitted, and of
those that equal it as many as there is room for, in the order of their rows.

One program does it all: 1024 requests with 15 drafts are 16 candidates for each of 1024 threads.
Several programs would have to wait for each other 19 times, which costs more than it saves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_dspark.kernels.kth_largest import kth_largest

MOST_REQUESTS, MOST_DRAFTS = 1024, 15


@dataclass(frozen=True)
class Calibration:
    """Maps from raw to calibrated confidence, by regime (0 greedy, 1 sampled) and position.

    Attributes:
        slope, intercept: float32 [2, γ], of the logit.
        raw_margin: raw confidences are cut to this..1 - this.
        margin: calibrated ones likewise.
    """

    slope: torch.Tensor
    intercept: torch.Tensor
    raw_margin: float
    margin: float


@triton.jit
def _lesser(a, b):
    return tl.minimum(a, b)


@triton.jit
def _survival(confidence, slope, intercept, raw_margin, margin):
    """a of [ROWS, COLUMNS] raw confidences. What is no probability counts as a half."""
    known = tl.where(confidence == confidence, confidence, 0.5)
    known = tl.minimum(tl.maximum(known, raw_margin), 1.0 - raw_margin)
    logit = slope * tl.log(known / (1.0 - known)) + intercept
    calibrated = tl.minimum(tl.maximum(tl.sigmoid(logit), margin), 1.0 - margin)
    # The products of a row are made in another order than left to right, so that neighbours could
    # swap by rounding.
    return tl.associative_scan(tl.cumprod(calibrated, axis=1), 1, _lesser)


@triton.jit
def _largest(keys, budget):
    """The `budget`-th largest of int32 keys below 2^30; negative ones do not count. 2^30 - 1 for
    no budget, 0 where there are too few. Of at most 2^14 keys."""
    low, high = tl.full((), 0, tl.int32), tl.full((), (1 << 30) - 1, tl.int32)
    return kth_largest(keys, budget, low, high, tl.int32, 16)


# Nor by alignment: a batch's numbers begin anywhere in a larger buffer, and each alignment would be
# compiled anew while requests wait.
@triton.jit(
    do_not_specialize=["requests", "budget", "regime"],
    do_not_specialize_on_alignment=[
        "offsets_ptr", "queries_ptr", "confidence_ptr", "places_ptr", "slope_ptr", "intercept_ptr",
        "regimes_ptr", "limits_ptr", "others_ptr",
    ],
)  # fmt: skip
def allocate_kernel(
    offsets_ptr,  # int32 [≥ R + 1], out
    queries_ptr,  # int32 [≥ R + 1], out
    confidence_ptr,
    confidence_stride,
    places_ptr,  # int [R] or None
    slope_ptr,
    intercept_ptr,
    regimes_ptr,  # int [R]; None: `regime` for all
    limits_ptr,  # int [R]; None: γ for all
    others_ptr,  # int32 [R]
    raw_margin,
    margin,
    requests,
    budget,
    regime,
    gamma,
    BONUS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    has_row, has_column = row < requests, column < gamma
    inside = has_row[:, None] & has_column[None, :]
    place = row
    if places_ptr is not None:
        place = tl.load(places_ptr + row, mask=has_row, other=0)
    at = place.to(tl.int64)[:, None] * confidence_stride + column[None, :]
    confidence = tl.load(confidence_ptr + at, mask=inside, other=0.5)
    if regimes_ptr is None:
        maps = tl.zeros_like(row) + regime
    else:
        maps = tl.load(regimes_ptr + row, mask=has_row, other=0).to(tl.int32)
    maps = maps[:, None] * gamma + column[None, :]
    slope = tl.load(slope_ptr + maps, mask=inside, other=1.0)
    intercept = tl.load(intercept_ptr + maps, mask=inside, other=0.0)
    survival = _survival(confidence, slope, intercept, raw_margin, margin)

    limit = tl.where(has_row, gamma, 0)
    if limits_ptr is not None:
        limit = tl.load(limits_ptr + row, mask=has_row, other=0).to(tl.int32)
    candidate = column[None, :] < limit[:, None]
    keys = tl.where(candidate, survival.to(tl.int32, bitcast=True), -1)
    least = _largest(keys, budget)
    above = tl.sum((keys > least).to(tl.int32), axis=1)
    equal = tl.sum((keys == least).to(tl.int32), axis=1)
    room = budget - tl.sum(above, axis=0) - (tl.cumsum(equal, axis=0) - equal)
    length = above + tl.minimum(tl.maximum(room, 0), equal)

    ends = tl.cumsum(length, axis=0)
    others = tl.load(others_ptr + row, mask=has_row, other=0)
    tl.store(offsets_ptr + 1 + row, ends + (row + 1) * BONUS, mask=has_row)
    tl.store(queries_ptr + 1 + row, ends + others, mask=has_row)
    tl.store(offsets_ptr, 0)
    tl.store(queries_ptr, 0)


def allocate(
    confidence: torch.Tensor,  # float32 [≥ R, γ], raw
    calibration: Calibration,
    regimes: torch.Tensor | int,  # int [R], 0 greedy, 1 sampled; or one for all
    budget: int,
    other_ends: torch.Tensor,  # int32 [R], tokens that are no drafts, summed up to each request
    offsets: torch.Tensor,  # int32 [≥ R + 1], out: first row of the logits of each request
    queries: torch.Tensor,  # int32 [≥ R + 1], out: first token of each request
    *,
    places: torch.Tensor | None = None,  # int [R], rows of `confidence`; None: in order
    limits: torch.Tensor | None = None,  # int [R], candidates of each request; None: γ
    bonus: int = 1,  # rows of the logits besides the drafts'
) -> None:
    """Admit the `budget` likeliest drafts, and lay the batch out, without asking the host.

    As `vllm_dspark.scheduler.budget.allocate` ranks them. A budget above what there is admits all.

    Raises:
        ValueError: more requests or drafts than one launch takes, or buffers that do not fit.
    """
    requests, gamma = len(other_ends), confidence.shape[1]
    if requests > MOST_REQUESTS or gamma > MOST_DRAFTS:
        raise ValueError(
            f"{requests} requests with {gamma} drafts; a launch takes {MOST_REQUESTS} with "
            f"{MOST_DRAFTS}"
        )
    if len(offsets) <= requests or len(queries) <= requests:
        raise ValueError(f"offsets and queries must have room for {requests + 1}")
    if calibration.slope.shape != (2, gamma) or calibration.intercept.shape != (2, gamma):
        raise ValueError(f"slope and intercept must be [2, {gamma}]")
    if requests == 0:
        return
    one = isinstance(regimes, int)
    rows = max(16, triton.next_power_of_2(requests))
    columns = triton.next_power_of_2(gamma)
    allocate_kernel[(1,)](
        offsets,
        queries,
        confidence,
        confidence.stride(0),
        places,
        calibration.slope,
        calibration.intercept,
        None if one else regimes,
        limits,
        other_ends,
        calibration.raw_margin,
        calibration.margin,
        requests,
        budget,
        regimes if one else 0,
        gamma,
        BONUS=bonus,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=max(1, min(32, rows * columns // 128)),
    )
