"""Our scheduler, worker and verification manager put together around a stand-in of the engine."""

from __future__ import annotations

from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.host_engine import CONTEXT, MadeUpClock, Scheduler, Traffic, Worker
from benchmarks.spans import Spans
from vllm_dspark.calibration.online import OnlineCalibrator
from vllm_dspark.integration.depth_plan import SCHEDULERS
from vllm_dspark.integration.step_meter import StepMeter
from vllm_dspark.integration.step_report import EVERY, Startup
from vllm_dspark.integration.verification.arrivals import Arrivals, DeviceArrivals
from vllm_dspark.integration.verification.batch import Layout
from vllm_dspark.integration.verification.costs import StepCosts
from vllm_dspark.integration.verification.device import DeviceVerification
from vllm_dspark.integration.verification.host import HostVerification
from vllm_dspark.integration.verification.manager import VerificationManager
from vllm_dspark.scheduler.cost_model import CostModel, StepSample, StepShape
from vllm_dspark.scheduler.verification import VerificationPolicy

DEPTHS = 0, 1, 2, 3, 5  # and γ
CAPTURED = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))
MOST_TOKENS, MOST_CONTEXT = 8192, 4096
# A step without drafts takes 5 ms, a full block 1 ms. A draft that is verified adds this part of
# 5 ms over R, which is what about half of the drafts are worth, or next to none.
DEAR, CHEAP = 0.25, 1e-4

# What is timed, by attribute of `Server`. Together the entries are all that the plugin adds.
ENTRIES = {
    "scheduler": ("schedule", "update_from_output"),
    "worker": ("execute_model", "sample_tokens"),
}
PARTS = {
    "scheduler": (*ENTRIES["scheduler"], "_choose", "_learn"),
    "scheduler.controller": ("choose", "observe_step", "observe_survival"),
    "worker": ENTRIES["worker"],
    "meter": ("begin", "launched", "end"),
    "meter._survival": ("step",),
    "manager": (
        "begin_step",
        "get_num_tokens",
        "compact_batch",
        "reallocate_drafts",
        "observe",
        "record_confidences",
    ),
    "arrivals": ("send", "collect"),
    "costs": ("budget_curve",),
    "policy": (
        "standing",
        "choose",
        "allocate",
        "drafted",
        "outcomes_arrived",
        "confidences_arrived",
        "retired",
    ),
    "policy.calibrator": ("calibrate", "observe"),
}


class Server:
    """One process that schedules and runs steps.

    Args:
        requests, gamma: R and γ.
        trims: drafts are so dear that fewer pay than are drafted.
        device_mode: whose drafts are verified is decided on tensors; otherwise on the host.
        device: of the manager's tensors.
        spans: is told of each step.
        parts: each part is timed by itself, not only the entries.
    """

    def __init__(
        self,
        requests: int,
        gamma: int,
        trims: bool,
        device_mode: bool,
        device: torch.device,
        spans: Spans,
        parts: bool,
    ) -> None:
        self._spans = spans
        model = _model(gamma, requests, DEAR if trims else CHEAP)
        self.costs = _costs(gamma, requests, model)
        calibrator = OnlineCalibrator(gamma, steps=EVERY)
        self.policy = VerificationPolicy(requests, gamma, calibrator, self.costs, stands=EVERY)
        self.arrivals = Arrivals()
        if device.type == "cuda":
            self.arrivals = DeviceArrivals(requests, gamma, device, alone=True)
        rest = _layout(requests, device), self.policy, self.costs, self.arrivals
        self.manager: VerificationManager
        if device_mode:
            self.manager = DeviceVerification(calibrator, *rest)
            self.manager.samples = True
        else:
            self.manager = HostVerification(*rest)
        self.scheduler = Scheduler(_vllm_config(gamma, requests), requests, spans)
        self.worker = Worker(self.manager, Traffic(requests, gamma, device, seed=0), spans)
        size = requests, requests, requests * CONTEXT, requests
        curve = model.budget_curve(*size, gamma, drafts=requests * gamma)
        clock = MadeUpClock(self.manager, curve)
        startup = Startup(_depths(gamma), model.to_json({}))
        self.meter = StepMeter(gamma, self.manager, clock, startup, every=EVERY)
        self.worker.meter = self.meter
        self._before: tuple[Any, Any] | None = None
        self._admit()
        for owner, names in (PARTS if parts else ENTRIES).items():
            for name in names:
                spans.wrap(attrgetter(owner)(self), name, f"{owner}.{name}")

    def step(self) -> None:
        """Schedule a step, run it, and take in what became of the one before."""
        output = self.scheduler.schedule()
        self.worker.execute_model(output)
        sampled = self.worker.sample_tokens(None)
        if self._before is not None:
            self.scheduler.update_from_output(*self._before)
        self._before = output, sampled
        if self.manager.layout.query_start_loc.device.type == "cuda":
            torch.cuda.synchronize()  # launches are never held up by a full queue
        self._spans.end_step()

    def _admit(self) -> None:
        """All requests come at once; every other one is sampled."""
        states = self.manager.layout.req_states
        new = []
        for slot, name in enumerate(self.scheduler.requests):
            states.req_id_to_index[name], states.index_to_req_id[slot] = slot, name
            parameters = SimpleNamespace(
                temperature=float(slot % 2), structured_outputs=None, extra_args=None
            )
            new.append(SimpleNamespace(req_id=name, sampling_params=parameters))
        gamma = self.policy.gamma
        self.manager.begin_step(
            SimpleNamespace(scheduled_new_reqs=new, num_spec_tokens_to_schedule=gamma)
        )
        for slot in range(len(new)):
            self.manager.add_request(slot)


def _depths(gamma: int) -> tuple[int, ...]:
    return (*(depth for depth in DEPTHS if depth < gamma), gamma)


def _model(gamma: int, requests: int, dear: float) -> CostModel:
    """A profile of two sizes at every depth."""
    samples = []
    for depth in _depths(gamma):
        for tokens in (requests, requests * (gamma + 1)):
            shape = StepShape(tokens, requests, requests * CONTEXT, tokens, depth)
            verify_ms = 5.0 * (1 + dear * (tokens / requests - 1))
            samples.append(StepSample(shape, verify_ms, depth / gamma))
    return CostModel(samples, CAPTURED, gamma)


def _costs(gamma: int, requests: int, model: CostModel) -> StepCosts:
    costs = StepCosts(
        gamma=gamma,
        most_requests=requests,
        most_tokens=MOST_TOKENS,
        context=CONTEXT,
        most_context=MOST_CONTEXT,
        trims_replay=True,
        learns=False,
    )
    costs.model, costs.profiled = model, True
    return costs


def _layout(requests: int, device: torch.device) -> Layout:
    states = SimpleNamespace(
        req_id_to_index={},
        index_to_req_id={},
        num_computed_tokens_np=np.full(requests, CONTEXT, dtype=np.int32),
        prefill_len=SimpleNamespace(np=np.full(requests, CONTEXT // 2, dtype=np.int32)),
    )
    starts = torch.zeros(requests + 1, dtype=torch.int32, device=device)
    return Layout(states, starts, 1, 1 << 40, True)


def _vllm_config(gamma: int, requests: int) -> Any:
    return SimpleNamespace(
        additional_config={"dspark": {}},
        speculative_config=SimpleNamespace(
            num_speculative_tokens=gamma, num_speculative_tokens_per_batch_size=None
        ),
        scheduler_config=SimpleNamespace(scheduler_cls=SCHEDULERS[True], max_num_seqs=requests),
        num_lookahead_tokens=gamma,
    )
