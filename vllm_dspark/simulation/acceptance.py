"""What drafts survive verification, and what the confidence head says of it beforehand.

Draft k of a block is accepted with probability q_k = σ(center_k + sharpness · z), z normal and its
own for every draft, given that those before it are. The centers are such that q_k is the
conditional acceptance on average. The head sees q_k through noise:

    c_k = σ(logit(q_k) + noise · e + overconfidence),    e normal.

So sharpness is how much drafts differ, and noise how little of that the head knows.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from vllm_dspark import checks

Floats = npt.NDArray[np.float64]

_NODES = 40  # of the quadrature over z
_HALVINGS = 60


class Drafter:
    """Draws blocks.

    Args:
        conditional: [γ] of numbers in (0, 1): acceptance at each position, given acceptance before.
        sharpness, noise: standard deviations, logits, at least 0.
        overconfidence: logits; above 0 the head promises too much.

    Raises:
        ValueError: an argument, which it names, is outside of that.
    """

    def __init__(
        self,
        conditional: npt.ArrayLike,
        sharpness: float = 1.0,
        noise: float = 0.5,
        overconfidence: float = 0.0,
    ) -> None:
        checked = checks.probabilities("conditional", conditional, 1, "[γ]").astype(np.float64)
        if not ((checked > 0) & (checked < 1)).all():
            raise ValueError(f"conditional must lie strictly between 0 and 1, got {checked}")
        self.conditional = checked
        self._sharpness = checks.amount("sharpness", sharpness)
        self._noise = checks.amount("noise", noise)
        self._overconfidence = float(overconfidence)
        self._centers = _centers(checked, self._sharpness)

    @property
    def gamma(self) -> int:
        """γ, drafts of a full block."""
        return self.conditional.size

    def draw(self, random: np.random.Generator, requests: int) -> tuple[Floats, Floats]:
        """Blocks for that many requests.

        Returns:
            Acceptance of each draft given those before it, and raw confidences; float64 [R, γ].
        """
        shape = requests, self.gamma
        logit = self._centers + self._sharpness * random.standard_normal(shape)
        seen = logit + self._noise * random.standard_normal(shape) + self._overconfidence
        return _sigmoid(logit), _sigmoid(seen)


def conditional_acceptance(accepted_lengths: Mapping[int, float], gamma: int = 0) -> Floats:
    """Acceptance by position from what blocks of different lengths emit.

    Between two lengths that are known, acceptance is taken to be the same at every position, and
    beyond the longest to be that of its last position.

    Args:
        accepted_lengths: by γ, tokens emitted per round, the target's own included.
        gamma: positions that are asked for, if that is more than the largest γ.

    Returns:
        float64 [the larger of both], acceptance given that of all before; within [0.001, 0.999].

    Raises:
        ValueError: it is empty, a γ is below 1, or a longer block emits less.
    """
    if not accepted_lengths:
        raise ValueError("accepted_lengths is empty")
    conditional: list[float] = []
    survival, known = 1.0, 1.0
    for block, length in sorted(accepted_lengths.items()):
        positions = checks.whole("accepted_lengths", block, least=1) - len(conditional)
        if not length >= known:
            raise ValueError(f"accepted_lengths falls to {length} at γ = {block}")
        low, high = 0.001, 0.999
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            more = survival * (middle ** np.arange(1, positions + 1)).sum()
            low, high = (middle, high) if more < length - known else (low, middle)
        conditional += [low] * positions
        survival, known = survival * low**positions, float(length)
    conditional += conditional[-1:] * (gamma - len(conditional))
    return np.array(conditional)


def _centers(conditional: Floats, sharpness: float) -> Floats:
    """Logits whose sigmoid, spread by `sharpness`, is `conditional` on average."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    weights = weights / weights.sum()
    low, high = np.full(conditional.shape, -50.0), np.full(conditional.shape, 50.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = _sigmoid(middle[:, None] + sharpness * nodes) @ weights < conditional
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return low


def _sigmoid(logit: Floats) -> Floats:
    return 1 / (1 + np.exp(-np.clip(logit, -60, 60)))
