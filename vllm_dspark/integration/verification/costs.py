"""What steps cost on this engine: profiled while vLLM captures graphs, corrected by measured steps.

Where vLLM captures none (CPU, eager), prices start from the cost model's guess.

The profile has no rejection sampling in it, only an argmax of the logits: vLLM's dummy steps end
before the sampler, and what the sampler takes hangs on temperatures, top-k, top-p, penalties and
grammars of requests that nobody knows at start-up. Measured steps have it in them. It grows with
the rows that are verified, as tokens do, so that the correction puts it down to those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_dspark.scheduler.cost_model import CostModel, StepSample, StepShape

_REPLAYS = 3
_SIZES = 6  # at each depth but γ
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
        learns: from times that were measured here. They differ between tensor-parallel ranks,
            which must decide alike, so those learn from what the scheduler tells them all.
        num_bonus_tokens: of a decoding request, beside its drafts.

    Attributes:
        profiled: the model is no guess.
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
        num_bonus_tokens: int = 1,
    ) -> None:
        self.gamma = gamma
        self._width = gamma + num_bonus_tokens  # tokens of a whole block
        self.model = CostModel.default(gamma)
        self._most_requests, self._most_tokens = most_requests, most_tokens
        self._contexts = [min(context * f, max(most_context - gamma - 1, 0)) for f in (1, _LONGER)]
        self.learns = learns
        self.trims_replay = trims_replay
        self.profiled = False
        self._captured: list[int] = []
        # Context and depth of each batch that was handed out.
        self._batches: list[tuple[int, int]] = []
        self._penalty = 1.0 if trims_replay else _FIRST_PENALTY
        self._follows = False

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

    def restore(self, model: CostModel, captured: Sequence[int]) -> None:
        """Replace the guess by a profile of an engine like this one, with the same graphs."""
        self.model, self._captured = model, list(captured)
        self.profiled = True

    def batches(
        self,
        captured: Sequence[int],
        depths: Sequence[int] = (),
        draw_at: Callable[[int | None], None] = lambda depth: None,
    ) -> Iterator[dict[str, Any]]:
        """Arguments of the runner's dummy runs that are to be timed.

        Every captured size and, since larger steps run too, doublings up to the largest step; a few
        of them with a longer context as well, and a few at every other depth. Graphs for whole
        blocks are run with such, which leaves out those for shorter ones.

        Args:
            captured: tokens of captured graphs, ascending.
            depths: drafts per request; dummy runs draw γ if not told otherwise.
            draw_at: called before each batch with the depth that it is to draw; None for γ.
        """
        self._captured = list(captured)
        self._batches = []
        size = captured[-1] if captured else 0
        larger = []
        while 0 < size < self._most_tokens:
            size = min(2 * size, self._most_tokens)
            larger.append(size)
        replayed = captured if self.trims_replay else self._whole_blocks(captured)
        sizes = [*replayed, *larger]
        few = sizes[:: max(-(-len(sizes) // 4), 1)]
        near, far = self._contexts
        batches = [(size, near, self.gamma) for size in sizes]
        batches += [(size, far, self.gamma) for size in few]
        # A request has one token in a dummy run of these, and its draft costs what it costs.
        batches += [
            (size, near, depth)
            for depth in depths
            if depth != self.gamma
            for size in _spread([s for s in sizes if s <= self._most_requests], _SIZES)
        ]
        try:
            for size, context, depth in batches:
                draw_at(depth)
                for _ in range(_REPLAYS):
                    self._batches.append((context, depth))
                    batch: dict[str, Any] = {"num_tokens": size, "context_len": context}
                    if size in replayed and not self.trims_replay:
                        batch["uniform_decode"] = True
                    yield batch
        finally:
            draw_at(None)

    def _whole_blocks(self, captured: Sequence[int]) -> list[int]:
        """The sizes that vLLM's dummy run of whole blocks takes. Where vLLM's own schedule varies
        how many drafts there are, graphs for shorter blocks have sizes of theirs."""
        most = self._most_requests * self._width
        return [size for size in captured if size % self._width == 0 and size <= most]

    def learn_profile(
        self, timings: Sequence[Any], head_line: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        """Replace the guess.

        Args:
            timings: vLLM's StepTimingSample of each batch, in order.
            head_line: ms of the LM head without rows, and for each row. Dummy runs leave it out.

        Raises:
            RuntimeError: there are no timings, or not as many as there were batches of
                different depths.
        """
        if not timings:
            raise RuntimeError("vLLM timed none of the steps that were to be profiled")
        batches = self._batches
        if len(batches) != len(timings):  # dummy runs of another origin among them
            if {depth for _, depth in batches} - {self.gamma}:
                raise RuntimeError(
                    f"vLLM timed {len(timings)} steps, {len(batches)} were to be profiled"
                )
            batches = [(self._contexts[0], self.gamma)] * len(timings)
        replayed = {
            (depth, t.num_reqs): t.drafter_ms
            for t, (_, depth) in zip(timings, batches, strict=True)
            if t.full_cudagraph
        }
        samples = []
        for timing, (context, depth) in zip(timings, batches, strict=True):
            requests, tokens = timing.num_reqs, timing.num_target_tokens
            draft_ms = timing.drafter_ms
            if not timing.full_cudagraph and replayed:
                # The host was still launching the target when the drafter began. What counts is
                # the time on a device that is never kept waiting.
                near = min(replayed, key=lambda n: (n[0] != depth, abs(n[1] - requests)))
                draft_ms = min(draft_ms, replayed[near])
            for rows in {requests, tokens}:
                shape = StepShape(
                    tokens=tokens,
                    requests=requests,
                    context_tokens=requests * context,
                    logits_rows=rows,
                    depth=depth,
                )
                verify_ms = timing.forward_ms + head_line[0] + head_line[1] * rows
                samples.append(StepSample(shape, verify_ms, draft_ms))
        self.model = CostModel(samples, self._captured, self.gamma)
        self.profiled = True

    def follow(self, model: CostModel) -> None:
        """From now on use a model that learns elsewhere, from the same profile."""
        self.model, self._follows = model, True

    def observe(self, shape: StepShape, ms: float, replayed: bool) -> None:
        """A decode step took `ms`, from the end of the step before.

        Args:
            shape: what it worked on.
            ms: milliseconds.
            replayed: it ran as steps of its size were profiled, not as a trimmed batch that
                had to leave its graph.
        """
        if not ms > 0:
            return
        if not replayed and self._whole_would_replay(shape.tokens):
            predicted = self.model.step_ms(
                shape.tokens, shape.requests, shape.context_tokens, shape.logits_rows, shape.depth
            )
            self._penalty += _PENALTY_WEIGHT * (max(ms / float(predicted), 1.0) - self._penalty)
            return
        if not self._follows:
            self.model.observe(shape, ms, graph=True)


def _spread(sizes: Sequence[int], count: int) -> list[int]:
    """At most `count` of ascending sizes, evenly by rank, the first and the last among them."""
    if len(sizes) <= count:
        return list(sizes)
    return [sizes[round(i * (len(sizes) - 1) / (count - 1))] for i in range(count)]
