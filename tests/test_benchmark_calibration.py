"""Judging confidences: what is judged, and that nothing is predicted with its own outcome."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import calibration
from benchmarks.calibration import markdown, predict_online, scores
from benchmarks.prompts import PromptSet
from tests.engine import MICRO
from vllm_dspark.calibrate import Rounds

GAMMA = 3


def rounds(count: int, sharpness: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rounds whose confidences are too far from a half by a factor on the logit."""
    random = np.random.default_rng(1)
    truth = random.beta(4, 2, (count, GAMMA))
    accepted = (random.random(truth.shape) < truth).cumprod(1).sum(1)
    confidence = 1 / (1 + (1 / truth - 1) ** sharpness)
    return confidence, accepted, np.full(count, GAMMA), np.arange(count) // 20


def test_online_prediction_is_made_before_the_outcome_is_known() -> None:
    """Another outcome of the last step changes no prediction of it, nor of any step before."""
    confidence, accepted, verified, request = rounds(200, 3.0)
    found = predict_online(confidence, accepted, verified, request, sampled=True)
    changed = accepted.copy()
    changed[-8:] = GAMMA - changed[-8:]
    again = predict_online(confidence, changed, verified, request, sampled=True)
    np.testing.assert_array_equal(found, again)
    assert np.abs(found - confidence).max() > 0.05


def test_overconfident_head_is_judged_worse_than_what_was_learned() -> None:
    """And the ranking within a position is the head's own throughout."""
    confidence, accepted, verified, request = rounds(3000, 3.0)
    online = predict_online(confidence, accepted, verified, request, sampled=True)
    raw, learned = (scores(c, accepted, verified) for c in (confidence, online))
    assert np.mean(learned["ece"]) < 0.5 * np.mean(raw["ece"])
    np.testing.assert_allclose(learned["roc_auc"], raw["roc_auc"], atol=0.02)


def test_rounds_that_did_not_get_to_a_draft_say_nothing_of_its_confidence() -> None:
    """Deep confidences of rounds that were rejected before are arbitrary."""
    confidence, accepted, verified, _ = rounds(500, 1.0)
    arbitrary = confidence.copy()
    arbitrary[np.arange(GAMMA) > accepted[:, None]] = 0.99
    assert scores(arbitrary, accepted, verified)["roc_auc"] == pytest.approx(
        scores(confidence, accepted, verified)["roc_auc"]
    )


def test_table_has_a_row_for_each_kind() -> None:
    """Mean and each position."""
    kind = {"ece": [0.02, 0.04, 0.06], "brier": [0.2] * 3, "roc_auc": [0.8] * 3}
    result = {"pair": "p", "temperature": 1.0, "rounds": 9, "requests": 2, "kinds": {"raw": kind}}
    assert "| raw | 0.040 | 0.020 0.040 0.060 | 0.200 | 0.800 |" in markdown(result)


def test_the_record_says_in_which_type_it_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's own word, whatever was asked for."""
    confidence, accepted, verified, request = rounds(2000, 1.0)
    options: dict[str, Any] = {}

    def calibrate(*arguments: Any, **_: Any) -> Any:
        options.update(arguments[5])
        held = request % 2 == 1
        artifact = SimpleNamespace(dtype="the engine's", temperatures=(1.0,) * GAMMA)
        return artifact, Rounds(confidence, accepted, verified, request, held)

    monkeypatch.setattr(calibration, "calibrate", calibrate)
    monkeypatch.setattr(calibration, "load_prompts", lambda *_: PromptSet("x", ("a", "b")))
    monkeypatch.setattr(calibration.reliability, "draw", lambda *_: None)
    words = ["--target", str(MICRO), "--drafter", str(MICRO / "dspark-vanilla")]
    done = CliRunner().invoke(calibration.app, [*words, "--out", str(tmp_path)])
    assert done.exit_code == 0, repr(done.exception)
    assert options["dtype"] == "float32"
    assert json.loads((tmp_path / "calibration.json").read_text())["dtype"] == "the engine's"
