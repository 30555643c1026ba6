"""Which implementation serves a stage: our kernels, or the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

CHOICES = ("auto", "reference", "triton")
VARIABLE = "DSPARK_KERNELS"


@dataclass(frozen=True)
class Choice:
    """Attributes:
    triton: our kernels serve.
    why: in words, for the log.
    """

    triton: bool
    why: str


def wanted(option: str, environment: Mapping[str, str]) -> tuple[str, str]:
    """What was asked for, one of `CHOICES`, and where. DSPARK_KERNELS, if set, overrides the
    option.

    Raises:
        ValueError: the variable holds another word.
    """
    named = environment.get(VARIABLE, "")
    if not named:
        return option, f'kernels is "{option}"'
    if named not in CHOICES:
        known = ", ".join(map(repr, CHOICES))
        raise ValueError(f"{VARIABLE} is {named!r}, known are {known}")
    return named, f"{VARIABLE} is {named}"


def choose(option: str, environment: Mapping[str, str], obstacle: str | None) -> Choice:
    """Choose for one stage.

    Args:
        option: `DSparkConfig.kernels`.
        environment: of the process.
        obstacle: why our kernels cannot serve the stage in this engine; None if they can.

    Raises:
        ValueError: DSPARK_KERNELS holds an unknown word.
    """
    word, source = wanted(option, environment)
    if word == "reference":
        return Choice(False, source)
    if word == "auto":
        return Choice(False, f"{source}, and ours were not measured to be faster here")
    if obstacle is not None:
        return Choice(False, f"{source}, but {obstacle}")
    return Choice(True, source)


def device_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why kernels over weights of `dtype` cannot run on `device`; None if they can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"weights are {dtype}"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return None if capability >= (8, 0) else f"the GPU has compute capability {capability}"
    from triton import knobs

    return None if knobs.runtime.interpret else f"there is no Triton for {device.type}"
