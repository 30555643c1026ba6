"""How long a number of drafts stands that was chosen for a step.

To choose takes the host a while, and mostly leads to the number of the step before. So a choice
that has stopped changing stands for more and more steps, as long as the same requests run with as
many drafts each.

That keeps what is emitted the target's: the number comes from blocks that are older still, provided
that nothing drawn since then decides on whether it stands. Who runs with how many drafts says
nothing of them, but for a request under a grammar, whose block is cut where a token does not fit:
with one of those nothing may be put here.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_dspark.scheduler.fixed import Ints

_STEADY = 32  # a choice is about the same if it differs by less than this part of the drafts


@dataclass
class _Choice:
    slots: Ints
    draft_lengths: Ints
    depth: int | None
    budget: int
    stands: int  # steps, with the one that it was chosen in
    left: int  # of those

    def is_for(self, slots: Ints, draft_lengths: Ints, depth: int | None) -> bool:
        """Whether these are the same objects: that is quicker than to compare arrays."""
        return self.slots is slots and self.draft_lengths is draft_lengths and self.depth == depth


class Standing:
    """The last choice.

    Args:
        most: steps that a choice stands at most, at least 1. It starts with one, and doubles each
            time that the next one is about the same.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._choice: _Choice | None = None

    def forget(self) -> None:
        """What was chosen stands no longer, and what is chosen next starts with one step."""
        self._choice = None

    def take(self, slots: Ints, draft_lengths: Ints, depth: int | None) -> int | None:
        """The number, if one stands in this step; else None.

        Args:
            slots, draft_lengths, depth: of the step; as in `FixedPolicy.choose`.
        """
        choice = self._choice
        if choice is None or not choice.left or not choice.is_for(slots, draft_lengths, depth):
            return None
        choice.left -= 1
        return choice.budget

    def put(
        self, slots: Ints, draft_lengths: Ints, depth: int | None, budget: int, total: int
    ) -> None:
        """A number was chosen.

        Args:
            slots, draft_lengths, depth: as above.
            budget: drafts.
            total: drafts that it was chosen from.
        """
        before, stands = self._choice, 1
        if before is not None and before.is_for(slots, draft_lengths, depth):
            steady = abs(budget - before.budget) * _STEADY <= total
            stands = min(2 * before.stands, self._most) if steady else 1
        self._choice = _Choice(slots, draft_lengths, depth, budget, stands, stands - 1)
