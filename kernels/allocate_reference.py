"""`allocate` in numpy, float64, with the scheduler's own ranking."""

from __future__ import annotations

import numpy as np
import torch

from vllm_dspark.kernels.allocate import Calibration
from vllm_dspark.scheduler.budget import allocate


def allocate_reference(
    confidence: torch.Tensor,  # float32 [R, γ], raw
    calibration: Calibration,
    regimes: list[int],  # [R]
    budget: int,
    limits: list[int],  # [R]
) -> list[int]:
    """Admitted drafts of each request."""
    known = np.nan_to_num(confidence.double().cpu().numpy(), nan=0.5)
    known = known.clip(calibration.raw_margin, 1 - calibration.raw_margin)
    slope = calibration.slope.double().cpu().numpy()[regimes]
    intercept = calibration.intercept.double().cpu().numpy()[regimes]
    calibrated = 1 / (1 + np.exp(-(slope * np.log(known / (1 - known)) + intercept)))
    calibrated = calibrated.clip(calibration.margin, 1 - calibration.margin)
    admitted: list[int] = allocate(calibrated.cumprod(axis=1), limits, budget).tolist()
    return admitted
