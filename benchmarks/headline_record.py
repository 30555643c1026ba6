"""The JSON of the headline figures: what it holds, and what may be added to it.

Accepted lengths are compared with each other, so those of one file have the same settings. Files
from before settings were kept can be shown, but not extended.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from pydantic import ConfigDict
from typing_extensions import NotRequired, TypedDict

from benchmarks.errors import BenchmarkError
from benchmarks.provenance import provenance
from benchmarks.records import read_record, require_same_settings, save_record
from vllm_dspark.calibration.digest import checkpoint_digest


class Figures(TypedDict):
    """What `accepted_lengths` found for a drafter at a temperature."""

    accepted_length: float
    conditional: list[float | None]
    rounds: NotRequired[float]


class Stage(TypedDict):
    """A row of `stage_times`."""

    requests: int
    gamma: int
    parallel_ms: float
    sequential_ms: float


class Matched(TypedDict):
    """tok/s/user at one throughput that γ = 1 and ours both reach."""

    throughput: float
    gamma_1: float
    ours: float
    ratio: float


class Record(TypedDict, total=False):
    """Everything; a part that was not measured is not there."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]  # pydantic's own way

    acceptance: dict[str, dict[str, Figures]]  # by drafter and temperature
    acceptance_settings: dict[str, Any]  # that all drafters share
    drafters: dict[str, str]  # name → digest of the checkpoint
    stage: list[Stage]
    temperature: float
    round_ms: dict[str, float]  # by γ
    verified: dict[str, dict[str, float | None]]  # by arm and concurrency
    matched: list[Matched]
    ours: str | None  # arm of the sweep
    provenance: list[dict[str, Any]]


def open_record(path: Path) -> dict[str, Any]:
    """What a file holds, nothing if there is none.

    Raises:
        OSError, RecordError: see `read_record`.
        typer.BadParameter: the table, which lies beside it, would have the same name.
    """
    if path.suffix == ".md":
        raise typer.BadParameter("--out is the JSON, needed is a name that does not end in .md")
    return read_record(path, Record, "benchmarks.headline") or {}


def lacking_drafters(
    path: Path,
    kept: Mapping[str, Any],
    settings: Mapping[str, Any],
    drafters: Mapping[str, Path],
    digests: Mapping[str, str],
) -> dict[str, Path]:
    """Drafters by name whose accepted length is still to be measured.

    Args:
        path: of the record, for errors.
        settings: of this run.
        digests: of `drafters`, see `digest_of`.

    Raises:
        typer.BadParameter: the record has accepted lengths of other settings, or of another
            checkpoint by the same name, or does not say of which.
    """
    found = kept.get("acceptance", {})
    if found and "acceptance_settings" not in kept:
        raise typer.BadParameter(
            f"{path} holds accepted lengths without their settings, as older versions wrote it: it "
            "can be shown, but not extended. Fix: another --out, or leave out --drafters"
        )
    if found:
        require_same_settings(path, kept["acceptance_settings"], settings)
    known = kept.get("drafters", {})
    for name in drafters.keys() & found.keys():
        if known.get(name) != digests[name]:
            raise typer.BadParameter(
                f"{path} holds {name!r} of another checkpoint than {drafters[name]}. Fix: another "
                "name, or another --out"
            )
    return {name: folder for name, folder in drafters.items() if name not in found}


def digest_of(drafter: Path) -> str:
    """See `checkpoint_digest`.

    Raises:
        BenchmarkError: the folder is no checkpoint, or a broken one.
    """
    try:
        return checkpoint_digest(drafter)
    except (OSError, ValueError) as error:
        raise BenchmarkError(
            f"{drafter} is no drafter's checkpoint ({error}). Needed is a folder with config.json "
            "and safetensors weights. Fix: correct --drafters"
        ) from None


def keep(path: Path, kept: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Put what was found into the record and write it, with what it ran on."""
    kept |= part
    here = provenance()
    before = kept.setdefault("provenance", [])
    if here not in before:
        before.append(here)
    save_record(path, kept)
