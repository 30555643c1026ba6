"""How many drafts a step verifies, and how they are shared out among requests.

A candidate is a pair (r, j): draft j of request r, with survival a_{r,j}. Admitting the k best
costs step_ms[k] and is expected to emit

    Θ(k) = (emitted_without_drafts + sum of the k largest a_{r,j}) / step_ms[k]   tokens per ms.

Survival never increases along a row, so the k best are prefixes, and ranking is the best
allocation of every k (arXiv 2607.05147, "Confidence-scheduled verification").

One ranking holds everywhere: survival descending, then lower row, then lower position. So a
prefix comes before its own extension also where both survive equally, and whether (r, j) is
admitted into k places never depends on what follows j in row r. That is what makes the
emitted distribution the target's, provided that k was chosen without looking at this block:
`choose_budget` on confidences of earlier steps with `allocate` on the current ones, or
`early_stop_lengths` on the current ones. `choose_budget` on the current ones looks ahead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_dspark import checks


def choose_budget(
    survival: npt.ArrayLike,
    draft_lengths: npt.ArrayLike,
    step_ms: npt.ArrayLike,
    emitted_without_drafts: float,
) -> int:
    """The number of drafts k with the largest Θ(k), over all k: step costs may have steps.

    Args:
        survival: [R, γ] of numbers, probabilities in [0, 1], non-increasing along a row.
        draft_lengths: int [R], in 0..γ; row r has candidates j < draft_lengths[r] only. What
            survival holds beyond them is not used, but has to be a probability.
        step_ms: [≥ 1 + sum(draft_lengths)] of numbers, milliseconds, positive and finite:
            cost of a step that admits k = 0, 1, … drafts. Entries beyond the sum are not used.
        emitted_without_drafts: tokens that the step emits at k = 0, at least 0.

    Returns:
        k in 0..sum(draft_lengths), drafts; the smallest where several Θ(k), computed in
        float64, are largest.

    Raises:
        ValueError: an argument, which it names, is outside of what is said above, empty or NaN.
    """
    survival, draft_lengths = _checked(survival, draft_lengths)
    rate = _rates(_candidates(survival, draft_lengths), step_ms, emitted_without_drafts)
    return int(rate.argmax())


def allocate(
    survival: npt.ArrayLike, draft_lengths: npt.ArrayLike, budget: int
) -> npt.NDArray[np.int64]:
    """The `budget` best candidates, as a prefix of each row.

    Args:
        survival, draft_lengths: as in `choose_budget`.
        budget: drafts to admit, at least 0; more than there are admits all.

    Returns:
        int64 [R], drafts: prefix lengths, with sum min(budget, sum(draft_lengths)).

    Raises:
        ValueError: an argument, which it names, is outside of what is said above, empty or NaN.
    """
    survival, draft_lengths = _checked(survival, draft_lengths)
    return share_out(survival, draft_lengths, checks.whole("budget", budget, least=0))


def early_stop_lengths(
    survival: npt.ArrayLike,
    draft_lengths: npt.ArrayLike,
    step_ms: npt.ArrayLike,
    emitted_without_drafts: float,
) -> npt.NDArray[np.int64]:
    """Admit by rank until the first admission that does not raise Θ.

    Causal on the current confidences: nothing behind the stop is read, and what follows (r, j)
    in its row is behind (r, j). Finds the largest Θ only where Θ has a single peak.

    Args:
        survival, draft_lengths, step_ms, emitted_without_drafts: as in `choose_budget`.

    Returns:
        int64 [R], drafts: prefix lengths.

    Raises:
        ValueError: an argument, which it names, is outside of what is said above, empty or NaN.
    """
    survival, draft_lengths = _checked(survival, draft_lengths)
    rate = _rates(_candidates(survival, draft_lengths), step_ms, emitted_without_drafts)
    stops = np.flatnonzero(rate[1:] <= rate[:-1])
    return share_out(survival, draft_lengths, int(stops[0]) if stops.size else rate.size - 1)


def _checked(
    survival: npt.ArrayLike, draft_lengths: npt.ArrayLike
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Both as arrays, with rows of survival that never increase, even beyond the lengths."""
    survival = checks.probabilities("survival", survival, 2, "[R, γ]")
    requests, gamma = survival.shape
    draft_lengths = checks.lengths("draft_lengths", draft_lengths, "[R]", requests, gamma)
    # On the flat array, which is several times quicker; its last column is between rows.
    flat = survival.ravel()
    rises = np.zeros(survival.shape, dtype=bool)
    np.greater(flat[1:], flat[:-1], out=rises.ravel()[:-1])
    if rises[:, :-1].any():
        valid = _valid(draft_lengths, gamma)
        if (rises[:, :-1] & valid[:, 1:]).any():
            raise ValueError("survival must not increase along a row")
        survival = np.where(valid, survival, 0)
    return survival, draft_lengths


def _valid(draft_lengths: npt.NDArray[np.int64], gamma: int) -> npt.NDArray[np.bool_]:
    return np.arange(gamma) < draft_lengths[:, None]


def _candidates(
    survival: npt.NDArray[Any], draft_lengths: npt.NDArray[np.int64]
) -> npt.NDArray[Any]:
    """Survival of the valid positions, flat, in a new array."""
    if draft_lengths.sum() == survival.size:
        return survival.flatten()
    return survival[_valid(draft_lengths, survival.shape[1])]


def _rates(
    candidates: npt.NDArray[Any], step_ms: npt.ArrayLike, emitted_without_drafts: float
) -> npt.NDArray[np.float64]:
    """Θ(k) for k = 0..len(candidates), tokens per ms. Sorts `candidates` in place."""
    costs = checks.positives("step_ms", step_ms, "[1 + sum(draft_lengths)]")
    if costs.size <= candidates.size:
        needed = candidates.size + 1
        raise ValueError(f"step_ms needs 1 + sum(draft_lengths) = {needed}, got {costs.size}")
    candidates.sort(kind="stable")  # by merging: quicker here, because rows are sorted already
    emitted = np.zeros(candidates.size + 1)
    np.cumsum(candidates[::-1], dtype=np.float64, out=emitted[1:])
    emitted += checks.amount("emitted_without_drafts", emitted_without_drafts)
    return emitted / costs[: emitted.size]


def share_out(
    survival: npt.NDArray[Any], draft_lengths: npt.NDArray[np.int64], budget: int
) -> npt.NDArray[np.int64]:
    """`allocate` where arguments need no check: arrays, survival in float32 or float64."""
    total = int(draft_lengths.sum())
    if budget >= total:
        return draft_lengths.copy()
    if budget == 0:
        return np.zeros_like(draft_lengths)
    candidates = _candidates(survival, draft_lengths)
    candidates.partition(total - budget)
    threshold = candidates[total - budget]
    admitted = np.minimum(_row_counts(survival >= threshold), draft_lengths)
    surplus = int(admitted.sum()) - budget
    if surplus:  # more candidates tie at the threshold than fit: the highest rows give way
        above = np.minimum(_row_counts(survival > threshold), draft_lengths)
        ties = admitted - above
        behind = np.cumsum(ties[::-1])[::-1] - ties  # ties in higher rows
        admitted -= np.clip(surplus - behind, 0, ties)
    return admitted


def _row_counts(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """How many are true in each row; as a matrix product, half the time of `count_nonzero`."""
    ones = np.ones(mask.shape[1], dtype=np.float32)
    return (mask.astype(np.float32) @ ones).astype(np.int64)
