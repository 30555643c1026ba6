"""vLLM's scheduler, which also chooses how many tokens the drafter drafts.

Depth d of step t is how many drafts each request gets at the end of step t; they are verified in
step t + 1. It is chosen before step t is scheduled, from what earlier steps reported in sum: times,
mean survival, requests, free memory. So it is known before any draft that it concerns is drawn, and
no draft decides on its own verification. That is what losslessness asks for (see
`vllm_dspark.scheduler.budget`), and why any rule at all may choose depths, a random one included.

vLLM's own dynamic speculative decoding is the seam: a scheduler with a `dynamic_sd_lookup` asks it
for the drafts of each step. With one, vLLM also stops filling new requests that have a single token
to compute up to γ + 1 tokens, which served batches of one length only.

What is reserved follows the depth: tokens of a step, since a request is scheduled with as many
placeholders as were drafted for it, and K/V slots, through `num_lookahead_tokens`. A block drafted
in step t is written at most `lookahead(d)` slots beyond the tokens of step t, even if all of those
are accepted, and its slots are taken before step t is launched. Steps that are in flight took
theirs before; blocks are never taken back from a request that runs. So it is enough that each step
reserves for its own depth.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.structured_output.utils import strip_speculative_padding

from vllm_dspark.integration.broken_requests import BrokenRequests
from vllm_dspark.integration.depth_plan import DepthPlan
from vllm_dspark.integration.kv_room import KvRoom
from vllm_dspark.integration.speculation_counts import SpeculationCounts
from vllm_dspark.integration.speculation_stats import with_speculation
from vllm_dspark.integration.step_report import (
    StepPlan,
    StepReport,
    TimedStep,
    attach_plan,
    take_report,
)
from vllm_dspark.scheduler.controller import DepthController
from vllm_dspark.scheduler.outlook import ALIKE
from vllm_dspark.scheduler.running_survival import outcomes

_COUNT_EVERY = 16  # steps


class DepthScheduling:
    """Mixed into a scheduler class of vLLM's, before it.

    Attributes:
        controller: chooses the depth.
    """

    vllm_config: Any
    num_spec_tokens: int
    num_lookahead_tokens: int
    max_num_active_reqs: int
    dynamic_sd_lookup: Any
    running: list[Any]
    requests: dict[str, Any]
    kv_cache_manager: Any
    deferred_waiting: Any
    get_request_counts: Any
    pause_state: Any
    broken: frozenset[str] = frozenset()  # see `BrokenRequests`

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._plan = plan = DepthPlan.of(self.vllm_config)
        self.controller = DepthController(
            plan.gamma, plan.goal, fixed=plan.fixed, max_requests=self.max_num_active_reqs
        )
        self._depths: list[int] = []  # to fall back to, descending
        self._room = KvRoom(self, plan.lookahead)
        self._learned: list[TimedStep] = []  # steps that the next plan hands on
        self._ranked = False  # a worker says what survives
        self._counted = 0, 0  # running requests, and their tokens
        self._uncounted = 0  # steps since then
        self._counts = SpeculationCounts(self.controller)
        if plan.fixed is not None:
            self._follow([plan.fixed])

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Choose the depth, then schedule for it; see vLLM's."""
        self._choose()
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]  # vLLM's, mixed in after
        attach_plan(output, StepPlan(tuple(self._learned), self.controller.cost))
        self._learned.clear()
        if output.total_num_scheduled_tokens:
            # vLLM 0.33 lets the drafter rest where no request goes on after the step.
            skips = getattr(output, "skip_drafts", False)
            self._counts.scheduled(0 if skips else output.num_spec_tokens_to_schedule)
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Learn from what ended, then go on; see vLLM's."""
        self._learn(take_report(model_runner_output))
        if not self._ranked and self.controller.varies:
            self._count_outcomes(scheduler_output, model_runner_output)
        # vLLM's, mixed in after
        return super().update_from_output(  # type: ignore[misc]
            scheduler_output, model_runner_output
        )

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """With what we decided; see vLLM's."""
        stats = super().make_stats(*args, **kwargs)  # type: ignore[misc]  # vLLM's, mixed in after
        if stats is None:
            return None
        drafted = stats.spec_decoding_stats
        accepted = drafted.num_accepted_tokens if drafted is not None else 0
        return with_speculation(stats, self._counts.take(accepted))

    def _choose(self) -> None:
        """Set what vLLM reads while it schedules."""
        if self.dynamic_sd_lookup is None:
            return
        running, waiting = self.get_request_counts()
        waiting -= len(self.deferred_waiting)  # for something else than room
        chosen = self.controller.choose(
            requests=running,
            waiting=max(waiting, 0) if self.pause_state == PauseState.UNPAUSED else 0,
            context_tokens=self._context(),
            free_kv_fraction=1.0 - self.kv_cache_manager.usage,
        )
        shallower = (depth for depth in self._depths if depth < chosen)
        depth = self._room.fitting_depth([chosen, *shallower])
        self.dynamic_sd_lookup.depth = depth
        self.num_lookahead_tokens = self._plan.lookahead(depth)

    def _context(self) -> int:
        """Tokens computed of all running requests, by their mean of at most some steps ago, which
        changes little as long as they are about as many."""
        running = len(self.running)
        self._uncounted += 1
        changed = abs(self._counted[0] - running) * ALIKE > running
        if changed or self._uncounted >= _COUNT_EVERY:
            tokens = sum(map(attrgetter("num_computed_tokens"), self.running))
            self._counted, self._uncounted = (running, tokens), 0
        counted, tokens = self._counted
        return tokens * running // counted if counted else 0

    def _follow(self, depths: list[int]) -> None:
        """From now on vLLM asks us for the depth of each step."""
        self._depths = sorted({0, *depths}, reverse=True)
        self.dynamic_sd_lookup = ChosenDepth(self.controller.depth)

    def _learn(self, report: StepReport) -> None:
        controller = self.controller
        if report.startup is not None:
            controller.start(report.startup.depths, report.startup.costs)
            if controller.varies:
                self._follow(list(report.startup.depths))
        for step in report.steps:
            if controller.observe_step(step[:5], step.ms, step.usual):
                self._learned.append(step)
        self._counts.reported(report)
        if report.survival:
            self._ranked = True
            controller.observe_survival(report.survival, report.age)

    def _count_outcomes(self, scheduler_output: Any, model_runner_output: Any) -> None:
        """Where every draft is verified that its request lets be, what was accepted says what
        survives. A draft that a grammar rejects, or that a request keeps from verification, is
        drafted in vain like any other."""
        accepted, verified = [], []
        sampled = model_runner_output.sampled_token_ids
        for req_id, drafts in scheduler_output.scheduled_spec_decode_tokens.items():
            row = model_runner_output.req_id_to_index[req_id]
            # What broken logits reject says nothing about the drafter.
            if req_id not in self.requests or not sampled[row] or req_id in self.broken:
                continue
            accepted.append(len(sampled[row]) - 1)
            verified.append(len(drafts))
        self.controller.observe_outcomes(outcomes(accepted, verified, self.num_spec_tokens))


class ChosenDepth:
    """Stands in for vLLM's table of drafts by number of requests.

    Attributes:
        depth: the answer, whatever is asked.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def __getitem__(self, requests: int) -> int:
        return self.depth


class DSparkScheduler(BrokenRequests, DepthScheduling, AsyncScheduler):
    """Chosen through `scheduler_config.scheduler_cls`, only where DSpark was asked for."""


class DSparkSyncScheduler(BrokenRequests, DepthScheduling, Scheduler):
    """The same without asynchronous scheduling."""

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        """Take the drafts of a step; see vLLM's, which cuts a block before the first draft that a
        grammar rejects. That draft stays, as a placeholder: see `GrammarRejectionSampler`."""
        super().update_draft_token_ids(draft_token_ids)
        drawn = zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True)
        for name, drafts in drawn:
            request = self.requests.get(name)
            if request is None or request.is_finished() or request.is_prefill_chunk:
                continue
            if not request.use_structured_output:
                continue
            if len(request.spec_token_ids) < len(strip_speculative_padding(drafts)):
                request.spec_token_ids = [*request.spec_token_ids, -1]
