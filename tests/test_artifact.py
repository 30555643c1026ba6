"""The calibration artifact: what is written is read, anything else is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.calibration_streams import IDENTITY, rounds_off_by
from vllm_dspark.calibration.artifact import ARTIFACT_NAME, ArtifactError, CalibrationArtifact
from vllm_dspark.calibration.fitting import fit_artifact
from vllm_dspark.calibration.online import OnlineCalibrator

TRUE = [2.0, 1.5, 0.7]


@pytest.fixture(scope="module")
def artifact() -> CalibrationArtifact:
    return fit_artifact(*rounds_off_by(TRUE, 6001), **IDENTITY)


def test_what_is_saved_is_loaded(artifact: CalibrationArtifact, tmp_path: Path) -> None:
    """To the last digit, over an older file, and nothing else is left in the folder."""
    path = tmp_path / ARTIFACT_NAME
    path.write_text("an older one")
    artifact.save(path)
    assert CalibrationArtifact.load(path) == artifact
    assert CalibrationArtifact.load(str(path)).temperatures == artifact.temperatures
    assert [file.name for file in tmp_path.iterdir()] == [ARTIFACT_NAME]
    OnlineCalibrator(artifact.gamma, artifact.temperatures)


def test_a_failed_save_leaves_the_old_file(
    artifact: CalibrationArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, say. A server that starts now must not read half of one."""
    path = tmp_path / ARTIFACT_NAME
    artifact.save(path)

    def fail(self: Path, target: Path) -> None:
        raise OSError("no space")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        artifact.model_copy(update={"dtype": "float16"}).save(path)
    assert CalibrationArtifact.load(path) == artifact
    assert [file.name for file in tmp_path.iterdir()] == [ARTIFACT_NAME]


def test_frozen(artifact: CalibrationArtifact) -> None:
    with pytest.raises(ValueError, match="frozen"):
        artifact.gamma = 5


def test_extremes_of_the_search_are_valid(artifact: CalibrationArtifact, tmp_path: Path) -> None:
    """The search ends at exp(log(10)), which is a little more than 10."""
    assert math.exp(math.log(10)) > 10
    content = json.loads(artifact.model_dump_json())
    content["temperatures"] = [0.1, 1, math.exp(math.log(10))]
    path = tmp_path / ARTIFACT_NAME
    path.write_text(json.dumps(content))
    assert CalibrationArtifact.load(path).temperatures[2] > 10


Edit = Callable[[dict[str, Any]], Any]
REFUSED: dict[str, tuple[Edit, str]] = {
    "newer_format": (lambda c: c.update(format_version=2), "format_version 2, needed 1"),
    "no_format": (lambda c: c.pop("format_version"), "format_version None, needed 1"),
    "format_true": (lambda c: c.update(format_version=True), "format_version True, needed 1"),
    "unknown_key": (lambda c: c.update(temperature=[1]), "unknown key 'temperature'"),
    "unknown_inner": (lambda c: c["target"].update(x=1), "unknown key 'target.x'"),
    "missing_key": (lambda c: c.pop("gamma"), "key 'gamma' is missing"),
    "missing_inner": (lambda c: c["drafter"].pop("digest"), "key 'drafter.digest' is missing"),
    "two_problems": (lambda c: (c.pop("gamma"), c.pop("dtype")), "'dtype' .*; key 'gamma'"),
    "other_gamma": (lambda c: c.update(gamma=4), "gamma is 4, but temperatures has 3"),
    "few_scores": (lambda c: c["after"]["survival"]["ece"].pop(), "after.survival.ece has 2"),
    "gamma_0": (lambda c: c.update(gamma=0, temperatures=[]), "gamma is 0"),
    "gamma_text": (lambda c: c.update(gamma="3"), "gamma is '3'"),
    "hot": (lambda c: c.update(temperatures=[1, 11, 1]), r"temperatures\.1 is 11"),
    "cold": (lambda c: c.update(temperatures=[1, 1, 0.09]), r"temperatures\.2 is 0.09"),
    "negative": (lambda c: c.update(temperatures=[-1, 1, 1]), r"temperatures\.0 is -1"),
    "nan": (lambda c: c.update(temperatures=[math.nan, 1, 1]), r"temperatures\.0 is nan"),
    "infinite": (lambda c: c.update(temperatures=[math.inf, 1, 1]), r"temperatures\.0 is inf"),
    "null": (lambda c: c.update(temperatures=[None, 1, 1]), r"temperatures\.0 is None"),
    "digest": (lambda c: c["target"].update(digest="A" * 64), "target.digest is 'AAA"),
    "score": (lambda c: c["before"]["survival"].update(ece=[2, 0, 0]), r"survival\.ece\.0 is 2"),
    "drafting": (lambda c: c["sampling"].update(drafting="beam"), "sampling.drafting is 'beam'"),
    "date": (lambda c: c.update(date="yesterday"), "date is 'yesterday'"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals_say_what_and_how_to_fix(
    artifact: CalibrationArtifact, tmp_path: Path, edit: Edit, message: str
) -> None:
    content = json.loads(artifact.model_dump_json())
    path = tmp_path / ARTIFACT_NAME
    path.write_text(json.dumps(content))
    CalibrationArtifact.load(path)  # before the edit it is fine
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=message) as refusal:
        CalibrationArtifact.load(path)
    assert str(path) in str(refusal.value)
    assert "Fix: run vllm-dspark calibrate" in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no JSON"),
        (b'{"format_version": 1, "target"', "no JSON"),
        (b"\xff\xfe{}", "no JSON"),
        (b"[1]", "JSON list, needed an object"),
        (b"null", "JSON NoneType, needed an object"),
        (None, "cannot be read: No such file"),
    ],
)
def test_unreadable_files_are_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / ARTIFACT_NAME
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        CalibrationArtifact.load(path)


SERVED: dict[str, Any] = {
    "drafter_digest": "b" * 64,
    "target_digest": "a" * 64,
    "gamma": 3,
    "dtype": "bfloat16",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drafter_digest": "c" * 64}, r"drafter's digest \(/models/drafter\) is c+, .* b+"),
        ({"target_digest": "c" * 64}, r"target's digest \(org/target\) is c+, .* a+"),
        ({"gamma": 2}, "γ is 2, it was fitted on 3"),
        ({"gamma": 4}, "γ is 4, it was fitted on 3"),
        ({"dtype": "float16"}, "dtype is float16, it was fitted on bfloat16"),
        ({"gamma": 4, "dtype": "float16"}, "γ is 4.*; dtype is float16"),
    ],
)
def test_another_pair_is_refused(
    artifact: CalibrationArtifact, change: dict[str, Any], message: str
) -> None:
    artifact.check_against(**SERVED)
    with pytest.raises(ArtifactError, match=message):
        artifact.check_against(**(SERVED | change))
