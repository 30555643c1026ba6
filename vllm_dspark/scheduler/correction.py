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
move together, so that a size learns from the next.

A time that lies outside of what noise and doubt explain teaches nothing: pauses, compilation,
a prefill that was taken for a decode step. When such times outweigh the others by a dozen, of
all steps or of those of a size and depth, they are the new regime: all doubt is restored, and
the filter settles anew. Thresholds are in observed steps, since nothing here reads a clock.
"""

from __future__ import annotations

from collections import defaultdict, deque

import numpy as np

from vllm_dspark.scheduler.monotone import Floats

NODE_LOGS = np.arange(0.0, 15.0, 2.0)  # log2 of 1, 4, …, 16384 tokens
# Standard deviations before anything is seen.
WHOLE, TOKENS, DEPTH, CONTEXT = 0.7, 0.15, 0.3, 0.5
NEIGHBOUR = 0.5  # correlation of neighbouring sizes and depths
RETURN_STEPS = 5000.0  # time constant of the return to the profile
WHOLE_DRIFT = 0.004  # standard deviation of the change of `whole` in a step
NOISE_FIRST, NOISE_LEAST = 0.05, 0.01  # relative, of a measured time
NOISE_WINDOW = 64  # accepted times that the noise is the median of
GATE = 4.0  # standard deviations that noise and doubt explain
REGIME_STEPS = 12
LIMIT = 1.5  # of a part's logarithm: factors of 0.22 to 4.5
WHOLE_LIMIT = 20.0
CONTEXT_LIMIT = 100.0  # units


class Correction:
    """Corrections of the parts of a step.

    Args:
        gamma: γ, drafts of a full block.
        least_context: units, at most 0: less would turn the rate negative.
        doubt: of the profile's ratios: 1 where they were measured. The parts may vary by that
            many times as much.

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
        prior[self._tokens, self._tokens] = TOKENS**2 * _neighbours(nodes)
        prior[self._depth, self._depth] = DEPTH**2 * _neighbours(gamma + 1)
        prior *= doubt**2
        prior[0, 0] = WHOLE**2
        self._prior, self._doubt = prior, prior.copy()
        self._keep = np.full(size, 1 - 1 / RETURN_STEPS)
        self._keep[0] = 1.0
        # What the return takes from the doubt, the drift gives back: unseen, it stays the prior.
        self._drift = prior * (1 - np.outer(self._keep, self._keep))
        self._drift[0, 0] = WHOLE_DRIFT**2
        self._state = np.zeros(size)
        self._most = np.full(size, LIMIT * doubt)
        self._most[0], self._most[self._context] = WHOLE_LIMIT, CONTEXT_LIMIT
        self._least = -self._most
        self._least[self._context] = least_context
        self._noise: deque[float] = deque([NOISE_FIRST] * NOISE_WINDOW, maxlen=NOISE_WINDOW)
        self._refused: defaultdict[tuple[int, ...], list[float]] = defaultdict(list)

    @property
    def whole(self) -> float:
        return float(self._state[0])

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

    def observe(
        self,
        log_ratio: float,
        tokens: int,
        depth: int,
        table_share: float,
        context_share: float,
        draft_share: float,
    ) -> bool:
        """Learn from one measured time.

        Args:
            log_ratio: log(measured / predicted), with this correction in the prediction.
            tokens: through the target, after padding.
            depth: drafted, 0..γ.
            table_share, draft_share: of the prediction, in [0, 1].
            context_share: of the prediction, what one unit makes up.

        Returns:
            Whether it taught anything.
        """
        place = float(np.log2(max(tokens, 1)))
        shares = np.zeros(self._state.size)
        shares[0] = 1.0
        shares[self._tokens] = table_share * _between(place)
        shares[self._context] = context_share
        shares[self._depth.start + depth] = draft_share
        self._state *= self._keep
        self._doubt *= np.outer(self._keep, self._keep)
        self._doubt += self._drift
        kinds = [self._refused[kind] for kind in ((round(place / 2), depth, table_share > 0), ())]
        noise = self._noise_level()
        if log_ratio**2 > GATE**2 * (float(shares @ self._doubt @ shares) + noise**2):
            for refused in kinds:
                refused.append(log_ratio)
            regime = max(kinds, key=len)
            if len(regime) < REGIME_STEPS:
                return False
            log_ratio = float(np.median(regime))
            self._doubt = self._prior.copy()
            self._noise.extend([NOISE_FIRST] * NOISE_WINDOW)
            self._refused.clear()
        else:
            for refused in kinds:
                del refused[:1]
            self._noise.append(abs(log_ratio))
        gain = self._doubt @ shares
        variance = float(shares @ gain) + noise**2
        gain /= variance
        self._state += gain * log_ratio
        np.clip(self._state, self._least, self._most, out=self._state)
        self._doubt -= np.outer(gain, gain) * variance
        return True

    def _noise_level(self) -> float:
        """Relative standard deviation of a measured time; the median shrugs outliers off."""
        return max(1.4826 * float(np.median(self._noise)), NOISE_LEAST)


def _neighbours(count: int) -> Floats:
    index = np.arange(count)
    return NEIGHBOUR ** np.abs(index[:, None] - index).astype(np.float64)


def _between(place: float) -> Floats:
    """float64 [8], weights of linear interpolation at one place on `NODE_LOGS`."""
    return np.maximum(0.0, 1 - np.abs(min(place, NODE_LOGS[-1]) - NODE_LOGS) / 2)
