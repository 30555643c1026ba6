"""From verified rounds to a calibration artifact: fit on one half, judge on the other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from vllm_dspark import __version__, checks
from vllm_dspark.calibration.artifact import (
    FORMAT_VERSION,
    CalibrationArtifact,
    Checkpoint,
    Quality,
    Sampling,
    Scores,
)
from vllm_dspark.calibration.metrics import brier_score, expected_calibration_error, roc_auc
from vllm_dspark.calibration.sts import apply_temperatures, fit_temperatures
from vllm_dspark.scheduler.survival import prefix_survival

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def fit_artifact(
    confidence: npt.ArrayLike,
    accepted: npt.ArrayLike,
    verified: npt.ArrayLike,
    *,
    target: Checkpoint,
    drafter: Checkpoint,
    dtype: str,
    sampling: Sampling,
    vllm_version: str,
    date: str,
    held_out: npt.ArrayLike | None = None,
    seed: int = 0,
) -> CalibrationArtifact:
    """Fit temperatures on the rounds that are not held out, and score them on those that are.

    Rounds of one request resemble each other. Split at random they are in both halves, and the
    scores come out somewhat too good; give `held_out` to split by request.

    Args:
        confidence, accepted, verified: as in `sts.fit_temperatures`, at least two rounds.
        date: UTC, such as 2026-01-31 or 2026-01-31T12:00:00Z.
        held_out: bool [N], rounds to score on, some and not all; None for half of the rounds,
            by a permutation drawn from `seed`.

    Raises:
        ValueError: an argument, which it names, is outside of what is said above, or is not
            what `sts.fit_temperatures` or the artifact takes.
    """
    confidence = checks.probabilities("confidence", confidence, 2, "[N, γ]").astype(np.float64)
    rounds, gamma = confidence.shape
    accepted = checks.lengths("accepted", accepted, "[N]", rounds, gamma)
    verified = checks.lengths("verified", verified, "[N]", rounds, gamma)
    held = _held_out(held_out, rounds, seed)
    if (accepted > verified).any():
        raise ValueError("accepted must not exceed verified")
    temperatures = fit_temperatures(confidence[~held], accepted[~held], verified[~held])
    raw = confidence[held]
    calibrated = apply_temperatures(raw, temperatures)
    return CalibrationArtifact(
        format_version=FORMAT_VERSION,
        target=target,
        drafter=drafter,
        dtype=dtype,
        sampling=sampling,
        gamma=gamma,
        temperatures=tuple(temperatures.tolist()),
        rounds=rounds,
        observations=tuple(int((verified[~held] > k).sum()) for k in range(gamma)),
        before=quality(raw, accepted[held], verified[held]),
        after=quality(calibrated, accepted[held], verified[held]),
        vllm_version=vllm_version,
        package_version=__version__,
        date=date,
    )


def _held_out(held_out: npt.ArrayLike | None, rounds: int, seed: int) -> npt.NDArray[np.bool_]:
    if held_out is None:
        held = np.zeros(rounds, dtype=bool)
        held[np.random.default_rng(seed).permutation(rounds)[: rounds // 2]] = True
    else:
        held = checks.numbers("held_out", held_out, 1, "[N]", kinds="b")
        if held.shape != (rounds,):
            raise ValueError(f"held_out must have shape [N] = ({rounds},), got {held.shape}")
    if held.all() or not held.any():
        raise ValueError(f"held_out must leave rounds on both sides, got {held.sum()} of {rounds}")
    return held


def quality(confidence: Floats, accepted: Ints, verified: Ints) -> Quality:
    """How good confidences are, in themselves and as survival.

    Args:
        confidence: [N, γ], probabilities.
        accepted, verified: int [N].
    """
    survival = prefix_survival(confidence)
    rows = [verified > k for k in range(confidence.shape[1])]
    reached = [row & (accepted >= k) for k, row in enumerate(rows)]
    return Quality(
        confidence=_scores(confidence, accepted, reached),
        survival=_scores(survival, accepted, rows),
    )


def _scores(predicted: Floats, accepted: Ints, rows: list[npt.NDArray[np.bool_]]) -> Scores:
    """Column k against "draft k was accepted", on `rows[k]`."""

    def each(metric: Callable[..., float], both: bool = False) -> tuple[float | None, ...]:
        scores: list[float | None] = []
        for k, row in enumerate(rows):
            observed = accepted[row] > k
            undefined = not observed.size or (both and observed.all() == observed.any())
            scores.append(None if undefined else metric(predicted[row, k], observed))
        return tuple(scores)

    return Scores(
        observations=tuple(int(row.sum()) for row in rows),
        ece=each(expected_calibration_error),
        brier=each(brier_score),
        roc_auc=each(roc_auc, both=True),
    )
