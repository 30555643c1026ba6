"""One engine, step by step: continuous batching with chunked prefill, as vLLM schedules it.

Scheduling is asynchronous: a step is scheduled while the one before it runs, so that a request that
arrives in a step is part of the next but one, and one that has ended leaves its place empty for a
step. K/V memory is taken to suffice for all that run.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vllm_dspark.scheduler.cost_model import StepShape
from vllm_dspark.simulation.acceptance import Drafter
from vllm_dspark.simulation.blocks import accepted_by_block
from vllm_dspark.simulation.engine import Engine
from vllm_dspark.simulation.policies import Batch, Floats, Ints, Outcome, Policy, Queue
from vllm_dspark.simulation.workload import Request

LEAD = 2  # steps between the one in progress and the first that an arrival can be part of


@dataclass
class Totals:
    """Of the steps so far."""

    steps: int = 0
    rounds: int = 0  # requests that decoded, over all steps
    emitted: int = 0  # tokens
    firsts: int = 0  # tokens that a prefill emitted
    verified: int = 0  # drafts
    drafted: int = 0  # drafts that were scheduled
    depths: Counter[int] = field(default_factory=Counter)  # steps that drafted each depth


class Replica:
    """An engine with its queue.

    Args:
        policy: decides on drafts.
        engine: says what steps take.
        drafter: draws blocks.
        seed: of all chance.
        jitter: standard deviation of the logarithm of step times.

    Attributes:
        clock: ms.
        totals: `Totals`.
        shapes: of every step, and whether it had a prefill, if it is a list; None keeps none.
    """

    shapes: list[tuple[StepShape, bool]] | None = None

    def __init__(
        self, policy: Policy, engine: Engine, drafter: Drafter, seed: int, jitter: float = 0.0
    ) -> None:
        self.clock = 0.0
        self.totals = Totals()
        self._policy, self._engine, self._drafter = policy, engine, drafter
        self._random = np.random.default_rng(seed)
        self._jitter = jitter
        slots = engine.most_requests
        self._requests: list[Request | None] = [None] * slots
        self._waiting: deque[tuple[int, Request]] = deque()  # first step that may run it
        self._prefill = np.zeros(slots, dtype=np.int64)  # tokens of the prompt to come
        self._output = np.zeros(slots, dtype=np.int64)  # tokens to come
        self._context = np.zeros(slots, dtype=np.int64)
        self._drafts = np.zeros(slots, dtype=np.int64)
        self._accepts = np.zeros((slots, drafter.gamma))
        self._step = 0
        self._busy = False  # a step is scheduled already

    @property
    def load(self) -> int:
        """Requests that run or wait."""
        return len(self._waiting) + int((self._output > 0).sum())

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """A request arrives, now."""
        request.arrived = self.clock
        self._waiting.append((self._step + (LEAD - 1 if self._busy else 0), request))

    def step(self) -> list[Request]:
        """Run a step, at least one request being there.

        Returns:
            Requests that ended with it.
        """
        running = np.flatnonzero(self._output)
        depth = self._policy.depth(
            Queue(running.size, len(self._waiting), int(self._context[running].sum()))
        )
        self._admit()
        slots, chunks = self._schedule()
        # Where nothing is scheduled yet, the step takes no time.
        ended = self._run(slots, chunks, depth) if slots.size else []
        self._step += 1
        self._busy = self.load > 0
        return ended

    def _admit(self) -> None:
        free = deque(np.flatnonzero(self._output == 0).tolist())
        while self._waiting and free and self._waiting[0][0] <= self._step:
            slot, (_, request) = free.popleft(), self._waiting.popleft()
            self._requests[slot] = request
            self._prefill[slot], self._output[slot] = request.prompt, request.output
            self._context[slot] = self._drafts[slot] = 0
            self._policy.admit(self._step, slot)

    def _schedule(self) -> tuple[Ints, Ints]:
        """Slots that are part of the step, and tokens of each one's prompt: requests that decode
        come before those that do not yet, as far as there is room."""
        running = np.flatnonzero(self._output)
        decodes = self._prefill[running] == 0
        taken = int((1 + self._drafts[running[decodes]]).sum())
        wanted = self._prefill[running]
        before = np.cumsum(wanted) - wanted
        room = max(self._engine.most_tokens - taken, 0)
        chunks = np.clip(room - before, 0, wanted)
        part = decodes | (chunks > 0)
        return running[part], chunks[part]

    def _run(self, slots: Ints, chunks: Ints, depth: int) -> list[Request]:
        decodes = chunks == 0
        samples = chunks == self._prefill[slots]  # also all that decode
        batch = Batch(
            step=self._step,
            slots=slots,
            drafts=self._drafts[slots],
            base_tokens=int(decodes.sum() + chunks.sum()),
            sampling=int(samples.sum()),
            context_tokens=int(self._context[slots].sum()),
            depth=depth,
        )
        verified = self._policy.lengths(batch)
        shape = StepShape(
            tokens=batch.base_tokens + int(verified.sum()),
            requests=slots.size,
            context_tokens=batch.context_tokens,
            logits_rows=slots.size + int(verified.sum()),
            depth=depth,
        )
        prefills = not decodes.all()
        ms = self._engine.step_ms(shape, prefills)
        if self._jitter:
            ms *= float(np.exp(self._jitter * self._random.standard_normal()))
        if self.shapes is not None:
            self.shapes.append((shape, prefills))
        self.clock += ms
        accepted = self._accept(slots, verified)
        emitted = np.where(samples, np.minimum(1 + accepted, self._output[slots]), 0)
        self._count(batch, decodes, emitted, verified)
        ended = self._emit(slots, chunks, emitted)
        drew = slots[samples]
        confidence = self._draw(drew, depth)
        self._policy.ended(
            Outcome(batch, verified, accepted, drew, confidence, shape, ms, prefills)
        )
        return ended

    def _accept(self, slots: Ints, verified: Ints) -> Ints:
        """Drafts of each that rejection sampling lets through."""
        if self._policy.by_block:
            return accepted_by_block(self._random, self._accepts[slots], verified)
        lucky = self._random.random((slots.size, self._drafter.gamma)) < self._accepts[slots]
        lucky &= np.arange(self._drafter.gamma) < verified[:, None]
        return np.cumprod(lucky, axis=1).sum(axis=1)

    def _emit(self, slots: Ints, chunks: Ints, emitted: Ints) -> list[Request]:
        self._prefill[slots] -= chunks
        self._context[slots] += chunks + emitted
        self._output[slots] -= emitted
        ended = []
        for slot, tokens in zip(slots.tolist(), emitted.tolist(), strict=True):
            request = self._requests[slot]
            if request is None or not tokens:
                continue
            if np.isnan(request.first):
                request.first = self.clock
            if self._output[slot] == 0:
                request.ended = self.clock
                ended.append(request)
                self._requests[slot] = None
        return ended

    def _draw(self, slots: Ints, depth: int) -> Floats:
        self._drafts[slots] = depth
        self._accepts[slots], confidence = self._drafter.draw(self._random, slots.size)
        return confidence

    def _count(
        self, batch: Batch, decodes: npt.NDArray[np.bool_], emitted: Ints, verified: Ints
    ) -> None:
        totals = self.totals
        totals.steps += 1
        totals.rounds += int(decodes.sum())
        totals.emitted += int(emitted.sum())
        totals.firsts += int(emitted[~decodes].sum())
        totals.verified += int(verified.sum())
        totals.drafted += int(batch.drafts.sum())
        totals.depths[batch.depth] += 1
