"""Which calibration artifact an engine uses: the one named, or the one beside the drafter."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from vllm_dspark.calibration.artifact import ARTIFACT_NAME, ArtifactError, CalibrationArtifact
from vllm_dspark.calibration.digest import checkpoint_digest

AUTO, OFF = "auto", "off"


class Found(NamedTuple):
    """What was found, and one phrase that says what or why not."""

    artifact: CalibrationArtifact | None
    why: str
    refused: bool = False  # there is one, and it does not fit


def find_artifact(choice: str, *, target: str, drafter: str, gamma: int, dtype: str) -> Found:
    """Load and check the artifact for a pair.

    Args:
        choice: "auto" for `dspark_calibration.json` in the drafter's folder, "off" for none, or
            the path of one.
        target, drafter: as the engine was given them; only folders can be compared.
        gamma, dtype: of the engine.

    Returns:
        See `Found`. An artifact that merely lies beside the drafter and does not fit is left out;
        what is wrong with it is in the phrase.

    Raises:
        ArtifactError: an artifact was named and cannot be used.
    """
    if choice == OFF:
        return Found(None, "turned off")
    named = choice != AUTO
    path = Path(choice) if named else Path(drafter) / ARTIFACT_NAME
    if not named and not path.is_file():
        return Found(None, f"no {ARTIFACT_NAME} beside the drafter")
    try:
        artifact = CalibrationArtifact.load(path)
        artifact.check_against(
            drafter_digest=_digest("drafter", drafter),
            target_digest=_digest("target", target),
            gamma=gamma,
            dtype=dtype,
        )
    except ArtifactError as error:
        if named:
            raise
        return Found(None, str(error), refused=True)
    return Found(artifact, f"temperatures of {artifact.date} from {artifact.rounds} rounds")


def _digest(role: str, name: str) -> str:
    try:
        return checkpoint_digest(name)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"the calibration artifact cannot be compared with the {role} {name!r}: {error}. "
            "Needed is a folder with its weights. Fix: serve the folder that was calibrated, or "
            'set calibration to "off".'
        ) from None
