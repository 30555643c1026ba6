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

    def add(self, batch: Batch, wanted: int) -> None:
        """Count a step, for which the policy wanted so many drafts verified."""
        self.rounds += 1
        self.scheduled += batch.rows.scheduled
        self.budget += wanted
        self.verified += batch.budget
        self.whole += not batch.trims


@dataclass(frozen=True)
class Rows:
    """Who is in a step that has drafts to verify, in the runner's order.

    Steps of the same requests with as many drafts share one object: its arrays must not change.
    """

    req_ids: list[str]
    slots: Ints  # [R]
    drafts: Ints  # [R], scheduled
    others: Ints  # [R], tokens that run in any case
    scheduled: int  # sum of `drafts`
    base: int  # sum of `others`
    full: bool  # every request has γ drafts


@dataclass
class Batch:
    """A step that has drafts to verify."""

    rows: Rows
    budget: int
    lengths: Ints | None = None  # [R], drafts to verify, where the host decides

    @property
    def trims(self) -> bool:
        """Whether fewer drafts are verified than were scheduled."""
        return self.budget < self.rows.scheduled


@dataclass(frozen=True)
class Layout:
    """What the runner lays batches out in."""

    req_states: Any  # vLLM's RequestState
    query_start_loc: torch.Tensor  # int32 [slots + 1], the runner's input buffer
    num_bonus_tokens: int  # logits rows of a request without drafts
    max_total_logits: int  # rows that the rejection sampler takes
    returns_admitted: bool  # `reallocate_drafts` returns four values, not three

    def boundaries(self, lengths: npt.NDArray[Any]) -> torch.Tensor:
        """`boundaries` of int [R], on the device."""
        from vllm.utils.torch_utils import async_tensor_h2d

        return async_tensor_h2d(boundaries(lengths), device=self.query_start_loc.device)


def boundaries(lengths: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """int32 [R + 1]: 0 and the running sum of int [R]."""
    result = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=result[1:])
    return result


class BatchRows:
    """Makes `Rows`, or finds that they are those of the step before: a batch that only decodes
    stays the same for many steps.

    Args:
        gamma: γ.
        layout: see `Layout`.
    """

    def __init__(self, gamma: int, layout: Layout) -> None:
        self._gamma, self._layout = gamma, layout
        self._rows: Rows | None = None
        self._asked: tuple[list[Any], ...] = ()

    def forget(self) -> None:
        """A request took a slot."""
        self._rows = None

    def of(self, num_tokens_per_req: dict[str, int], draft_tokens: dict[str, list[int]]) -> Rows:
        """Of one step; arguments as those of `VerificationManager.get_num_tokens`."""
        asked = (
            list(num_tokens_per_req),
            list(num_tokens_per_req.values()),
            list(draft_tokens),
            list(map(len, draft_tokens.values())),
        )
        if self._rows is None or asked != self._asked:
            self._rows = self._make(num_tokens_per_req, draft_tokens)
            self._asked = asked
        return self._rows

    def progress(self, rows: Rows) -> tuple[int, int]:
        """How many of these requests emit a token in any case, because their prefill ends in this
        step or before, and the tokens in the caches of all."""
        states = self._layout.req_states
        computed = states.num_computed_tokens_np.take(rows.slots)
        emits = computed + rows.others >= states.prefill_len.np.take(rows.slots)
        return int(np.count_nonzero(emits)), int(computed.sum())

    def _make(self, num_tokens_per_req: dict[str, int], draft_tokens: dict[str, list[int]]) -> Rows:
        from vllm.v1.worker.gpu.model_runner import sort_batch_req_ids

        width = self._gamma + self._layout.num_bonus_tokens
        req_ids = sort_batch_req_ids(num_tokens_per_req, draft_tokens, width)
        count = len(req_ids)
        index = self._layout.req_states.req_id_to_index
        slots = np.fromiter((index[r] for r in req_ids), np.int64, count)
        tokens = np.fromiter((num_tokens_per_req[r] for r in req_ids), np.int64, count)
        drafts = np.fromiter((len(draft_tokens.get(r, ())) for r in req_ids), np.int64, count)
        others = tokens - drafts
        full = bool((drafts == self._gamma).all())
        return Rows(req_ids, slots, drafts, others, int(drafts.sum()), int(others.sum()), full)
