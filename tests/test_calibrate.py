"""`vllm-dspark calibrate`, from prompts to an artifact that a server uses or refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine import MICRO, engine
from tests.verification_cases import manager_of
from vllm_dspark import reliability
from vllm_dspark.calibrate import CalibrationError, calibrate, mean_survival_ece
from vllm_dspark.calibration.artifact import (
    ARTIFACT_NAME,
    ArtifactError,
    CalibrationArtifact,
    Checkpoint,
    Sampling,
)
from vllm_dspark.calibration.digest import checkpoint_digest
from vllm_dspark.calibration.finding import find_artifact
from vllm_dspark.calibration.fitting import fit_artifact

GAMMA = 7
SAMPLING = Sampling(temperature=1.0, top_p=1.0, drafting="probabilistic")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the micro pair with one drafter."""
    folder = tmp_path_factory.mktemp("pair") / "target"
    ignore = shutil.ignore_patterns("dspark-gated", "dspark-rnn")
    return Path(shutil.copytree(MICRO, folder, ignore=ignore))


def fitted(pair: Path, **changes: Any) -> CalibrationArtifact:
    """An artifact for the pair, fitted on made-up rounds of an overconfident head."""
    random = np.random.default_rng(0)
    truth = random.beta(5, 2, (3000, GAMMA))
    logit = np.log(truth / (1 - truth))
    accepted = (random.random(truth.shape) < truth).cumprod(1).sum(1)
    fields: dict[str, Any] = {
        "target": Checkpoint(name="target", revision=None, digest=checkpoint_digest(pair)),
        "drafter": Checkpoint(
            name="drafter", revision=None, digest=checkpoint_digest(pair / "dspark-vanilla")
        ),
        "dtype": "float32", "sampling": SAMPLING, "vllm_version": "0.32.0", "date": "2026-01-31",
    }  # fmt: skip
    return fit_artifact(
        1 / (1 + np.exp(-2 * logit)), accepted, np.full(3000, GAMMA), **fields | changes
    )


def found(pair: Path, choice: str, **changes: Any) -> Any:
    """`find_artifact` for the pair."""
    drafter = str(pair / "dspark-vanilla")
    fields: dict[str, Any] = {"target": str(pair), "drafter": drafter, "gamma": GAMMA}
    return find_artifact(choice, **fields | {"dtype": "float32"} | changes)


@pytest.mark.engine
def test_rounds_of_the_real_engine(pair: Path) -> None:
    """Every draft of every round is there and was verified, whatever the confidences said; requests
    are held out whole; what the artifact says of the checkpoints is what they are."""
    from vllm_dspark import cpu

    options = cpu.ENGINE_OPTIONS | {"max_model_len": 256, "kv_cache_memory_bytes": 1 << 26}
    prompts = [f"def function_{i}(self" for i in range(8)]
    artifact, rounds = calibrate(
        str(pair), str(pair / "dspark-vanilla"), prompts, SAMPLING, 24, options, chat=False
    )
    assert artifact.rounds == len(rounds.accepted) == len(rounds.held_out)
    assert artifact.rounds > 8 * 24 / (GAMMA + 1)
    # The last round of a request may be cut short by its length, never by a budget.
    assert (rounds.verified == GAMMA).mean() > 0.8
    assert (rounds.accepted <= rounds.verified).all()
    assert 0 < rounds.accepted.sum() < rounds.verified.sum()
    assert ((rounds.confidence > 0) & (rounds.confidence < 1)).all()
    assert len(np.unique(rounds.confidence)) > len(rounds.accepted)
    assert 0.2 < rounds.held_out.mean() < 0.8
    assert artifact.target.digest == checkpoint_digest(pair)
    assert artifact.dtype == "float32"
    assert artifact.sampling == SAMPLING
    assert artifact.temperatures == (1.0,) * GAMMA  # fewer rounds than a fit needs
    assert mean_survival_ece(artifact)[0] == mean_survival_ece(artifact)[1]


@pytest.mark.engine
def test_server_starts_from_the_artifact_beside_the_drafter(pair: Path, tmp_path: Path) -> None:
    """The temperatures are the calibrator's slopes before anything was observed."""
    copy = Path(shutil.copytree(pair, tmp_path / "target"))
    artifact = fitted(copy)
    artifact.save(copy / "dspark-vanilla" / ARTIFACT_NAME)
    with engine(copy, "dspark") as llm:
        slope, intercept = manager_of(llm).policy.calibrator.affine()
    np.testing.assert_allclose(slope, 1 / np.array([artifact.temperatures] * 2))
    assert not intercept.any()
    assert max(artifact.temperatures) > 1.5  # what was made up is overconfident


def test_what_fits_is_used_and_what_does_not_is_left_with_the_reason(
    pair: Path, tmp_path: Path
) -> None:
    """Beside the drafter a stale artifact costs a warning, never the start."""
    copy = Path(shutil.copytree(pair, tmp_path / "target"))
    assert found(copy, "auto") == (None, f"no {ARTIFACT_NAME} beside the drafter", False)
    fitted(copy).save(copy / "dspark-vanilla" / ARTIFACT_NAME)
    assert found(copy, "auto").artifact is not None
    assert found(copy, "off") == (None, "turned off", False)
    other = found(copy, "auto", dtype="bfloat16")
    assert other.artifact is None
    assert other.refused
    assert "dtype is bfloat16, it was fitted on float32" in other.why
    (copy / "dspark-vanilla" / ARTIFACT_NAME).write_text("{")
    assert found(copy, "auto").refused


def test_a_named_artifact_has_to_fit(pair: Path, tmp_path: Path) -> None:
    """The start ends before anything loads, also where weights are not at hand to compare."""
    path = tmp_path / "mine.json"
    fitted(pair).save(path)
    assert found(pair, str(path)).artifact is not None
    with pytest.raises(ArtifactError, match="γ is 5, it was fitted on 7"):
        found(pair, str(path), gamma=5)
    with pytest.raises(ArtifactError, match="cannot be read"):
        found(pair, str(tmp_path / "nowhere.json"))
    with pytest.raises(ArtifactError, match=r"cannot be compared with the target .*Fix:"):
        found(pair, str(path), target="Qwen/Qwen3-8B")


def test_checkpoints_and_prompts_are_checked_before_an_engine_starts(pair: Path) -> None:
    """A hub id has no weights at hand to name; one prompt leaves none to hold out."""
    drafter = str(pair / "dspark-vanilla")
    with pytest.raises(CalibrationError, match="found 1 prompts"):
        calibrate(str(pair), drafter, ["a"], SAMPLING, 8, {})
    with pytest.raises(CalibrationError, match="target 'Qwen/Qwen3-8B' is no folder"):
        calibrate("Qwen/Qwen3-8B", drafter, ["a", "b"], SAMPLING, 8, {})


def test_points_of_the_diagram_by_hand() -> None:
    """Groups of equal size, in the order of the prediction."""
    predicted = np.array([0.9, 0.1, 0.8, 0.2])
    observed = np.array([True, False, True, True])
    mean, share = reliability.points(predicted, observed, bins=2)
    np.testing.assert_allclose(mean, [0.15, 0.85])
    np.testing.assert_allclose(share, [0.5, 1.0])
    assert len(reliability.points(predicted[:1], observed[:1])[0]) == 1


def test_diagram_is_drawn(tmp_path: Path) -> None:
    """Also for a position that nobody verified."""
    random = np.random.default_rng(0)
    confidence, verified = random.random((50, 5)), random.integers(0, 5, 50)
    path = tmp_path / "d.png"
    reliability.draw({"raw": confidence}, verified // 2, verified, path)
    assert path.read_bytes()[1:4] == b"PNG"
