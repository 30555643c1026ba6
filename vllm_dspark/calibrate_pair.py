"""The two checkpoints that are calibrated, read as far as an artifact has to name them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vllm_dspark.calibrate_error import CalibrationError
from vllm_dspark.calibration.artifact import Checkpoint
from vllm_dspark.calibration.digest import checkpoint_digest


@dataclass(frozen=True)
class Part:
    """One of the two: its folder, and what an artifact calls it."""

    folder: str
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Pair:
    """A target and its drafter."""

    target: Part
    drafter: Part

    @classmethod
    def read(cls, target: str, drafter: str) -> Pair:
        """The pair in two folders.

        Raises:
            CalibrationError: one is no folder, or lacks its config.json or weights, or these are
                damaged.
        """
        return cls(_part("target", target), _part("drafter", drafter))


def _part(role: str, folder: str) -> Part:
    if not Path(folder).is_dir():
        raise CalibrationError(
            f"the {role} {folder!r} is no folder. Needed are both checkpoints on disk, whose "
            "weights the artifact names. Fix: give the folder that the hub's cache holds."
        )
    try:
        digest = checkpoint_digest(folder)
    except (OSError, ValueError) as error:
        found = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            found = f"{Path(error.filename).name}: {error.strerror}"
        raise CalibrationError(
            f"the {role} {folder!r} is no checkpoint: found {found}. Needed are config.json and "
            f"weights as safetensors. Fix: give the {role}'s folder that has them."
        ) from None
    return Part(folder, Checkpoint(name=Path(folder).name, revision=None, digest=digest))
