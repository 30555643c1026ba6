"""What vLLM's model runner calls, and what host and device mode share.

The runner calls, in the order of a step: `add_request` for every new request, `get_num_tokens`
(how many tokens the step runs), `compact_batch` (query lengths as the host sees them),
`reallocate_drafts` (the same on the device), and after the next block was drawn
`record_confidences`. Our worker calls `begin_step` before all of that, our proposer `observe`
before it draws. What it calls before any step is in `start_up`.
Upstream: vllm/v1/worker/gpu/spec_decode/adaptive_verification.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_dspark.integration.requests import RequestFacts
from vllm_dspark.integration.verification.arrivals import Arrivals
from vllm_dspark.integration.verification.batch import Batch, BatchRows, Counters, Layout, Rows
from vllm_dspark.integration.verification.costs import StepCosts
from vllm_dspark.integration.verification.start_up import StartUp
from vllm_dspark.integration.verification.timing import StepTiming
from vllm_dspark.scheduler.cost_model import StepShape
from vllm_dspark.scheduler.fixed import FixedPolicy

# Steps, two of which are sent: a block's confidences, and what became of them in the step after.
SAMPLE_EVERY = 4


class VerificationManager(StartUp, ABC):
    """Base of both modes.

    Args:
        layout: see `Layout`.
        policy: decides.
        costs: prices steps for the policy; None where it needs no prices.
        arrivals: brings confidences and outcomes to the policy; None where it needs none.

    Attributes:
        samples: of `SAMPLE_EVERY` steps of a depth the first two are sent, and the budget and
            what is learned do without the others; else every step is.
        outcomes_of: int [2, R], emitted tokens and rejected drafts, as our kernels told them with
            the emitted tokens; None if they did not verify.
    """

    mode: str
    samples = False

    def __init__(
        self,
        layout: Layout,
        policy: FixedPolicy,
        costs: StepCosts | None,
        arrivals: Arrivals | None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.policy = policy
        self.costs = costs
        self.arrivals = arrivals
        self.counters = Counters()
        self.outcomes_of: Callable[[torch.Tensor], torch.Tensor | None] = lambda emitted: None
        self._step = 0  # in progress
        self._depth = policy.gamma  # drafts of the block that it draws
        self._alike = 0  # steps of that depth right before it
        self._facts: dict[str, RequestFacts] = {}
        self._rows = BatchRows(policy.gamma, layout)
        self._batch: Batch | None = None
        self._verifies = False  # the step in progress has drafts to verify
        self._outcome: tuple[torch.Tensor, torch.Tensor] | None = None
        self._timing: StepTiming | None = None
        if costs is not None and costs.learns and arrivals is not None:
            self._timing = StepTiming(costs, arrivals)
        device = layout.query_start_loc.device
        slots = layout.query_start_loc.shape[0]
        width = policy.gamma + layout.num_bonus_tokens
        # Row boundaries of a batch in which every request verifies a full block.
        self._full_cu = torch.arange(slots, dtype=torch.int32, device=device) * width
        # Those of the last batch that verified all it had, but no full blocks. Only read, as those.
        self._whole_cu: tuple[Rows, torch.Tensor] | None = None

    def snapshot(self) -> dict[str, Any]:
        """Mode and counters of this process, for metrics."""
        return {"mode": self.mode} | asdict(self.counters)

    # Called by our worker and our proposer.

    def begin_step(self, scheduler_output: Any) -> None:
        """A step of the engine begins; what its new requests ask for is taken down."""
        self._facts = {
            new.req_id: RequestFacts.of(new.sampling_params)
            for new in scheduler_output.scheduled_new_reqs
        }
        skips = getattr(scheduler_output, "skip_drafts", False)  # 0.33
        depth = 0 if skips else scheduler_output.num_spec_tokens_to_schedule
        self._alike = self._alike + 1 if depth == self._depth else 0
        self._depth = depth
        self._verifies = False

    def observe(self, num_sampled: torch.Tensor, num_rejected: torch.Tensor) -> None:
        """The target has spoken: int [R] each, on the device, for `record_confidences`."""
        self._outcome = num_sampled, num_rejected

    # Called by vLLM's runner.

    def add_request(self, req_idx: int) -> None:
        """A request of this step took a slot."""
        self._rows.forget()
        facts = self._facts.get(self.layout.req_states.index_to_req_id[req_idx], RequestFacts())
        self.policy.add_request(req_idx, self._step, **vars(facts))

    def get_num_tokens(
        self, num_tokens_per_req: dict[str, int], draft_tokens: dict[str, list[int]]
    ) -> int:
        """Tokens that the step runs. Decides on all that can be decided by now.

        Args:
            num_tokens_per_req: scheduled tokens, drafts included.
            draft_tokens: scheduled drafts, of those requests that have some.
        """
        self._verifies = True
        self._collect()
        rows = self._rows.of(num_tokens_per_req, draft_tokens)
        wanted = self.policy.standing(rows.slots, rows.drafts, self._depth, rows.base)
        sampling = context = 0  # not asked for
        if wanted is None or self._timing is not None:
            sampling, context = self._rows.progress(rows)
        if wanted is None:
            wanted = self.policy.choose(
                rows.slots, rows.drafts, rows.base, sampling, context, self._depth
            )
        count = len(rows.req_ids)
        bonus_rows = count * self.layout.num_bonus_tokens
        batch = Batch(rows, min(wanted, max(self.layout.max_total_logits - bonus_rows, 0)))
        self._batch = batch
        self._decide(batch)
        self.counters.add(batch, wanted)
        tokens = rows.base + batch.budget
        # A prefill among them is not what was profiled.
        if self._timing is not None and sampling == rows.base == count:
            shape = StepShape(tokens, count, context, bonus_rows + batch.budget, self._depth)
            self._timing.start(self._step, shape, not batch.trims)
        return tokens

    def record_confidences(self, confidence_probs: torch.Tensor, input_batch: Any) -> None:
        """The step has drawn its block; ends the step.

        Args:
            confidence_probs: float [≥ R, γ], on the device.
            input_batch: the runner's, of the step.
        """
        step, outcome = self._step, self._outcome
        self._step, self._outcome = step + 1, None
        if self.arrivals is None or outcome is None:
            return
        if not self._verifies:
            self._collect()  # nobody else did in this step
            if not self._depth:
                return  # neither drew nor verified: a step as without speculation
        slots = input_batch.idx_mapping_np
        confidence = confidence_probs[: len(slots)]
        if self._depth:
            self.policy.drafted(step, slots, self._depth)
            self._drawn(confidence, input_batch)
        if not self._is_sent():
            return
        # Kernels know which drafts could not be judged, and their table is copied as it is.
        table = self.outcomes_of(outcome[0])
        if table is None:
            table = torch.stack(outcome)
        self.arrivals.send(step, slots, table, confidence, self._depth)

    @abstractmethod
    def compact_batch(
        self,
        num_draft_tokens_per_req: npt.NDArray[np.int32],
        num_scheduled_tokens: npt.NDArray[np.int32],
        cu_num_logits_np: npt.NDArray[np.int32],
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Query lengths [R] and boundaries of logits rows [R + 1] as the host is to see them."""

    @abstractmethod
    def reallocate_drafts(self, req_ids: list[str], idx_mapping: torch.Tensor) -> tuple[Any, ...]:
        """Boundaries of logits rows [R + 1] and of queries [slots + 1] on the device, the number
        of verified drafts, and on 0.33 a None for drafts that the host still has to learn of."""

    # For the modes.

    def _take_batch(self, req_ids: list[str]) -> Batch:
        """The batch that was decided on, which is the one that the runner lays out."""
        batch, self._batch = self._batch, None
        assert batch is not None
        assert batch.rows.req_ids == req_ids, "the runner orders requests in another way"
        return batch

    def _laid_out(self, cu_num_logits: torch.Tensor, verified: int) -> tuple[Any, ...]:
        """What `reallocate_drafts` returns; queries are in the runner's own buffer."""
        result = cu_num_logits, self.layout.query_start_loc, verified
        return (*result, None) if self.layout.returns_admitted else result

    def _whole(self, batch: Batch) -> tuple[Any, ...]:
        """`reallocate_drafts` for a batch that verifies all: the runner's own layout. Where all
        blocks are full its boundaries are at hand, else they are copied to the device once for as
        many steps as these rows last. Mostly, nothing is launched."""
        rows = batch.rows
        if rows.full:
            return self._laid_out(self._full_cu[: len(rows.req_ids) + 1], rows.scheduled)
        if self._whole_cu is None or self._whole_cu[0] is not rows:
            lengths = rows.drafts + self.layout.num_bonus_tokens
            self._whole_cu = rows, self.layout.boundaries(lengths)
        return self._laid_out(self._whole_cu[1], rows.scheduled)

    def _is_sent(self) -> bool:
        """Whether the policy is to hear of the step. It is of every probe, however short."""
        return not self.samples or self._alike % SAMPLE_EVERY < 2 or self._timing is not None

    def _collect(self) -> None:
        """Tell the policy what has arrived."""
        if self.arrivals is None:
            return
        for arrival in self.arrivals.collect(self._step):
            step, slots, confidence = arrival.step, arrival.slots, arrival.confidence
            self.policy.outcomes_arrived(step, slots, arrival.accepted, arrival.verified)
            if arrival.depth:
                drew = arrival.emitted > 0  # in the middle of a prefill nothing will be verified
                if np.count_nonzero(drew) < drew.size:
                    slots, confidence = slots[drew], confidence[drew]
                self.policy.confidences_arrived(step, slots, confidence)
            if self._timing is not None:
                self._timing.arrived(arrival)

    @abstractmethod
    def _decide(self, batch: Batch) -> None:
        """Fill in what this mode knows before the batch is laid out."""

    @abstractmethod
    def _drawn(self, confidence: torch.Tensor, input_batch: Any) -> None:
        """A new block's confidences [R, γ], on the device."""
