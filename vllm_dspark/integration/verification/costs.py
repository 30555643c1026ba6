"""What steps cost on this engine: profiled when vLLM captures its graphs, corrected by every step.

Where vLLM captures none (CPU, eager), prices start from the cost model's guess.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_dspark.scheduler.cost_model import CostModel, StepSample, StepShape

_REPLAYS = 3
_LONGER = 4  # the second context length, in multiples of the first
# A trimmed batch that cannot replay a full graph, against one that does: before any was seen.
_FIRST_PENALTY = 1.5
_PENALTY_WEIGHT = 0.1  # of one observed step


class StepCosts:
    """The cost model of one engine.

    Args:
        gamma: γ.
        most_requests, most_tokens: of a step.
        context: tokens of context per request to profile at; also at four times as many.
        most_context: tokens that a request can have.
        trims_replay: a batch with trimmed requests replays full graphs, or there are none.
        learns: measured times correct the model. They differ between tensor-parallel ranks,
            which must decide alike, so those keep to the profile.
    """

    def __init__(
        self,
        *,
        gamma: int,
        most_requests: int,
        most_tokens: int,
        context: int,
        most_context: int,
        trims_replay: bool,
        learns: bool,
    ) -> None:
        self.gamma = gamma
        self.model = CostModel.default(gamma)
        self._most_requests, self._most_tokens = most_requests, most_tokens
        self._contexts = [min(context * f, max(most_context - gamma - 1, 0)) for f in (1, _LONGER)]
        self._learns = learns
        self._captured: list[int] = []
        self._batches: list[int] = []  # context of each batch that was handed out
        self._trims_replay = trims_replay
        self._penalty = 1.0 if trims_replay else _FIRST_PENALTY

    def budget_curve(
        self,
        base_tokens: int,
        requests: int,
        context_tokens: int,
        base_logits_rows: int,
        depth: int,
        drafts: int,
    ) -> npt.NDArray[np.float64]:
        """As `CostModel.budget_curve`; a step that leaves its graph costs more."""
        curve = self.model.budget_curve(
            base_tokens, requests, context_tokens, base_logits_rows, depth, drafts
        )
        if self._whole_would_replay(base_tokens + drafts):
            curve[:-1] *= self._penalty
        return curve

    def _whole_would_replay(self, tokens: int) -> bool:
        return self._penalty != 1.0 and bool(self._captured) and tokens <= self._captured[-1]

    def batches(self, captured: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Arguments of the runner's dummy runs that are to be timed.

        Every captured size and, since larger steps run too, doublings up to the largest step; a few
        of them with a longer context as well. Graphs for whole blocks are run with such.

        Args:
            captured: tokens of captured graphs, ascending.
        """
        self._captured = list(captured)
        self._batches = []
        size = captured[-1] if captured else 0
        larger = []
        while 0 < size < self._most_tokens:
            size = min(2 * size, self._most_tokens)
            larger.append(size)
        sizes = [*captured, *larger]
        few = sizes[:: max(-(-len(sizes) // 4), 1)]
        for context, chosen in zip(self._contexts, (sizes, few), strict=True):
            for size in chosen:
                for _ in range(_REPLAYS):
                    self._batches.append(context)
                    batch: dict[str, Any] = {"num_tokens": size, "context_len": context}
                    if size in self._captured and not self._trims_replay:
                        batch["uniform_decode"] = True
                    yield batch

    def learn_profile(
        self, timings: Sequence[Any], head_line: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        """Replace the guess.

        Args:
            timings: vLLM's StepTimingSample of each batch, in order.
            head_line: ms of the LM head without rows, and for each row. Dummy runs leave it out.

        Raises:
            RuntimeError: there are no timings.
        """
        if not timings:
            raise RuntimeError("vLLM timed none of the steps that were to be profiled")
        contexts = self._batches
        if len(contexts) != len(timings):  # dummy runs of another origin among them
            contexts = [self._contexts[0]] * len(timings)
        replayed = {t.num_reqs: t.drafter_ms for t in timings if t.full_cudagraph}
        samples = []
        for timing, context in zip(timings, contexts, strict=True):
            requests, tokens = timing.num_reqs, timing.num_target_tokens
            draft_ms = timing.drafter_ms
            if not timing.full_cudagraph and replayed:
                # The host was still launching the target when the drafter began. What counts is
                # the time on a device that is never kept waiting.
                draft_ms = min(draft_ms, replayed[max(replayed, key=lambda n: -abs(n - requests))])
            for rows in {requests, tokens}:
                shape = StepShape(
                    tokens=tokens,
                    requests=requests,
                    context_tokens=requests * context,
                    logits_rows=rows,
                    depth=self.gamma,
                )
                verify_ms = timing.forward_ms + head_line[0] + head_line[1] * rows
                samples.append(StepSample(shape, verify_ms, draft_ms))
        self.model = CostModel(samples, self._captured, self.gamma)

    def observe(self, shape: StepShape, ms: float, replayed: bool) -> None:
        """A decode step took `ms` on the device.

        Args:
            shape: what it worked on.
            ms: milliseconds.
            replayed: it ran as steps of its size were profiled, not as a trimmed batch that
                had to leave its graph.
        """
        if not self._learns or not ms > 0:
            return
        if not replayed and self._whole_would_replay(shape.tokens):
            predicted = self.model.step_ms(
                shape.tokens, shape.requests, shape.context_tokens, shape.logits_rows, shape.depth
            )
            self._penalty += _PENALTY_WEIGHT * (max(ms / float(predicted), 1.0) - self._penalty)
            return
        self.model.observe(shape, ms, graph=True)
