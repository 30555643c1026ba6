"""Drafting from candidates: γ tokens per request, each drawn from the K words with the largest base
logits, in four launches a block."""

from __future__ import annotations

import torch

from vllm_dspark.kernels.candidate_walk import candidate_walk
from vllm_dspark.kernels.candidates import CandidateFinder
from vllm_dspark.kernels.draws import Draws
from vllm_dspark.kernels.head_weights import HeadWeights


class CandidateDrafter:
    """Draws blocks with one Markov head. Owns what lies between its launches: a call allocates
    nothing but the hidden states' share of the gates, and never waits for the device.

    Args:
        head: the Markov head.
        max_requests: most requests of a block.
        gamma: most drafts of a request.
        count: K, candidates of a position.
        dtype: of the base logits.

    Raises:
        ValueError: a K or dtype that the kernels do not take.
    """

    def __init__(
        self, head: HeadWeights, max_requests: int, gamma: int, count: int, dtype: torch.dtype
    ) -> None:
        self.head, self.count = head, count
        device, places = head.w1.device, max_requests * gamma * count
        self._finder = CandidateFinder(head.vocab_size, count, max_requests * gamma, dtype, device)
        self._ids = torch.empty(places, dtype=torch.int32, device=device)
        self._values = torch.empty(places, dtype=torch.float32, device=device)
        self._scratch = None
        if head.kind != "vanilla":
            self._scratch = torch.empty(
                max_requests, 2, head.rank, dtype=head.w1.dtype, device=device
            )

    def draw(
        self,
        base_logits: torch.Tensor,  # [R, d, V], contiguous but for padding behind the words
        hidden: torch.Tensor,  # [R, d, D], dtype of the head
        anchors: torch.Tensor,  # int [R], contiguous
        tokens: torch.Tensor,  # int64 [R, d or more], out: target ids in the first d columns
        draws: Draws | None = None,  # None: greedy
        draft_ids: torch.Tensor | None = None,  # int32 [slots, γ, K], out
        draft_logprobs: torch.Tensor | None = None,  # float32 [slots, γ, K], out
    ) -> None:
        """Draw x_1..x_d, left to right, and write what they were drawn from (see
        `candidate_walk`).

        Raises:
            ValueError: shapes or strides that the kernels do not take.
        """
        rows, depth, vocab = base_logits.shape
        shape = (rows, depth, self.count)
        places = rows * depth * self.count
        if places > len(self._ids):
            raise ValueError(f"base_logits has {rows} requests of {depth}, more than there is room")
        ids, values = self._ids[:places].view(shape), self._values[:places].view(shape)
        self._finder.find(
            base_logits.view(rows * depth, vocab), ids.flatten(0, 1), values.flatten(0, 1)
        )
        share = self.head.hidden_part(hidden)
        candidate_walk(
            ids, values, anchors, self.head, share, self._scratch, draws, tokens,
            draft_ids, draft_logprobs,
        )  # fmt: skip
