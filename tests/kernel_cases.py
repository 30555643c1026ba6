"""Random inputs for the drafting kernels, on the GPU if there is one, else for the interpreter."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_dspark.cpu.repairs import repair_interpreter
from vllm_dspark.heads import ConfidenceHead, build_markov_head
from vllm_dspark.kernels.draws import Draws
from vllm_dspark.kernels.head_weights import ConfidenceWeights, HeadWeights

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")
if DEVICE.type == "cpu":
    repair_interpreter()
WIDTH = 24  # of hidden states


@dataclass(frozen=True)
class Block:
    """One block's inputs: R requests, d positions, V words."""

    head: HeadWeights
    confidence: ConfidenceWeights
    base: torch.Tensor  # [R, d, V]
    hidden: torch.Tensor  # [R, d, D]
    anchors: torch.Tensor  # int32 [R]
    tokens: torch.Tensor  # int64 [R, d + 1], out; the last column is not a draft's


def block(
    kind: str = "vanilla",
    requests: int = 3,
    depth: int = 2,
    vocab: int = 300,
    rank: int = 96,
    dtype: torch.dtype = torch.float32,
    *,
    whole: bool = False,
    words: torch.Tensor | None = None,
    targets: int | None = None,
    seed: int = 0,
) -> Block:
    """Inputs of the given sizes.

    Args:
        whole: tables and base logits are small whole numbers, so that every sum of them is exact
            in float32 and many logits are equal.
        words: target ids of the draft words.
        targets: words of the target, `vocab` if None.
    """
    torch.manual_seed(seed)
    sizes = {"vocab_size": targets or vocab, "draft_vocab_size": vocab, "rank": rank}
    module = build_markov_head(kind, **sizes, hidden_size=WIDTH).requires_grad_(False)
    confidence = ConfidenceHead(hidden_size=WIDTH, rank=rank, with_markov=True)
    base = 2 * torch.randn(requests, depth, vocab)
    for name, parameter in module.named_parameters():
        parameter.normal_(std=1.0 if "w1" in name else rank**-0.5)
        if whole:
            parameter.copy_((2 * parameter).round().clamp(-2, 2))
    if whole:
        base = base.round()
    module = module.to(DEVICE, dtype)
    confidence = confidence.to(DEVICE, dtype).requires_grad_(False)
    return Block(
        head=HeadWeights.of(module, None if words is None else words.to(DEVICE)),
        confidence=ConfidenceWeights.of(confidence, depth),
        base=base.to(DEVICE, dtype),
        hidden=torch.randn(requests, depth, WIDTH).to(DEVICE, dtype),
        anchors=torch.randint(targets or vocab, (requests,), dtype=torch.int32).to(DEVICE),
        tokens=torch.full((requests, depth + 1), -7, device=DEVICE),
    )


def draws(
    requests: int,
    depth: int,
    temperature: float | list[float] = 1.0,
    *,
    by_step: bool = False,
    first_seed: int = 1,
    padded: int = 0,
    filters: tuple[list[int], list[float]] | None = None,
) -> Draws:
    """Request i has slot R - 1 - i, so that a kernel which takes one for the other is caught.

    Args:
        temperature: of all requests, or of each slot.
        first_seed: seeds are this and the numbers after it, in the order of slots.
        padded: the last so many rows only pad a graph.
        filters: top-k and top-p of each slot.
    """
    slots = torch.arange(requests - 1, -1, -1)[:, None].repeat(1, depth)
    slots[requests - padded :] = -1
    positions = 10 + torch.arange(requests)[:, None] * 100 + torch.arange(depth)
    heat = torch.tensor(temperature, dtype=torch.float32).expand(requests).contiguous()
    top_k, top_p = (None, None) if filters is None else filters
    return Draws(
        slots=slots.to(DEVICE),
        positions=positions.to(DEVICE),
        temperature=heat.to(DEVICE),
        seeds=torch.arange(first_seed, first_seed + requests, device=DEVICE),
        by_step=by_step,
        top_k=None if top_k is None else torch.tensor(top_k, dtype=torch.int32, device=DEVICE),
        top_p=None if top_p is None else torch.tensor(top_p, device=DEVICE),
    )
