"""Offline calibration: run a pair in the real engine, fit temperatures, judge them, keep them.

What `vllm-dspark calibrate` does. Every draft is verified, so that no position is seen only where
the drafter was sure; half of the requests are held out, and what the artifact says of itself is
measured on those.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from vllm_dspark import compat, cpu, reliability
from vllm_dspark.calibration.artifact import CalibrationArtifact, Checkpoint, Sampling
from vllm_dspark.calibration.digest import checkpoint_digest
from vllm_dspark.calibration.fitting import fit_artifact
from vllm_dspark.calibration.sts import apply_temperatures


class CalibrationError(ValueError):
    """There is nothing to calibrate with; the message says what was found and what is needed."""


@dataclass(frozen=True)
class Rounds:
    """Verified rounds in the order of their end: confidence [N, γ] raw, accepted [N], verified [N],
    request [N] (a number of its own for each), held_out bool [N]."""

    confidence: npt.NDArray[np.float64]
    accepted: npt.NDArray[np.int64]
    verified: npt.NDArray[np.int64]
    request: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Result:
    """What `run_command` did."""

    artifact: CalibrationArtifact
    written: bool
    notes: tuple[str, ...]

    def table(self) -> Table:
        """Per position: temperature, and the error of its survival before and after."""
        artifact = self.artifact
        columns = ("draft", "temperature", "rounds", "ECE before", "ECE after", "ROC-AUC")
        table = Table(*columns, title="survival, on requests that were held out")
        before, after = artifact.before.survival, artifact.after.survival
        for k in range(artifact.gamma):
            scores = (before.ece[k], after.ece[k], artifact.after.confidence.roc_auc[k])
            table.add_row(
                str(k + 1),
                f"{artifact.temperatures[k]:.2f}",
                str(before.observations[k]),
                *("–" if score is None else f"{score:.3f}" for score in scores),
            )
        return table


def read_prompts(path: Path | None) -> list[str]:
    """Prompts from a file: JSON lines with `prompt` or `turns`, or plain text, one a line; the
    ones that come with the package if there is no file.

    Raises:
        CalibrationError: the file cannot be read, or a line of JSON has neither key.
    """
    if path is None:
        text = resources.files("vllm_dspark.calibration").joinpath("prompts.txt").read_text("utf-8")
        return [line for line in text.splitlines() if line]
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"prompts {str(path)!r} cannot be read: {error}") from None
    if path.suffix not in (".jsonl", ".json"):
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            prompts.append(str(entry["prompt"] if "prompt" in entry else entry["turns"][0]))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise CalibrationError(
                f"line {number} of {str(path)!r} is no prompt ({error!r}); needed is an object "
                "with prompt or turns"
            ) from None
    return prompts


def run_command(
    target: str,
    drafter: str,
    prompts: Path | None,
    out: Path,
    diagram: Path,
    *,
    sampling: Mapping[str, Any],
    max_tokens: int,
    chat: bool,
    engine: Mapping[str, Any],
) -> Result:
    """Calibrate a pair and write artifact and diagram, on a machine with a GPU or without.

    An artifact that would not make survival more honest is not written.

    Args:
        out, diagram: files to write.
        rest: as in `calibrate`, the prompts by their file.

    Raises:
        CalibrationError, ValueError: see `calibrate`.
    """
    import torch

    texts = read_prompts(prompts)
    options = dict(engine)
    if not torch.cuda.is_available():
        cpu.activate()
        options = cpu.ENGINE_OPTIONS | {k: v for k, v in options.items() if v != "auto"}
    artifact, rounds = calibrate(
        target, drafter, texts, Sampling(**sampling), max_tokens, options, chat=chat
    )
    notes = [f"{artifact.rounds} rounds of {len(texts)} requests, every second one held out"]
    before, after = mean_survival_ece(artifact)
    notes.append(f"calibration error of survival, mean: {before:.3f} before, {after:.3f} after")
    written = after < before
    if written:
        artifact.save(out)
        notes.append(f"written: {out}")
    else:
        notes.append("nothing written: the temperatures do not make survival more honest")
    try:
        held = rounds.held_out
        raw = rounds.confidence[held]
        kinds = {"raw": raw, "calibrated": apply_temperatures(raw, artifact.temperatures)}
        reliability.draw(kinds, rounds.accepted[held], rounds.verified[held], diagram)
        notes.append(f"drawn: {diagram}")
    except ImportError:
        notes.append('no diagram: pip install "vllm-dspark[bench]" has what draws it')
    return Result(artifact, written, tuple(notes))


def calibrate(
    target: str,
    drafter: str,
    prompts: Sequence[str],
    sampling: Sampling,
    max_tokens: int,
    engine: Mapping[str, Any],
    *,
    chat: bool = True,
) -> tuple[CalibrationArtifact, Rounds]:
    """Run the pair over the prompts, and fit.

    Args:
        target, drafter: folders.
        max_tokens: of each request.
        engine: further arguments of `LLM`.
        chat: put the target's chat template, if it has one, around the prompts.

    Raises:
        CalibrationError: too few prompts or rounds, or checkpoints that are not folders.
        ValueError: whatever vLLM or the drafter's checks refuse.
    """
    if len(prompts) < 2:
        raise CalibrationError(f"found {len(prompts)} prompts, needed are two: one is held out")
    checkpoints = {}
    for role, name in (("target", target), ("drafter", drafter)):
        if not Path(name).is_dir():
            raise CalibrationError(
                f"the {role} {name!r} is no folder. Needed are both checkpoints on disk, whose "
                "weights the artifact names. Fix: give the folder that the hub's cache holds."
            )
        digest = checkpoint_digest(name)
        checkpoints[role] = Checkpoint(name=Path(name).name, revision=None, digest=digest)
    from vllm_dspark.integration.recording import record

    recorded, dtype = record(target, drafter, prompts, sampling, max_tokens, engine, chat)
    if len(recorded["accepted"]) < 2:
        raise CalibrationError("the run gave fewer than two rounds: give more or longer prompts")
    request = np.asarray(recorded["request"], dtype=np.int64)
    rounds = Rounds(
        confidence=np.asarray(recorded["confidence"], dtype=np.float64),
        accepted=np.asarray(recorded["accepted"], dtype=np.int64),
        verified=np.asarray(recorded["verified"], dtype=np.int64),
        request=request,
        held_out=request % 2 == 1,  # by request: rounds of one resemble each other
    )
    artifact = fit_artifact(
        rounds.confidence,
        rounds.accepted,
        rounds.verified,
        target=checkpoints["target"],
        drafter=checkpoints["drafter"],
        dtype=dtype,
        sampling=sampling,
        vllm_version=str(compat.require_supported_vllm()),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        held_out=rounds.held_out,
    )
    return artifact, rounds


def mean_survival_ece(artifact: CalibrationArtifact) -> tuple[float, float]:
    """Calibration error of the survival of a prefix, before and after, mean over positions."""
    before, after = (
        [e for e in quality.survival.ece if e is not None]
        for quality in (artifact.before, artifact.after)
    )
    return float(np.mean(before)), float(np.mean(after))
