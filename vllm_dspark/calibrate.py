"""Offline calibration: run a pair in the real engine, fit temperatures, judge them, keep them.

What `vllm-dspark calibrate` does. Every draft is verified, so that no position is seen only where
the drafter was sure; half of the requests are held out, and what the artifact says of itself is
measured on those.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from vllm_dspark import compat, cpu, reliability
from vllm_dspark.calibrate_error import CalibrationError as CalibrationError
from vllm_dspark.calibrate_pair import Pair
from vllm_dspark.calibrate_prompts import read_prompts
from vllm_dspark.calibration.artifact import CalibrationArtifact, Sampling
from vllm_dspark.calibration.fitting import fit_artifact
from vllm_dspark.calibration.sts import MIN_OBSERVATIONS, apply_temperatures
from vllm_dspark.outputs import OutputError, make_ready


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

    An artifact that would not make survival more honest is not written. Whatever can be refused is,
    before the engine starts.

    Args:
        target, drafter: folders.
        out, diagram: files to write; their folders are made.
        rest: as in `calibrate`, the prompts by their file.

    Raises:
        OutputError: there is nowhere to write to.
        CalibrationError, ValueError: see `calibrate`.
    """
    import torch

    texts = read_prompts(prompts)
    pair = Pair.read(target, drafter)
    make_ready("--out", out)
    make_ready("--diagram", diagram, reliability.SUFFIXES)
    if out.resolve() == diagram.resolve():
        raise OutputError(f"--out and --diagram are one file, {str(out)!r}. Fix: another --diagram")
    options = dict(engine)
    if not torch.cuda.is_available():
        cpu.activate()
        options = cpu.ENGINE_OPTIONS | {k: v for k, v in options.items() if v != "auto"}
    artifact, rounds = _calibrate(pair, texts, Sampling(**sampling), max_tokens, options, chat)
    notes = [f"{artifact.rounds} rounds of {len(texts)} requests, every second one held out"]
    written, said = _keep(artifact, out)
    notes += [*said, _drawn(artifact, rounds, diagram)]
    return Result(artifact, written, tuple(notes))


def _keep(artifact: CalibrationArtifact, out: Path) -> tuple[bool, list[str]]:
    """Write the artifact if it makes survival more honest; whether it was, and what to say."""
    before, after = mean_survival_ece(artifact)
    notes = [f"calibration error of survival, mean: {before:.3f} before, {after:.3f} after"]
    short = shortage(artifact)
    if short and max(artifact.observations) < MIN_OBSERVATIONS:
        return False, [*notes, f"nothing written: {short}"]
    notes += [short] if short else []
    if after >= before:
        reason = "the temperatures do not make survival more honest"
        return False, [*notes, f"nothing written: {reason}"]
    artifact.save(out)
    return True, [*notes, f"written: {out}"]


def _drawn(artifact: CalibrationArtifact, rounds: Rounds, diagram: Path) -> str:
    """Draw the held-out rounds; what to say of it."""
    held = rounds.held_out
    raw = rounds.confidence[held]
    kinds = {"raw": raw, "calibrated": apply_temperatures(raw, artifact.temperatures)}
    try:
        reliability.draw(kinds, rounds.accepted[held], rounds.verified[held], diagram)
    except ImportError:
        return 'no diagram: pip install "vllm-dspark[bench]" has what draws it'
    except OSError as error:  # the artifact is there and stays
        return f"no diagram: {error}"
    return f"drawn: {diagram}"


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
        CalibrationError: a folder is not there or holds no checkpoint, or there are too few
            prompts or rounds.
        ValueError: whatever vLLM or the drafter's checks refuse.
    """
    return _calibrate(Pair.read(target, drafter), prompts, sampling, max_tokens, engine, chat)


def _calibrate(
    pair: Pair,
    prompts: Sequence[str],
    sampling: Sampling,
    max_tokens: int,
    engine: Mapping[str, Any],
    chat: bool,
) -> tuple[CalibrationArtifact, Rounds]:
    if len(prompts) < 2:
        raise CalibrationError(f"found {len(prompts)} prompts, needed are two: one is held out")
    from vllm_dspark.integration.recording import record

    recorded, dtype = record(
        pair.target.folder, pair.drafter.folder, prompts, sampling, max_tokens, engine, chat
    )
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
        target=pair.target.checkpoint,
        drafter=pair.drafter.checkpoint,
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


def shortage(artifact: CalibrationArtifact) -> str | None:
    """Which positions had too few rounds to be fitted and what would help; None if none had."""
    counts = artifact.observations
    short = [k for k, count in enumerate(counts) if count < MIN_OBSERVATIONS]
    if not short:
        return None
    drafts = ", ".join(str(k + 1) for k in short)
    where = "" if len(short) == len(counts) else f" for drafts {drafts}, which keep temperature 1"
    return (
        f"too few rounds{where}: {max(counts[k] for k in short)} were fitted on, "
        f"{MIN_OBSERVATIONS} are needed. Fix: more prompts or --max-tokens"
    )
