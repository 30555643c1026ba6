"""vLLM's scheduler and worker as far as ours lean on them, without an engine, for `host_cost`.

Our own classes are the real ones, mixed into these as they are into vLLM's. The traffic is steady
decode: the same R requests in every step, γ drafts each, outcomes and confidences drawn in
advance. What a step takes on the device is made up.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.core.sched.interface import PauseState

from benchmarks.spans import Spans
from vllm_dspark.integration.depth_hooks import DepthHooks
from vllm_dspark.integration.scheduler import DepthScheduling
from vllm_dspark.integration.step_clock import HostClock
from vllm_dspark.integration.verification.hooks import VerificationHooks
from vllm_dspark.integration.verification.manager import VerificationManager

CONTEXT = 600  # tokens of each request
ENGINE = "engine"  # label of what is not ours
_TABLES = 64  # of outcomes and confidences, drawn in advance


class EngineScheduler:
    """vLLM's, mixed in after ours."""

    def __init__(self, vllm_config: Any, requests: int, spans: Spans) -> None:
        self.vllm_config = vllm_config
        self.num_spec_tokens = self.num_lookahead_tokens = gamma = vllm_config.num_lookahead_tokens
        self.dynamic_sd_lookup = None
        self.max_num_scheduled_tokens, self.max_model_len = 8192, 4096
        self.max_num_active_reqs = requests
        self.deferred_waiting: set[Any] = set()
        self.pause_state = PauseState.UNPAUSED
        self.running = [
            SimpleNamespace(request_id=f"cmpl-{n:032x}", num_computed_tokens=CONTEXT)
            for n in range(requests)
        ]
        self.requests = {request.request_id: request for request in self.running}
        self.kv_cache_manager = SimpleNamespace(
            usage=0.3,
            block_pool=SimpleNamespace(get_num_free_blocks=lambda: 100_000),
            coordinator=SimpleNamespace(single_type_managers=[SimpleNamespace(block_size=16)]),
        )
        self._drafts = dict.fromkeys(self.requests, [-1] * gamma)
        spans.wrap(self, "_plan_step", ENGINE)

    def get_request_counts(self) -> tuple[int, int]:
        return len(self.running), 0

    def schedule(self) -> Any:
        return self._plan_step()

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> None:
        """Nothing of vLLM's is of interest."""

    def _plan_step(self) -> Any:
        for request in self.running:
            request.num_computed_tokens += 2
        gamma = self.num_spec_tokens
        return SimpleNamespace(
            num_scheduled_tokens=dict.fromkeys(self._drafts, gamma + 1),
            scheduled_spec_decode_tokens=dict(self._drafts),
            total_num_scheduled_tokens=len(self.running) * (gamma + 1),
            scheduled_new_reqs=[],
            num_spec_tokens_to_schedule=gamma,
        )


class Scheduler(DepthScheduling, EngineScheduler):
    """Ours, which needs no more of vLLM's than this."""


class EngineWorker:
    """vLLM's worker and runner, mixed in after ours."""

    def __init__(self, manager: VerificationManager, traffic: Traffic, spans: Spans) -> None:
        self.model_runner = SimpleNamespace(adaptive_verification=manager, execute_model_state=None)
        self._manager, self._traffic = manager, traffic
        self._rows = torch.zeros(1)
        spans.wrap(self, "_prepare", ENGINE)
        spans.wrap(self, "_outcome", ENGINE)

    def execute_model(self, scheduler_output: Any) -> None:
        manager, tokens = self._manager, scheduler_output.num_scheduled_tokens
        manager.get_num_tokens(tokens, scheduler_output.scheduled_spec_decode_tokens)
        batch, arrays = self._prepare(scheduler_output)
        manager.compact_batch(*arrays)
        self._rows, *_ = manager.reallocate_drafts(batch.req_ids, batch.idx_mapping)
        self.model_runner.execute_model_state = SimpleNamespace(
            input_batch=batch,
            num_spec_tokens_to_schedule=scheduler_output.num_spec_tokens_to_schedule,
        )

    def sample_tokens(self, grammar_output: Any) -> Any:
        batch = self.model_runner.execute_model_state.input_batch
        sampled, rejected, confidence = self._outcome()
        self._manager.observe(sampled, rejected)
        self._manager.record_confidences(confidence, batch)
        return SimpleNamespace()

    def _prepare(self, scheduler_output: Any) -> tuple[Any, Any]:
        """The runner's input batch, and what it hands to `compact_batch`."""
        states = self._manager.layout.req_states
        drafts = scheduler_output.scheduled_spec_decode_tokens
        names = list(scheduler_output.num_scheduled_tokens)
        count = len(names)
        slots = np.fromiter((states.req_id_to_index[name] for name in names), np.intp, count)
        drafted = np.fromiter((len(drafts[name]) for name in names), np.int32, count)
        rows = np.concatenate([[0], np.cumsum(drafted + 1)]).astype(np.int32)
        states.num_computed_tokens_np[slots] += 2
        device = self._manager.layout.query_start_loc.device
        batch = SimpleNamespace(
            req_ids=names,
            num_reqs=count,
            idx_mapping_np=slots,
            idx_mapping=torch.from_numpy(slots).to(device),
            num_computed_tokens_np=states.num_computed_tokens_np[slots],
        )
        return batch, (drafted, drafted + 1, rows)

    def _outcome(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the target says of this step, and the confidences of the next block."""
        accepts, confidence = self._traffic.next()
        verified = self._rows.diff() - 1
        accepted = torch.minimum(accepts, verified)
        return accepted + 1, verified - accepted, confidence


class Worker(DepthHooks, VerificationHooks, EngineWorker):
    """Ours."""


class Traffic:
    """Outcomes and confidences.

    Args:
        requests, gamma: R and γ.
        device: where they are.
    """

    def __init__(self, requests: int, gamma: int, device: torch.device, seed: int) -> None:
        random = np.random.default_rng(seed)
        self._tables = []
        for _ in range(_TABLES):
            confidence = random.beta(5, 2, (requests, gamma)).astype(np.float32)
            survives = random.random((requests, gamma)) < confidence
            accepts = survives.cumprod(axis=1).sum(axis=1)
            self._tables.append(
                (torch.from_numpy(accepts).to(device), torch.from_numpy(confidence).to(device))
            )
        self._at = 0

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [R], drafts that would be accepted, and float32 [R, γ]."""
        self._at = (self._at + 1) % _TABLES
        return self._tables[self._at]


class MadeUpClock(HostClock):
    """Does what a clock does, then says that a step took what its verified drafts are told to take.

    Args:
        manager: counts them.
        curve: float64 [drafts + 1], ms.
    """

    def __init__(self, manager: VerificationManager, curve: npt.NDArray[np.float64]) -> None:
        super().__init__()
        self._counters, self._curve = manager.counters, curve.tolist()
        self._noise = np.random.default_rng(1).lognormal(0, 0.02, 997).tolist()
        self._verified = 0
        self._made_up: list[tuple[int, float]] = []

    def end(self, step: int) -> None:
        """See `StepClock`."""
        super().end(step)
        ms = self._curve[self._counters.verified - self._verified]
        self._verified = self._counters.verified
        self._made_up.append((step, ms * self._noise[step % 997]))

    def ended(self) -> list[tuple[int, float]]:
        """See `StepClock`."""
        super().ended()
        made_up, self._made_up = self._made_up, []
        return made_up
