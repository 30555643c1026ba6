"""Our verification kernels, compiled for whatever requests ask for before there are any.

Triton compiles a kernel anew where an argument is left out. Two are left out of batches that need
none of them, min-p and processed rows, and a third, the notes on what was rejected, where a batch
is so small that all of its programs run at once. vLLM's warm-up verifies requests that ask for
everything, then some that ask for nothing: the first one with a top-p would hold all others up
while five kernels compile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product

import torch

from vllm_dspark.kernels.verify import Method, Verifier
from vllm_dspark.kernels.verify_batch import Batch, tile_count
from vllm_dspark.kernels.verify_stats import AT_ONCE
from vllm_dspark.kernels.verify_verdict import Verdict


@contextmanager
def verification_compiled(verifier: Verifier, methods: Sequence[Method]) -> Iterator[None]:
    """While active, the first batch of `verifier` has `stand_ins` verified before it by each of
    `methods`, where kernels are compiled at all."""
    if _interpreted():
        yield
        return
    pending = True

    def verify(batch: Batch, method: Method = "standard") -> Verdict:
        nonlocal pending
        for other, each in product(stand_ins(batch), methods) if pending else ():
            Verifier.verify(verifier, other, each)
        pending = False
        return Verifier.verify(verifier, batch, method)

    vars(verifier)["verify"] = verify
    try:
        yield
    finally:
        del vars(verifier)["verify"]


def stand_ins(like: Batch) -> Iterator[Batch]:
    """Batches that stand for all that Triton tells apart in the steps of an engine.

    Their requests have no drafts, so that next to nothing is done. They take at most `AT_ONCE` rows
    of a tile's words each.

    Args:
        like: a batch of the engine, for dtypes, strides and drafts.
    """
    slots, gamma, tiles = len(like.temperature), like.gamma, tile_count(like.vocab_size)
    many = AT_ONCE // (tiles * gamma) + 1
    sizes = [(1, max(min(gamma, AT_ONCE // tiles), 1))]
    if many <= slots:
        sizes.append((many, gamma))
    for (requests, steps), min_p, processed in product(sizes, (False, True), (False, True)):
        yield _blank(like, requests, steps, min_p, processed)


def _blank(like: Batch, requests: int, steps: int, min_p: bool, processed: bool) -> Batch:
    """`requests` requests with a row each, all of slot 0, launched as if they had drafts."""
    device, width = like.logits.device, like.logits.stride(0)
    ready = torch.zeros(1, like.vocab_size, device=device) if processed else None
    nowhere = torch.full((requests,), -1, dtype=torch.int32, device=device) if processed else None
    return Batch(
        logits=like.logits.new_zeros(requests, width)[:, : like.vocab_size],
        offsets=torch.arange(requests + 1, dtype=like.offsets.dtype, device=device),
        tokens=like.tokens.new_zeros(requests),
        positions=like.positions.new_zeros(requests),
        slots=like.slots.new_zeros(requests),
        temperature=like.temperature,
        seeds=like.seeds,
        gamma=like.gamma,
        most_drafts=steps,
        min_p=torch.zeros_like(like.temperature) if min_p else None,
        draft=like.draft,
        processed=ready,
        processed_row=nowhere,
    )


def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)
