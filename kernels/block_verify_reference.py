"""Block verification in plain torch, float64: algorithm 2 of Sun et al. 2024 as it is printed."""

from __future__ import annotations

from vllm_dspark.kernels.verify_batch import Batch
from vllm_dspark.kernels.verify_reference import (
    Outcome,
    draft_distribution,
    drafts_of,
    draw,
    target_distribution,
)
from vllm_dspark.kernels.verify_uniform_reference import uniform_reference


def block_verify_reference(batch: Batch) -> list[Outcome]:
    """Each sampled request verified as one block; a row without a distribution ends it.

    Args:
        batch: small; temperatures above 0.
    """
    return [_block_of_one(batch, request) for request in range(batch.requests)]


def _block_of_one(batch: Batch, request: int) -> Outcome:
    drafts = drafts_of(batch, request)
    slot, start = int(batch.slots[request]), int(batch.offsets[request])
    targets, proposals = [], []
    for step, draft in enumerate(drafts):
        p = target_distribution(batch, request, step)
        q = draft_distribution(batch, request, step, draft)
        if p is None or q is None:
            break
        targets.append(p)
        proposals.append(q)
    ends = len(targets)
    ratio, accepted, margin = [1.0], 0, float("inf")
    for i in range(1, ends + 1):
        draft = drafts[i - 1]
        likely = float(targets[i - 1][draft]) / float(proposals[i - 1][draft])
        ratio.append(min(ratio[-1] * likely, 1.0))
        h = ratio[i]
        if i < ends:
            left = float((ratio[i] * targets[i] - proposals[i]).clamp(min=0).sum())
            below = left + 1 - ratio[i]
            h = left / below if below > 0 else 1.0
        seed = int(batch.seeds[slot]) ^ ((i - 1) << 32)
        u = uniform_reference(seed, int(batch.positions[start + i - 1]))
        margin = min(margin, abs(h - u))
        if u <= h:
            accepted = i
    last, verified = target_distribution(batch, request, accepted), ends
    if accepted < ends:
        verified = len(drafts)
        last = (ratio[accepted] * targets[accepted] - proposals[accepted]).clamp(min=0)
    if last is None:
        return Outcome([*drafts[:accepted], 0], verified, True, margin)
    token, by = draw(batch, request, accepted, last)
    return Outcome([*drafts[:accepted], token], verified, False, min(margin, by))
