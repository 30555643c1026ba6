"""The shipped pair, and the options that serve it on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from vllm_dspark import cpu

PAIR = Path(__file__).parent / "tiny-python"


def has_gpu() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def serve_arguments() -> list[str]:
    """Arguments of `vllm serve` that suit the pair; on a CPU those that the interpreter needs."""
    arguments = ["--served-model-name", PAIR.name, "--max-model-len", "1024"]
    if not has_gpu():
        arguments += cpu.SERVE_ARGUMENTS
    return arguments


def environment() -> dict[str, str]:
    """Environment of the server: this one's, or the interpreter's where there is no GPU."""
    return dict(os.environ) if has_gpu() else cpu.environment()
