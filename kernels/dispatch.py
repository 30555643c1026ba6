"""Which implementation serves a stage: our kernels, or the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

CHOICES = ("auto", "reference", "triton")
VARIABLE = "DSPARK_KERNELS"
MEASURED = 9  # major compute capability of the CUDA devices that our measurements were made on


@dataclass(frozen=True)
class Choice:
    """Attributes:
    triton: our kernels serve.
    why: in words, for the log.
    """

    triton: bool
    why: str


def wanted(
    option: str, environment: Mapping[str, str], needed_for: str | None = None
) -> tuple[str, str]:
    """What was asked for, one of `CHOICES`, and where. DSPARK_KERNELS, if set, overrides the
    option; auto is triton where our kernels are `needed_for` something.

    Raises:
        ValueError: the variable holds another word.
    """
    named = environment.get(VARIABLE, "")
    if named and named not in CHOICES:
        known = ", ".join(map(repr, CHOICES))
        raise ValueError(f"{VARIABLE} is {named!r}, known are {known}")
    word, source = option, f'kernels is "{option}"'
    if named:
        word, source = named, f"{VARIABLE} is {named}"
    if word == "auto" and needed_for is not None:
        return "triton", needed_for
    return word, source


def choose(
    option: str,
    environment: Mapping[str, str],
    obstacle: str | None,
    needed_for: str | None = None,
    faster: bool = False,
) -> Choice:
    """Choose for one stage.

    Args:
        option: `DSparkConfig.kernels`.
        environment: of the process.
        obstacle: why our kernels cannot serve the stage in this engine; None if they can.
        needed_for: what was asked for that they alone can do; None if nothing was.
        faster: they were measured to be faster in the engine, on such a device. Then auto is
            triton where nothing stands in the way.

    Raises:
        ValueError: DSPARK_KERNELS holds an unknown word.
    """
    word, source = wanted(option, environment, needed_for)
    if word == "reference":
        return Choice(False, source)
    if word == "auto" and not faster:
        return Choice(False, f"{source}, and ours were not measured to be faster here")
    if obstacle is not None:
        return Choice(False, f"{source}, but {obstacle}")
    return Choice(True, source)


def is_measured(device: torch.device) -> bool:
    """Whether `device` is of the kind that our measurements were made on. ROCm, which torch calls
    cuda too, counts capabilities of its own."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] == MEASURED


def device_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why kernels over weights of `dtype` cannot run on `device`; None if they can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"weights are {dtype}"
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "the GPU is one of ROCm, for which they were not made"
        capability = torch.cuda.get_device_capability(device)
        return None if capability >= (8, 0) else f"the GPU has compute capability {capability}"
    from triton import knobs

    return None if knobs.runtime.interpret else f"there is no Triton for {device.type}"
