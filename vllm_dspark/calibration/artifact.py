"""What offline calibration leaves beside a drafter: `dspark_calibration.json`.

Temperatures (`sts`) belong to one drafter, one target, one γ and one dtype; the artifact names
all four, and `check_against` refuses any other. It also says what the fit was worth, on rounds
that it did not see.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from vllm_dspark.calibration import sts
from vllm_dspark.calibration.digest import checkpoint_digest as checkpoint_digest
from vllm_dspark.outputs import replacing

ARTIFACT_NAME = "dspark_calibration.json"
FORMAT_VERSION: Final = 1
_FIX = "Fix: run vllm-dspark calibrate for this pair again, or remove the file."

Share = Annotated[float, Field(ge=0, le=1)]
# Both ends are reached by exp(log(end)), which may round outwards.
Temperature = Annotated[FiniteFloat, Field(ge=sts.LOWEST * 0.999, le=sts.HIGHEST * 1.001)]


class ArtifactError(ValueError):
    """A calibration artifact cannot be used: what was found, what is needed, how to fix it."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Checkpoint(_Part):
    """Which weights. `digest` decides, name and revision are for people."""

    name: str
    revision: str | None
    digest: str = Field(pattern="^[0-9a-f]{64}$", description="checkpoint_digest of its folder")


class Sampling(_Part):
    """How the rounds were sampled."""

    temperature: Annotated[FiniteFloat, Field(ge=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    drafting: Literal["greedy", "probabilistic"]


class Scores(_Part):
    """Metrics of a prediction per position, [γ] each; None where they are undefined."""

    observations: tuple[NonNegativeInt, ...]
    ece: tuple[Share | None, ...]
    brier: tuple[Share | None, ...]
    roc_auc: tuple[Share | None, ...]  # None also where all were accepted, or all rejected


class Quality(_Part):
    """Of c_k against acceptance given acceptance before it, and of a_k = c_1…c_k."""

    confidence: Scores
    survival: Scores


class CalibrationArtifact(_Part):
    """Temperatures of a drafter, what they were fitted on and what they are worth."""

    format_version: Literal[1]
    target: Checkpoint
    drafter: Checkpoint
    dtype: str = Field(min_length=1, description="the target's, such as bfloat16")
    sampling: Sampling
    gamma: PositiveInt
    temperatures: tuple[Temperature, ...]  # [γ]
    rounds: PositiveInt  # those fitted on and those held out
    observations: tuple[NonNegativeInt, ...]  # [γ], rounds fitted on that verified position k
    before: Quality  # raw, on held-out rounds
    after: Quality  # with `temperatures`, on the same rounds
    vllm_version: str
    package_version: str
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}(T\d{2}:\d{2}:\d{2}Z)?$", description="UTC")

    @model_validator(mode="after")
    def _lengths_are_gamma(self) -> CalibrationArtifact:
        lengths = {"temperatures": len(self.temperatures), "observations": len(self.observations)}
        for when, quality in (("before", self.before), ("after", self.after)):
            for what, scores in quality:
                for name, values in scores:
                    lengths[f"{when}.{what}.{name}"] = len(values)
        if wrong := [f"{name} has {n}" for name, n in lengths.items() if n != self.gamma]:
            raise ValueError(f"gamma is {self.gamma}, but {', '.join(wrong)} entries")
        return self

    def save(self, path: str | Path) -> None:
        """Write as JSON; whoever reads at the same time sees the old file or the new one."""
        with replacing(Path(path)) as partial:
            partial.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> CalibrationArtifact:
        """Read what `save` wrote.

        Raises:
            ArtifactError: the file is not there, is no JSON, has another format version, an
                unknown or missing key, or a value that makes no sense. All problems are listed.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            content = json.loads(text)
        except OSError as error:
            raise _unusable(path, f"it cannot be read: {error.strerror}") from None
        except ValueError as error:  # no UTF-8, or no JSON
            raise _unusable(path, f"found is no JSON: {error}") from None
        if not isinstance(content, dict):
            raise _unusable(path, f"found is a JSON {type(content).__name__}, needed an object")
        version = content.get("format_version")
        if version != FORMAT_VERSION or isinstance(version, bool):
            found = f"found is format_version {version!r}, needed {FORMAT_VERSION}"
            raise _unusable(path, found)
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise _unusable(path, "; ".join(map(_problem, error.errors()))) from None

    def check_against(
        self, *, drafter_digest: str, target_digest: str, gamma: int, dtype: str
    ) -> None:
        """Refuse to calibrate anything but what this was fitted on.

        Also a smaller γ: a block is drafted as a whole, its positions see one another.

        Args:
            drafter_digest, target_digest: `checkpoint_digest` of what is being served.

        Raises:
            ArtifactError: naming every difference.
        """
        differences = [
            f"{name} is {serving}, it was fitted on {fitted}"
            for name, serving, fitted in (
                (
                    f"the drafter's digest ({self.drafter.name})",
                    drafter_digest,
                    self.drafter.digest,
                ),
                (f"the target's digest ({self.target.name})", target_digest, self.target.digest),
                ("γ", gamma, self.gamma),
                ("dtype", dtype, self.dtype),
            )
            if serving != fitted
        ]
        if differences:
            raise _unusable(ARTIFACT_NAME, "; ".join(differences))


def _unusable(path: str | Path, problem: str) -> ArtifactError:
    return ArtifactError(f"calibration artifact {str(path)!r} cannot be used: {problem}. {_FIX}")


def _problem(error: Any) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}"
    if error["type"] == "missing":
        return f"key {key!r} is missing"
    if not key:
        return str(error["ctx"]["error"])
    return f"{key} is {error['input']!r}: {error['msg']}"
