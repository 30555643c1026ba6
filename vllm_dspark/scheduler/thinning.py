"""Which measured steps to learn from: of those that go on as they are, one in a few.

To learn from a step takes the host a while, and the hundredth of a kind says what the others said.
So once some steps of about the same size were believed, only each eighth is learned from. A step of
another kind, or a time that is not believed, has every step learned from again: what is new is
known as many steps later as had been passed over, and no more. A single such time, a pause, has it
for a few steps.
"""

from __future__ import annotations

ALIKE = 8  # steps are of a kind that differ by less than this part of their tokens and requests


class Thinning:
    """Of one learner; deterministic, counts steps.

    Args:
        every: steps of a kind that is known, of which one is learned from; at least 1.
        known: steps of a kind, believed, that make it known.
        doubt: of them that a time takes back which is not believed.
    """

    def __init__(self, every: int = 8, known: int = 32, doubt: int = 8) -> None:
        self._every, self._enough, self._doubt = every, known, doubt
        self._depth = self._requests = self._tokens = -1  # of the first step of its kind
        self._believed = self._passed = 0

    def takes(self, requests: int, tokens: int, depth: int) -> int:
        """How many steps a step stands for that is to be learned from, itself among them; 0 for one
        that is passed over. Arguments are fields of its `StepShape`."""
        if (
            depth != self._depth
            or abs(requests - self._requests) * ALIKE > self._requests
            or abs(tokens - self._tokens) * ALIKE > self._tokens
        ):
            self._depth, self._requests, self._tokens = depth, requests, tokens
            self._believed = 0
        self._passed += 1
        if self._enough <= self._believed and self._passed < self._every:
            return 0
        stands, self._passed = self._passed, 0
        return stands

    def learned(self, believed: bool) -> None:
        """What became of a step that was taken."""
        if believed:
            self._believed = min(self._believed + 1, self._enough)
        else:
            self._believed = max(self._believed - self._doubt, 0)
