"""What vLLM's built-in adaptive verification would verify; see
vllm/v1/worker/gpu/spec_decode/adaptive_verification.py of 0.33.

It always drafts γ tokens. Of a step it verifies the number of drafts with the most expected tokens
per ms, by an unrestricted search over raw confidences of the block before the current one, and
shares it out by the current one's. Costs come from tables over token and request counts, timed once
with dummy requests that all have the same, long context: up to the most requests of a step each
token is a request of its own, which reads that context, and beyond there are no more requests. A
new request counts as certain in every draft.
"""

from __future__ import annotations

import numpy as np

from vllm_dspark.scheduler.budget import allocate, choose_budget
from vllm_dspark.scheduler.survival import prefix_survival
from vllm_dspark.simulation.engine import Engine
from vllm_dspark.simulation.policies import Batch, Floats, Ints, Outcome, Queue

PROFILE_CONTEXT = 8192  # tokens; VLLM_ADAPTIVE_VERIFICATION_PROFILE_CONTEXT_LEN


class BuiltIn:
    """See the module.

    Args:
        gamma: γ.
        engine: that it profiles.
        most_context: tokens that a request can have; the profile's context is cut to it.
        profile_context: tokens of context per dummy request.
        verified: drafts per request to verify in every step, in the place of the search: to tell
            what its choice costs from what its step costs.
    """

    by_block = False

    def __init__(
        self,
        gamma: int,
        engine: Engine,
        most_context: int = PROFILE_CONTEXT,
        profile_context: int = PROFILE_CONTEXT,
        verified: float | None = None,
    ) -> None:
        self.gamma = gamma
        self._given = verified
        self._owed = 0.0
        context = max(min(profile_context, most_context - 1), 0)
        self._step_ms = _tables(engine, gamma, context)
        slots = engine.most_requests
        self._current = np.ones((slots, gamma))
        self._before = np.ones((slots, gamma))

    def admit(self, step: int, slot: int) -> None:
        """See `Policy`."""
        self._current[slot] = self._before[slot] = 1.0

    def depth(self, queue: Queue) -> int:
        """See `Policy`."""
        return self.gamma

    def lengths(self, batch: Batch) -> Ints:
        """See `Policy`."""
        total = int(batch.drafts.sum())
        if total == 0:
            return batch.drafts
        if self._given is None:
            verify_ms, draft_ms = self._step_ms
            last = batch.base_tokens + total
            costs = verify_ms[batch.base_tokens : last + 1] + draft_ms[len(batch.slots)]
            survival = prefix_survival(self._before[batch.slots])
            budget = choose_budget(survival, batch.drafts, costs, batch.sampling)
        else:
            self._owed += self._given * int((batch.drafts > 0).sum())
            budget = min(int(self._owed), total)
            self._owed -= budget
        return allocate(prefix_survival(self._current[batch.slots]), batch.drafts, budget)

    def ended(self, outcome: Outcome) -> None:
        """See `Policy`."""
        self._before[:] = self._current
        self._current[outcome.drew] = outcome.confidence


def _tables(engine: Engine, gamma: int, context: int) -> tuple[Floats, Floats]:
    """Target's ms by tokens, drafter's ms by requests; float64."""
    tokens = np.arange(engine.most_tokens + gamma * engine.most_requests + 1)
    requests = np.minimum(tokens, engine.most_requests)
    rows = np.zeros_like(tokens)  # its profile leaves the LM head out
    verify = engine.cost.verify_ms(tokens, requests, requests * context, rows)
    of = np.arange(engine.most_requests + 1)
    return np.maximum.accumulate(verify), engine.cost.draft_ms(of, gamma, 0 * of, 0 * of)
