"""Calibration artifacts from rounds: fitted on one half, scored on the other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.calibration_streams import IDENTITY, rounds_off_by
from vllm_dspark import __version__
from vllm_dspark.calibration.artifact import Scores
from vllm_dspark.calibration.fitting import fit_artifact
from vllm_dspark.calibration.metrics import brier_score, expected_calibration_error, roc_auc
from vllm_dspark.calibration.sts import MIN_OBSERVATIONS, apply_temperatures, fit_temperatures

TRUE = [2.0, 1.5, 0.7]
ROUNDS = rounds_off_by(TRUE, 8001)


def halves(rounds: int) -> np.ndarray:
    return np.arange(rounds) % 2 == 0


def test_temperatures_are_those_of_the_other_half() -> None:
    """Whatever is in the held-out half, the fit does not see it; and it is not refitted on all."""
    held = halves(8001)
    artifact = fit_artifact(*ROUNDS, **IDENTITY, held_out=held)
    fitted = fit_temperatures(*(array[~held] for array in ROUNDS))
    assert artifact.temperatures == tuple(fitted.tolist())
    np.testing.assert_allclose(artifact.temperatures, TRUE, rtol=0.25)
    confidence, accepted, verified = (array.copy() for array in ROUNDS)
    accepted[held] = 0
    spoilt = fit_artifact(confidence, accepted, verified, **IDENTITY, held_out=held)
    assert spoilt.temperatures == artifact.temperatures
    assert spoilt.after != artifact.after
    assert artifact.rounds == 8001
    assert artifact.observations == tuple((ROUNDS[2][~held] > k).sum() for k in range(3))
    assert (artifact.gamma, artifact.package_version) == (3, __version__)
    assert artifact.target == IDENTITY["target"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_scores_are_those_of_the_held_out_half(when: str) -> None:
    """Row by row, from the public metrics. c_k is judged where the k−1 before were accepted, a_k
    wherever k were verified: mixing the two up shows at position 2."""
    held = halves(8001)
    artifact = fit_artifact(*ROUNDS, **IDENTITY, held_out=held)
    confidence, accepted, verified = (array[held] for array in ROUNDS)
    if when == "after":
        confidence = apply_temperatures(confidence, artifact.temperatures)
    quality = getattr(artifact, when)
    for k in range(3):
        for scores, predicted, least in (
            (quality.confidence, confidence[:, k], k),
            (quality.survival, confidence[:, : k + 1].prod(axis=1), 0),
        ):
            rows = [i for i in range(len(verified)) if verified[i] > k and accepted[i] >= least]
            observed = accepted[rows] > k
            assert scores.observations[k] == len(rows)
            for name, metric in (
                ("ece", expected_calibration_error),
                ("brier", brier_score),
                ("roc_auc", roc_auc),
            ):
                expected = metric(predicted[rows], observed)
                assert getattr(scores, name)[k] == pytest.approx(expected, abs=1e-12)


def test_calibration_pays_where_the_head_was_dishonest() -> None:
    """Surviving drafts are predicted better on rounds that the fit did not see, in each position;
    the order of c_k, and so its ROC-AUC, stays."""
    artifact = fit_artifact(*rounds_off_by(TRUE, 40_001, seed=1), **IDENTITY)
    before, after = artifact.before, artifact.after
    for k in range(3):
        assert _number(after.survival.ece[k]) < 0.03 < _number(before.survival.ece[k])
        assert _number(after.survival.brier[k]) < _number(before.survival.brier[k])
        auc = _number(before.confidence.roc_auc[k])
        assert _number(after.confidence.roc_auc[k]) == pytest.approx(auc, abs=1e-9)


def test_split_is_half_drawn_from_the_seed() -> None:
    """Not the first half: a run's beginning is no fair sample of it."""
    first, again, other = (fit_artifact(*ROUNDS, **IDENTITY, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.temperatures != other.temperatures
    confidence = np.full((1000, 1), 0.5)
    accepted = (np.arange(1000) < 500).astype(int)
    drifting = fit_artifact(confidence, accepted, np.ones(1000, int), **IDENTITY)
    assert drifting.observations == (500,)
    assert drifting.before.survival.observations == (500,)
    assert _number(drifting.before.survival.ece[0]) < 0.1


@pytest.mark.parametrize("outcome", [0, 1], ids=["all_rejected", "all_accepted"])
def test_undefined_scores_are_none(outcome: int) -> None:
    """One class has no ROC-AUC; a position that was never verified has no score at all."""
    rounds = 2 * MIN_OBSERVATIONS
    verified = np.ones(rounds, int)
    artifact = fit_artifact(np.full((rounds, 2), 0.7), verified * outcome, verified, **IDENTITY)
    for scores in (artifact.before.confidence, artifact.after.survival):
        assert scores.observations == (MIN_OBSERVATIONS, 0)
        assert scores.ece[0] is not None
        assert scores.brier[0] is not None
        assert (scores.ece[1], scores.brier[1]) == (None, None)
        assert scores.roc_auc == (None, None)
    assert artifact.temperatures[1] == 1
    assert Scores.model_validate_json(artifact.after.survival.model_dump_json()) == (
        artifact.after.survival
    )


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("confidence", [[1.5], [0.5]]), ("confidence", [[math.nan], [0.5]]),
        ("accepted", [2, 0]), ("accepted", [1, 1]), ("accepted", [1]), ("verified", [1]),
        ("verified", [2, 1]), ("held_out", [True]), ("held_out", [True, True]),
        ("held_out", [False, False]), ("held_out", [0, 1]), ("held_out", [[True, False]]),
    ],
)  # fmt: skip
def test_bad_input_is_named(argument: str, value: Any) -> None:
    """[1, 1] accepted is more than round 2 verified, which only the held-out half would show."""
    good: dict[str, Any] = {
        "confidence": [[0.5], [0.5]], "accepted": [1, 0], "verified": [1, 0],
        "held_out": [False, True],
    }  # fmt: skip
    fit_artifact(**good, **IDENTITY)
    with pytest.raises(ValueError, match=f"^{argument} "):
        fit_artifact(**(good | {argument: value}), **IDENTITY)


def test_one_round_cannot_be_split() -> None:
    with pytest.raises(ValueError, match=r"^held_out must leave rounds on both sides, got 0 of 1"):
        fit_artifact([[0.5]], [1], [1], **IDENTITY)


def _number(value: float | None) -> float:
    assert value is not None
    return value
