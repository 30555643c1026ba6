"""Dense drafting: γ tokens per request, each drawn from all of the vocabulary, in two launches a
position and with no [R, V] intermediate."""

from __future__ import annotations

import torch

from vllm_dspark.kernels.dense_pick import dense_pick
from vllm_dspark.kernels.dense_scores import dense_scores, tile_count
from vllm_dspark.kernels.draws import Draws
from vllm_dspark.kernels.head_weights import HeadWeights


class DenseDrafter:
    """Draws blocks with one Markov head. Owns what lies between its launches: a call allocates
    nothing but the hidden states' share of the gates, and never waits for the device.

    Args:
        head: the Markov head.
        max_requests: most requests of a block.
    """

    def __init__(self, head: HeadWeights, max_requests: int) -> None:
        self.head = head
        tiles, device = tile_count(head.vocab_size), head.w1.device
        self._best = torch.empty(max_requests, tiles, dtype=torch.float32, device=device)
        self._where = torch.empty(max_requests, tiles, dtype=torch.int32, device=device)
        latents = {"vanilla": 0, "gated": 1, "rnn": 3}[head.kind]  # the RNN's two states with it
        self._latents = torch.empty(
            latents, max_requests, head.rank, dtype=head.w1.dtype, device=device
        )

    def draw(
        self,
        base_logits: torch.Tensor,  # [R, d, V], any float; words contiguous
        hidden: torch.Tensor,  # [R, d, D], dtype of the head
        anchors: torch.Tensor,  # int [R]
        tokens: torch.Tensor,  # int64 [R, d or more], out: target ids in the first d columns
        draws: Draws | None = None,  # None: greedy
        cache: torch.Tensor | None = None,  # [slots, γ, V_target], out; see `dense_scores`
    ) -> None:
        """Draw x_1..x_d from softmax((U_k + B_k) / temperature), left to right.

        Raises:
            ValueError: shapes or strides that the kernels do not take.
        """
        head = self.head
        rows, depth = base_logits.shape[:2]
        if rows > self._best.shape[0]:
            raise ValueError(f"base_logits has {rows} requests, room is for {len(self._best)}")
        share = head.hidden_part(hidden)
        latent, states = None, None
        if share is not None:
            latent = self._latents[0]
            if head.kind == "rnn":
                states = (self._latents[1], self._latents[2])
            dense_pick(None, None, anchors, head, share[:, 0], latent, states)
        previous = anchors
        for k in range(depth):
            table, index = (head.w1, previous) if latent is None else (latent, None)
            dense_scores(
                base_logits[:, k], table, index, head.w2, draws, k, self._best, self._where,
                scale=head.w2_scale, words=head.words, cache=cache,
            )  # fmt: skip
            if states is not None:
                states = (states[1], states[0])
            previous = tokens[:, k]
            following = None if share is None or k + 1 == depth else share[:, k + 1]
            dense_pick(self._best, self._where, previous, head, following, latent, states)
