"""Batched verification: from target logits to each request's tokens, in four launches.

    verify_stats    every row's tiles    largest logit, sum of powers
    verify_accept   every request        accepted prefix, the row of the next token
    residual        that row's tiles     the tile that the token is in
                    every request        the word in it

Verification by blocks of dense drafts has two more behind the first (`block_verify`), unless no
request can have more than one.
"""

from __future__ import annotations

from typing import Literal

import torch

from vllm_dspark.kernels.residual import residual
from vllm_dspark.kernels.verify_accept import verify_accept
from vllm_dspark.kernels.verify_batch import Batch, tile_count
from vllm_dspark.kernels.verify_stats import NEVER, planes_of, verify_stats
from vllm_dspark.kernels.verify_verdict import Choice, Verdict

Method = Literal["standard", "block"]


class Verifier:
    """Verifies batches. Owns the notes that launches leave each other between calls; a call never
    waits for the device, and allocates nothing that grows with rows times words.

    Args:
        max_requests: most requests of a batch.
        gamma: most drafts of a request.
        device: of all tensors.
    """

    def __init__(self, max_requests: int, gamma: int, device: torch.device) -> None:
        self.gamma = gamma
        rows = max_requests * (gamma + 1)
        self._arrived = torch.zeros(rows, dtype=torch.int32, device=device)
        self._rejected = torch.full((max_requests,), NEVER, dtype=torch.int32, device=device)

    def verify(self, batch: Batch, method: Method = "standard") -> Verdict:
        """Accepted drafts and one token more for each request, by the target's distribution.

        Args:
            method: standard accepts drafts one by one (Leviathan et al. 2023), block all together
                (Sun et al. 2024). Greedy requests come out the same.

        Raises:
            ValueError: the batch is larger than what this was made for.
        """
        requests, rows = batch.requests, batch.logits.shape[0]
        if requests > len(self._rejected) or rows > len(self._arrived) or batch.gamma > self.gamma:
            raise ValueError(
                f"the batch has {requests} requests, {rows} rows and γ = {batch.gamma}, room is "
                f"for {len(self._rejected)}, {len(self._arrived)} and {self.gamma}"
            )
        device, tiles = batch.logits.device, tile_count(batch.vocab_size)
        verdict = Verdict.empty(requests, batch.gamma, device)
        if requests == 0:
            return verdict
        stats = torch.empty(rows, planes_of(batch), tiles, device=device)
        choice = Choice.empty(requests, device)
        # A block is judged as a whole: all of its rows are needed.
        verify_stats(batch, stats, self._arrived, self._rejected, skip=method == "standard")
        verify_accept(
            batch, stats, self._arrived, self._rejected, verdict, choice,
            by_block=method == "block",
        )  # fmt: skip
        residual(batch, choice, verdict)
        return verdict
