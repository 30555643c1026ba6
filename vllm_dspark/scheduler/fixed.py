"""Verifying a fixed number of drafts, and what every policy is asked and told.

A *policy* decides what a step verifies. The engine asks it twice a step, how many (`choose`) and
whose (`allocate`), and tells it what happened: requests that came, blocks that were drawn, and,
steps later, what became of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class FixedPolicy:
    """Verifies whatever the requests let be verified.

    Requests are known by slot, which the engine gives away again once a request has left. Steps
    are numbered upwards by the caller.

    Args:
        slots: requests that can be in the engine at once.
        gamma: γ, drafts of a full block.
    """

    def __init__(self, slots: int, gamma: int) -> None:
        self.gamma = gamma
        self.sampled = np.zeros(slots, dtype=bool)
        self._most = np.full(slots, gamma, dtype=np.int64)

    def add_request(
        self,
        slot: int,
        step: int,
        sampled: bool = False,
        constrained: bool = False,
        max_verified: int | None = None,
    ) -> None:
        """A request takes over a slot. What belonged to its predecessor is forgotten, and will be
        ignored if it arrives.

        Args:
            slot: 0 to slots − 1.
            step: the first that it takes part in.
            sampled: its temperature is above zero.
            constrained: a grammar restricts its output; its rejections teach nothing.
            max_verified: drafts to verify in a step at most, 0 to γ; None for γ.
        """
        self.sampled[slot] = sampled
        self._most[slot] = self.gamma if max_verified is None else max_verified

    def limits(self, slots: Ints, draft_lengths: Ints) -> Ints:
        """int [R]: how many of its scheduled drafts each request lets be verified."""
        return np.minimum(draft_lengths, self._most.take(slots))

    def drafted(self, step: int, slots: Ints, depth: int) -> None:
        """Step `step` drew a block of `depth` drafts for each of `slots`: known when it is
        launched, long before its confidences arrive."""

    def standing(
        self,
        slots: Ints,
        draft_lengths: Ints,
        depth: int | None = None,
        base_tokens: int | None = None,
    ) -> int | None:
        """What was chosen in an earlier step, if it is to hold in this one too; else None. To be
        asked once in every step that has drafts, before `choose`.

        Args:
            slots, draft_lengths, depth: as in `choose`.
            base_tokens: as there; None for one of each request.

        Returns:
            Drafts, the sum of the limits at most.
        """
        return None

    def choose(
        self,
        slots: Ints,
        draft_lengths: Ints,
        base_tokens: int,
        sampling_requests: int,
        context_tokens: int,
        depth: int | None = None,
    ) -> int:
        """How many drafts to verify, the sum of the limits at most.

        Args:
            slots: int [R], the requests of the step.
            draft_lengths: int [R], drafts scheduled for each, 0 to γ.
            base_tokens: tokens that run in any case.
            sampling_requests: requests that emit a token in any case.
            context_tokens: tokens in the caches of all requests together.
            depth: drafts that the step draws for each request, 0 to γ; None for γ.
        """
        return int(self.limits(slots, draft_lengths).sum())

    def allocate(self, slots: Ints, draft_lengths: Ints, budget: int, current: bool = True) -> Ints:
        """Share the budget out: int64 [R], verified drafts of each request.

        Args:
            slots, draft_lengths: as in `choose`.
            budget: drafts.
            current: rank by the current block where its confidences arrived. False ranks by what
                the budget was chosen from, whatever else arrived.
        """
        return self.limits(slots, draft_lengths)

    def outcomes_arrived(self, step: int, slots: Ints, accepted: Ints, verified: Ints) -> None:
        """Step `step` verified `verified` drafts of each of `slots` and accepted the first
        `accepted`. To be told before the confidences of the same step."""

    def confidences_arrived(self, step: int, slots: Ints, confidence: npt.NDArray[Any]) -> None:
        """Raw confidences [R, γ] of the blocks that step `step` drew for `slots`; NaN marks what
        was not drawn. Steps arrive in order."""
