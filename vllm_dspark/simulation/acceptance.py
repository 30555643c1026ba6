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
_LEAST, _MOST = 0.001, 0.999  # of what is found
_LENGTH_ERROR = 0.001  # relative: chance in an accepted length over some 100,000 rounds
_LOGIT_STEP = 0.3  # as neighbouring positions of drafters differ
_ROUNDS = 200  # far more than a fit takes


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

    Two lengths differ by what the positions between them add. Deep in a block that is so little
    that chance in a length would make any acceptance of it, so all lengths are fitted together, by
    least squares of

        (fitted length / given length − 1) / 0.001    and    (step from logit to next logit) / 0.3.

    Where lengths say little, acceptance is drawn towards that of the positions beside. Beyond the
    longest block it is that of its last position.

    Args:
        accepted_lengths: by γ, tokens emitted per round, the target's own included.
        gamma: positions that are asked for, if that is more than the largest γ.

    Returns:
        float64 [the larger of both], acceptance given that of all before; within [0.001, 0.999].

    Raises:
        ValueError: it is empty, a γ is below 1, or a longer block emits less or no finite number.
    """
    if not accepted_lengths:
        raise ValueError("accepted_lengths is empty")
    known = 1.0
    for block, length in sorted(accepted_lengths.items()):
        checks.whole("accepted_lengths", block, least=1)
        if not known <= length < np.inf:
            raise ValueError(f"accepted_lengths goes from {known} to {length} at γ = {block}")
        known = float(length)
    blocks = np.array(sorted(accepted_lengths))
    lengths = np.array([accepted_lengths[block] for block in blocks.tolist()], dtype=np.float64)
    fitted = np.clip(_sigmoid(_fit_logits(blocks, lengths)), _LEAST, _MOST)
    return np.append(fitted, np.repeat(fitted[-1:], max(gamma - fitted.size, 0)))


def _fit_logits(blocks: npt.NDArray[np.int64], lengths: Floats) -> Floats:
    """[γ] of the longest block, by damped Gauss-Newton steps (Levenberg's); see above.

    Args:
        blocks, lengths: [B], γ rising.
    """
    positions = np.arange(blocks[-1])
    within = positions < blocks[:, None]  # [B, γ]
    smooth = np.diff(np.eye(positions.size), axis=0) / _LOGIT_STEP

    def residuals(logits: Floats) -> Floats:
        survival = within * np.cumprod(_sigmoid(logits))
        errors = (1 + survival.sum(axis=1)) / lengths - 1
        return np.concatenate([errors / _LENGTH_ERROR, smooth @ logits])

    def jacobian(logits: Floats) -> Floats:
        accepts = _sigmoid(logits)
        survival = within * np.cumprod(accepts)
        later = np.cumsum(survival[:, ::-1], axis=1)[:, ::-1]  # of this position and beyond
        errors = later * (1 - accepts) / lengths[:, None]
        return np.concatenate([errors / _LENGTH_ERROR, smooth])

    bound = float(np.log(_MOST / _LEAST))
    logits, damping = np.full(positions.size, _constant_logit(blocks[-1], lengths[-1])), 1.0
    found = residuals(logits)
    for _ in range(_ROUNDS):
        slopes = jacobian(logits)
        curvature = slopes.T @ slopes + damping * np.eye(positions.size)
        tried = np.clip(logits - np.linalg.solve(curvature, slopes.T @ found), -bound, bound)
        following = residuals(tried)
        if following @ following <= found @ found:
            moved = np.abs(tried - logits).max()
            logits, found, damping = tried, following, damping / 4
            if moved < 1e-9:
                break
        else:
            damping *= 4
    return logits


def _constant_logit(positions: int, length: float) -> float:
    """Of the acceptance that, the same at every position, gives this length."""
    low, high = _LEAST, _MOST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        more = 1 + (middle ** np.arange(1, positions + 1)).sum() < length
        low, high = (middle, high) if more else (low, middle)
    return float(np.log(low / (1 - low)))


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
