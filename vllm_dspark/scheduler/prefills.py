"""When prompts that wait are prefilled: at once, or several in one step.

A step that prefills takes longer than its tokens do by a ms: attention is launched layer by layer
instead of in one CUDA graph, requests are set up. All R requests that decode wait that long, for
however many prompts share the step. Where requests come and go one by one, a large batch has a
prefill in nearly every step.

Held back until g of them are there, at r prompts per step of D ms, each waits (g - 1) / (2 r) steps
on average, and costs the others a R / g. The sum is what a prompt adds to all requests' times from
arrival to last token; it is least at the largest g with

    g (g - 1) <= 2 a r R / D.

As requests finish as often as they arrive, the same g gives the most tokens per second: a place
that waits is empty meanwhile.

D, a and r are measured: D where neither a step nor the one before it prefills, since a step is
launched while the one before it runs; a by what a prefill and the step behind it take beyond D
each, less what that rises by per token of the prompts. Where D has not been seen for long, prompts
are held back once to see it.
"""

from __future__ import annotations

import math

from vllm_dspark import checks

MEMORY = 64  # steps of r, and prefills of a, that are remembered
GUESS = 0.5  # a / D before anything is known
CERTAIN = 0.2  # prefills that the guess counts as
CHANCE = 0.15  # a / D that may be due to chance, and to steps that differ otherwise
LONGEST_MS = 1000.0  # a step beyond is a pause of the engine or a compilation
UNSEEN = 256  # steps without a measurement of D until one is made
LONGEST_EPISODE = 32  # steps
SETTLING = 16  # measurements that D is the mean of


class PrefillGroups:
    """Decides, step by step, whether prompts wait.

    Args:
        longest_ms: that a prompt is held back; 0 never.

    Attributes:
        held: steps so far that prompts were held back in.

    Raises:
        ValueError: `longest_ms` is no finite number of at least 0.
    """

    def __init__(self, longest_ms: float) -> None:
        self.longest_ms = checks.amount("longest_ms", longest_ms)
        self.held = 0
        self._at: float | None = None  # ms, of the step before
        self._took = math.inf  # ms, likewise
        self._since: float | None = None  # ms, the first of those that wait is held back
        self._rate = 0.0  # r
        self._decode_ms: float | None = None  # D
        self._decodes = 0  # measurements of D
        self._unseen = 0  # steps since the last of them
        self._plain = 0  # steps since the last that prefilled
        # Since the last prefill behind steps without: ms, steps, steps that prefilled, tokens.
        self._episode = 0.0, 0, 0, 0
        # Weights, tokens, ms, tokens², tokens · ms, of extra times.
        self._sums: tuple[float, ...] = (0.0,) * 5

    @property
    def decode_ms(self) -> float:
        """D; NaN before it is known."""
        return math.nan if self._decode_ms is None else self._decode_ms

    @property
    def extra_ms(self) -> float:
        """a; NaN before D is known."""
        if self._decode_ms is None:
            return math.nan
        weight, x, y, xx, xy = self._sums
        # The guess is what a prefill of no tokens would have taken.
        weight, y = weight + CERTAIN, y + CERTAIN * GUESS * self._decode_ms
        spread = xx - x * x / weight
        slope = max((xy - x * y / weight) / spread, 0.0) if spread > 0 else 0.0
        return max((y - slope * x) / weight, 0.0)

    def group(self, running: int) -> int:
        """Prompts that are to share a step beside so many requests that decode, at least 1."""
        if self._decode_ms is None:
            return 1
        extra = max(self.extra_ms / self._decode_ms - CHANCE, 0.0)
        gain = 2 * extra * self._rate * running
        return int((1 + math.sqrt(1 + 4 * gain)) / 2)

    def holds(self, now: float, running: int, waiting: int) -> bool:
        """Whether the step that is about to be scheduled is to leave prompts waiting.

        Args:
            now: ms, of a clock that only goes forward.
            running: requests that decode.
            waiting: prompts that there is a place for.
        """
        self._measure(now, running)
        since = now if self._since is None else self._since
        step_ms = self._took if self._decode_ms is None else self._decode_ms
        explores = self._unseen >= UNSEEN
        if (
            not (waiting and running)
            or now + step_ms - since > self.longest_ms  # the next chance is a step away
            or (waiting >= self.group(running) and not explores)
        ):
            if explores and self._since is not None:
                self._unseen = 0  # it has been tried
            self._since = None
            return False
        self._since = since
        self.held += 1
        return True

    def scheduled(self, arrived: int, prefilled: int) -> None:
        """What the step became.

        Args:
            arrived: prompts that it begins.
            prefilled: tokens of prompts that it computes, 0 where it only decodes.
        """
        self._rate += (arrived - self._rate) / MEMORY
        if not prefilled:
            self._plain += 1
            return
        ms, steps, prefills, tokens = self._episode
        self._episode = ms, steps, prefills + 1, tokens + prefilled
        self._plain = 0

    def _measure(self, now: float, running: int) -> None:
        """The step before has taken until now."""
        before, self._at = self._at, now if running else None
        took = self._took = math.inf if before is None else now - before
        self._unseen += 1
        if not running or not 0 < took < LONGEST_MS:
            self._episode = 0.0, 0, 0, 0
            return
        ms, steps, prefills, tokens = self._episode
        if not prefills:
            if self._plain > 1:
                self._learn_decode(took)
            return
        self._episode = ms, steps, *_ = ms + took, steps + 1, prefills, tokens
        if not self._plain and steps < LONGEST_EPISODE:
            return
        if self._decode_ms is not None:
            extra_ms = max(ms - steps * self._decode_ms, 0.0)
            self._learn_extra(tokens / prefills, extra_ms / prefills)
        self._episode = 0.0, 0, 0, 0

    def _learn_decode(self, ms: float) -> None:
        """A mean that no single time moves far."""
        self._decodes, self._unseen = self._decodes + 1, 0
        if self._decode_ms is None:
            self._decode_ms = ms
            return
        most = self._decode_ms / 2
        change = min(max(ms - self._decode_ms, -most), most)
        self._decode_ms += change / min(self._decodes, SETTLING)

    def _learn_extra(self, tokens: float, ms: float) -> None:
        new = 1.0, tokens, ms, tokens * tokens, tokens * ms
        kept = 1 - 1 / MEMORY
        self._sums = tuple(kept * old + one for old, one in zip(self._sums, new, strict=True))
