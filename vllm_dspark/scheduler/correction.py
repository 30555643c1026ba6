"""What measured steps teach about a profile: a robust filter.

The profile keeps its shape, and its parts are corrected:

    whole    logarithm of a factor on the step: clocks, co-running load, another scale
    tokens   the same on the target's table, at sizes 1, 4, 16, …, interpolated in between
    depth    the same on the draft table of each depth
    context  added to the rate of context tokens, in units that the caller knows: a rate that
             was not profiled is 0, and no factor could raise it

A measured time says one thing about their sum, weighted by what each part's share of the step
is. A Kalman filter on log(measured / predicted) shares it out by how unsure each of them is: a
change that every step sees ends up in `whole`, one that only some sizes see in those. All but
`whole` drift back to 0, so what is not seen for long returns to the profile, and neighbours
move together, so that a size learns from the next. What to learn from is told by `gate`.
"""

from __future__ import annotations

import math

import numpy as np

from vllm_dspark.scheduler.gate import Gate
from vllm_dspark.scheduler.monotone import Floats

NODE_LOGS = np.arange(0.0, 15.0, 2.0)  # log2 of 1, 4, …, 16384 tokens
# Standard deviations before anything is seen, of a measured profile.
WHOLE, TOKENS, DEPTH, CONTEXT = 0.4, 0.04, 0.3, 0.5
NEIGHBOUR = 0.5  # correlation of neighbouring sizes and depths
RETURN_STEPS = 5000.0  # time constant of the return to the profile
RETURN_EVERY = 8  # observed steps: it is slow, and need not be done in each
WHOLE_DRIFT = 0.004  # standard deviation of the change of `whole` in a step
LIMIT = 1.5  # of a part's logarithm: factors of 0.22 to 4.5
WHOLE_LIMIT = 20.0
CONTEXT_LIMIT = 100.0  # units


class Correction:
    """Corrections of the parts of a step.

    Args:
        gamma: γ, drafts of a full block.
        least_context: units, at most 0: less would turn the rate negative.
        doubt: of the profile's ratios: 1 where they were measured. The parts may vary by that
            many times as much, and `tokens` by its square: a table that was measured is known
            far better than the rest, one that was guessed is not.

    Attributes:
        whole: float, logarithm.
        context: float, units.
        tokens: float64 [8], logarithms at `NODE_LOGS`.
        depth: float64 [γ + 1], logarithms.
    """

    def __init__(self, gamma: int, least_context: float = 0.0, doubt: float = 1.0) -> None:
        nodes = NODE_LOGS.size
        self._tokens, self._context = slice(1, 1 + nodes), 1 + nodes
        self._depth = slice(2 + nodes, 3 + nodes + gamma)
        size = 3 + nodes + gamma
        prior = np.zeros((size, size))
        prior[self._context, self._context] = CONTEXT**2
        prior[self._tokens, self._tokens] = (TOKENS * doubt) ** 2 * _neighbours(nodes)
        prior[self._depth, self._depth] = DEPTH**2 * _neighbours(gamma + 1)
        prior[0, 0] = WHOLE**2
        self._prior = prior * doubt**2
        self._doubt = self._prior.copy()
        keep = np.full(size, (1 - 1 / RETURN_STEPS) ** RETURN_EVERY)
        keep[0] = 1.0
        self._keep, self._keep_doubt = keep, np.outer(keep, keep)
        # What the return takes from the doubt, the drift gives back: unseen, it stays the prior.
        self._drift = self._prior * (1 - self._keep_doubt)
        self._drift[0, 0] = RETURN_EVERY * WHOLE_DRIFT**2
        self._state = np.zeros(size)
        self._most = np.full(size, LIMIT * doubt)
        self._most[0], self._most[self._context] = WHOLE_LIMIT, CONTEXT_LIMIT
        self._least = -self._most
        self._least[self._context] = least_context
        self._observed = 0
        self.gate = Gate()

    @property
    def whole(self) -> float:
        return float(self._state[0])

    @property
    def parts(self) -> Floats:
        """float64 [all but `whole`]."""
        return self._state[1:]

    @property
    def tokens(self) -> Floats:
        return self._state[self._tokens]

    @property
    def context(self) -> float:
        return float(self._state[self._context])

    @property
    def depth(self) -> Floats:
        return self._state[self._depth]

    def at_tokens(self, tokens: Floats) -> Floats:
        """float64, logarithms of the table's factor at these sizes, at least 1 token."""
        return np.interp(np.log2(tokens), NODE_LOGS, self.tokens)

    def shares(
        self,
        tokens: int,
        depth: int,
        table_share: float,
        context_share: float,
        draft_share: float,
    ) -> Floats:
        """How the logarithm of a step's time goes with every correction.

        Args:
            tokens: through the target, after padding.
            depth: drafted, 0..γ.
            table_share, draft_share: of the prediction, in [0, 1].
            context_share: of the prediction, what one unit makes up.

        Returns:
            float64 [all], for `variance` and `learn`.
        """
        shares = np.zeros(self._state.size)
        shares[0] = 1.0
        place = min(math.log2(max(tokens, 1)) / 2, NODE_LOGS.size - 1.0)
        node = min(int(place), NODE_LOGS.size - 2)
        shares[1 + node] = table_share * (node + 1 - place)
        shares[2 + node] = table_share * (place - node)
        shares[self._context] = context_share
        shares[self._depth.start + depth] = draft_share
        return shares

    def variance(self, shares: Floats) -> float:
        """Of the logarithm of a step's predicted time."""
        return max(float(shares @ (self._doubt @ shares)), 0.0)

    def doubt_whole(self) -> None:
        """The step as a whole may take another time by now."""
        self._doubt[0, 0] += self._prior[0, 0]

    def learn(
        self,
        log_ratio: float,
        shares: Floats,
        kind: tuple[int, ...],
        doubtful: bool = False,
        stands: int = 1,
    ) -> bool:
        """Learn from one measured time.

        Args:
            log_ratio: log(measured / predicted), with this correction in the prediction.
            shares: see `shares`.
            kind: steps of a kind may change their time together; see `Gate`.
            doubtful: it teaches nothing unless it is a new regime's.
            stands: steps that this one stands for.

        Returns:
            Whether it taught anything.
        """
        self._observed += stands
        if self._observed >= RETURN_EVERY:
            self._observed -= RETURN_EVERY
            self._state *= self._keep
            self._doubt *= self._keep_doubt
            self._doubt += self._drift
        gain = self._doubt @ shares
        verdict = self.gate.judge(log_ratio, float(shares @ gain), kind, doubtful)
        if verdict is None:
            return False
        if verdict.anew:
            self._doubt = self._prior.copy()
            gain = self._doubt @ shares
        variance = float(shares @ gain) + self.gate.noise**2
        self._state += gain * (verdict.log_ratio / variance)
        self._doubt -= gain[:, None] * (gain / variance)
        self._keep_within()
        return True

    def _keep_within(self) -> None:
        """Put what left its limits onto them, and let the others make up for it, by how they go
        with it. Where it alone were cut off, they would be left with a change that only makes
        sense together with its own, and would run away from what is measured."""
        state = self._state
        for _ in range(state.size):
            excess = state - np.minimum(np.maximum(state, self._least), self._most)
            at = int(np.abs(excess).argmax())
            if excess[at] == 0:
                return
            if self._doubt[at, at] > 0:
                state -= self._doubt[at] * (excess[at] / self._doubt[at, at])
            state[at] = min(max(state[at], self._least[at]), self._most[at])
        np.clip(state, self._least, self._most, out=state)


def _neighbours(count: int) -> Floats:
    index = np.arange(count)
    return NEIGHBOUR ** np.abs(index[:, None] - index).astype(np.float64)
