"""Why a draft's noise goes by its place in the block: the scheduler's budget over real noise.

Two words, q = (0.5, 0.5) and p = (0.7, 0.3), γ = 3, one request at a time. The third confidence of
a block is low where its second draft is B, and the number of drafts to verify comes from the block
before the current one. Noise is that of our kernels.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_dspark.kernels.gumbel_reference import gumbel_reference
from vllm_dspark.kernels.verify_uniform_reference import uniform_reference
from vllm_dspark.scheduler.budget import choose_budget

REQUESTS, LENGTH, GAMMA = 4000, 24, 3
TARGET, DRAFT = np.array([0.7, 0.3]), np.array([0.5, 0.5])
RESIDUAL = np.maximum(TARGET - DRAFT, 0) + 1e-300
STEP_MS = [1, 3, 3, 3]  # no draft, or all
DRAFT_SALT = 1 << 30


def noise(by_step: bool) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """float [γ, requests, positions, 2] of drafts and [requests, positions, 2] of other tokens, and
    the requests' seeds."""
    seeds = torch.arange(1, REQUESTS + 1) * 104_729_000_017
    words, positions = torch.arange(2), range(LENGTH + 3 * GAMMA)

    def of(step: int, salt: int, mixed: bool) -> np.ndarray:
        return np.stack(
            [
                gumbel_reference(
                    seeds, torch.full((REQUESTS,), at - salt), words, step=step, by_step=mixed
                ).numpy()
                for at in positions
            ],
            axis=1,
        )

    drafts = np.stack([of(k, 0, by_step) for k in range(GAMMA)])
    return drafts, of(0, DRAFT_SALT, False), seeds.tolist()


def share_of_the_first_word(by_step: bool) -> float:
    drafts, own, seeds = noise(by_step)
    emitted = np.zeros(2)
    for request, seed in enumerate(seeds):
        at, before = 0, None
        block = [int(np.argmax(drafts[k, request, k])) for k in range(GAMMA)]
        while at < LENGTH - 1:
            budget = 0
            if before is not None:
                confidence = np.array([0.9, 0.9, 0.05 if before[1] else 0.9])
                budget = choose_budget(np.cumprod(confidence)[None], [GAMMA], STEP_MS, 1)
            said: list[int] = []
            for i, word in enumerate(block[:budget]):
                if uniform_reference(seed, at + i) * DRAFT[word] > TARGET[word]:
                    said.append(int(np.argmax(np.log(RESIDUAL) + own[request, at + i])))
                    break
                said.append(word)
            else:
                said.append(int(np.argmax(np.log(TARGET) + own[request, at + budget])))
            for i, word in enumerate(said):
                emitted[word] += 3 <= at + 1 + i < LENGTH - 4
            at, before = at + len(said), block
            block = [int(np.argmax(drafts[k, request, at + k])) for k in range(GAMMA)]
    return float(emitted[0] / emitted.sum())


@pytest.mark.parametrize(("by_step", "exact"), [(True, True), (False, False)])
def test_emitted_words_follow_the_target_if_no_two_blocks_share_noise(
    by_step: bool, exact: bool
) -> None:
    """With noise of seed and position alone the second draft of a block is the first of the next
    one, should that be one token further. Tokens of a request are no more alike than 16 at once."""
    error = 4 * (0.21 / (REQUESTS * (LENGTH - 7) / 16)) ** 0.5
    assert (abs(share_of_the_first_word(by_step) - 0.7) < error) is exact
