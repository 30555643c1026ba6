"""What vLLM's model runner calls, and what host and device mode share.

The runner calls, in the order of a step: `add_request` for every new request, `get_num_tokens`
(how many tokens the step runs), `compact_batch` (query lengths as the host sees them),
`reallocate_drafts` (the same on the device), and after the next block was drawn
`record_confidences`. Our worker calls `begin_step` before all of that, our proposer `observe`
before it draws. Upstream: vllm/v1/worker/gpu/spec_decode/adaptive_verification.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_dspark.integration.requests import RequestFacts
from vllm_dspark.integration.verification.arrivals import Arrival, Arrivals
from vllm_dspark.integration.verification.batch import Batch, Counters, Layout, boundaries
from vllm_dspark.integration.verification.costs import StepCosts
from vllm_dspark.scheduler.cost_model import StepShape
from vllm_dspark.scheduler.fixed import FixedPolicy, Ints


class VerificationManager(ABC):
    """Base of both modes.

    Args:
        layout: see `Layout`.
        policy: decides.
        costs: prices steps for the policy; None where it needs no prices.
        arrivals: brings confidences and outcomes to the policy; None where it needs none.

    Attributes:
        head_line: times the LM head; see `head.head_line`.
        depths: that are drafted, γ the last.
        draw_at: tells the proposer how deep dummy runs draft; None for γ.
    """

    mode: str
    depths: Sequence[int] = ()

    def __init__(
        self,
        layout: Layout,
        policy: FixedPolicy,
        costs: StepCosts | None,
        arrivals: Arrivals | None,
    ) -> None:
        self.layout = layout
        self.policy = policy
        self.costs = costs
        self.arrivals = arrivals
        self.counters = Counters()
        self.head_line: Callable[[], tuple[float, float]] = lambda: (0.0, 0.0)
        self.draw_at: Callable[[int | None], None] = lambda depth: None
        self._step = 0  # in progress
        self._depth = policy.gamma  # drafts of the block that it draws
        self._facts: dict[str, RequestFacts] = {}
        self._batch: Batch | None = None
        self._verifies = False  # the step in progress has drafts to verify
        self._outcome: tuple[torch.Tensor, torch.Tensor] | None = None
        self._shapes: dict[int, tuple[StepShape, bool]] = {}  # of steps whose time is awaited
        self._late: tuple[StepShape, float, bool] | None = None
        device = layout.query_start_loc.device
        slots = layout.query_start_loc.shape[0]
        width = policy.gamma + layout.num_bonus_tokens
        # Row boundaries of a batch in which every request verifies a full block.
        self._full_cu = torch.arange(slots, dtype=torch.int32, device=device) * width

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
        self._depth = 0 if skips else scheduler_output.num_spec_tokens_to_schedule
        self._verifies = False

    def observe(self, num_sampled: torch.Tensor, num_rejected: torch.Tensor) -> None:
        """The target has spoken: int [R] each, on the device, for `record_confidences`."""
        self._outcome = num_sampled, num_rejected

    # Called by vLLM's runner.

    def add_request(self, req_idx: int) -> None:
        """A request of this step took a slot."""
        facts = self._facts.get(self.layout.req_states.index_to_req_id[req_idx], RequestFacts())
        self.policy.add_request(req_idx, self._step, **asdict(facts))

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
        batch = self._batch_of(num_tokens_per_req, draft_tokens)
        states = self.layout.req_states
        computed = states.num_computed_tokens_np[batch.slots]
        sampling = int((computed + batch.others >= states.prefill_len.np[batch.slots]).sum())
        base, context = int(batch.others.sum()), int(computed.sum())
        wanted = self.policy.choose(batch.slots, batch.drafts, base, sampling, context, self._depth)
        rows = len(batch.req_ids) * self.layout.num_bonus_tokens
        batch.budget = min(wanted, max(self.layout.max_total_logits - rows, 0))
        self._decide(batch)
        self._count(batch, wanted)
        self._batch = batch
        if self.costs is not None and self.arrivals is not None:
            shape = StepShape(
                tokens=base + batch.budget,
                requests=len(batch.req_ids),
                context_tokens=context,
                logits_rows=rows + batch.budget,
                depth=self._depth,
            )
            decodes = sampling == base == len(batch.req_ids)
            if decodes and self.costs.learns:  # a prefill among them is not what was profiled
                self._shapes[self._step] = shape, not batch.trims
                self.arrivals.start()
        return base + batch.budget

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
        self.arrivals.send(step, slots, *outcome, confidence, self._depth)

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

    def batches_to_profile(self, capture_sizes: list[int]) -> Iterator[dict[str, Any]]:
        """Arguments of dummy runs to be timed, once graphs are captured."""
        if self.costs is not None:
            yield from self.costs.batches(capture_sizes, self.depths, self.draw_at)

    def set_initial_cost_curves(self, samples: list[Any]) -> None:
        """Timings of those runs. All tensor-parallel ranks go by the first one's."""
        from vllm.distributed.parallel_state import get_tp_group

        if self.costs is not None:
            profile = get_tp_group().broadcast_object((samples, self.head_line()), src=0)
            self.costs.learn_profile(*profile)

    # For the modes.

    def _take_batch(self, req_ids: list[str]) -> Batch:
        """The batch that was decided on, which is the one that the runner lays out."""
        batch, self._batch = self._batch, None
        assert batch is not None
        assert batch.req_ids == req_ids, "the runner orders requests in another way"
        return batch

    def _laid_out(self, cu_num_logits: torch.Tensor, verified: int) -> tuple[Any, ...]:
        """What `reallocate_drafts` returns; queries are in the runner's own buffer."""
        result = cu_num_logits, self.layout.query_start_loc, verified
        return (*result, None) if self.layout.returns_admitted else result

    def _whole(self, batch: Batch) -> tuple[Any, ...]:
        """`reallocate_drafts` for a batch that verifies all: the runner's own layout. Where all
        blocks are full its boundaries are at hand, and nothing is launched."""
        rows = len(batch.req_ids)
        if (batch.drafts == self.policy.gamma).all():
            cu_num_logits = self._full_cu[: rows + 1]
        else:
            cu_num_logits = self._boundaries(batch.drafts + self.layout.num_bonus_tokens)
        return self._laid_out(cu_num_logits, int(batch.drafts.sum()))

    def _boundaries(self, lengths: Ints) -> torch.Tensor:
        """int32 [R + 1] on the device: 0 and the running sum of int [R]."""
        from vllm.utils.torch_utils import async_tensor_h2d

        return async_tensor_h2d(boundaries(lengths), device=self.layout.query_start_loc.device)

    def _batch_of(
        self, num_tokens_per_req: dict[str, int], draft_tokens: dict[str, list[int]]
    ) -> Batch:
        from vllm.v1.worker.gpu.model_runner import sort_batch_req_ids

        width = self.policy.gamma + self.layout.num_bonus_tokens
        req_ids = sort_batch_req_ids(num_tokens_per_req, draft_tokens, width)
        count = len(req_ids)
        index = self.layout.req_states.req_id_to_index
        slots = np.fromiter((index[r] for r in req_ids), np.int64, count)
        tokens = np.fromiter((num_tokens_per_req[r] for r in req_ids), np.int64, count)
        drafts = np.fromiter((len(draft_tokens.get(r, ())) for r in req_ids), np.int64, count)
        return Batch(req_ids, slots, drafts, tokens - drafts)

    def _count(self, batch: Batch, wanted: int) -> None:
        counters = self.counters
        counters.rounds += 1
        counters.scheduled += int(batch.drafts.sum())
        counters.budget += wanted
        counters.verified += batch.budget
        counters.whole += not batch.trims

    def _collect(self) -> None:
        """Tell the policy what has arrived."""
        if self.arrivals is None:
            return
        for arrival in self.arrivals.collect(self._step):
            step, slots = arrival.step, arrival.slots
            self.policy.outcomes_arrived(step, slots, arrival.accepted, arrival.verified)
            drew = arrival.emitted > 0  # in the middle of a prefill nothing will be verified
            if arrival.depth:
                self.policy.confidences_arrived(step, slots[drew], arrival.confidence[drew])
            self._learn_time(arrival)

    def _learn_time(self, arrival: Arrival) -> None:
        """Let a step's time correct the costs, one step late: how long the current blocks took to
        draw is no business of their own budget."""
        late, self._late = self._late, None
        if late is not None and self.costs is not None:
            self.costs.observe(*late)
        known = self._shapes.pop(arrival.step, None)
        if known is not None and arrival.ms is not None:
            shape, replayed = known
            self._late = shape, arrival.ms, replayed

    @abstractmethod
    def _decide(self, batch: Batch) -> None:
        """Fill in what this mode knows before the batch is laid out."""

    @abstractmethod
    def _drawn(self, confidence: torch.Tensor, input_batch: Any) -> None:
        """A new block's confidences [R, γ], on the device."""
