"""A step as the verification manager sees it, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_dspark.scheduler.fixed import Ints


@dataclass
class Counters:
    """Totals since the engine started, of steps that had drafts to verify.

    vLLM's own metrics count a draft that was trimmed as one that was rejected.
    """

    rounds: int = 0  # steps
    scheduled: int = 0  # drafts that the engine scheduled
    budget: int = 0  # drafts that the policy wanted verified
    verified: int = 0  # drafts that were
    whole: int = 0  # steps that verified all there was, on the runner's own layout


@dataclass
class Batch:
    """A step that has drafts to verify, requests in the runner's order."""

    req_ids: list[str]
    slots: Ints  # [R]
    drafts: Ints  # [R], scheduled
    others: Ints  # [R], tokens that run in any case
    budget: int = 0
    lengths: Ints | None = None  # [R], drafts to verify, where the host decides

    @property
    def trims(self) -> bool:
        """Whether fewer drafts are verified than were scheduled."""
        return self.budget < int(self.drafts.sum())


@dataclass(frozen=True)
class Layout:
    """What the runner lays batches out in."""

    req_states: Any  # vLLM's RequestState
    query_start_loc: torch.Tensor  # int32 [slots + 1], the runner's input buffer
    num_bonus_tokens: int  # logits rows of a request without drafts
    max_total_logits: int  # rows that the rejection sampler takes
    returns_admitted: bool  # `reallocate_drafts` returns four values, not three


def boundaries(lengths: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """int32 [R + 1]: 0 and the running sum of int [R]."""
    result = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=result[1:])
    return result
