"""Verified rounds from a known relation between confidence and acceptance, and whose they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit, logit

from vllm_dspark.calibration.artifact import Checkpoint, Sampling
from vllm_dspark.calibration.online import OnlineCalibrator

IDENTITY: dict[str, Any] = {
    "target": Checkpoint(name="org/target", revision="main", digest="a" * 64),
    "drafter": Checkpoint(name="/models/drafter", revision=None, digest="b" * 64),
    "dtype": "bfloat16",
    "sampling": Sampling(temperature=1.0, top_p=0.9, drafting="probabilistic"),
    "vllm_version": "0.33.0",
    "date": "2026-01-31T12:00:00Z",
}


def rounds_off_by(
    temperatures: list[float], rounds: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence, accepted and verified; a head that is off by `temperatures`, ragged depths."""
    random = np.random.default_rng(seed)
    gamma = len(temperatures)
    honest = random.beta(4, 1, (rounds, gamma))
    survived = np.cumprod(random.random((rounds, gamma)) < honest, axis=1).sum(axis=1)
    verified = random.integers(0, gamma + 1, rounds)
    return expit(logit(honest) * temperatures), np.minimum(survived, verified), verified


@dataclass
class Workload:
    """Draft k is accepted with σ(slope · logit(c_k) + intercept) once those before it are."""

    slope: float
    intercept: float
    mean_logit: float = 2.2
    gamma: int = 3

    def confidence(self, random: np.random.Generator, rounds: int) -> np.ndarray:
        return expit(random.normal(self.mean_logit, 1.2, (rounds, self.gamma)))

    def truth(self, confidence: np.ndarray) -> np.ndarray:
        return expit(self.slope * np.log(confidence / (1 - confidence)) + self.intercept)

    def accepted(self, random: np.random.Generator, confidence: np.ndarray) -> np.ndarray:
        """Of γ verified drafts."""
        survived = random.random(confidence.shape) < self.truth(confidence)
        return np.cumprod(survived, axis=1).sum(axis=1)


class Server:
    """Feeds a calibrator rounds of R requests at a time; a request lasts `life` rounds."""

    def __init__(self, calibrator: OnlineCalibrator, requests: int = 16, seed: int = 0) -> None:
        self.calibrator, self.requests = calibrator, requests
        self.random = np.random.default_rng(seed)
        self.steps = 0

    def serve(
        self, workload: Workload, observations: int, sampled: bool = False, life: int = 50
    ) -> None:
        """At least that many observations of position 1, which every round makes."""
        for _ in range(-(-observations // self.requests)):
            confidence = workload.confidence(self.random, self.requests)
            self.calibrator.observe(
                confidence,
                workload.accepted(self.random, confidence),
                np.full(self.requests, workload.gamma),
                np.full(self.requests, sampled),
                request=np.arange(self.requests) + self.steps // life * self.requests,
            )
            self.steps += 1


def error(calibrator: OnlineCalibrator, workload: Workload, sampled: bool = False) -> np.ndarray:
    """Mean |calibrated − true| of the workload's own confidences, [γ]."""
    confidence = workload.confidence(np.random.default_rng(99), 2001)
    calibrated = calibrator.calibrate(confidence, np.full(2001, sampled))
    return np.abs(calibrated - workload.truth(confidence)).mean(axis=0)
