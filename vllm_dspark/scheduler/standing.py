"""How long a number of drafts stands that was chosen for a step.

To choose takes the host a while, and mostly leads to the number of the step before. So a choice
that has stopped changing stands for more and more steps, as long as about as many requests run,
with about as many drafts and other tokens. For a few drafts more or less it is scaled.

That keeps what is emitted the target's: the number comes from blocks that are older still, provided
that nothing drawn since then decides on whether it stands. How many requests run with how many
drafts says nothing of them, but for a request under a grammar, whose block is cut where a token
does not fit: with one of those nothing may be put or taken here.
"""

from __future__ import annotations

from typing import NamedTuple

_STEADY = 16  # a choice is about the same if it differs by less than this part of the drafts
_ALIKE = 16  # loads are about the same that differ by less than this part
_PROMPTS_ALIKE = 4  # the same of the tokens that run in any case, where prompts are among them


class Load(NamedTuple):
    """What a choice is for."""

    requests: int
    drafts: int  # that may be verified, at least 1
    base: int  # tokens that run in any case
    depth: int | None  # of the block that the step draws

    def about(self, other: Load) -> bool:
        """Whether the other one is about the same."""
        alike = _ALIKE if self.decodes and other.decodes else _PROMPTS_ALIKE
        return (
            self.depth == other.depth
            and abs(self.requests - other.requests) * _ALIKE <= self.requests
            and abs(self.drafts - other.drafts) * _ALIKE <= self.drafts
            and abs(self.base - other.base) * alike <= self.base
        )

    @property
    def decodes(self) -> bool:
        """Whether no prompt is among them."""
        return self.base == self.requests


class _Choice(NamedTuple):
    load: Load
    budget: int
    stands: int  # steps, with the one that it was chosen in
    until: int  # first step that it does not stand in

    def of(self, load: Load) -> int:
        """Its budget, scaled to the drafts of another load."""
        return self.budget * load.drafts // self.load.drafts


class Standing:
    """The last choices: one for steps that only decode, and one for those with a prefill, which
    may come in turn.

    Args:
        most: steps that a choice stands at most, at least 1. It starts with one, and doubles each
            time that the next one is about the same, and halves each time that it is not.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._step = 0
        self._choices: dict[bool, _Choice] = {}  # by whether the step only decodes

    def forget(self) -> None:
        """What was chosen stands no longer, and what is chosen next starts with one step."""
        self._choices.clear()

    def take(self, load: Load) -> int | None:
        """The number, if one stands in this step; else None. To be called once in every step."""
        self._step += 1
        choice = self._choices.get(load.decodes)
        if choice is None or self._step >= choice.until or not choice.load.about(load):
            return None
        return choice.of(load)

    def put(self, load: Load, budget: int) -> None:
        """A number was chosen in the step that was asked about last."""
        before, stands = self._choices.get(load.decodes), 1
        if before is not None and before.load.about(load):
            steady = abs(budget - before.of(load)) * _STEADY <= load.drafts
            stands = min(2 * before.stands, self._most) if steady else max(before.stands // 2, 1)
        self._choices[load.decodes] = _Choice(load, budget, stands, self._step + stands)
